r"""Train a tiny autoencoder (TAESD) that speaks the latent language of a big VAE, the teacher.

    python train.py --teacher=sdxl --batch_size=16 --data_dir=pictures
    python train.py recipes/ft_mse.py --teacher=sdxl --data_dir=pictures     # settings from a file, then from flags

                real image x [0,1]
               /         |         \
      teacher.encode     |       encoder --> latent'     encoder loss: latent' = latent
              |          |
            latent ------|---> decoder --> fake          decoder loss: fake is near x, and cannot be told from it
              |          |        |
      D, the discriminator(x or fake | latent)           + replay buffer of old fakes

The encoder copies the teacher's latents. The decoder is a conditional GAN on real images: it may invent detail, but not
shift colour. The method is that of the TAESD author, from github.com/madebyollin/taesd, issues 2 and 11, and seraena.
"""
import signal
import time

started = time.time()  # before the imports, which take seconds
signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop runs, Ctrl-C leaves at once

import copy
import functools

import torch
import torch.nn.functional as F

from data import Images, batches, cut
from model import Decoder, Discriminator, Encoder, convolutions, optimizer_of
from recipes import published
from sample import HeldOut
from support.configure import configure, pick_compile, pick_device, pick_dtype
from support.donor import adapt
from support.graph import replayed
from support.parallel import RANK, RANKS, average_gradients, join
from support.report import Interrupt, Report, explain_out_of_memory, introduce
from support.run import Progress, check_fit, check_losses, check_settings, open_run, restore, save_run
from teacher import Teacher

# -----------------------------------------------------------------------------
# the settings: `name = default  # help` is a flag, --name=value, and may stand in a recipe. All three parts are needed
# run
out_dir = "out"              # checkpoint, exports, pictures and log.jsonl go here
init_from = "scratch"        # scratch; donor (bundled); resume; or another run, a taesd.py file, an AutoencoderTiny
max_iters = 300_000          # steps; seraena's example trains about this many at 96 pixels; 0 = only start and export
seed = 0                     # of weights, crops and replay
# data
data_dir = ""                # folder of images, searched recursively; '' = thirty bundled ones, to try things out
val_dir = ""                 # folder of held-out images; '' = 5% of data_dir, chosen by file name
crop = 96                    # training crop in pixels, a multiple of the teacher's factor; finish a long run at 256
window = 256                 # crops are cut from squares of at most this side, which the teacher encodes whole; 0 = no
batch_size = 16              # crops a step
color_augment = 0.07         # share of windows with randomly mixed colour channels; 0 = off
echo = 2.0                   # times that a crop and its teacher latent are used, on average
workers = 4                  # threads that read images
# teacher and student
teacher = "toy"              # toy, sd, sd-mse, sdxl, a diffusers folder, a hub id, a .safetensors file, a taesd.py .pth
variant = "auto"             # plain (TAESD), midblock_gn (FLUX.2), f32 (Sana); auto: as init_from or the teacher has it
width = 64                   # channels of the student, unless init_from has others; 32 or 16 for phones and CPUs
train_encoder = True         # false = leave the encoder as init_from has it, or as it was solved
train_decoder = True         # false = leave the decoder as init_from has it, or as it was solved
# losses: the weight of each term; 0 = off, and not computed
adversarial_weight = 1.0     # D must not tell the fake from the real image
matching_weight = 5.0        # L1 of D's activations for fake and real, over their mean size; with adversarial_weight
lowres_weight = 10.0         # MSE of 8x8-pooled images, which holds the colours
mse_weight = 10.0            # MSE of the pixels
replay_size = 4096           # old fakes kept for D, half of those it sees, as bytes on the device; 0 = only fresh fakes
encoder_loss = "mse"         # of the student's latents: mse; or l1, in long runs better for the teacher's decoder
encoder_feature_weight = 1.0 # L1 of what our decoder's first layers make of the student's latents and of the teacher's
latent_noise = 0.0           # up to so much noise on the decoder's latents, so that it also decodes unfinished ones
# losses of published recipes
encoder_adversarial_weight = 0.0  # D also judges pairs of real image and student's latent (TAESD 1.2)
adversarial_form = "squares" # squares (least squares, relativistic; below) or hinge
adversarial_scaling = "none" # of its gradient: none; unit (seraena); adaptive (to the pixel losses', CompVis)
adversarial_start = 0        # steps before D begins; until then the decoder learns from the pixel losses alone
l1_weight = 0.0              # L1 of the pixels
frequency_weight = 0.0       # L1 of the amplitudes of the 2-D Fourier transform
lpips_weight = 0.0           # perceptual distance, from the lpips package
# optimizer
optimizer = "muon"           # muon (Adam for biases and D's outer layers); adam (as TAESD's author); adamw (as seraena)
learning_rate = 1e-3         # of encoder and decoder; 1e-4 from weights of this teacher and width if no flag gives it
discriminator_lr = 1e-3      # of the discriminator
cooldown = 0.5               # share of max_iters over which, at the end, the learning rates fall to 0
ema_halflife = 10_000        # images after which a weight counts half in the average that is exported; 0 = no average
# reports
log_interval = 50            # steps between lines in log.jsonl and on the screen
eval_interval = 1000         # steps between evaluations; each writes a picture, a checkpoint and the exports
eval_images = 16             # held-out images
eval_size = 256              # held-out images are centre squares of this side in pixels
# system
device = "auto"              # auto, cuda, mps or cpu
dtype = "auto"               # auto, float32, bfloat16 or float16: of teacher and autocast; weights stay float32
compile = "auto"             # torch.compile and, on a GPU, a CUDA graph of the step: auto, true; or false, neither
profile = 0                  # steps to record as out_dir/trace.json for perfetto, some 74 after the start; 0 = off
# -----------------------------------------------------------------------------
settings, by_file, by_flag = configure(globals())  # all of them; those that files and flags give
checkpoint = open_run(settings, by_file, by_flag)  # None from scratch; `settings` take over what it brings
check_settings(settings)
globals().update(settings)
# `settings` stay what was asked for; from here on these globals hold what "auto" becomes on this machine
device = pick_device(device)
dtype, compile = pick_dtype(dtype, device), pick_compile(compile, device)
machine = {"device": device, "dtype": dtype, "compile": compile}
explain_out_of_memory(settings)
batch_size //= RANKS  # of this process; RANKS is 1, unless torchrun started more
progress = Progress(  # what a checkpoint keeps beside weights and memories
    step=0, images_seen=0, images_averaged=0, batches_read=0, due=0.0, figures={}, origin=init_from,
    ready=[half for half in ("encoder", "decoder") if settings[f"train_{half}"]])  # to be exported: the other is noise

# -----------------------------------------------------------------------------
# images, teacher, student, discriminator
images = Images(data_dir, val_dir)
vae = Teacher(teacher, device, dtype)
variant = check_fit(settings, vae, checkpoint)  # where it is "auto", as the checkpoint or else the teacher has it
torch.manual_seed(seed)
torch.backends.cudnn.benchmark = True  # crops have one size
shape = {"latent_channels": vae.latent_channels, "factor": vae.factor, "width": width, "variant": variant}
encoder, decoder = Encoder(**shape).requires_grad_(train_encoder), Decoder(**shape).requires_grad_(train_decoder)
discriminator = Discriminator(vae.latent_channels)
ema_encoder, ema_decoder = (copy.deepcopy(half).requires_grad_(False) for half in (encoder, decoder))
networks = {"encoder": encoder, "decoder": decoder, "discriminator": discriminator,
            "ema_encoder": ema_encoder, "ema_decoder": ema_decoder}  # averaged over the steps: these are exported
for network in networks.values():
    network.to(device, memory_format=torch.channels_last)

# Muon for all convolutions of the student, and D's but the first and those of its scores, 1x1: the layers next to
# latents and images learn too slowly by this Adam, colours above all
if optimizer == "adamw":
    adam = discriminator_adam = functools.partial(torch.optim.AdamW, betas=(0.9, 0.99))
else:
    adam = functools.partial(torch.optim.Adam, betas=(0.9, 0.9), amsgrad=True)  # taesd issue 11
    discriminator_adam = functools.partial(torch.optim.Adam, betas=(0.5, 0.99))
by_muon = convolutions(encoder) + convolutions(decoder) if optimizer == "muon" else []
student_optimizer = optimizer_of([*encoder.parameters(), *decoder.parameters()], by_muon, adam, dtype)
by_muon = [weight for weight in convolutions(discriminator)[1:] if weight.shape[-1] > 1 and optimizer == "muon"]
discriminator_optimizer = optimizer_of([*discriminator.parameters()], by_muon, discriminator_adam, dtype)
scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def ramp(step):
    """What the learning rates are multiplied by: 1, and down to 0 over the last share, cooldown."""
    return min(1.0, (max_iters - step) / max(1.0, cooldown * max_iters))


def descend(optimizer, loss, lr):
    """One step of an optimizer."""
    for group in optimizer.param_groups:
        group.update(lr=lr, capturable=torch.is_tensor(lr))
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    average_gradients(optimizer)
    scaler.step(optimizer)


# -----------------------------------------------------------------------------
# the losses
def discriminator_loss(real_scores, fake_scores):
    """What D minimises: scores of real images are +1, of fakes -1. Half of the fakes are old, of other images."""
    return (real_scores - 1).square().mean() + (fake_scores + 1).square().mean()


def adversarial_loss(real_scores, fake_scores):
    """What the decoder minimises. Relativistic: however good D is, a fake and its real image are pulled together."""
    return (fake_scores - real_scores).square().mean()


def matching_loss(real_activations, fake_activations):
    """What the decoder minimises, too: a fake and its real image look alike to D, layer by layer (pix2pixHD)."""
    return sum(F.l1_loss(fake.movedim(1, 3), real.movedim(1, 3)).float() / real.abs().mean()  # as in memory: no copy
               for real, fake in zip(real_activations, fake_activations)) / len(real_activations)


def lowres_mse(fake, real):
    """MSE of the mean colours of 8x8 patches."""
    return F.mse_loss(F.avg_pool2d(fake, 8), F.avg_pool2d(real, 8))


discriminator_loss, adversarial_loss = published.FORMS.get(adversarial_form, (discriminator_loss, adversarial_loss))
pixel_losses = {  # name: (weight, distance of fake and real)
    "mse": (mse_weight, F.mse_loss), "lowres_mse": (lowres_weight, lowres_mse),
    "l1": (l1_weight, F.l1_loss), "frequency": (frequency_weight, published.frequency_l1),
    "lpips": (lpips_weight, published.lpips(device) if lpips_weight > 0 and train_decoder else None),
}
check_losses(settings, pixel_losses)
# of latents, and of their size: what the averaged decoder's first six layers make of them (taesd issue 11)
features = ema_decoder[:6] if encoder_feature_weight > 0 else torch.nn.Identity()


def judge(*pairs):
    """D's scores of each (image, latent), and its activations."""
    with amp:
        scores, activations = zip(*(discriminator(image, latent) for image, latent in pairs))
    return [each.float() for each in scores], activations


# -----------------------------------------------------------------------------
# the memories: a pool of real crops, and the replay buffer of old fakes
class Memory:
    """Pairs of image [3,H,W] in [0,1] and latent, kept on the device; images as bytes. Drawn at random."""
    def __init__(self, size, image_shape, latent_shape):
        self.images = torch.zeros(size, *image_shape, dtype=torch.uint8, device=device)
        self.latents = torch.zeros(size, *latent_shape, dtype=torch.float16, device=device)
        self.uses = torch.zeros(size, device=device)
        self.filled = 0

    def push(self, images, latents):
        """Append while there is room, then take the place of those that were drawn most often."""
        free = torch.arange(self.filled, min(self.filled + len(images), len(self.images)), device=device)
        uses = self.uses[:self.filled] + torch.rand(self.filled, device=device)  # equals in random order
        slots = torch.cat([free, uses.topk(min(self.filled, len(images) - len(free))).indices])
        self.filled += len(free)
        self.images[slots] = (images[:len(slots)].clamp(0, 1) * 255).round().to(torch.uint8)
        self.latents[slots] = latents[:len(slots)].to(torch.float16)
        self.uses.index_fill_(0, slots, 0)  # the CPU does not wait, as in [slots] = 0

    def draw(self, n):
        """n different pairs, float32."""
        slots = torch.randperm(self.filled, device=device)[:n]
        self.uses[slots] += 1
        images = (self.images[slots].float() / 255).contiguous(memory_format=torch.channels_last)
        return images, self.latents[slots].float()

    def state_dict(self):
        return {name: getattr(self, name)[:self.filled].to("cpu", copy=True) for name in ("images", "latents", "uses")}

    def load_state_dict(self, state):
        self.filled = min(len(self.images), len(state["images"]))
        for name, values in state.items():
            getattr(self, name)[:self.filled] = values[:self.filled]


pair_shapes = (3, crop, crop), (vae.latent_channels, crop // vae.factor, crop // vae.factor)
across = max(1, window // crop)  # crops side by side in a window
windows = max(1, round(batch_size / echo / across**2))  # read at once
pool = Memory(max(64 * batch_size, 64 * windows * across**2), *pair_shapes)  # so large that crops of many images mix
adversarial = train_decoder and adversarial_weight > 0
replay = Memory(replay_size // RANKS if adversarial else 0, *pair_shapes)


def get_batch():
    """Real images and the teacher's latents, from the pool, which takes in two batches a step until it is full."""
    progress.due += batch_size / echo if pool.filled == len(pool.images) else 2 * batch_size
    while progress.due > 0:
        waiting = time.time()
        squares = next(loader).to(device, non_blocking=True)
        report.waited += time.time() - waiting
        squares = squares.to(memory_format=torch.channels_last).float() / 255
        pool.push(cut(squares, across), cut(vae.encode(squares), across))
        progress.due -= windows * across**2
        progress.batches_read += 1
    return pool.draw(batch_size)


# -----------------------------------------------------------------------------
# start, or go on
parts = networks | {"student_optimizer": student_optimizer, "discriminator_optimizer": discriminator_optimizer,
                    "scaler": scaler, "pool": pool, "replay": replay}
if checkpoint:
    checkpoint = adapt(checkpoint, shape, networks, vae, images, settings, amp)  # to this teacher's latents
    learning_rate = settings["learning_rate"]  # it depends on whether they had to be learned
    restore(checkpoint, parts, progress, settings, shape, device)  # all, or the weights alone, D's too if they fit
    del checkpoint  # frees its memory
join(networks, settings)

introduce(settings, images, vae, networks, {"pool": pool, "replay": replay}, machine)
held_out = HeldOut(images.held_out(eval_images, eval_size), vae, teacher)
images.batch(across * crop, 1, 0, [seed, 0])  # of broken files alone? Then stop before anything is written
report = Report(settings, progress, held_out, machine, started)


def evaluate():
    """Measure and draw the averaged weights on the held-out images."""
    if RANK == 0:
        path = f"{out_dir}/samples/{progress.step:07d}.png"
        progress.figures = held_out.evaluate(ema_encoder, ema_decoder, decoder, amp, path)
        report.evaluation(progress.figures)


if compile:  # when first called, each for its one shape; `.forward`: Module.compile does not see through a Sequential
    for network in (encoder, decoder, discriminator, features, *([] if vae.video else [vae.vae.encoder])):
        network.forward = torch.compile(network.forward, dynamic=False)
    torch._functorch.config.donated_buffer = adversarial_scaling == "none"  # others go through a graph twice
if init_from not in ("scratch", "resume"):
    evaluate()  # how good are the weights that it starts from?
    save_run(settings, shape, parts, progress, held_out)
averages, trained = zip(*[pair for of_half in ((ema_encoder, encoder), (ema_decoder, decoder))
                          for pair in zip(*(half.parameters() for half in of_half)) if pair[1].requires_grad])
loader = batches(images, across * crop, windows, color_augment, seed, workers, start=progress.batches_read,
                 pin=device.type == "cuda", rank=RANK, ranks=RANKS)
stopping = Interrupt()  # true after Ctrl-C

# -----------------------------------------------------------------------------
# the loop, and a step of it
@replayed(device, settings["compile"], scaler)  # on a GPU its Python runs in the first calls only: what varies goes in
def train_step(real, latent, rate, *old):
    """One step at `rate` times the learning rates; `old` fakes and their latents are for D, once it takes part. Returns
    the terms of the losses, this step's fakes and their latents. Terms are logged: to look at a number, make it one."""
    terms, loss, fake = {}, 0.0, latent  # the loss is what the student minimises; fake: unused without a decoder

    # encoder: copies the teacher's latents, in themselves and as our decoder's first layers see them
    if train_encoder:
        with amp:
            encoded = encoder(real).float()
        loss = terms["encoder"] = F.mse_loss(encoded, latent) if encoder_loss == "mse" else F.l1_loss(encoded, latent)
        if encoder_feature_weight > 0 and "decoder" in progress.ready:  # one that is trained, or was given
            with amp:
                terms["encoder_feature"] = F.l1_loss(features(encoded).float(), features(latent).float())
            loss = loss + encoder_feature_weight * terms["encoder_feature"]

    # decoder: paints fakes, near the real images
    if train_decoder:
        if latent_noise > 0:
            latent = latent + latent_noise * torch.rand(len(latent), 1, 1, 1, device=device) * torch.randn_like(latent)
        with amp:
            fake = decoder(latent).float()
        for name, (weight, distance) in pixel_losses.items():
            if weight > 0:
                terms[name] = distance(fake, real)
                loss = loss + weight * terms[name]

    if old:
        # discriminator: a step of its own, to tell real images from fakes; half are old, lest it forget what it caught
        fakes = [[torch.cat([a, b[len(a):]]) if len(a) else b for a, b in zip(old, (fake.detach(), latent))]]
        if encoder_adversarial_weight > 0:  # a real image with the student's latent is a fake, too
            fakes.append((real, encoded.detach()))
        real_scores, *scores = judge((real, latent), *fakes)[0]
        terms["discriminator"] = sum(discriminator_loss(real_scores, fake_scores) for fake_scores in scores)
        descend(discriminator_optimizer, terms["discriminator"], rate * discriminator_lr)

        # decoder: its fakes cannot be told from the real images by the D that has just learned
        discriminator.requires_grad_(False)
        (real_scores, fake_scores), activations = judge((real, latent), (fake, latent))
        pull = terms["adversarial"] = adversarial_loss(real_scores, fake_scores)
        if adversarial_scaling != "none":
            pull = published.SCALINGS[adversarial_scaling](pull, fake, loss, decoder[-1].weight, scaler)
        loss = loss + adversarial_weight * pull
        if matching_weight > 0:
            terms["matching"] = matching_loss(*activations)
            loss = loss + matching_weight * terms["matching"]
        del activations  # real's are of no more use: frees their memory
        if encoder_adversarial_weight > 0:
            terms["encoder_adversarial"] = adversarial_loss(real_scores, *judge((real, encoded))[0])
            loss = loss + encoder_adversarial_weight * terms["encoder_adversarial"]
        discriminator.requires_grad_(True)

    descend(student_optimizer, loss, rate * learning_rate)
    scaler.update()
    return {name: term.detach() for name, term in terms.items()}, fake.detach(), latent


last = progress.step == max_iters
while not last:
    real, latent = get_batch()
    old = replay.draw(batch_size // 2) if adversarial and progress.step >= adversarial_start else ()
    terms, *fakes = train_step(real, latent, ramp(progress.step), *old)
    if old:
        replay.push(*fakes)
    progress.step += 1
    progress.images_seen += batch_size * RANKS
    progress.images_averaged += batch_size * RANKS

    # average the weights over images; early on over the last tenth of them, so that the first noise is soon forgotten
    halflife = max(1e-9, min(ema_halflife, 0.1 * progress.images_averaged))
    torch._foreach_lerp_(averages, [weight.detach() for weight in trained], 1 - 0.5 ** (batch_size * RANKS / halflife))

    # report, evaluate, save
    report.add(terms)
    last = progress.step == max_iters or bool(stopping)
    if last or progress.step % log_interval == 0 or progress.step % eval_interval == 0:
        report.means()
    if last or progress.step % eval_interval == 0:
        if not stopping:
            evaluate()
        save_run(settings, shape, parts, progress, held_out)
        report.draw()

loader.close()
report.end(stopped=bool(stopping))  # several processes end here, at once
