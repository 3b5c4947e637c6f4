"""Train a small AutoencoderKL of any factor, with an L1 and a small KL loss, to be a teacher for train.py.

    python -m tools.train_vae --out_dir=vae      # the `toy` teacher was made this way, in 27 minutes on one core
    python -m tools.train_vae --factor=16 --latent_channels=16 --data_dir=photos --out_dir=f16
"""
import math
import os
import time

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from data import Images, batches
from model import conv_weights, make_optimizer
from sample import save_picture
from support.config import configure, fail, require_positive
from support.device import pick_device, pick_dtype

# --- settings --------------------------------------------------------------------------------------------------------
out_dir = "vae"            # new folder for the VAE, in the format of diffusers, which train.py --teacher= reads
data_dir = ""              # folder of images, searched recursively; '' = the bundled photographs
factor = 8                 # pixels per latent along each side: 2, 4, 8, 16, 32
latent_channels = 4        # channels of the latent
vae_width = 32             # channels of every layer, a multiple of 8
crop = 64                  # training crop in pixels, a multiple of the factor
batch_size = 16            # crops per step
max_iters = 3000           # steps
learning_rate = 2e-3       # of Muon and AdamW, reached after 5% of the steps; then it falls to 0 along a cosine
kl_weight = 3e-4           # of the KL divergence per latent element; the L1 loss per colour value has weight 1
seed = 0                   # of the weights and of the crops
device = "auto"            # auto, cuda, mps or cpu
# -----------------------------------------------------------------------------


def initialize(vae):
    """Residual blocks start as the identity, other convolutions keep the variance, and the posterior has little noise.
    With PyTorch's own initialisation, pictures stay grey for thousands of steps."""
    for name, layer in vae.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            torch.nn.init.zeros_(layer.bias)
            if name.endswith(".conv2"):  # the last layer of a residual block
                torch.nn.init.zeros_(layer.weight)
    torch.nn.init.constant_(vae.quant_conv.bias[vae.config.latent_channels:], -6)  # the logarithm of the variance


def check_settings():
    require_positive(globals(), "latent_channels", "batch_size", "max_iters", "learning_rate")
    if os.path.exists(out_dir):
        fail(f"--out_dir={out_dir}: exists already; choose a new folder")
    rules = {"factor": (factor > 1 and not factor & (factor - 1), "a power of two"),
             "crop": (crop >= 16 and crop % max(1, factor) == 0, f"16 or more and a multiple of the factor, {factor}"),
             "vae_width": (vae_width >= 8 and vae_width % 8 == 0, "a multiple of 8")}
    for name, (is_kept, rule) in rules.items():
        if not is_kept:
            fail(f"--{name}={globals()[name]}: must be {rule}")


def train(vae, images, place):
    dtype = pick_dtype("auto", place)
    autocast = torch.autocast(place.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    inner_weights = conv_weights(vae.encoder)[1:-1] + conv_weights(vae.decoder)[1:-1]
    optimizer = make_optimizer("muon", [vae], inner_weights, dtype, betas=(0.9, 0.99))
    loader = batches(images, crop, batch_size, color_augment=0.07, seed=seed, workers=0)
    start = time.time()
    for step in range(max_iters):
        real = next(loader).to(place) / 127.5 - 1
        with autocast:
            posterior = vae.encode(real).latent_dist
            fake = vae.decode(posterior.sample()).sample.float()
        # The second L1 loss, of 8x8 patches, is for the colours, which are learned late from single pixels.
        l1 = F.l1_loss(fake, real) + F.l1_loss(F.avg_pool2d(fake, 8), F.avg_pool2d(real, 8))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        warm_up = (step + 1) / (0.05 * max_iters)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / max_iters)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, warm_up, cosine)
        optimizer.zero_grad()
        (l1 + kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            minutes = (max_iters - step) * (time.time() - start) / (step + 1) / 60
            print(f"step {step}/{max_iters}  l1 {l1:.4f}  kl {kl:.2f}  {minutes:.1f} min left", flush=True)
            rows = {"original": real[:8] / 2 + 0.5, f"step {step}": fake[:8] / 2 + 0.5}
            save_picture(rows, os.path.normpath(out_dir) + ".png")
    loader.close()


def main():
    check_settings()
    place = pick_device(device)
    stages = factor.bit_length()  # factor 8 has four stages, and the image is halved between them
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages, up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=(vae_width,) * stages, norm_num_groups=8, latent_channels=latent_channels,
        mid_block_add_attention=False, force_upcast=False).to(place)
    initialize(vae)
    images = Images(data_dir)
    train(vae, images, place)

    vae.eval().requires_grad_(False)
    latents = vae.encode(images.held_out(64, crop).to(place) / 127.5 - 1).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    torch.nn.Module.to(vae, torch.float16)  # halves the file; vae.to would print a warning
    vae.save_pretrained(out_dir)
    print(f"---\nscaling_factor: {vae.config.scaling_factor}\nto look at it: python sample.py --teacher={out_dir}")


if __name__ == "__main__":
    configure(globals())
    main()
