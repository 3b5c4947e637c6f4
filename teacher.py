"""The VAE that the student imitates, behind one convention.

`Teacher` is the only code that knows [-1,1] images, scaling and shift factors, posteriors and classes of diffusers:
everything outside it is [0,1] images and latents about N(0,1). To look at one: python sample.py --teacher=sdxl
"""
import difflib
import os

import torch
import torch.nn.functional as F

from support.configure import stop
from support.files import load_taesd
from support.hub import is_hub_id, load_autoencoder

NAMES = {
    "toy": os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "toy_vae"),
    "sd": "stabilityai/sd-vae-ft-ema",
    "sd-mse": "stabilityai/sd-vae-ft-mse",
    "sdxl": "madebyollin/sdxl-vae-fp16-fix",  # the original overflows in float16
}


SUPPORTED = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderDC", "AutoencoderKLQwenImage", "AutoencoderKLWan",
             "AutoencoderTiny")


class Teacher:
    """A frozen VAE behind one convention: [0,1] images, NCHW; latents of about zero mean and unit variance.

    name: `toy`, `sd`, `sd-mse`, `sdxl`; a diffusers folder; a hub id, `owner/repo` or `owner/repo::subfolder`; a file
    in the original layout, `vae.safetensors` or `vae.ckpt` (`::folder` names a folder with its config.json, otherwise
    diffusers looks it up on the hub); or the encoder of a taesd.py pair, `path/taef2_encoder.pth`, its `_decoder.pth`
    beside it.

    Has `latent_channels`, `factor` (pixels per latent along a side), `multiple` (which sides of images must be) and the
    `mean` and `std` of raw latents, numbers or [1,C,1,1], all from the VAE's own files; and the `student_variant` that
    suits it. Computes in `dtype`; takes and gives float32. Stops with one line if the VAE cannot be had.
    """
    def __init__(self, name, device="cpu", dtype=torch.float32):
        name, self.device, self.dtype = str(name), torch.device(device), dtype
        self.mean, self.std, self.image_range = 0.0, 1.0, (0, 1)
        self.patch = 1     # FLUX.2 normalises each place of a 2x2 patch of latents by its own statistics
        self.video = False  # made for [N,3,frames,H,W]
        if name.endswith(".pth"):
            (encoder, shape), (decoder, _) = load_taesd(name), load_taesd(partner(name))
            self.vae = torch.nn.ModuleDict({"encoder": encoder, "decoder": decoder}).to(dtype)
            self.raw_encode, self.raw_decode = encoder, decoder
            self.class_name, self.student_variant = "taesd.py pair", shape["variant"]
        else:
            self.vae = vae = load_autoencoder(known(name), SUPPORTED, dtype, f"--teacher={name}")
            self.class_name, self.dtype, self.image_range = type(vae).__name__, vae.dtype, (-1, 1)
            self.raw_encode, self.raw_decode = self.encode_by_diffusers, lambda latents: vae.decode(latents).sample
            variants = {"AutoencoderKLFlux2": "midblock_gn", "AutoencoderDC": "f32"}
            self.student_variant = variants.get(self.class_name, "plain")
            self.video = self.class_name in ("AutoencoderKLQwenImage", "AutoencoderKLWan")
            self.read_normalisation(vae)
        self.vae.to(self.device).eval().requires_grad_(False)
        if not self.video:  # channels_last is for 4-D weights only
            self.vae.to(memory_format=torch.channels_last)
        self.parameters = sum(p.numel() for p in self.vae.parameters())
        side = 64 * self.patch
        latent = self.encode(torch.zeros(1, 3, side, side))
        self.latent_channels, self.factor = latent.shape[1], side // latent.shape[2]
        self.multiple = self.factor * self.patch
        if self.student_variant == "f32" and self.factor != 32:
            self.student_variant = "plain"

    def read_normalisation(self, vae):
        """Sets mean and std from the VAE's config, or, for FLUX.2, from its batch-norm statistics."""
        def per_channel(values):
            return torch.as_tensor(values, dtype=torch.float32, device=self.device).view(1, -1, 1, 1)
        config = vae.config
        if self.class_name == "AutoencoderKLFlux2":
            self.patch = config.patch_size[0]
            self.mean = per_channel(vae.bn.running_mean)
            self.std = per_channel((vae.bn.running_var.float() + config.batch_norm_eps).sqrt())
        elif config.get("latents_mean") is not None and config.get("latents_std") is not None:
            self.mean = per_channel(config.latents_mean)
            self.std = per_channel(config.latents_std) / (config.get("scaling_factor") or 1.0)
        else:
            self.mean, self.std = config.get("shift_factor") or 0.0, 1 / (config.get("scaling_factor") or 1.0)

    def __str__(self):
        if torch.is_tensor(self.mean):
            scale = "mean and standard deviation by channel" + ", in patches of 2x2" * (self.patch > 1)
        else:
            scale = f"scaling factor {1 / self.std:g}, shift {self.mean:g}"
        return (f"{self.class_name}, {self.parameters:,} parameters, factor {self.factor}, {self.latent_channels} "
                f"channels, {scale}")

    def encode_by_diffusers(self, images):
        found = self.vae.encode(images)
        return found.latent_dist.mode() if hasattr(found, "latent_dist") else found[0]  # .latent or .latents

    @torch.no_grad()
    def encode(self, images):
        """[N,3,H,W] images in [0,1], sides multiples of `multiple` -> [N,latent_channels,H/factor,W/factor] ~ N(0,1)"""
        low, high = self.image_range
        images = (images * (high - low) + low).to(self.device, self.dtype, memory_format=torch.channels_last)
        latents = (self.raw_encode(images.unsqueeze(2)).squeeze(2) if self.video else self.raw_encode(images)).float()
        return F.pixel_shuffle((F.pixel_unshuffle(latents, self.patch) - self.mean) / self.std, self.patch)

    @torch.no_grad()
    def decode(self, latents):
        """[N,latent_channels,h,w] latents ~ N(0,1) -> [N,3,h*factor,w*factor] images in [0,1]."""
        low, high = self.image_range
        latents = F.pixel_unshuffle(latents.to(self.device).float(), self.patch) * self.std + self.mean
        latents = F.pixel_shuffle(latents, self.patch).to(self.dtype, memory_format=torch.channels_last)
        images = (self.raw_decode(latents.unsqueeze(2)).squeeze(2) if self.video else self.raw_decode(latents)).float()
        return ((images - low) / (high - low)).clamp(0, 1)


def known(name):
    """A name in NAMES -> its folder or hub id; other places as they are. Stops with one line if it can be neither."""
    where = NAMES.get(name, name)
    place = where.partition("::")[0]
    if not (os.path.isdir(place) or is_hub_id(place) or place.endswith((".safetensors", ".ckpt", ".sft"))):
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0)[0]
        stop(f"--teacher={name}: no such folder and no known name (did you mean {near}?); it takes {', '.join(NAMES)}, "
             f"a diffusers folder, a hub id owner/repo, a .safetensors or .ckpt file, or a taesd.py pair's encoder.pth")
    return where


def partner(encoder_path):
    """path/taef2_encoder.pth -> path/taef2_decoder.pth"""
    folder, name = os.path.split(encoder_path)
    if "encoder" not in name:
        stop(f"--teacher={encoder_path}: name the encoder of a pair, taesd_encoder.pth beside taesd_decoder.pth")
    decoder_path = os.path.join(folder, name.replace("encoder", "decoder"))
    if os.path.isfile(encoder_path) and not os.path.isfile(decoder_path):
        stop(f"--teacher={encoder_path}: its other half, {decoder_path}, is missing; a teacher needs both")
    return decoder_path
