"""The training loop of seraena's TAESDXL notebook (github.com/madebyollin/seraena), written down again from published
facts: AdamW, a discriminator with BatchNorm and 7.5M parameters, a Python list of old fakes, float16 autocast on a GPU,
float32 on a CPU. tools.bench times train.py beside it; this trains it alone and measures it every minute:

    python -m tools.reference --teacher=taef2_encoder.pth --data_dir=photos --val_dir=val --crop=64 --minutes=10
"""
import copy
import os
import random
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from data import Images, to_tensor
from model import Decoder, Encoder
from sample import chunked, measure, picture
from support.configure import configure, pick_device, pick_dtype, require_positive
from support.files import load_taesd
from teacher import NAMES, Teacher

# -----------------------------------------------------------------------------
# settings
teacher = "toy"            # as in train.py, without ::
data_dir = ""              # folder of images
val_dir = ""               # folder of held-out images; '' = 5% of data_dir
crop = 96                  # training crop in pixels
batch_size = 16            # crops a step
learning_rate = 3e-5       # of encoder and decoder
width = 64                 # channels of the student
minutes = 10.0             # it is measured after each of them
dtype = "auto"             # of autocast and teacher: auto (float16 on a GPU, else float32), or as train.py's --dtype
device = "auto"            # auto, cuda, mps or cpu
# -----------------------------------------------------------------------------


class ReferenceDiscriminator(nn.Module):
    def __init__(self, latent_channels):
        super().__init__()
        widths, strides = (3 + latent_channels, 64, 128, 256, 512, 512, 512), (1, 2, 2, 2, 1, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(n_in, n_out, 4 if stride == 2 else 3, stride, 1, bias=False),
                          nn.BatchNorm2d(n_out), nn.ReLU(inplace=True))
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
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return to_tensor([image.convert("RGB")])[0].contiguous()


def reference_teacher(name, place, dtype):
    """(function from [0,1] images to latents, latent channels, factor, encoder): the VAE in its own memory order."""
    if name.endswith(".pth"):
        encoder, shape = load_taesd(name)
        encoder.to(place, dtype).requires_grad_(False)
        return encoder, shape["latent_channels"], shape["factor"], encoder
    from diffusers import AutoencoderKL
    vae = AutoencoderKL.from_pretrained(NAMES.get(name, name), torch_dtype=dtype, low_cpu_mem_usage=False)
    vae.to(place).requires_grad_(False)
    return (lambda images: vae.encode(images * 2 - 1).latent_dist.sample() * vae.config.scaling_factor,
            vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1), vae.encoder)


def reference_loop(teacher, paths, place, crop, batch_size, learning_rate, width, dtype="auto"):
    """Endless generator: the averaged student after each training step of the notebook."""
    dtype = pick_dtype(dtype.replace("auto", "float16" if place.type == "cuda" else "float32"), place)
    amp, half = torch.autocast(place.type, dtype, enabled=dtype != torch.float32), dtype == torch.float16
    encode, latent_channels, factor, _ = reference_teacher(teacher, place, dtype)
    shape = latent_channels, factor, width
    model = nn.ModuleDict({"encoder": Encoder(*shape), "decoder": Decoder(*shape)}).to(place)
    average, averaged_at, updates = copy.deepcopy(model), time.time(), 0
    discriminator = ReferenceDiscriminator(latent_channels).to(place)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.99))
    discriminator_optimizer = torch.optim.AdamW(discriminator.parameters(), 3e-4, betas=(0.9, 0.99))
    scaler, discriminator_scaler = (torch.amp.GradScaler(place.type, enabled=half) for _ in range(2))
    replay, capacity = [], 16384
    torch.backends.cudnn.benchmark = True
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    crops = ReferenceCrops(paths, crop)
    endless = torch.utils.data.RandomSampler(crops, replacement=True, num_samples=10**12)  # one epoch, no restart
    loader = torch.utils.data.DataLoader(crops, batch_size, sampler=endless, num_workers=min(12, cores))
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
            old = random.choices(replay, k=max(1, batch_size // 2))
            old_fake, old_latent = (torch.stack(tensors) for tensors in zip(*old))
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
                averaged_at, decay, updates = time.time(), min(0.95, updates / 10), updates + 1  # the first is a copy
                with torch.no_grad():
                    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
            loss.item()
            yield average


def main():
    """Train it for some minutes; print its figures on the held-out images as train.py does."""
    require_positive(globals(), "crop", "batch_size", "learning_rate", "width", "minutes")
    vae, images, place = Teacher(teacher), Images(data_dir, val_dir), pick_device(device)
    real = images.held_out(100, 256) / 255
    latent = chunked(vae.encode, real)
    loop = reference_loop(teacher, images.train, place, crop, batch_size, learning_rate, width, dtype)
    start, minute = time.time(), 1
    for step, average in enumerate(loop, 1):
        if time.time() > start + 60 * minute:
            minute, paused = minute + 1, time.time()
            with torch.no_grad():
                average.cpu()
                latents, fake = chunked(average["encoder"], real), chunked(average["decoder"], latent).clamp(0, 1)
                average.to(place)
            figures = measure(fake, real) | {"latent_mse": F.mse_loss(latents, latent).item()}
            print(f"minute {minute - 1}  step {step}  images_seen {step * batch_size:,}  "
                  + "  ".join(f"val_{name} {value:.4g}" for name, value in figures.items()), flush=True)
            if minute > minutes:
                return picture({"original": real[:8], "reference": fake[:8]}, "reference.png")
            start += time.time() - paused  # minutes are of training alone, as train.py counts its rate


if __name__ == "__main__":
    configure(globals())
    main()
