"""Speed: train.py beside the training loop of seraena's TAESDXL notebook, on this machine, in this run, turn by turn.

    python bench.py                                                                     # a VAE of SDXL's size, random weights
    python bench.py --teacher=taef2_encoder.pth --data_dir=photos --crop=64 --batch_size=16
    python bench.py --teacher=taef2_encoder.pth --data_dir=photos --crop=64 --batch_size=16 --val_dir=val --minutes=10   # quality

The reference (github.com/madebyollin/seraena) is written down again here from its published facts: AdamW, a discriminator
with BatchNorm and 7.5M parameters, a Python list of old fakes, float16 autocast on a GPU, float32 on a CPU.
An image counts each time it is trained on; train.py trains on a crop --echo times, so the line of new images is given, too.
Also printed is the floor: the time that a step's multiplications or memory traffic need at the rates measured here.
"""
import copy
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from configure import configure, pick_device, pick_dtype, require_positive
from data import Images, dead_leaves, find_images, to_tensor
from model import Decoder, Discriminator, Encoder, load_taesd
from sample import chunked, measure, picture
from teacher import NAMES, Teacher

# -----------------------------------------------------------------------------
# settings
teacher = "sdxl-random"    # a VAE of SDXL's size with random weights, on which speed does not depend; or as in train.py, without ::
data_dir = ""              # folder of images; '' = 24 synthetic pictures of 512 pixels, written as JPEG
crop = 96                  # training crop in pixels
batch_size = 8             # crops a step
pairs = 5                  # times that each takes its turn
steps = 10                 # steps timed in a turn, after some to warm up (3 of the reference, 70 of train.py, whose pool must fill)
extra = ""                 # more flags for train.py alone, separated by spaces, for example --echo=1
minutes = 0.0              # instead: train the reference alone for so long, and measure it every minute on val_dir
val_dir = ""               # folder of held-out images; '' = 5% of data_dir
reference_lr = 3e-5        # of the reference's encoder and decoder
width = 64                 # channels of the reference's student
reference_dtype = "auto"   # of the reference's autocast and teacher: auto (as in the notebook), or as train.py's --dtype
device = "auto"            # auto, cuda, mps or cpu
# -----------------------------------------------------------------------------


# the reference

class ReferenceDiscriminator(nn.Module):
    def __init__(self, latent_channels):
        super().__init__()
        widths, strides = (3 + latent_channels, 64, 128, 256, 512, 512, 512), (1, 2, 2, 2, 1, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(n_in, n_out, 4 if stride == 2 else 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True))
            for n_in, n_out, stride in zip(widths, widths[1:], strides))
        self.scores = nn.ModuleList(nn.Conv2d(n_out, 1, 1, bias=False) for n_out in widths[1:])

    def forward(self, image, latent):
        x, scores = torch.cat([image * 2 - 1, F.interpolate(latent, image.shape[-2:])], 1), []
        for block, score in zip(self.blocks, self.scores):
            x = block(x)
            scores.append(F.adaptive_avg_pool2d(score(x), latent.shape[-2:]))
        return torch.cat(scores, 1)


class ReferenceCrops(torch.utils.data.Dataset):
    """A random square of a random side from the whole decoded file, resized."""
    def __init__(self, paths, size):
        self.paths, self.size = paths, size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        image = Image.open(self.paths[i])
        side = random.randint(self.size, max(self.size, min(image.size)))
        left, top = random.randint(0, max(0, image.width - side)), random.randint(0, max(0, image.height - side))
        image = image.crop((left, top, left + side, top + side)).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return to_tensor([image.convert("RGB")])[0].contiguous()


def reference_teacher(name, place, dtype):
    """(function from [0,1] images to latents, latent channels, factor, encoder): the VAE as it is, in plain memory order."""
    if name.endswith(".pth"):
        encoder, shape = load_taesd(name)
        encoder.to(place, dtype).requires_grad_(False)
        return encoder, shape["latent_channels"], shape["factor"], encoder
    from diffusers import AutoencoderKL
    vae = AutoencoderKL.from_pretrained(NAMES.get(name, name), torch_dtype=dtype, low_cpu_mem_usage=False).to(place).requires_grad_(False)
    return (lambda images: vae.encode(images * 2 - 1).latent_dist.sample() * vae.config.scaling_factor,
            vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1), vae.encoder)


def reference_loop(teacher, paths):
    """Endless generator: the averaged student after each training step of the notebook."""
    place = pick_device(device)
    dtype = pick_dtype(reference_dtype.replace("auto", "float16" if place.type == "cuda" else "float32"), place)
    amp, half = torch.autocast(place.type, dtype, enabled=dtype != torch.float32), dtype == torch.float16
    encode, latent_channels, factor, _ = reference_teacher(teacher, place, dtype)
    model = nn.ModuleDict({"encoder": Encoder(latent_channels, factor, width), "decoder": Decoder(latent_channels, factor, width)}).to(place)
    average, averaged_at = copy.deepcopy(model), time.time()
    discriminator = ReferenceDiscriminator(latent_channels).to(place)
    optimizer = torch.optim.AdamW(model.parameters(), reference_lr, betas=(0.9, 0.99))
    discriminator_optimizer = torch.optim.AdamW(discriminator.parameters(), 3e-4, betas=(0.9, 0.99))
    scaler, discriminator_scaler = (torch.amp.GradScaler(place.type, enabled=half) for _ in range(2))
    replay, capacity = [], 16384
    torch.backends.cudnn.benchmark = True
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    loader = torch.utils.data.DataLoader(ReferenceCrops(paths * 10_000, crop), batch_size, shuffle=True,  # one epoch, no restart
                                         num_workers=min(12, cores))
    while True:
        for images in loader:
            with torch.no_grad():
                images = images.to(place).to(dtype) / 255
                real, latent = images.float(), encode(images).float()
            with amp:
                encoder_loss = F.mse_loss(model["encoder"](real), latent)
                decoded = model["decoder"](latent)
            fake = decoded.detach().float()

            # discriminator: each image of the batch is real or fake by the toss of a coin, half of the fakes are old
            for pair in zip(fake, latent):
                if len(replay) < capacity:
                    replay.append([tensor.clone() for tensor in pair])
                else:
                    for old, new in zip(random.choice(replay), pair):
                        old.copy_(new)
            old_fake, old_latent = (torch.stack(tensors) for tensors in zip(*random.choices(replay, k=max(1, batch_size // 2))))
            n = batch_size - len(old_fake)
            is_fake = torch.rand(batch_size, 1, 1, 1, device=place) < 0.5
            image = torch.where(is_fake, torch.cat([fake[:n], old_fake]), real)
            context = torch.where(is_fake, torch.cat([latent[:n], old_latent]), latent)
            discriminator.train()
            with amp:
                scores = discriminator(image, context)
            discriminator_loss = F.mse_loss(scores.float(), (is_fake * 2.0 - 1).expand(scores.shape))
            discriminator_optimizer.zero_grad()
            discriminator_scaler.scale(discriminator_loss).backward()
            discriminator_scaler.step(discriminator_optimizer)
            discriminator_scaler.update()
            discriminator_loss.item()

            # decoder: along the gradient that brings the fake's scores to the real image's, at unit size
            discriminator.eval()
            correction = torch.zeros_like(fake, requires_grad=True)
            with amp:
                with torch.no_grad():
                    goal = discriminator(real, latent)
                distance = (goal - discriminator(fake + correction, latent)).float().square().mean((1, 2, 3)).sum()
            correction = -torch.autograd.grad(distance, correction)[0]
            target = fake + correction / (correction.std(correction=0) + 1e-5)
            loss = encoder_loss + F.mse_loss(decoded.float(), target)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if time.time() > averaged_at + 2:
                averaged_at = time.time()
                with torch.no_grad():
                    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 0.05)
            loss.item()
            yield average


# -----------------------------------------------------------------------------
# the floor

def work(network, *inputs):
    """(multiply-add operations x 2, bytes in and out) of the convolutions and linear layers of a forward pass, 2 bytes a value."""
    total = [0, 0]

    def count(layer, inputs, output):
        total[0] += 2 * output.numel() * layer.weight[0].numel()
        total[1] += 2 * (inputs[0].numel() + output.numel())
    hooks = [layer.register_forward_hook(count) for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    network(*inputs)
    for hook in hooks:
        hook.remove()
    return total


def rate(amount, call):
    """amount / seconds of a call, the best of 10 times 10 calls."""
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(10):
            result = call()
        result[0, 0].item()  # waits for the device
        seconds.append((time.perf_counter() - start) / 10)
    return amount / min(seconds)


@torch.no_grad()
def floor(teacher, echo, width):
    """Print the operations, bytes and least seconds of a training step, by part. Returns the seconds."""
    place = pick_device(device)
    _, latent_channels, factor, teacher_encoder = reference_teacher(teacher, "cpu", torch.float32)
    image, latent = torch.rand(1, 3, crop, crop), torch.randn(1, latent_channels, crop // factor, crop // factor)
    parts = {  # forward passes, or as much work: a backward pass counts 2, or 1 if only the input's gradient is wanted
        "teacher": (1 / echo, work(teacher_encoder, image)),
        "encoder": (3, work(Encoder(latent_channels, factor, width), image)),
        "decoder": (3, work(Decoder(latent_channels, factor, width), latent)),
        "discriminator": (2 * 3 + 2 + 1, work(Discriminator(latent_channels), image, latent))}
    matrix = torch.randn(4096, 4096, device=place, dtype=pick_dtype("auto", place))
    operations_rate = rate(2 * 4096**3, lambda: matrix @ matrix)
    large, other = torch.zeros(16, 2**23, device=place), torch.zeros(16, 2**23, device=place)
    bytes_rate = rate(2 * large.nbytes, lambda: other.copy_(large))
    print(f"rates here: {operations_rate / 1e12:.2f} T operations/s in a matrix product, {bytes_rate / 1e9:.1f} GB/s in a copy")
    total = 0.0
    for name, (passes, (operations, traffic)) in parts.items():
        operations, traffic = operations * passes * batch_size, traffic * passes * batch_size
        total += (least := max(operations / operations_rate, traffic / bytes_rate))
        print(f"floor of a step: {name:14} {operations / 1e9:8.1f} G operations, {traffic / 1e9:6.2f} GB, {1000 * least:7.1f} ms")
    return total


# -----------------------------------------------------------------------------
# the comparison

def time_ours(teacher, data, folder):
    """(settings, last report) of train.py, in a process of its own: its pool is full by then."""
    warm_up = 70
    out_dir = tempfile.mkdtemp(dir=folder)
    flags = dict(teacher=teacher, data_dir=data, crop=crop, batch_size=batch_size, device=device, out_dir=out_dir, variant="plain", log_interval=warm_up,
                 eval_images=1, eval_interval=10**9, max_iters=warm_up + steps)
    command = [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py"), *(f"--{k}={v}" for k, v in flags.items())]
    subprocess.run(command + extra.split(), check=True, stdout=subprocess.DEVNULL)
    with open(os.path.join(out_dir, "log.jsonl"), encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return lines[0]["settings"], [line for line in lines if "data_wait" in line][-1]


def time_reference(loop):
    for _ in range(3):
        next(loop)
    start = time.time()
    for _ in range(steps):
        next(loop)
    return steps * batch_size / (time.time() - start)


def measure_reference():
    """Train the reference for some minutes; print its figures on the held-out images as train.py does."""
    vae, images = Teacher(teacher), Images(data_dir, val_dir)
    real = images.held_out(100, 256) / 255
    latent = chunked(vae.encode, real)
    start, minute = time.time(), 1
    for step, average in enumerate(reference_loop(teacher, images.train), 1):
        if time.time() > start + 60 * minute:
            minute += 1
            with torch.no_grad():
                average.cpu()
                latents, fake = chunked(average["encoder"], real), chunked(average["decoder"], latent).clamp(0, 1)
                average.to(pick_device(device))
            figures = measure(fake, real) | {"latent_mse": F.mse_loss(latents, latent).item()}
            print(f"minute {minute - 1}  step {step}  images_seen {step * batch_size:,}  "
                  + "  ".join(f"val_{name} {value:.4g}" for name, value in figures.items()), flush=True)
            if minute > minutes:
                return picture({"original": real[:8], "reference": fake[:8]}, "reference.png")


def main():
    if minutes:
        return measure_reference()
    require_positive(globals(), "pairs", "steps", "batch_size", "crop")
    with tempfile.TemporaryDirectory() as folder:
        name, data = teacher, data_dir
        if teacher == "sdxl-random":
            from diffusers import AutoencoderKL
            name = os.path.join(folder, "vae")
            AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
                          block_out_channels=(128, 256, 512, 512), scaling_factor=0.13025, force_upcast=False).save_pretrained(name)
        if not data:
            import numpy as np
            data = os.path.join(folder, "pictures")
            os.mkdir(data)
            for i in range(24):
                Image.fromarray(dead_leaves(512, np.random.default_rng(i))).save(os.path.join(data, f"{i}.jpg"), quality=95)
        place = pick_device(device)
        print(f"torch {torch.__version__}, {place}, {torch.get_num_threads()} CPU threads; teacher {teacher}, {crop} pixels, batch {batch_size}; "
              f"images/s; a pair takes minutes on a CPU", flush=True)
        loop, speeds = reference_loop(name, find_images(data)), []
        for pair in range(pairs):
            reference = time_reference(loop)
            settings, report = time_ours(name, data, folder)
            ours = report["images_per_second"]
            speeds.append((ours, reference, ours / reference))
            print(f"{pair + 1}: train.py {ours:.2f}, reference {reference:.2f}: {ours / reference:.2f} times "
                  f"(data wait {report['data_wait']:.0%}, peak {report['peak_memory_mb']} MB)", flush=True)
        ours, reference, times = map(statistics.median, zip(*speeds))
        print(f"median: train.py {ours:.2f}, reference {reference:.2f}: {times:.2f} times "
              f"(of images never seen before: {ours / settings['echo']:.2f}, {reference:.2f})")
        least = floor(name, settings["echo"], settings["width"])
        print(f"train.py takes {1000 * batch_size / ours:.0f} ms a step, the floor is {1000 * least:.0f} ms: "
              f"{least * ours / batch_size:.0%} of it reached")


if __name__ == "__main__":
    configure(globals())
    main()
