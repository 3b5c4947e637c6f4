r"""Train a tiny autoencoder (TAESD) that speaks the latent language of a big VAE, the teacher.

    python train.py --teacher=sdxl --batch_size=16 --data_dir=pictures

                real image x [0,1]
               /         |         \
      teacher.encode     |       encoder --> latent'     encoder loss: latent' = latent
              |          |
            latent ------|---> decoder --> fake          decoder loss: fake is near x, and cannot be told from it
              |          |        |
        discriminator(x or fake | latent)                + replay buffer of old fakes

The encoder copies the teacher's latents. The decoder is a conditional GAN on real images: it may invent detail, but not
shift colour. The method is that of the TAESD author, from github.com/madebyollin/taesd, issues 2 and 11, and his seraena.
"""
import copy
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import signal
import sys
import time

# before the imports that take seconds; until the loop runs, Ctrl-C leaves at once
started = time.time()
signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F

from configure import configure, peak_memory_mb, pick_device, pick_dtype, require_positive, stop
from data import Images, batches
from model import (VARIANTS, Decoder, Discriminator, Encoder, Muon, checkpoint_paths, load_checkpoint, load_student, model_card, parameters,
                   save_diffusers, save_file, save_taesd)
from sample import chunked, measure, picture
from teacher import NAMES, Teacher

# -----------------------------------------------------------------------------
# run
out_dir = "out"              # checkpoint, exports, pictures and log.jsonl go here
init_from = "scratch"        # scratch; resume (go on with out_dir); or weights: a run's out_dir, a taesd.py file, an AutoencoderTiny
max_iters = 300_000          # steps; seraena's example trains about this many at 96 pixels
seed = 0                     # of weights, crops and replay
# data
data_dir = ""                # folder of images, searched recursively; '' = synthetic dead leaves, to try things out
val_dir = ""                 # folder of held-out images; '' = 5% of data_dir, chosen by file name
crop = 96                    # training crop in pixels, a multiple of the teacher's factor; finish a long run at 256
window = 256                 # crops are cut from squares of about this side that the teacher encodes whole, as in use; 0 = each alone
batch_size = 16              # crops a step
color_augment = 0.07         # share of crops with randomly mixed colour channels; 0 = off
echo = 2.0                   # times that a crop and its teacher latent are used, on average
workers = 4                  # threads that read images
# teacher and student
teacher = "toy"              # toy, sd, sd-mse, sdxl, a diffusers folder, a hub id, a .safetensors file, or a taesd.py pair's encoder.pth
variant = "auto"             # of the student: plain (TAESD), midblock_gn (FLUX.2), f32 (Sana), or auto: as the teacher or init_from wants
width = 64                   # channels of the student, as init_from has it or: 64 = the released TAESD; 32 or 16 for phones and CPUs
train_encoder = True         # false = leave the encoder as init_from has it
train_decoder = True         # false = leave the decoder as init_from has it
# losses: the weight of each term; 0 = off, and not computed
recipe = "default"           # or taesd-1.0, taesd-1.1, taesd-1.2, seraena, ft-ema, ft-mse: sets several of these; flags win over it
encoder_loss = "mse"         # of the student's latents: mse or l1
encoder_adversarial_weight = 0.0  # D also judges pairs of real image and student's latent (TAESD 1.2)
adversarial_weight = 1.0     # D must not tell the fake from the real image
adversarial_form = "squares" # squares (least squares) or softplus, both relativistic; or hinge
adversarial_scaling = "none" # of its gradient: none; unit (seraena); adaptive (to the pixel losses', CompVis)
adversarial_start = 0        # steps before D begins; they are plain MSE where there is no mse_weight or l1_weight
replay_size = 4096           # old fakes kept for D, as bytes on the device: half of the fakes it sees; 0 = only fresh fakes
lowres_weight = 10.0         # MSE of 8x8-pooled images, which holds the colours
mse_weight = 10.0            # MSE of the pixels
l1_weight = 0.0              # L1 of the pixels
frequency_weight = 0.0       # L1 of the amplitudes of the 2-D Fourier transform
lpips_weight = 0.0           # perceptual distance, from the lpips package
latent_noise = 0.0           # the decoder learns from latents with up to this much noise, so that it also decodes unfinished ones
# optimizer
learning_rate = 1e-3         # of encoder and decoder; 1e-4 if init_from names weights and no flag says otherwise
muon = True                  # Muon for the weights of hidden layers, Adam for the rest; false = Adam for all
discriminator_lr = 1e-3      # of the discriminator
warmup_iters = 0             # steps over which the learning rates rise
cooldown = 0.5               # share of max_iters over which, at the end, they fall to 0
ema_halflife = 10_000        # images after which a weight counts half in the average that is evaluated and exported; 0 = no average
# reports
log_interval = 50            # steps between lines in log.jsonl and on the screen
eval_interval = 1000         # steps between evaluations; each writes a picture, a checkpoint and the exports
eval_images = 16             # held-out images
eval_size = 256              # held-out images are centre squares of this side in pixels
# system
device = "auto"              # auto, cuda, mps or cpu
dtype = "auto"               # auto, float32, bfloat16 or float16: of teacher and autocast; weights stay float32
compile = "auto"             # torch.compile: auto (on a GPU), true or false
profile = 0                  # steps to record, once warm, as out_dir/trace.json for chrome://tracing or perfetto; 0 = off
# -----------------------------------------------------------------------------
AUTHOR = dict(muon=False, learning_rate=3e-4, discriminator_lr=3e-4, cooldown=0.0, window=0, mse_weight=0.0)
RECIPES = {
    "default": {},
    # the author's, by version, from taesd issues 2 and 11; he names the terms and the optimizer, the weights are ours
    "taesd-1.0": AUTHOR | dict(mse_weight=0.1, lowres_weight=0.0),
    "taesd-1.1": AUTHOR | dict(lpips_weight=0.5, frequency_weight=0.1, lowres_weight=1.0),
    "taesd-1.2": AUTHOR | dict(lowres_weight=1.0, encoder_adversarial_weight=0.01),
    # the losses of his notebook, beside our discriminator
    "seraena": AUTHOR | dict(adversarial_scaling="unit", adversarial_weight=2.0, lowres_weight=0.0, replay_size=16384, learning_rate=3e-5),
    # the losses of Stable Diffusion's own decoders, from CompVis/latent-diffusion
    "ft-ema": dict(l1_weight=1.0, mse_weight=0.0, lpips_weight=1.0, adversarial_form="hinge", adversarial_scaling="adaptive",
                   adversarial_weight=0.5, adversarial_start=50_001, lowres_weight=0.0, replay_size=0),
    "ft-mse": dict(mse_weight=1.0, lpips_weight=0.1, adversarial_form="hinge", adversarial_scaling="adaptive",
                   adversarial_weight=0.5, adversarial_start=50_001, lowres_weight=0.0, replay_size=0),
}
settings = configure(globals())
checkpoint = None
if init_from == "resume":
    checkpoint = load_checkpoint(out_dir, set_aside=True)
    before = {name: value for name, value in checkpoint["settings"].items() if name in settings and name not in ("out_dir", "init_from", "profile")}
    globals().update(before)         # the run's own settings...
    settings = configure(globals())  # ...but for what this command line says
    for name in ("crop", "recipe", "muon"):
        if name in before and settings[name] != before[name]:
            stop(f"--{name}={settings[name]}: a resumed run keeps its {name}, {before[name]}; to change it, start a new run with --init_from={out_dir} "
                 f"and its own --out_dir")
else:
    if recipe not in RECIPES:
        stop(f"--recipe={recipe}: must be one of {', '.join(RECIPES)}")
    if any(map(os.path.exists, checkpoint_paths(out_dir))):
        stop(f"--out_dir={out_dir}: holds a run already; --init_from=resume goes on with it, another --out_dir starts a new one")
    if init_from != "scratch":
        checkpoint = load_student(init_from)
        learning_rate = 1e-4             # what is learned already is lost in larger steps
        width = checkpoint["shape"]["width"]
        teacher = checkpoint.get("settings", {}).get("teacher", teacher)
    globals().update(RECIPES[recipe])
    settings = configure(globals())  # the command line wins over the recipe


def require(name, holds, rule):
    if not holds:
        stop(f"--{name}={globals()[name]}: {rule}")


require_positive(settings, "max_iters", "batch_size", "workers", "width", "log_interval", "eval_interval", "eval_images", "learning_rate",
                 "discriminator_lr")
require("echo", echo >= 1, "must be 1 or more")
require("seed", seed < 2**32 - 1, "must be less than 2**32 - 1")
require("color_augment", color_augment <= 1, "must be between 0 and 1")
require("replay_size", replay_size == 0 or replay_size >= batch_size, f"must be 0 or at least the batch size, {batch_size}")
require("train_decoder", train_encoder or train_decoder, "nothing is left to train: train_encoder is false, too")
require("cooldown", cooldown <= 1, "must be between 0 and 1")
require("encoder_loss", encoder_loss in ("mse", "l1"), "must be mse or l1")
require("adversarial_form", adversarial_form in ("squares", "softplus", "hinge"), "must be squares, softplus or hinge")
require("adversarial_scaling", adversarial_scaling in ("none", "unit", "adaptive"), "must be none, unit or adaptive")
pixels = any((mse_weight, l1_weight, lowres_weight, frequency_weight, lpips_weight))
require("adversarial_weight", adversarial_weight > 0 or pixels or not train_decoder, "the decoder has no loss: all of its weights are 0")
require("adversarial_scaling", adversarial_scaling != "adaptive" or pixels, "adaptive needs a pixel loss to adapt to: all of their weights are 0")
require("encoder_adversarial_weight", encoder_adversarial_weight == 0 or train_encoder and train_decoder and adversarial_weight > 0 and latent_noise == 0,
        "needs train_encoder, train_decoder and adversarial_weight, and latent_noise=0; --encoder_adversarial_weight=0 turns it off")
require("compile", compile.lower() in ("auto", "true", "false"), "must be auto, true or false")
device = pick_device(device)
dtype = pick_dtype(dtype, device)
compile = compile.lower() == "true" or compile == "auto" and device.type == "cuda" and importlib.util.find_spec("triton") is not None
for name in ("teacher", "data_dir", "val_dir"):  # so that sample.py and resume may be called from another folder
    if settings[name] not in NAMES and os.path.exists(settings[name]):
        settings[name] = os.path.abspath(settings[name])
images = Images(data_dir, val_dir)
vae = Teacher(teacher, device, dtype)
for name in ("crop", "eval_size"):
    require(name, globals()[name] >= 16 and globals()[name] % vae.multiple == 0, f"must be 16 or more and a multiple of {vae.multiple} for this teacher")

# -----------------------------------------------------------------------------
# networks and optimizers
torch.manual_seed(seed)
torch.backends.cudnn.benchmark = True  # crops have one size
if variant == "auto":
    variant = settings["variant"] = checkpoint["shape"]["variant"] if checkpoint else vae.student_variant
require("variant", variant in VARIANTS, f"must be auto or one of {', '.join(VARIANTS)}")
require("variant", variant != "f32" or vae.factor == 32, f"is for factor 32, the teacher's is {vae.factor}")
shape = {"latent_channels": vae.latent_channels, "factor": vae.factor, "width": width, "variant": variant}
encoder, decoder, discriminator = Encoder(**shape), Decoder(**shape), Discriminator(vae.latent_channels)
ema_encoder, ema_decoder = copy.deepcopy(encoder).requires_grad_(False), copy.deepcopy(decoder).requires_grad_(False)
networks = {"encoder": encoder, "decoder": decoder, "discriminator": discriminator, "ema_encoder": ema_encoder, "ema_decoder": ema_decoder}
for network in networks.values():
    network.to(device, memory_format=torch.channels_last)
encoder.requires_grad_(train_encoder)
decoder.requires_grad_(train_decoder)
student = [*encoder.parameters(), *decoder.parameters()]
trained = [*encoder.parameters()] * train_encoder + [*decoder.parameters()] * train_decoder
averages = [*ema_encoder.parameters()] * train_encoder + [*ema_decoder.parameters()] * train_decoder  # of the trained ones


def optimizers_of(name, parameters, hidden, lr, betas, amsgrad=False):
    """{name: optimizer}: Muon for the weights of hidden layers, Adam for everything else, or for all."""
    hidden = [weight for weight in hidden if weight.ndim == 4] if muon else []
    others = [weight for weight in parameters if not any(weight is matrix for matrix in hidden)]
    found = {f"{name}_adam": torch.optim.Adam(others, lr, betas, amsgrad=amsgrad, fused=device.type != "mps")}
    return found | ({f"{name}_muon": Muon(hidden, lr, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)} if hidden else {})


hidden = [weight for layer in (*encoder[1:-1], *decoder[2:-1]) for weight in layer.parameters()]
student_optimizers = optimizers_of("student", student, hidden, learning_rate, (0.9, 0.9), amsgrad=True)
hidden = [*discriminator.blocks[1:].parameters()]
discriminator_optimizers = optimizers_of("discriminator", discriminator.parameters(), hidden, discriminator_lr, (0.5, 0.99))
optimizers = student_optimizers | discriminator_optimizers
scaler = optimizers["scaler"] = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

# -----------------------------------------------------------------------------
# reports: evaluation, picture, checkpoint, exports, log


def log(record):
    try:
        with open(os.path.join(out_dir, "log.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        stop(f"{out_dir}: could not be written ({error}); a checkpoint there is untouched, --init_from=resume goes on with it")


def progress(images_per_second):
    return {"step": step, "images_seen": images_seen, "images_per_second": round(images_per_second, 2)}


def check_finite(record, step):
    for name, value in record.items():
        if not math.isfinite(value):
            stop(f"step {step}: {name} is {value}. A checkpoint in {out_dir} is from before; go on with --init_from=resume and "
                 f"a smaller --learning_rate, or --dtype=float32")


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # other shapes than in training, too few of them to compile for
def evaluate():
    """Held-out figures of the averaged weights, and a picture. Latent errors are in units of the latents' own variance, 1."""
    with amp:
        latents = chunked(ema_encoder, val_real)
        from_teacher, from_student = chunked(ema_decoder, val_latent).clamp(0, 1), chunked(ema_decoder, latents).clamp(0, 1)
        raw = chunked(decoder, val_latent).clamp(0, 1)
    picture({"original": val_real[:8], f"teacher: {teacher}": val_teacher[:8],
             f"our decoder on the teacher's latents, step {step}": from_teacher[:8],
             "our encoder and decoder": from_student[:8]}, os.path.join(out_dir, "samples", f"{step:07d}.png"))
    figures = {f"val_{name}": value for name, value in measure(from_teacher, val_real).items()}
    figures["val_latent_mse"] = F.mse_loss(latents, val_latent).item()
    std, goal_std = latents.std((0, 2, 3)), val_latent.std((0, 2, 3))
    figures["val_latent_mean_error"] = ((latents.mean((0, 2, 3)) - val_latent.mean((0, 2, 3))).abs() / goal_std).max().item()
    figures["val_latent_std_error"] = (std / goal_std - 1).abs().max().item()  # of the worst channel, both
    figures["val_psnr_raw"] = measure(raw, val_real)["psnr"]  # of the weights as they are, not averaged
    return {name: round(value, 6) for name, value in figures.items()}


def save():
    """Everything that resume and sample.py need, then the averaged weights in the formats that others load."""
    state = {
        "settings": settings, "shape": shape, "step": step, "images_seen": images_seen, "images_averaged": images_averaged,
        "ready": ready, "figures": figures, "held_out": (val_real * 255).round().byte(), "batches_read": batches_read, "due": due,
        "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None}
    for name, part in (networks | optimizers | memories).items():
        state[name] = part.state_dict()
    path, previous = checkpoint_paths(out_dir)
    save_file(path, lambda aside: torch.save(state, aside), keep=previous)
    for half in ready:
        save_taesd(os.path.join(out_dir, f"taesd_{half}.pth"), networks[f"ema_{half}"])
    if len(ready) == 2 and variant == "plain":  # AutoencoderTiny can express no other
        save_diffusers(os.path.join(out_dir, "diffusers"), ema_encoder, ema_decoder, card=model_card(state))


stopping = False


def stop_after_step(signum, frame):
    """Ctrl-C or a preempted machine: finish the step, save, leave. A second Ctrl-C leaves at once."""
    global stopping
    stopping = True
    signal.signal(signum, signal.SIG_DFL)
    os.write(2, b"stopping after this step; once more to leave without saving\n")  # print is not safe in a signal handler


def explain(kind, error, trace):
    """Out of memory in one line; everything else as ever."""
    if issubclass(kind, (torch.OutOfMemoryError, MemoryError)):
        print(f"error: out of memory on {device}: a smaller --batch_size ({batch_size}), --crop ({crop}), --window ({window}) or --replay_size ({replay_size}) "
              f"helps; checkpoints in {out_dir} are untouched", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = explain

# -----------------------------------------------------------------------------
# the losses, and the memory of fakes


def discriminator_loss(real_scores, fake_scores):
    """What D minimises; scores are large for real."""
    if adversarial_form == "squares":  # real towards +1, fake towards -1
        return (real_scores - 1).square().mean() + (fake_scores + 1).square().mean()
    if adversarial_form == "softplus":  # each real above its fake (RpGAN)
        return F.softplus(fake_scores - real_scores).mean()
    return F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean()


def adversarial_loss(real_scores, fake_scores):
    """What the decoder minimises. The first two are relativistic: however good D is, fake and real are pulled together."""
    if adversarial_form == "squares":  # how far D tells the fake from its own real image
        return (fake_scores - real_scores).square().mean()
    if adversarial_form == "softplus":
        return F.softplus(real_scores - fake_scores).mean()
    return -fake_scores.mean()


def lowres_mse(fake, real):
    """MSE of the mean colours of 8x8 patches."""
    return F.mse_loss(F.avg_pool2d(fake, 8), F.avg_pool2d(real, 8))


def frequency_l1(fake, real):
    """L1 of the amplitudes of the 2-D Fourier transform: how much of each frequency there is, wherever it lies."""
    return F.l1_loss(torch.fft.rfft2(fake, norm="ortho").abs(), torch.fft.rfft2(real, norm="ortho").abs())


def of_unit_gradient(loss, fake):
    """A stand-in for the loss whose gradient on the fakes has a standard deviation of 1 / fake.numel() (seraena)."""
    gradient = torch.autograd.grad(scaler.scale(loss), fake)[0]
    return (fake * gradient / (gradient.std() + 1e-12)).mean()


def adaptive_weight(loss, adversarial, layer):
    """Makes the gradients of both losses equally large at the decoder's last layer (VQGAN, CompVis/latent-diffusion)."""
    gradient = torch.autograd.grad(scaler.scale(loss), layer, retain_graph=True)[0]
    of_adversarial = torch.autograd.grad(scaler.scale(adversarial), layer, retain_graph=True)[0]
    return (gradient.norm() / (of_adversarial.norm() + scaler.scale(zero + 1e-4))).clamp(0, 1e4).detach()


def ramp(step):
    """What the learning rates are multiplied by: linearly up to 1 over warmup_iters, down to 0 over the last share, cooldown."""
    return min(1.0, (step + 1) / max(1, warmup_iters), (max_iters - step) / max(1.0, cooldown * max_iters))


def descend(optimizers, loss, lr):
    """One step of each of the optimizers."""
    for optimizer in optimizers.values():
        optimizer.param_groups[0]["lr"] = lr * ramp(step)
        optimizer.zero_grad()
    scaler.scale(loss).backward()
    for optimizer in optimizers.values():
        scaler.step(optimizer)


def lpips_loss():
    """The perceptual distance of the `lpips` package, of images in [0,1]."""
    try:
        import lpips
        distance = lpips.LPIPS(net="vgg", verbose=False).to(device).requires_grad_(False)
    except Exception as error:  # not installed, or its VGG weights cannot be downloaded
        stop(f"--lpips_weight={lpips_weight}: needs the lpips package and its VGG weights ({error}); pip install lpips, or --lpips_weight=0")
    return lambda fake, real: distance(fake * 2 - 1, real * 2 - 1).mean()


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
        uses = self.uses[:self.filled] + torch.rand(self.filled, device=device)
        slots = torch.cat([free, uses.topk(min(self.filled, len(images) - len(free))).indices])
        self.filled += len(free)
        self.images[slots] = (images[:len(slots)].clamp(0, 1) * 255).round().to(torch.uint8)
        self.latents[slots] = latents[:len(slots)].to(torch.float16)
        self.uses[slots] = 0

    def draw(self, n):
        """n different pairs, float32."""
        slots = torch.randperm(self.filled, device=device)[:n]
        self.uses[slots] += 1
        return (self.images[slots].float() / 255).contiguous(memory_format=torch.channels_last), self.latents[slots].float()

    @property
    def full(self):
        return self.filled == len(self.images)

    def state_dict(self):
        return {name: getattr(self, name)[:self.filled].to("cpu", copy=True) for name in ("images", "latents", "uses")}

    def load_state_dict(self, state):
        self.filled = min(len(self.images), len(state["images"]))
        for name, values in state.items():
            getattr(self, name)[:self.filled] = values[:self.filled]


def half_old(replay, fakes, latents):
    """Remember a batch of fakes, so that D does not forget what it once caught; give one back, half new and half from memory."""
    if not len(replay.images):
        return fakes, latents
    replay.push(fakes, latents)
    n = len(fakes) // 2
    old_fakes, old_latents = replay.draw(n)
    return torch.cat([old_fakes, fakes[n:]]), torch.cat([old_latents, latents[n:]])  # the new ones in line with their real images


def cut(squares, n):
    """Cut [N,C,H,W] into n rows of n tiles each: [N*n*n,C,H/n,W/n]."""
    return squares.unflatten(3, (n, -1)).unflatten(2, (n, -1)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


# -----------------------------------------------------------------------------
# start, or go on
zero = torch.zeros((), device=device)
adversarial = train_decoder and adversarial_weight > 0
weights = {"mse": mse_weight, "l1": l1_weight, "lowres_mse": lowres_weight, "frequency": frequency_weight, "lpips": lpips_weight}
pixel_losses = {"mse": F.mse_loss, "l1": F.l1_loss, "lowres_mse": lowres_mse, "frequency": frequency_l1}
if train_decoder and lpips_weight > 0:
    pixel_losses["lpips"] = lpips_loss()
pair_shapes = (3, crop, crop), (vae.latent_channels, crop // vae.factor, crop // vae.factor)
across = max(1, window // crop)  # crops side by side in a window
windows = max(1, round(batch_size / echo / across**2))  # read at once
pool = Memory(max(64 * batch_size, 16 * windows * across**2), *pair_shapes)  # of crops, in which those of many images mix
replay = Memory(replay_size if adversarial else 0, *pair_shapes)
memories = {"pool": pool, "replay": replay}
step = images_seen = images_averaged = batches_read = 0
figures = {}  # of the last evaluation
due = 0.0  # crops that the pool still wants
ready = [half for half in ("encoder", "decoder") if settings[f"train_{half}"]]  # an untrained half is noise: not exported
if checkpoint:
    if checkpoint["shape"] != shape:
        stop(f"--init_from={init_from}: its student is {checkpoint['shape']}, this run asks for {shape}")
    for name, network in networks.items():
        if init_from != "resume" and name in ("encoder", "decoder"):
            name = f"ema_{name}"  # a new run starts from the averaged weights, the better ones
        if name not in checkpoint:  # weights of others have no D, and may be half a student
            continue
        shapes = [{key: value.shape for key, value in state.items()} for state in (checkpoint[name], network.state_dict())]
        if name == "discriminator" and init_from != "resume" and shapes[0] != shapes[1]:
            continue  # a fork with another D may start from our students, with a fresh D
        try:
            network.load_state_dict(checkpoint[name])
        except RuntimeError as error:
            stop(f"--init_from={init_from}: its {name} does not fit: {error}")
    if all(half in checkpoint["ready"] for half in ready):
        images_averaged = checkpoint.get("images_averaged", 10 * ema_halflife)  # those of others count as an average at its full length
    ready = sorted({*ready, *checkpoint["ready"]})
if init_from == "resume":
    lacking = {"step", "images_seen", "batches_read", "due", "figures", "rng", "cuda_rng", *networks, *optimizers, *memories} - checkpoint.keys()
    if lacking:
        stop(f"--init_from=resume: the checkpoint in {out_dir} is of another version, it lacks {', '.join(sorted(lacking))}; "
             f"--init_from={out_dir} and a new --out_dir start from its weights")
    step, images_seen, batches_read, due, figures = (checkpoint[name] for name in ("step", "images_seen", "batches_read", "due", "figures"))
    for name, part in (optimizers | memories).items():
        if checkpoint[name]:  # a scaler that was off has no state
            part.load_state_dict(checkpoint[name])
    torch.set_rng_state(checkpoint["rng"])
    if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
        torch.cuda.set_rng_state(checkpoint["cuda_rng"])
    if step >= max_iters:
        stop(f"--max_iters={max_iters}: the run in {out_dir} has done {step} steps; raise --max_iters to go on")
first_step, first_image, checkpoint = step, images_seen, None  # frees its memory
profile_from = max(first_step + 64, adversarial_start) + 10  # the pool is full and D at work
require("profile", not profile or profile_from + profile <= max_iters, f"begins at step {profile_from}; raise --max_iters")

dtype_name = str(dtype).removeprefix("torch.")
print(f"teacher   {teacher}: {vae}")
print(f"student   width {width}, {variant}" + " (diffusers cannot express it: exports are .pth only)" * (variant != "plain")
      + f": encoder {parameters(encoder):,}, decoder {parameters(decoder):,} parameters"
      + f"; discriminator {parameters(discriminator):,}" * adversarial)
print(f"images    {len(images.train):,} to train on, {len(images.val):,} held out" if images.train else
      "images    synthetic dead leaves, to try things out: a real run wants --data_dir=a folder of images")
print(f"batch     {batch_size} crops of {crop} pixels, each used {echo:g} times, cut from squares of {across * crop} pixels")
print(f"recipe    {recipe}: " + ", ".join(f"{weight:g} x {name}" for name, weight in weights.items() if weight)
      + f", {adversarial_weight:g} x adversarial ({adversarial_form}, scaling {adversarial_scaling}) from step {adversarial_start}" * adversarial
      + f"; {'Muon' if muon else 'Adam'} at {learning_rate:g}, discriminator {discriminator_lr:g}; all settings are in log.jsonl")
print(f"machine   {device}, {dtype_name}, compile {'on' if compile else 'off'}, torch {torch.__version__}")
val_real = images.held_out(eval_images, eval_size).to(device, memory_format=torch.channels_last) / 255
val_latent = chunked(vae.encode, val_real)
val_teacher = chunked(vae.decode, val_latent)
vae.drop_decoder()
goal = measure(val_teacher, val_real)
print(f"goal      the teacher's own round trip of the held-out images: psnr {goal['psnr']:.2f} dB, sharpness {goal['sharpness']:.2f}", flush=True)
images.batch(across * crop, 1, 0, [seed, batches_read])  # a folder of broken files stops the program here, before it leaves anything
os.makedirs(out_dir, exist_ok=True)
versions = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": importlib.metadata.version("diffusers")}
picture({"original": val_real[:8], f"teacher: {teacher}": val_teacher[:8]}, os.path.join(out_dir, "samples", "teacher.png"))
log({"settings": settings, "versions": versions, "device": str(device), "dtype": dtype_name, "compile": compile, "teacher": goal})

# -----------------------------------------------------------------------------
# the loop
if compile:  # when first called, each for its one shape; `.forward`, for Module.compile does not see through a Sequential
    for network in (encoder, decoder, discriminator) + (vae.vae.encoder,) * (not vae.video):
        network.forward = torch.compile(network.forward, dynamic=False)
    torch._functorch.config.donated_buffer = adversarial_scaling != "adaptive"  # which goes through a graph twice
signal.signal(signal.SIGINT, stop_after_step)
signal.signal(signal.SIGTERM, stop_after_step)
on = {"encoder": train_encoder, "encoder_adversarial": encoder_adversarial_weight > 0, "adversarial": adversarial, "discriminator": adversarial}
on |= {name: train_decoder and (weight > 0 or name == "mse" and adversarial_start > 0 and not l1_weight) for name, weight in weights.items()}
term_names = [name for name in on if on[name]]
history, waited = [], 0.0
train_seconds, clock = 0.0, time.time()  # spent training; the last report or evaluation
loader = batches(images, across * crop, windows, color_augment, seed, workers, start=batches_read, pin=device.type == "cuda")
while True:
    # look, save, stop
    if step == max_iters or stopping or step % eval_interval == 0 and (step > first_step or init_from not in ("scratch", "resume")):
        if not stopping:
            figures = evaluate()
            check_finite(figures, step)
            log(progress((images_seen - first_image) / max(train_seconds, 1e-9)) | figures)
            print(f"eval {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)
        save()
        if step >= max_iters or stopping:
            break
        clock = time.time()

    # real images and the teacher's latents: drawn from the pool, which takes in twice as many as it gives until it is full
    due += batch_size / echo if pool.full else 2 * batch_size
    while due > 0:
        waiting = time.time()
        squares = next(loader).to(device, non_blocking=True)
        waited, batches_read = waited + time.time() - waiting, batches_read + 1
        squares = squares.to(memory_format=torch.channels_last).float() / 255
        pool.push(cut(squares, across), cut(vae.encode(squares), across))
        due -= windows * across**2
    real, latent = pool.draw(batch_size)

    # the terms of the loss: each is reported by its name
    terms = dict.fromkeys(term_names, zero)
    loss = zero
    if train_encoder:
        with amp:
            encoded = encoder(real).float()
        loss = terms["encoder"] = F.mse_loss(encoded, latent) if encoder_loss == "mse" else F.l1_loss(encoded, latent)
    if train_decoder:
        warm = step >= adversarial_start
        judged = adversarial and warm
        encoder_judged = judged and train_encoder and encoder_adversarial_weight > 0
        if latent_noise > 0:
            latent = latent + latent_noise * torch.rand(len(latent), 1, 1, 1, device=device) * torch.randn_like(latent)
        with amp:
            fake = decoder(latent).float()
        for name, weight in weights.items() if warm or mse_weight or l1_weight else [("mse", 1.0)]:
            if weight > 0:
                terms[name] = pixel_losses[name](fake, real)
                loss = loss + weight * terms[name]
    if train_decoder and judged:
        # discriminator: a step of its own, on real images and on fakes new and old
        old_and_new_fake, its_latent = half_old(replay, fake.detach(), latent)
        with amp:
            real_scores = discriminator(real, latent).float()
            fake_scores = discriminator(old_and_new_fake, its_latent).float()
            if encoder_judged:
                encoded_scores = discriminator(real, encoded.detach()).float()
        terms["discriminator"] = discriminator_loss(real_scores, fake_scores)
        if encoder_judged:
            terms["discriminator"] = terms["discriminator"] + discriminator_loss(real_scores, encoded_scores)
        descend(discriminator_optimizers, terms["discriminator"], discriminator_lr)

        # decoder: cannot be told from the real image
        discriminator.requires_grad_(False)
        with amp:
            real_scores = discriminator(real, latent).float()
            fake_scores = discriminator(fake, latent).float()
            if encoder_judged:
                encoded_scores = discriminator(real, encoded).float()
        discriminator.requires_grad_(True)
        pull = terms["adversarial"] = adversarial_loss(real_scores, fake_scores)
        if adversarial_scaling == "unit":
            pull = of_unit_gradient(pull, fake)
        if adversarial_scaling == "adaptive":
            pull = pull * adaptive_weight(loss, pull, decoder[-1].weight)
        loss = loss + adversarial_weight * pull
        if encoder_judged:
            terms["encoder_adversarial"] = adversarial_loss(real_scores, encoded_scores)
            loss = loss + encoder_adversarial_weight * terms["encoder_adversarial"]
    descend(student_optimizers, loss, learning_rate)
    scaler.update()
    step, images_seen, images_averaged = step + 1, images_seen + batch_size, images_averaged + batch_size

    # average the weights over images; early on over the last tenth of them, so that the first noise is soon forgotten
    halflife = min(ema_halflife, 0.1 * images_averaged)
    with torch.no_grad():
        torch._foreach_lerp_(averages, trained, 1 - 0.5 ** (batch_size / max(halflife, 1e-9)))

    if step == first_step + 1:
        loss.item()  # waits for the device
        print(f"start     {time.time() - started:.1f} s until the first step was done", flush=True)
    if profile and step == profile_from:
        profiler = torch.profiler.profile()
        profiler.start()
    if profile and step == profile_from + profile:
        profiler.stop()
        save_file(os.path.join(out_dir, "trace.json"), profiler.export_chrome_trace)
        print(f"profile   {profile} steps: {os.path.join(out_dir, 'trace.json')}", flush=True)

    # report, and before every save: the terms stay on the device until then
    history.append(torch.stack(list(terms.values())).detach())
    if step % log_interval == 0 or step % eval_interval == 0 or step == max_iters or stopping:
        history = torch.stack(history).cpu()
        for i, row in enumerate(history.tolist()):
            check_finite(dict(zip(terms, row)), step - len(history) + 1 + i)
        mean = dict(zip(terms, history.mean(0).tolist()))
        seconds = time.time() - clock
        rate = len(history) * batch_size / seconds
        report = progress(rate) | {name: round(value, 6) for name, value in mean.items()}
        report |= {"data_wait": round(waited / seconds, 3), "peak_memory_mb": peak_memory_mb(device)}
        log(report)
        left = datetime.timedelta(seconds=round((max_iters - step) * batch_size / rate))
        shown = "  ".join(f"{name} {value:.4g}" for name, value in report.items() if name not in ("step", "images_seen"))
        print(f"step {step}/{max_iters}  images_seen {images_seen:,}  {shown}  left {left}", flush=True)
        history, waited, train_seconds, clock = [], 0.0, train_seconds + seconds, time.time()

loader.close()
rate = (images_seen - first_image) / max(train_seconds, 1e-9)
print(f"---\nout_dir: {out_dir}")
for name, value in (progress(rate) | {"peak_memory_mb": peak_memory_mb(device), "seconds": round(time.time() - started)} | (figures if not stopping else {})).items():
    print(f"{name}: {value}")
if stopping:
    print(f"stopped and saved at step {step}; go on with --out_dir={out_dir} --init_from=resume")
