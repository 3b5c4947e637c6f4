r"""Train a tiny autoencoder (TAESD) that uses the same latents as a big VAE, its teacher.

    python train.py --teacher=sdxl --batch_size=16 --data_dir=pictures
    python train.py recipes/ft_mse.py --teacher=sdxl --data_dir=pictures    # settings from a file, then from flags

                real image x [0,1]
               /         |         \
      teacher.encode     |       encoder --> latent'     encoder loss: latent' = latent
              |          |
            latent ------|---> decoder --> fake          decoder loss: fake is near x and looks real
              |          |        |
      D, the discriminator(x or fake | latent)           + replay buffer of old fakes

The encoder copies the teacher's latents. The decoder is a conditional GAN trained on real images: it may invent detail,
but it must not shift colours. The method is that of TAESD's author (github.com/madebyollin/taesd, issues 2 and 11, and
github.com/madebyollin/seraena).
"""
import copy
import functools

import torch
import torch.nn.functional as F

from data import Images, batches, to_tiles
from model import Decoder, Discriminator, Encoder, conv_weights, make_optimizer
from recipes import published
from support.checkpoint import init_weights, open_run, resume, save_checkpoint
from support.config import configure
from support.device import RANKS, cuda_graphed, pick_compile, pick_device, pick_dtype, setup_ddp
from support.log import Log
from teacher import Teacher

# -----------------------------------------------------------------------------
# Settings. Each line `name = default  # help` is a flag, --name=value, and can be set in a recipe.
# run
out_dir = "out"              # checkpoints, weights, pictures, settings.py and log.jsonl are written to this folder
init_from = "scratch"        # scratch; donor (bundled); resume; another run, a taesd.py file or an AutoencoderTiny
max_iters = 300_000          # steps; seraena's example trains about this many at 96 pixels; 0 = only export the start
seed = 0                     # of weights, crops and replay
# data
data_dir = ""                # folder of images, searched recursively; '' = thirty bundled ones, to try things out
val_dir = ""                 # folder of held-out images; '' = 5% of data_dir, chosen by file name
crop = 96                    # training crop in pixels, a multiple of the teacher's factor; finish a long run at 256
window = 256                 # crops are cut from windows of at most this side, which the teacher encodes whole; 0 = off
batch_size = 16              # crops per step, of all GPUs together
color_augment = 0.07         # share of windows with randomly mixed colour channels; 0 = off
echo = 2.0                   # how often a crop is used, on average (data echoing, Choi et al. 2019)
workers = 0                  # threads that read images; 0 = as many as there are cores
# teacher and student
teacher = "toy"              # toy, sd, sd-mse, sdxl, a diffusers folder, a hub id, a .safetensors file, a taesd.py .pth
variant = "auto"             # plain (TAESD), midblock_gn (FLUX.2) or f32 (Sana); auto = as init_from or the teacher
width = 64                   # channels of the student; 32 or 16 for phones and CPUs
train_encoder = True         # false = leave the encoder as it is in init_from
train_decoder = True         # false = leave the decoder as it is in init_from
# losses: the weight of each term; 0 = off, and not computed
adversarial_weight = 1.0     # D should not be able to tell the fake from the real image
feature_matching_weight = 5.0  # D's layers should see the same in both; needs adversarial_weight
lowres_weight = 10.0         # MSE of images after 8x8 average pooling, which keeps colours in place
mse_weight = 10.0            # MSE of the pixels
replay_size = 4096           # old fakes kept for D, stored as bytes on the device; 0 = D sees new fakes only
encoder_loss = "mse"         # of the latents: mse, or l1, which is better for the teacher's decoder in long runs
encoder_feature_weight = 1.0 # L1 of what our decoder's first layers make of the two latents, the student's and the teacher's
latent_noise = 0.0           # largest noise on the decoder's latents, so that it can also preview unfinished latents
# losses of published recipes
encoder_adversarial_weight = 0.0  # D also judges real images together with the student's latents (TAESD 1.2)
adversarial_form = "lsgan"   # lsgan (least squares; relativistic for the decoder) or hinge
adversarial_scaling = "none" # of the adversarial gradient: none, unit (seraena) or adaptive (VQGAN)
adversarial_start = 0        # step from which D takes part; before it, the decoder learns from the pixel losses alone
l1_weight = 0.0              # L1 of the pixels
frequency_weight = 0.0       # L1 of the amplitudes of the 2-D Fourier transform
lpips_weight = 0.0           # perceptual distance; needs the lpips package
# optimizer
optimizer = "muon"           # muon (with Adam for biases and D's outer layers), adam (TAESD) or adamw (seraena)
learning_rate = 1e-3         # of encoder and decoder; 1e-4 is usual for weights that are trained already
discriminator_lr = 1e-3      # of the discriminator
cooldown = 0.5               # share of the steps, at the end, over which the learning rates fall to 0
ema_halflife = 10_000        # images over which half of the exported weight average is renewed; 0 = no average
# reports
log_interval = 50            # steps between lines in log.jsonl and on the console
eval_interval = 1000         # steps between evaluations; each writes a picture, a checkpoint and the weights
eval_images = 16             # number of held-out images
eval_size = 256              # side of the held-out images in pixels
# system
device = "auto"              # auto, cuda, mps or cpu
dtype = "auto"               # of teacher and autocast: auto, float32, bfloat16 or float16; weights stay float32
compile = "auto"             # auto, true or false: torch.compile and, on a GPU, a CUDA graph of the step
# -----------------------------------------------------------------------------
settings = configure(globals())
checkpoint = open_run(settings)  # None from scratch
# from here on, these globals hold what "auto" means on this machine; `settings` stays as it was asked for
device = pick_device(device)
dtype, compile = pick_dtype(dtype, device), pick_compile(compile, device)
batch_size //= RANKS  # of this process; RANKS is 1 unless torchrun has started more

# -----------------------------------------------------------------------------
# images, teacher, student, discriminator
images = Images(data_dir, val_dir)
vae = Teacher(teacher, device, dtype)
vae.check_side("crop", crop)
vae.check_side("eval_size", eval_size)
if variant == "auto":
    variant = settings["variant"] = checkpoint["shape"]["variant"] if checkpoint else vae.student_variant
shape = {"latent_channels": vae.latent_channels, "factor": vae.factor, "width": width, "variant": variant}
torch.manual_seed(seed)
torch.backends.cudnn.benchmark = True  # crops have one size
encoder, decoder = Encoder(**shape).requires_grad_(train_encoder), Decoder(**shape).requires_grad_(train_decoder)
discriminator = Discriminator(vae.latent_channels)
ema_encoder, ema_decoder = (copy.deepcopy(network).requires_grad_(False) for network in (encoder, decoder))
networks = {"encoder": encoder, "decoder": decoder, "discriminator": discriminator,
            "ema_encoder": ema_encoder, "ema_decoder": ema_decoder}  # the averages are what is exported
for network in networks.values():
    network.to(device, memory_format=torch.channels_last)
autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

# Muon trains all convolutions of the student, and D's but for the first and those of its scores: the layers next to
# latents and images learn too slowly with this Adam, above all the colours.
if optimizer == "adamw":
    adam = discriminator_adam = functools.partial(torch.optim.AdamW, betas=(0.9, 0.99))
else:
    adam = functools.partial(torch.optim.Adam, betas=(0.9, 0.9), amsgrad=True)  # taesd issue 11
    discriminator_adam = functools.partial(torch.optim.Adam, betas=(0.5, 0.99))
student_weights, discriminator_weights = [*encoder.parameters(), *decoder.parameters()], [*discriminator.parameters()]
muon_weights = conv_weights(encoder) + conv_weights(decoder)
discriminator_muon_weights = [weight for weight in conv_weights(discriminator)[1:] if weight.shape[-1] > 1]
if optimizer != "muon":
    muon_weights = discriminator_muon_weights = []
student_optimizer = make_optimizer(student_weights, muon_weights, adam, dtype)
discriminator_optimizer = make_optimizer(discriminator_weights, discriminator_muon_weights, discriminator_adam, dtype)
scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def get_lr_scale(step):
    """The factor of both learning rates: 1, falling linearly to 0 over the last share, `cooldown`, of the steps."""
    return min(1.0, (max_iters - step) / max(1.0, cooldown * max_iters))


def optimizer_step(optimizer, loss, lr):
    for group in optimizer.param_groups:
        group.update(lr=lr, capturable=torch.is_tensor(lr))  # in a CUDA graph, lr is a tensor
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)


# -----------------------------------------------------------------------------
# losses

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
    divided by the mean size of its activations, so that all layers count alike."""
    distances = [F.l1_loss(fake, real).float() / real.abs().mean()
                 for real, fake in zip(real_activations, fake_activations)]
    return sum(distances) / len(distances)


def lowres_mse(fake, real):
    """The mean colour of every 8x8 patch should be right. The adversarial loss alone would let colours drift."""
    return F.mse_loss(F.avg_pool2d(fake, 8), F.avg_pool2d(real, 8))


pixel_losses = {  # name: (weight, function of fake and real)
    "mse": (mse_weight, F.mse_loss),
    "lowres_mse": (lowres_weight, lowres_mse),
    "l1": (l1_weight, F.l1_loss),
    "frequency": (frequency_weight, published.frequency_l1),
    "lpips": (lpips_weight, published.lpips(device) if lpips_weight > 0 and train_decoder else None),
}
use_discriminator = train_decoder and adversarial_weight > 0
# To compare two latents as a decoder sees them: the average decoder's first six layers (taesd issue 11).
decoder_features = ema_decoder[:6] if encoder_feature_weight > 0 else torch.nn.Identity()


# -----------------------------------------------------------------------------
# the pool of real crops, and the replay buffer of old fakes

class Buffer:
    """Pairs of image [3,H,W] in [0,1] and latent, kept on the device, images as bytes. Samples are drawn at random."""
    def __init__(self, size):
        side = crop // vae.factor
        self.images = torch.zeros(size, 3, crop, crop, dtype=torch.uint8, device=device)
        self.latents = torch.zeros(size, vae.latent_channels, side, side, dtype=torch.float16, device=device)
        self.uses = torch.zeros(size, device=device)
        self.filled = 0

    def add(self, images, latents):
        """Append while there is room; after that, replace the pairs that were drawn most often."""
        free = torch.arange(self.filled, min(self.filled + len(images), len(self.images)), device=device)
        uses = self.uses[:self.filled] + torch.rand(self.filled, device=device)  # random among equals
        slots = torch.cat([free, uses.topk(min(self.filled, len(images) - len(free))).indices])
        self.filled += len(free)
        self.images[slots] = (images[:len(slots)].clamp(0, 1) * 255).round().to(torch.uint8)
        self.latents[slots] = latents[:len(slots)].to(torch.float16)
        self.uses.index_fill_(0, slots, 0)  # unlike self.uses[slots] = 0, this does not wait for the GPU

    def sample(self, n):
        """n different pairs in float32."""
        slots = torch.randperm(self.filled, device=device)[:n]
        self.uses[slots] += 1
        images = (self.images[slots].float() / 255).contiguous(memory_format=torch.channels_last)
        return images, self.latents[slots].float()


tiles_per_side = max(1, window // crop)  # crops side by side in a window
tiles = tiles_per_side**2
windows = max(1, round(batch_size / echo / tiles))  # windows that are read at once
crop_pool = Buffer(max(64 * batch_size, 64 * windows * tiles))  # large enough to mix the crops of many images
replay_buffer = Buffer(replay_size if use_discriminator else 0)
crops_due = 0.0


def get_batch():
    """Real crops and the teacher's latents. A pair is used `echo` times on average; until the pool is full, it receives
    two batches per step. A latent depends on its surroundings, so the teacher encodes whole windows."""
    global crops_due
    crops_due += batch_size / echo if crop_pool.filled == len(crop_pool.images) else 2 * batch_size
    while crops_due > 0:
        real = next(loader).to(device, non_blocking=True)
        real = real.to(memory_format=torch.channels_last).float() / 255
        crop_pool.add(to_tiles(real, tiles_per_side), to_tiles(vae.encode(real), tiles_per_side))
        crops_due -= windows * tiles
    return crop_pool.sample(batch_size)


# -----------------------------------------------------------------------------
# start, or continue a run
parts = networks | {"student_optimizer": student_optimizer, "discriminator_optimizer": discriminator_optimizer,
                    "scaler": scaler}
step, images_seen = 0, 0
exportable = [half for half in ("encoder", "decoder") if settings[f"train_{half}"] and max_iters > 0]
if init_from == "resume":
    resume(checkpoint, parts, shape, out_dir)
    step, images_seen, exportable = checkpoint["step"], checkpoint["images_seen"], checkpoint["exportable"]
    torch.manual_seed(seed + step)
elif checkpoint:
    exportable = sorted({*exportable, *init_weights(checkpoint, networks, shape, vae, images, settings, autocast)},
                        reverse=True)
del checkpoint  # frees its memory
setup_ddp([*networks.values()])
machine = {"device": device, "dtype": dtype, "compile": compile}
log = Log(settings, machine, images, vae, networks, {"crop pool": crop_pool, "replay buffer": replay_buffer})


def evaluate_and_save(evaluate=True):
    if evaluate:
        log.evaluate(step, images_seen, ema_encoder, ema_decoder, decoder, autocast)
    state = {"step": step, "images_seen": images_seen, "shape": shape, "settings": settings, "exportable": exportable,
             "teacher": str(vae), "metrics": log.metrics}
    state |= {name: part.state_dict() for name, part in parts.items()}
    save_checkpoint(state, networks, out_dir)


if compile:  # each network when it is first called, for its one shape; Module.compile does not work on a Sequential
    for network in (encoder, decoder, discriminator, decoder_features, *([] if vae.video else [vae.vae.encoder])):
        network.forward = torch.compile(network.forward, dynamic=False)
    torch._functorch.config.donated_buffer = adversarial_scaling == "none"  # the others go through a graph twice
if init_from not in ("scratch", "resume"):
    evaluate_and_save()  # how good are the weights that the run starts from?
loader = log.waiting_for(batches(images, tiles_per_side * crop, windows, color_augment, seed + step, workers,
                                 pin=device.type == "cuda"))
averages, trained_weights = [], []
for average, network in ((ema_encoder, encoder), (ema_decoder, decoder)):
    if next(network.parameters()).requires_grad:
        averages += average.parameters()
        trained_weights += [weight.detach() for weight in network.parameters()]


# -----------------------------------------------------------------------------
# One training step. On a GPU it is recorded as a CUDA graph: its Python code runs in the first few calls only, so
# anything that changes from step to step has to be an argument, and nothing in it may ask for the value of a tensor.

@cuda_graphed(device, settings["compile"], scaler)
def train_step(real, latent, lr_scale, old_fakes, old_latents):
    """Returns {name: loss}, the fakes and their latents. Every loss in the dictionary is logged under its name."""
    losses, total, fake = {}, 0.0, latent  # without a decoder there is no fake

    # The encoder copies the teacher's latents. Our decoder's first layers should also see the same in both, unless the
    # decoder holds nothing but noise.
    if train_encoder:
        with autocast:
            student_latent = encoder(real).float()
        losses["encoder"] = (F.mse_loss if encoder_loss == "mse" else F.l1_loss)(student_latent, latent)
        total = losses["encoder"]
        if encoder_feature_weight > 0 and "decoder" in exportable:
            with autocast:
                losses["encoder_feature"] = F.l1_loss(decoder_features(student_latent).float(),
                                                      decoder_features(latent).float())
            total = total + encoder_feature_weight * losses["encoder_feature"]

    # The decoder paints a fake from the teacher's latent. Its target is the real image and not the teacher's picture of
    # it, so it may invent detail that the latent has lost.
    if train_decoder:
        if latent_noise > 0:
            latent = latent + latent_noise * torch.rand(len(latent), 1, 1, 1, device=device) * torch.randn_like(latent)
        with autocast:
            fake = decoder(latent).float()
        for name, (weight, pixel_loss) in pixel_losses.items():
            if weight > 0:
                losses[name] = pixel_loss(fake, real)
                total = total + weight * losses[name]

    if old_fakes is not None:
        # The discriminator learns first. Half of its fakes are from the replay buffer, so that it keeps recognising
        # mistakes that the decoder has stopped making, and the two do not chase each other in circles.
        n = len(old_fakes)
        d_fakes, d_latents = torch.cat([old_fakes, fake.detach()[n:]]), torch.cat([old_latents, latent[n:]])
        with autocast:
            real_scores, _ = discriminator(real, latent)
            fake_scores, _ = discriminator(d_fakes, d_latents)
            if encoder_adversarial_weight > 0:  # a real image with the student's latent counts as a fake, too
                encoder_scores, _ = discriminator(real, student_latent.detach())
        losses["discriminator"] = discriminator_loss(real_scores, fake_scores)
        if encoder_adversarial_weight > 0:
            losses["discriminator"] = losses["discriminator"] + discriminator_loss(real_scores, encoder_scores)
        optimizer_step(discriminator_optimizer, losses["discriminator"], lr_scale * discriminator_lr)

        # Then the decoder learns from the discriminator, which is frozen meanwhile.
        discriminator.requires_grad_(False)
        with autocast:
            real_scores, real_activations = discriminator(real, latent)
            fake_scores, fake_activations = discriminator(fake, latent)
        adversarial = losses["adversarial"] = adversarial_loss(real_scores, fake_scores)
        if adversarial_scaling != "none":
            scale = published.SCALINGS[adversarial_scaling]
            adversarial = scale(adversarial, fake, total, decoder[-1].weight, scaler)
        total = total + adversarial_weight * adversarial
        if feature_matching_weight > 0:
            losses["feature_matching"] = feature_matching_loss(real_activations, fake_activations)
            total = total + feature_matching_weight * losses["feature_matching"]
        if encoder_adversarial_weight > 0:
            with autocast:
                fake_scores, _ = discriminator(real, student_latent)
            losses["encoder_adversarial"] = adversarial_loss(real_scores, fake_scores)
            total = total + encoder_adversarial_weight * losses["encoder_adversarial"]
        discriminator.requires_grad_(True)

    optimizer_step(student_optimizer, total, lr_scale * learning_rate)
    scaler.update()
    return {name: loss.detach() for name, loss in losses.items()}, fake.detach(), latent


# -----------------------------------------------------------------------------
# the loop
last = step == max_iters
interrupted = False
while not last:
    real, latent = get_batch()
    old_fakes = old_latents = None
    if use_discriminator and step >= adversarial_start:
        old_fakes, old_latents = replay_buffer.sample(batch_size // 2)
    losses, fake, fake_latent = train_step(real, latent, get_lr_scale(step), old_fakes, old_latents)
    if old_fakes is not None:
        replay_buffer.add(fake, fake_latent)
    step += 1
    images_seen += batch_size * RANKS

    # Average the weights over images. Early in a run, half of the average is from the last tenth of the images, so that
    # the first noise is forgotten soon.
    halflife = max(1e-9, min(ema_halflife, 0.1 * images_seen))
    torch._foreach_lerp_(averages, trained_weights, 1 - 0.5 ** (batch_size * RANKS / halflife))

    # report, evaluate, save
    log.add(step, losses)
    interrupted = log.interrupted()
    last = step == max_iters or interrupted
    if last or step % log_interval == 0 or step % eval_interval == 0:
        log.report(step, images_seen)
    if last or step % eval_interval == 0:
        evaluate_and_save(evaluate=not interrupted)
        log.draw_curves()

loader.close()
log.end(step, images_seen, interrupted)
