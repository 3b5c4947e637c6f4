"""Rules for the settings of train.py; a setting without a rule needs no entry here."""
from types import SimpleNamespace

from model import VARIANTS
from recipes.published import SCALINGS
from support.config import fail, require_positive
from support.device import RANKS

CHOICES = {"optimizer": ("muon", "adam", "adamw"), "encoder_loss": ("mse", "l1"), "variant": ("auto", *VARIANTS),
           "adversarial_form": ("lsgan", "hinge"), "adversarial_scaling": (*SCALINGS,)}
NOT_PIXEL_LOSSES = ("adversarial_weight", "feature_matching_weight", "encoder_feature_weight",
                    "encoder_adversarial_weight")


def check_settings(settings):
    """End the program with one line at a setting that makes no sense, before anything is loaded."""
    s = SimpleNamespace(**settings)
    require_positive(settings, "batch_size", "width", "log_interval", "eval_interval", "eval_images", "learning_rate")
    for name, choices in CHOICES.items():
        if settings[name] not in choices:
            fail(f"--{name}={settings[name]}: must be {', '.join(choices[:-1])} or {choices[-1]}")
    pixel_losses = [name for name in settings if name.endswith("_weight") and name not in NOT_PIXEL_LOSSES]
    has_pixel_loss = any(settings[name] > 0 for name in pixel_losses) or not s.train_decoder
    both_and_discriminator = s.train_encoder and s.train_decoder and s.adversarial_weight > 0
    rules = [  # (setting, whether its rule is kept, the rule)
        ("batch_size", s.batch_size % RANKS == 0, f"must be a multiple of {RANKS}, the processes that torchrun starts"),
        ("echo", s.echo >= 1, "must be 1 or more"),
        *((name, settings[name] <= 1, "must be between 0 and 1") for name in ("color_augment", "cooldown", "finish")),
        ("replay_size", s.replay_size == 0 or s.replay_size >= s.batch_size,
         f"must be 0 or at least the batch size, {s.batch_size}"),
        ("max_iters", s.max_iters > 0 or s.init_from != "scratch",
         "must be more than 0, unless --init_from= names weights to start from, --init_from=donor for example"),
        ("train_decoder", s.train_encoder or s.train_decoder, "nothing is left to train: train_encoder is false, too"),
        ("encoder_adversarial_weight",
         s.encoder_adversarial_weight == 0 or both_and_discriminator and s.latent_noise == 0,
         "needs train_encoder, train_decoder and adversarial_weight, and latent_noise=0; "
         "--encoder_adversarial_weight=0 turns it off"),
        ("adversarial_weight", s.adversarial_weight > 0 or has_pixel_loss,
         "the decoder has no loss: all of its weights are 0"),
        ("adversarial_start", s.adversarial_start == 0 or has_pixel_loss,
         "until then the decoder has no loss: the weights of all pixel losses are 0; --mse_weight=1 adds one"),
        ("adversarial_scaling", s.adversarial_scaling != "adaptive" or has_pixel_loss,
         "adaptive needs a pixel loss to adapt to: the weights of all of them are 0"),
    ]
    for name, is_kept, rule in rules:
        if not is_kept:
            fail(f"--{name}={settings[name]}: {rule}")
