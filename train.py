r"""Train a tiny autoencoder (TAESD) that uses the same latents as a big VAE, its teacher.

    python train.py --teacher=sdxl --batch_size=16 --data_dir=pictures

                real image x [0,1]
               /         |         \
      teacher.encode     |       encoder --> latent'     encoder loss: latent' is near latent
              |          |
            latent ------|---> decoder --> fake          decoder loss: fake is near x and looks real
              |          |        |
      discriminator D(x or fake, given latent)           half of the fakes are old ones, from a replay buffer

The encoder copies the teacher's latents. The decoder is a conditional GAN trained on real images: it may invent detail,
but not shift colours. The method: github.com/madebyollin/taesd (issues 2 and 11) and github.com/madebyollin/seraena.
"""
import copy

import torch
import torch.nn.functional as F

from data import Images, batches, to_tiles
from model import Decoder, Discriminator, Encoder, conv_weights, make_optimizer
from recipes import published
from support.checkpoint import open_run, save_checkpoint, start_from
from support.config import configure
from support.device import RANKS, compile_networks, cuda_graphed, pick_compile, pick_device, pick_dtype, setup_ddp
from support.log import Log
from teacher import Teacher

# -----------------------------------------------------------------------------
# Settings. Each line `name = default  # help` is a flag, --name=value, and can be set in a recipe.
out_dir = "out"              # checkpoints, weights, pictures, settings.py and log.jsonl are written to this folder
init_from = "scratch"        # scratch; resume; donor (bundled, made for another VAE); a run, a weights file or a folder
max_iters = 300_000          # steps; seraena's example trains about this many at 96 pixels; 0 = only export the start
seed = 0                     # random seed of weights, crops and samples
# data
data_dir = ""                # folder of images, searched recursively; '' = thirty bundled ones, to try things out
val_dir = ""                 # folder of held-out images; '' = 5% of data_dir, chosen by file name
crop = 96                    # training crop in pixels, a multiple of the teacher's factor
finish = 0.1                 # share of the steps, at the end, with larger crops, which correct colours of large areas
finish_crop = 256            # their size; a step has fewer of them, but at least one, so that it takes about as long
window = 256                 # the teacher encodes squares of at most this side, cut into crops; not with midblock_gn
batch_size = 16              # crops per step, of all GPUs together; larger crops count as several, by their area
color_augment = 0.07         # share of the windows with randomly mixed colour channels; 0 = off
echo = 2.0                   # how often a crop is used, on average (data echoing, Choi et al. 2019)
workers = 0                  # threads that read images; 0 = as many as there are cores
# teacher and student
teacher = "toy"              # toy, sd, sd-mse, sdxl, a diffusers folder, a hub id, a .safetensors file, a taesd.py .pth
variant = "auto"             # plain (TAESD), midblock_gn (FLUX.2), f32 (Sana); auto = init_from's, else the teacher's
width = 64                   # channels of the student; 32 or 16 for phones and CPUs
train_encoder = True         # false = leave the encoder as it is in init_from
train_decoder = True         # false = leave the decoder as it is in init_from
# losses: the weight of each term; 0 = off, and not computed
adversarial_weight = 1.0     # D should not be able to tell the fake from the real image
feature_matching_weight = 5.0  # D's layers should see the same in both; needs adversarial_weight
lowres_weight = 10.0         # MSE of images after 8x8 average pooling, which keeps colours in place
mse_weight = 10.0            # MSE of the pixels
replay_size = 4096           # old fakes kept for D, stored as bytes on the device; 0 = D sees new fakes only
encoder_loss = "mse"         # mse; or l1, with which the teacher's decoder gives better pictures after long training
encoder_feature_weight = 1.0 # L1 of what our averaged decoder's first layers make of the student's and teacher's latent
latent_noise = 0.0           # largest noise on the latents that decoder and D see, to preview unfinished latents
# losses of published recipes
encoder_adversarial_weight = 0.0  # D also judges real images with the student's latents (TAESD 1.2); needs both and D
adversarial_form = "lsgan"   # lsgan (least squares; relativistic for the decoder) or hinge
adversarial_scaling = "none" # of the adversarial gradient: none, unit (seraena) or adaptive (VQGAN)
adversarial_start = 0        # step from which D takes part; before it, the decoder learns from the pixel losses alone
l1_weight = 0.0              # L1 of the pixels
frequency_weight = 0.0       # L1 of the amplitudes of the 2-D Fourier transform
lpips_weight = 0.0           # perceptual distance; needs the lpips package
# optimizer
optimizer = "muon"           # muon (with Adam for biases and D's outer layers), adam (TAESD) or adamw (seraena)
learning_rate = 1e-3         # of encoder and decoder; 1e-4 is usual for weights that are trained already
discriminator_lr = 0.0       # of the discriminator; 0 = learning_rate
cooldown = 0.5               # share of the steps, at the end, over which the learning rates fall to 0
ema_halflife = 10_000        # half-life of the exported weight average, in images; 0 = no average
# reports and machine
log_interval = 50            # steps between lines in log.jsonl and on the console
eval_interval = 1000         # steps between evaluations; each writes a picture, a checkpoint and the weights
eval_images = 16             # number of held-out images
eval_size = 0                # side of the held-out images in pixels; 0 = 512 on a GPU, 256 on a CPU
device = "auto"              # auto, cuda, mps or cpu
dtype = "auto"               # of teacher and autocast: auto, float32, bfloat16 or float16; weights stay float32
compile = "auto"             # auto, true or false: torch.compile and, on a GPU, a CUDA graph of the step
# -----------------------------------------------------------------------------
settings = configure(globals())  # overrides the globals above by recipes and flags, and returns all of them as a dict
checkpoint = open_run(settings)  # what init_from names; None from scratch
device = pick_device(device)  # from here on, the globals hold what "auto" means on this machine; settings do not change
dtype, compile = pick_dtype(dtype, device), pick_compile(compile, device)
batch_size //= RANKS  # torchrun starts several processes, each with its share of the batch; otherwise RANKS is 1

# --- images, teacher, student, discriminator -------------------------------------------------------------------------
images = Images(data_dir, val_dir)
vae = Teacher(teacher, device, dtype)
if variant == "auto":
    variant = settings["variant"] = checkpoint["shape"]["variant"] if checkpoint else vae.student_variant
vae.check_fit(variant, crop=crop, finish_crop=finish_crop, eval_size=eval_size or 256)
shape = {"latent_channels": vae.latent_channels, "factor": vae.factor, "width": width, "variant": variant}
torch.manual_seed(seed)
encoder, decoder = Encoder(**shape).requires_grad_(train_encoder), Decoder(**shape).requires_grad_(train_decoder)
discriminator = Discriminator(vae.latent_channels)
ema_encoder, ema_decoder = (copy.deepcopy(network).requires_grad_(False) for network in (encoder, decoder))
networks = torch.nn.ModuleDict({"encoder": encoder, "decoder": decoder, "discriminator": discriminator,
                                "ema_encoder": ema_encoder, "ema_decoder": ema_decoder})  # averages, for export
networks.to(device, memory_format=torch.channels_last)
autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

# Muon trains all convolutions of the student: with Adam, the layers next to images and latents learn too slowly, and
# colours suffer. In D it trains the hidden convolutions. Adam trains the rest (its settings: taesd issue 11).
convs = conv_weights(encoder) + conv_weights(decoder)
student_optimizer = make_optimizer(optimizer, [encoder, decoder], convs, dtype, betas=(0.9, 0.9), amsgrad=True)
hidden = [weight for weight in conv_weights(discriminator)[1:] if weight.shape[-1] > 1]  # 1x1 ones give scores
discriminator_optimizer = make_optimizer(optimizer, [discriminator], hidden, dtype, betas=(0.5, 0.99))
scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
parts = {**networks, "student_optimizer": student_optimizer, "discriminator_optimizer": discriminator_optimizer,
         "scaler": scaler}  # what a checkpoint keeps

def get_lr_scale(step):
    """The factor of both learning rates: 1, and over the last share of the steps, `cooldown`, linearly down to 0."""
    return min(1.0, (max_iters - step) / max(1.0, cooldown * max_iters))

def optimizer_step(optimizer, loss, lr):
    for group in optimizer.param_groups:
        group.update(lr=lr, capturable=torch.is_tensor(lr))  # where cuda_graphed records the step, lr is a tensor
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)

# --- losses ----------------------------------------------------------------------------------------------------------
def discriminator_loss(real_scores, fake_scores):
    """Least squares (LSGAN): D should give +1 to real images and -1 to fakes."""
    if adversarial_form == "hinge":
        return published.hinge_discriminator_loss(real_scores, fake_scores)
    return (real_scores - 1).square().mean() + (fake_scores + 1).square().mean()

def adversarial_loss(real_scores, fake_scores):
    """Relativistic: a fake should get the same score as its own real image, however good D has become. To pull the two
    together, instead of pushing the fake's score up, is what keeps the decoder from drifting (taesd issue 11)."""
    if adversarial_form == "hinge":
        return published.hinge_adversarial_loss(real_scores, fake_scores)
    return (fake_scores - real_scores).square().mean()

def feature_matching_loss(real_activations, fake_activations):
    """Every layer of D should see the same in a fake as in its real image (pix2pixHD). The L1 distance of each layer is
    divided by the mean size of its activations, so that all layers count alike. NHWC is their order in memory."""
    distances = [F.l1_loss(fake.movedim(1, 3), real.movedim(1, 3)).float() / real.abs().mean()
                 for real, fake in zip(real_activations, fake_activations)]
    return sum(distances) / len(distances)

def lowres_mse(fake, real):
    """The mean colour of every 8x8 patch should be right. The adversarial loss alone would let colours drift."""
    return F.mse_loss(F.avg_pool2d(fake, 8), F.avg_pool2d(real, 8))

pixel_losses = {"mse": F.mse_loss, "lowres_mse": lowres_mse, "l1": F.l1_loss, "frequency": published.frequency_l1,
                "lpips": published.lpips}  # name: function of fake and real
loss_weights = {"encoder": 1.0, "lowres_mse": lowres_weight}
loss_weights |= {name.removesuffix("_weight"): value for name, value in settings.items() if name.endswith("_weight")}
use_discriminator = train_decoder and adversarial_weight > 0
decoder_features = ema_decoder[:6]  # the averaged decoder's first layers, up to its third block (taesd issue 11)

def student_loss(losses):
    """What encoder and decoder minimise. D's own loss has no weight here, and is left out."""
    return sum(loss_weights[name] * loss for name, loss in losses.items() if name in loss_weights)

# --- the pool of real crops, and the replay buffer of old fakes ------------------------------------------------------
class Buffer:
    """Pairs of image [3,H,W] in [0,1] and latent, kept on the device as bytes and float16."""
    def __init__(self, size):
        side = crop // vae.factor
        self.images = torch.zeros(size, 3, crop, crop, dtype=torch.uint8, device=device)
        self.latents = torch.zeros(size, vae.latent_channels, side, side, dtype=torch.float16, device=device)
        self.uses = torch.zeros(size, device=device)
        self.filled = 0

    def add(self, images, latents):
        """Append while there is room; after that, replace the pairs that were sampled most often."""
        free = torch.arange(self.filled, min(self.filled + len(images), len(self.images)), device=device)
        uses = self.uses[:self.filled] + torch.rand(self.filled, device=device)  # random among equals
        slots = torch.cat([free, uses.topk(min(self.filled, len(images) - len(free))).indices])
        self.filled += len(free)
        self.images[slots] = (images[:len(slots)].clamp(0, 1) * 255).round().to(torch.uint8)
        self.latents[slots] = latents[:len(slots)].to(torch.float16)
        self.uses.index_fill_(0, slots, 0)  # unlike self.uses[slots] = 0, this does not wait for the GPU

    def sample(self, n):
        """n different pairs, at random, in float32; fewer if there are not so many."""
        slots = torch.randperm(self.filled, device=device)[:n]
        self.uses[slots] += 1
        images = (self.images[slots].float() / 255).contiguous(memory_format=torch.channels_last)
        return images, self.latents[slots].float()

def set_crop(side):
    """Train on crops of this side from here on, in batches of as many pixels. The buffers and the loader start anew."""
    global crop, n_crops, tiles_per_side, windows, crop_pool, replay_buffer, crops_due, loader
    crop, n_crops, crops_due = side, max(1, round(batch_size * (settings["crop"] / side)**2)), 0.0
    tiles_per_side = 1 if variant == "midblock_gn" else max(1, window // crop)  # GroupNorm sees what the teacher saw
    windows = max(1, round(n_crops / echo / tiles_per_side**2))  # number of windows that are read at once
    crop_pool = Buffer(64 * max(n_crops, windows * tiles_per_side**2))  # mixes crops of many images
    replay_buffer = Buffer(replay_size * n_crops // batch_size if use_discriminator else 0)
    torch.compiler.set_stance("default" if side == settings["crop"] else "force_eager")  # compiling again is too slow
    loader = log.waiting_for(batches(images, tiles_per_side * crop, windows, color_augment, seed + step, workers,
                                     pin=device.type == "cuda"))

def get_batch():
    """Real crops and the teacher's latents from the pool, which renews 1/echo of a batch per step (until it is full, it
    adds two batches). A latent depends on what surrounds its crop, so the teacher encodes whole windows."""
    global crops_due
    crops_due += n_crops / echo if crop_pool.filled == len(crop_pool.images) else 2 * n_crops
    while crops_due > 0:
        window_images = next(loader).to(device, non_blocking=True, memory_format=torch.channels_last).float() / 255
        crop_pool.add(*(to_tiles(x, tiles_per_side) for x in (window_images, vae.encode(window_images))))
        crops_due -= windows * tiles_per_side**2
    return crop_pool.sample(n_crops)

# --- start, or continue a run ----------------------------------------------------------------------------------------
step, images_seen = 0, 0
exportable = [name for name in ("encoder", "decoder") if settings[f"train_{name}"] and max_iters > 0]
if checkpoint:
    step, images_seen, loaded = start_from(checkpoint, parts, init_from, vae, images, settings, autocast)
    exportable += [name for name in loaded if name not in exportable]  # a network that is neither would be noise
setup_ddp(networks)
log = Log(settings, device, dtype, compile, images, vae, networks)
compile_networks(compile, [encoder, decoder, discriminator, decoder_features], vae, adversarial_scaling)
trained = [name for name in ("encoder", "decoder") if settings[f"train_{name}"]]  # the other one stays as it was
averaged_weights = [weight for name in trained for weight in networks[f"ema_{name}"].parameters()]
raw_weights = [weight.detach() for name in trained for weight in networks[name].parameters()]

# --- one training step -----------------------------------------------------------------------------------------------
# On a GPU it is recorded as a CUDA graph: what changes between steps must be an argument, and no value may be read.
@cuda_graphed(device, settings["compile"], scaler)
def train_step(real, latent, lr_scale, old_fakes, old_latents):
    """Returns {name: loss}, the fakes and their latents. Every loss in the dictionary is logged under its name."""
    losses, rescaled, fake = {}, {}, latent  # rescaled: replaces losses in the backward pass, but not in the log

    # The encoder copies the teacher's latents. Our decoder's first layers, unless random, should see no difference.
    if train_encoder:
        with autocast:
            student_latent = encoder(real).float()
        losses["encoder"] = (F.mse_loss if encoder_loss == "mse" else F.l1_loss)(student_latent, latent)
        if encoder_feature_weight > 0 and "decoder" in exportable:
            with autocast:
                ours, theirs = decoder_features(student_latent), decoder_features(latent)
            losses["encoder_feature"] = F.l1_loss(ours.float(), theirs.float())

    # The decoder paints a fake from the teacher's latent. Its target is the real image and not the teacher's picture of
    # it, so it may invent detail that the latent has lost.
    if train_decoder:
        if latent_noise > 0:
            latent = latent + latent_noise * torch.rand(len(latent), 1, 1, 1, device=device) * torch.randn_like(latent)
        with autocast:
            fake = decoder(latent).float()
        for name, pixel_loss in pixel_losses.items():
            if loss_weights[name] > 0:
                losses[name] = pixel_loss(fake, real)

    if old_fakes is not None:
        # The discriminator learns first. Half of its fakes are from the replay buffer, so that it keeps recognising
        # mistakes that the decoder has stopped making, and the two do not chase each other in circles.
        n = len(old_fakes)  # half a batch (of a single crop, every other one), but none in the first step
        d_fakes, d_latents = (fake.detach().clamp(0, 1) * 255).round() / 255, latent.clone()  # like the old ones
        d_fakes[:n], d_latents[:n] = old_fakes, old_latents
        with autocast:
            real_scores, _ = discriminator(real, latent)
            fake_scores, _ = discriminator(d_fakes, d_latents)
            losses["discriminator"] = discriminator_loss(real_scores, fake_scores)
            if encoder_adversarial_weight > 0:  # a real image with the student's latent counts as a fake, too
                encoder_scores, _ = discriminator(real, student_latent.detach())
                losses["discriminator"] = losses["discriminator"] + discriminator_loss(real_scores, encoder_scores)
        optimizer_step(discriminator_optimizer, losses["discriminator"], lr_scale * (discriminator_lr or learning_rate))

        # Then the decoder learns from the updated discriminator, which is frozen meanwhile.
        discriminator.requires_grad_(False)
        with autocast:
            real_scores, real_activations = discriminator(real, latent)
            fake_scores, fake_activations = discriminator(fake, latent)
            if encoder_adversarial_weight > 0:
                encoder_scores, _ = discriminator(real, student_latent)
                losses["encoder_adversarial"] = adversarial_loss(real_scores, encoder_scores)
        adversarial = adversarial_loss(real_scores, fake_scores)
        rescale = published.SCALINGS[adversarial_scaling]  # "none" returns the loss as it is
        rescaled["adversarial"] = rescale(adversarial, fake, student_loss(losses), decoder, scaler)
        losses["adversarial"] = adversarial
        if feature_matching_weight > 0:
            losses["feature_matching"] = feature_matching_loss(real_activations, fake_activations)
        discriminator.requires_grad_(True)

    optimizer_step(student_optimizer, student_loss(losses | rescaled), lr_scale * learning_rate)
    scaler.update()
    return {name: loss.detach() for name, loss in losses.items()}, fake.detach(), latent

# --- the loop --------------------------------------------------------------------------------------------------------
first_step, interrupted = step, False  # before the first step, only weights that were loaded are measured
while True:
    last = step == max_iters or interrupted
    if (last or step % eval_interval == 0) and (step > first_step or init_from not in ("scratch", "resume")):
        if not interrupted:
            log.evaluate(step, images_seen, ema_encoder, ema_decoder, decoder, autocast)
        checkpoint = {"step": step, "images_seen": images_seen, "shape": shape, "settings": settings, "exportable":
                      exportable, "teacher": str(vae), "fingerprint": vae.fingerprint, "metrics": log.metrics}
        save_checkpoint(checkpoint | {name: part.state_dict() for name, part in parts.items()}, networks, out_dir)
        log.draw_curves()
    if last:
        break

    side = settings["crop"] if step < (1 - finish) * max_iters else max(finish_crop, settings["crop"])
    if step == first_step or side != crop:
        set_crop(side)
    real, latent = get_batch()
    d_takes_part = use_discriminator and step >= adversarial_start
    old_fakes, old_latents = replay_buffer.sample((n_crops + step % 2) // 2) if d_takes_part else (None, None)
    losses, fake, fake_latent = train_step(real, latent, get_lr_scale(step), old_fakes, old_latents)
    if d_takes_part:
        replay_buffer.add(fake, fake_latent)
    step, images_seen = step + 1, images_seen + batch_size * RANKS

    # Average the weights over images. Early in a run, half of the average is from the last tenth of the images.
    halflife = max(1e-9, min(ema_halflife, 0.1 * images_seen))
    torch._foreach_lerp_(averaged_weights, raw_weights, 1 - 0.5 ** (batch_size * RANKS / halflife))
    interrupted = log.add(step, images_seen, losses)  # Ctrl-C asks to stop

log.end(step, images_seen, interrupted)
