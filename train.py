r"""Train a tiny autoencoder (TAESD) that speaks the latent language of a big VAE, the teacher.

    python train.py --teacher=sdxl --batch_size=16 --data_dir=pictures

                real image x [0,1]
               /         |         \
      teacher.encode     |       encoder --> latent'     encoder loss: latent' = latent
              |          |
            latent ------|---> decoder --> fake          decoder loss: fake cannot be told from x, nor its colours
              |          |        |
        discriminator(x or fake | latent)                + replay buffer of old fakes

The encoder copies the teacher's latents. The decoder is a conditional GAN on real images: it may invent detail, but not
shift colour. The method is that of the TAESD author, from github.com/madebyollin/taesd, issues 2 and 11, and his seraena.
"""
import copy
import datetime
import importlib.util
import json
import math
import os
import platform
import signal
import time

# before the imports that take seconds; until the loop runs, Ctrl-C leaves at once
started = time.time()
signal.signal(signal.SIGINT, signal.SIG_DFL)

import diffusers
import torch
import torch.nn.functional as F

from configure import configure, peak_memory_mb, pick_device, pick_dtype, require_positive, stop
from data import Images, batches
from model import Decoder, Discriminator, Encoder, load_checkpoint, parameters, save_diffusers, save_file, save_taesd
from sample import chunked, measure, picture
from teacher import NAMES, Teacher

# -----------------------------------------------------------------------------
# run
out_dir = "out"              # checkpoint, exports, pictures and log.jsonl go here
init_from = "scratch"        # scratch; resume (go on with out_dir); or another run's out_dir, to start from its weights
max_iters = 300_000          # steps; seraena's example trains about this many at 96 pixels
seed = 0                     # of weights, crops and replay
# data
data_dir = ""                # folder of images, searched recursively; '' = synthetic dead leaves, to try things out
val_dir = ""                 # folder of held-out images; '' = 5% of data_dir, chosen by file name
crop = 96                    # training crop in pixels, a multiple of the teacher's factor; finish a long run at 256
batch_size = 16              # crops a step
color_augment = 0.07         # share of crops with randomly mixed colour channels; 0 = off
echo = 2                     # steps that a crop and its teacher latent serve: 1 / echo of each batch is new; 1 = off
workers = 4                  # threads that read images
# teacher and student
teacher = "toy"              # toy, sd, sd-mse, sdxl, a diffusers folder, a hub id, or a taesd.py pair's encoder.pth
width = 64                   # channels of the student: 64 = the released TAESD; 32 or 16 for phones and CPUs
train_encoder = True         # false = leave the encoder as init_from has it
train_decoder = True         # false = leave the decoder as init_from has it
# losses
adversarial_weight = 1.0     # relativistic adversarial loss; 0 = off: no discriminator, plain MSE throughout
lowres_weight = 10.0         # MSE of 8x8-pooled images, which holds the colours; 0 = off
mse_iters = 200              # first steps of a decoder from scratch: plain MSE instead, so D has something to judge
replay_size = 4096           # old fakes kept for the discriminator, as bytes on the device; 0 = only fresh fakes
# optimizer
learning_rate = 3e-4         # of encoder and decoder: Adam, betas (0.9, 0.9), amsgrad
discriminator_lr = 3e-4      # of the discriminator: Adam, betas (0.5, 0.99)
ema_halflife = 10_000        # images after which a weight counts half in the average that is evaluated and exported
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
settings = configure(globals())
checkpoint = None
if init_from == "resume":
    checkpoint = load_checkpoint(out_dir)
    before = {name: value for name, value in checkpoint["settings"].items() if name in settings and name not in ("out_dir", "init_from", "profile")}
    globals().update(before)         # the run's own settings...
    settings = configure(globals())  # ...but for what this command line says
elif os.path.exists(os.path.join(out_dir, "ckpt.pt")):
    stop(f"--out_dir={out_dir}: holds a run already; --init_from=resume goes on with it, another --out_dir starts a new one")
elif init_from != "scratch":
    checkpoint = load_checkpoint(init_from)


def require(name, holds, rule):
    if not holds:
        stop(f"--{name}={globals()[name]}: {rule}")


require_positive(settings, "max_iters", "batch_size", "echo", "workers", "width", "log_interval", "eval_interval", "eval_images", "learning_rate",
                 "discriminator_lr", "ema_halflife")
echo = settings["echo"] = math.gcd(echo, batch_size)  # 16 images have no third
require("seed", seed < 2**32 - 1, "must be less than 2**32 - 1")
require("color_augment", color_augment <= 1, "must be between 0 and 1")
require("replay_size", replay_size == 0 or replay_size >= batch_size, f"must be 0 or at least the batch size, {batch_size}")
require("train_decoder", train_encoder or train_decoder, "nothing is left to train: train_encoder is false, too")
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
    require(name, globals()[name] >= 16 and globals()[name] % vae.factor == 0, f"must be 16 or more and a multiple of the teacher's factor, {vae.factor}")

# -----------------------------------------------------------------------------
# networks and optimizers
torch.manual_seed(seed)
torch.backends.cudnn.benchmark = True  # crops have one size
shape = {"latent_channels": vae.latent_channels, "factor": vae.factor, "width": width}
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

fused = device.type != "mps"
student_optimizer = torch.optim.Adam(student, learning_rate, betas=(0.9, 0.9), amsgrad=True, fused=fused)
discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), discriminator_lr, betas=(0.5, 0.99), fused=fused)
scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
optimizers = {"student_optimizer": student_optimizer, "discriminator_optimizer": discriminator_optimizer, "scaler": scaler}
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


def check_finite(record):
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
    figures["val_psnr_raw"] = measure(raw, val_real)["psnr"]  # of the weights as they are, not averaged
    return {name: round(value, 6) for name, value in figures.items()}


def save():
    """Everything that resume and sample.py need, then the averaged weights in the formats that others load."""
    state = {
        "settings": settings, "shape": shape, "step": step, "images_seen": images_seen, "images_averaged": images_averaged,
        "ready": ready, "held_out": (val_real * 255).round().byte(), "batches_read": batches_read,
        "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None}
    for name, part in (networks | optimizers | memories).items():
        state[name] = part.state_dict()
    save_file(os.path.join(out_dir, "ckpt.pt"), lambda aside: torch.save(state, aside))
    for half in ready:
        save_taesd(os.path.join(out_dir, f"taesd_{half}.pth"), networks[f"ema_{half}"])
    if len(ready) == 2:
        save_diffusers(os.path.join(out_dir, "diffusers"), ema_encoder, ema_decoder)


stopping = False


def stop_after_step(signum, frame):
    """Ctrl-C or a preempted machine: finish the step, save, leave. A second Ctrl-C leaves at once."""
    global stopping
    stopping = True
    signal.signal(signum, signal.SIG_DFL)
    os.write(2, b"stopping after this step; once more to leave without saving\n")  # print is not safe in a signal handler


# -----------------------------------------------------------------------------
# the losses, and the memory of fakes


def discriminator_loss(real_scores, fake_scores):
    """Least squares: real towards +1, fake towards -1."""
    return (real_scores - 1).square().mean() + (fake_scores + 1).square().mean()


def relativistic_distance(real_scores, fake_scores):
    """How far D tells the fake from its own real image. It vanishes only where both score alike, however good D is."""
    return (fake_scores - real_scores).square().mean()


def lowres_mse(fake, real):
    """MSE of the mean colours of 8x8 patches."""
    return F.mse_loss(F.avg_pool2d(fake, 8), F.avg_pool2d(real, 8))


class Memory:
    """Pairs of image [3,H,W] in [0,1] and latent, kept on the device; images as bytes. Drawn and replaced at random."""

    def __init__(self, size, image_shape, latent_shape):
        self.images = torch.zeros(size, *image_shape, dtype=torch.uint8, device=device)
        self.latents = torch.zeros(size, *latent_shape, dtype=torch.float16, device=device)
        self.filled = 0

    def push(self, images, latents):
        """Append while there is room, then replace at random."""
        free = torch.arange(self.filled, min(self.filled + len(images), len(self.images)), device=device)
        slots = torch.cat([free, torch.randperm(self.filled, device=device)[:len(images) - len(free)]])
        self.filled += len(free)
        self.images[slots] = (images[:len(slots)].clamp(0, 1) * 255).round().to(torch.uint8)
        self.latents[slots] = latents[:len(slots)].to(torch.float16)

    def fill_up(self, images, latents, n):
        """These pairs and as many from memory as make it a batch of n, float32."""
        slots = torch.randint(max(1, self.filled), (n - len(images),), device=device)
        images = torch.cat([images, self.images[slots].float() / 255]).contiguous(memory_format=torch.channels_last)
        return images, torch.cat([latents, self.latents[slots].float()])

    @property
    def full(self):
        return self.filled == len(self.images)

    def state_dict(self):
        return {"images": self.images[:self.filled].to("cpu", copy=True), "latents": self.latents[:self.filled].to("cpu", copy=True)}

    def load_state_dict(self, state):
        self.filled = min(len(self.images), len(state["images"]))
        self.images[:self.filled], self.latents[:self.filled] = state["images"][:self.filled], state["latents"][:self.filled]


def half_old(replay, fakes, latents):
    """Remember a batch of fakes, so that D does not forget what it once caught; give one back, half new and half from memory."""
    replay.push(fakes, latents)
    n = len(fakes) // 2 if len(replay.images) else 0
    return replay.fill_up(fakes[n:], latents[n:], len(fakes))


# -----------------------------------------------------------------------------
# start, or go on
adversarial = train_decoder and adversarial_weight > 0
pair_shapes = (3, crop, crop), (vae.latent_channels, crop // vae.factor, crop // vae.factor)
new_images = batch_size // echo  # in a batch; the others come from the pool, where a crop is mixed with those of 64 batches
pool = Memory(64 * batch_size if echo > 1 else 0, *pair_shapes)
replay = Memory(replay_size if adversarial else 0, *pair_shapes)
memories = {"pool": pool, "replay": replay}
step = images_seen = images_averaged = batches_read = 0
ready = [half for half in ("encoder", "decoder") if settings[f"train_{half}"]]  # an untrained half is noise: not exported
if checkpoint:
    if checkpoint["shape"] != shape:
        stop(f"--init_from={init_from}: its student is {checkpoint['shape']}, this run asks for {shape}")
    for name, network in networks.items():
        if init_from != "resume" and name in ("encoder", "decoder"):
            name = f"ema_{name}"  # a new run starts from the averaged weights, the better ones
        try:
            network.load_state_dict(checkpoint[name])
        except RuntimeError as error:  # a fork with another D may start from our students, with a fresh D
            if name != "discriminator" or init_from == "resume":
                stop(f"--init_from={init_from}: its {name} does not fit: {error}")
    if all(half in checkpoint["ready"] for half in ready):
        images_averaged = checkpoint["images_averaged"]
        if init_from != "resume":
            mse_iters = settings["mse_iters"] = 0
    ready = sorted({*ready, *checkpoint["ready"]})
if init_from == "resume":
    if checkpoint["settings"]["crop"] != crop:
        stop(f"--crop={crop}: a resumed run keeps its crop; to go on at another, start a new run with --init_from={out_dir} "
             f"and its own --out_dir")
    step, images_seen, batches_read = checkpoint["step"], checkpoint["images_seen"], checkpoint["batches_read"]
    for name, part in (optimizers | memories).items():
        if checkpoint[name]:  # a scaler that was off has no state
            part.load_state_dict(checkpoint[name])
    student_optimizer.param_groups[0]["lr"], discriminator_optimizer.param_groups[0]["lr"] = learning_rate, discriminator_lr
    torch.set_rng_state(checkpoint["rng"])
    if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
        torch.cuda.set_rng_state(checkpoint["cuda_rng"])
    if step >= max_iters:
        stop(f"--max_iters={max_iters}: the run in {out_dir} has done {step} steps; raise --max_iters to go on")
first_step, first_image, checkpoint = step, images_seen, None  # frees its memory
profile_from = max(first_step + 64, mse_iters) + 10  # the pool is full and D at work
require("profile", not profile or profile_from + profile <= max_iters, f"begins at step {profile_from}; raise --max_iters")

dtype_name = str(dtype).removeprefix("torch.")
print(f"teacher   {teacher}: {vae.class_name}, {vae.parameters:,} parameters, factor {vae.factor}, {vae.latent_channels} channels, "
      f"scaling factor {vae.scaling_factor:g}, shift {vae.shift_factor:g}")
print(f"student   width {width}: encoder {parameters(encoder):,}, decoder {parameters(decoder):,} parameters"
      + f"; discriminator {parameters(discriminator):,}" * adversarial)
print(f"images    {len(images.train):,} to train on, {len(images.val):,} held out" if images.train else
      "images    synthetic dead leaves, to try things out: a real run wants --data_dir=a folder of images")
print(f"batch     {batch_size} crops of {crop} pixels" + f", {new_images} of them new after 64 steps: each serves {echo} steps" * (echo > 1))
print(f"machine   {device}, {dtype_name}, compile {'on' if compile else 'off'}, torch {torch.__version__}")
val_real = images.held_out(eval_images, eval_size).to(device, memory_format=torch.channels_last) / 255
val_latent = chunked(vae.encode, val_real)
val_teacher = chunked(vae.decode, val_latent)
vae.drop_decoder()
goal = measure(val_teacher, val_real)
print(f"goal      the teacher's own round trip of the held-out images: psnr {goal['psnr']:.2f} dB, sharpness {goal['sharpness']:.2f}", flush=True)
images.batch(crop, new_images, 0, [seed, batches_read])  # a folder of broken files stops the program here, before it leaves anything
os.makedirs(out_dir, exist_ok=True)
versions = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
picture({"original": val_real[:8], f"teacher: {teacher}": val_teacher[:8]}, os.path.join(out_dir, "samples", "teacher.png"))
log({"settings": settings, "versions": versions, "device": str(device), "dtype": dtype_name, "compile": compile, "teacher": goal})

# -----------------------------------------------------------------------------
# the loop
if compile:  # when first called, each for its one shape; `.forward`, for Module.compile does not see through a Sequential
    for network in (encoder, decoder, discriminator, vae.vae.encoder):
        network.forward = torch.compile(network.forward, dynamic=False)
signal.signal(signal.SIGINT, stop_after_step)
signal.signal(signal.SIGTERM, stop_after_step)
zero = torch.zeros((), device=device)
figures, history, waited = {}, [], 0.0
train_seconds, clock = 0.0, time.time()  # since the last report or evaluation: every evaluation comes right after a report
loader = batches(images, crop, new_images, color_augment, seed, workers, start=batches_read, pin=device.type == "cuda")
while True:
    # look, save, stop
    if step == max_iters or stopping or step % eval_interval == 0 and (step > first_step or init_from not in ("scratch", "resume")):
        figures = evaluate() if not stopping else {}
        check_finite(figures)
        if figures:
            log(progress((images_seen - first_image) / max(train_seconds, 1e-9)) | figures)
            print(f"eval {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)
        save()
        if step >= max_iters or not figures:
            break
        clock = time.time()

    # real images and the teacher's latents: a few new ones, or, until the pool is full, new ones only; the others from the pool
    waiting = time.time()
    parts = [next(loader).to(device, non_blocking=True) for _ in range(1 if pool.full else echo)]
    waited, batches_read = waited + time.time() - waiting, batches_read + len(parts)
    parts = [part.to(memory_format=torch.channels_last).float() / 255 for part in parts]
    new, new_latent = torch.cat(parts), torch.cat([vae.encode(part) for part in parts])  # in parts: one shape for the teacher
    real, latent = pool.fill_up(new, new_latent, batch_size)
    pool.push(new, new_latent)

    # the terms of the loss: each is reported by its name
    terms = dict.fromkeys(("encoder_mse", "decoder_mse", "adversarial", "lowres_mse", "discriminator"), zero)
    if train_encoder:
        with amp:
            terms["encoder_mse"] = F.mse_loss(encoder(real).float(), latent)
    if train_decoder:
        with amp:
            fake = decoder(latent).float()
        if step < mse_iters or not adversarial:
            terms["decoder_mse"] = F.mse_loss(fake, real)
        else:
            # discriminator: a step of its own, on real images and on fakes new and old
            old_and_new_fake, its_latent = half_old(replay, fake.detach(), latent)
            with amp:
                real_scores = discriminator(real, latent).float()
                fake_scores = discriminator(old_and_new_fake, its_latent).float()
            terms["discriminator"] = discriminator_loss(real_scores, fake_scores)
            discriminator_optimizer.zero_grad()
            scaler.scale(terms["discriminator"]).backward()
            scaler.step(discriminator_optimizer)

            # decoder: cannot be told from the real image, and keeps its colours
            discriminator.requires_grad_(False)
            with amp:
                real_scores = discriminator(real, latent).float()
                fake_scores = discriminator(fake, latent).float()
            discriminator.requires_grad_(True)
            terms["adversarial"] = relativistic_distance(real_scores, fake_scores)
            terms["lowres_mse"] = lowres_mse(fake, real)
    loss = terms["encoder_mse"] + terms["decoder_mse"] + adversarial_weight * terms["adversarial"] + lowres_weight * terms["lowres_mse"]
    student_optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(student_optimizer)
    scaler.update()
    step, images_seen, images_averaged = step + 1, images_seen + batch_size, images_averaged + batch_size

    # average the weights over images; early on over the last tenth of them, so that the first noise is soon forgotten
    halflife = min(ema_halflife, 0.1 * images_averaged)
    with torch.no_grad():
        torch._foreach_lerp_(averages, trained, 1 - 0.5 ** (batch_size / halflife))

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
        mean = dict(zip(terms, torch.stack(history).mean(0).tolist()))
        check_finite(mean)
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
for name, value in (progress(rate) | {"peak_memory_mb": peak_memory_mb(device), "seconds": round(time.time() - started)} | figures).items():
    print(f"{name}: {value}")
if stopping:
    print(f"stopped and saved at step {step}; go on with --out_dir={out_dir} --init_from=resume")
