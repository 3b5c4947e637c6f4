"""The training loop of seraena's TAESDXL notebook (github.com/madebyollin/seraena), rewritten from its published
description, for tools/bench.py to compare train.py with. It uses AdamW, a discriminator with BatchNorm and 7.5M
parameters, a Python list of old fakes, and autocast to float16 on a GPU.
"""
import functools
import random

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler

from data import to_tensor
from model import Decoder, Encoder
from teacher import Teacher


class ReferenceDiscriminator(nn.Module):
    """Images [N,3,H,W] in [0,1] and latents [N,C,h,w] -> scores [N,6,h,w], which should be -1 if real and 1 if fake."""
    def __init__(self, latent_channels):
        super().__init__()
        widths = (3 + latent_channels, 64, 128, 256, 512, 512, 512)
        strides = (1, 2, 2, 2, 1, 1)
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


def load_crops(size, paths):
    """Decode whole files, take a random square of each and resize it. Returns [N,3,size,size] uint8."""
    squares = []
    for path in paths:
        image = Image.open(path)
        side = random.randint(size, max(size, min(image.size)))
        left, top = random.randint(0, max(0, image.width - side)), random.randint(0, max(0, image.height - side))
        square = image.crop((left, top, left + side, top + side))
        squares.append(square.resize((size, size), Image.Resampling.BICUBIC).convert("RGB"))
    return to_tensor(squares).contiguous()


def sample_latents(vae, images):
    """Images in [0,1] -> latents, drawn from the posterior as in the notebook. A taesd.py pair has no posterior."""
    if vae.class_name == "taesd.py pair":
        return vae.raw_encode(images)
    return (vae.vae.encode(images * 2 - 1).latent_dist.sample() - vae.mean) / vae.std


def reference_loop(teacher, paths, place, crop, batch_size):
    """Endless generator that does a training step each time. The notebook also averages the weights, every two seconds,
    which takes no time to speak of."""
    dtype = torch.float16 if place.type == "cuda" else torch.float32
    autocast = torch.autocast(place.type, dtype, enabled=dtype != torch.float32)
    vae = Teacher(teacher, place, dtype)
    vae.vae.to(memory_format=torch.contiguous_format)  # the notebook does not use channels_last
    model = nn.ModuleDict({"encoder": Encoder(vae.latent_channels, vae.factor),
                           "decoder": Decoder(vae.latent_channels, vae.factor)}).to(place)
    discriminator = ReferenceDiscriminator(vae.latent_channels).to(place)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-5, betas=(0.9, 0.99))
    discriminator_optimizer = torch.optim.AdamW(discriminator.parameters(), 3e-4, betas=(0.9, 0.99))
    scaler = torch.amp.GradScaler(place.type, enabled=dtype == torch.float16)
    discriminator_scaler = torch.amp.GradScaler(place.type, enabled=dtype == torch.float16)
    replay = []
    sampler = RandomSampler(paths, replacement=True, num_samples=10**12)  # so that the loop below does not end
    loader = DataLoader(paths, batch_size, sampler=sampler, num_workers=min(12, torch.get_num_threads()),
                        collate_fn=functools.partial(load_crops, crop))
    for images in loader:
        with torch.no_grad():
            images = images.to(place).to(vae.dtype) / 255
            real, latent = images.float(), sample_latents(vae, images).float()
        with autocast:
            encoder_loss = F.mse_loss(model["encoder"](real), latent)
            decoded = model["decoder"](latent)
        fake = decoded.detach().float()

        # Train the discriminator. Each image of the batch is real or fake at random, and half of the fakes are old.
        for pair in zip(fake, latent):
            if len(replay) < 16384:
                replay.append([tensor.clone() for tensor in pair])
            else:
                for old, new in zip(random.choice(replay), pair):
                    old.copy_(new)
        old_fakes, old_latents = zip(*random.choices(replay, k=max(1, batch_size // 2)))
        n = batch_size - len(old_fakes)
        is_fake = torch.rand(batch_size, 1, 1, 1, device=place) < 0.5
        image = torch.where(is_fake, torch.cat([fake[:n], torch.stack(old_fakes)]), real)
        context = torch.where(is_fake, torch.cat([latent[:n], torch.stack(old_latents)]), latent)
        discriminator.train()
        with autocast:
            scores = discriminator(image, context)
        discriminator_loss = F.mse_loss(scores.float(), (is_fake * 2.0 - 1).expand(scores.shape))
        discriminator_optimizer.zero_grad()
        discriminator_scaler.scale(discriminator_loss).backward()
        discriminator_scaler.step(discriminator_optimizer)
        discriminator_scaler.update()
        discriminator_loss.item()

        # Train the decoder. Its target is the fake plus a correction of unit size, along the gradient that brings the
        # scores of the fake closer to those of the real image.
        discriminator.eval()
        correction = torch.zeros_like(fake, requires_grad=True)
        with autocast:
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
        loss.item()
        yield
