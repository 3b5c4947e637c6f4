"""Whole pictures, for looking at faces, lettering and skies: sample.py --size=0."""
import os

import numpy as np
import torch
from PIL import Image, ImageOps

from support.colors import in_srgb, resizable

LARGEST = 2048  # pixels of the longer side; larger pictures are made smaller: a student of width 64 takes 4 GB for one


def whole_picture(path, multiple, open_image=Image.open):
    """A file at its own size, or with its longer side of LARGEST pixels, upright, on white, its centre cut to
    multiples of so many pixels: [H,W,3] uint8."""
    with open_image(path) as image:
        image = in_srgb(ImageOps.exif_transpose(resizable(image)), image.info.get("icc_profile"))
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.BICUBIC)
    width, height = (side // multiple * multiple for side in image.size)
    if not width * height:
        raise ValueError(f"{image.width}x{image.height} pixels: the shorter side must be {multiple} or more")
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.array(image.convert("RGB").crop((left, top, left + width, top + height)))


def draw_whole(vae, students, images, count, folder, picture):
    """Write the first `count` readable held-out images, whole, a file each: the original, the teacher's and those of
    the decoders of students, {label: {"decoder": network}}. picture: writes {label: images} to a path."""
    if vae.class_name in ("AutoencoderKL", "AutoencoderKLFlux2"):  # they can take large ones in parts
        vae.vae.enable_tiling()
        vae.vae.tile_sample_min_size, vae.vae.tile_latent_min_size = 1024, 1024 // vae.factor
    below = os.path.commonpath([os.path.dirname(path) for path in images.val])
    for path in images.val:
        if not count or (pixels := images.attempt(whole_picture, path, vae.multiple)) is None:
            continue
        count -= 1
        real = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(vae.device) / 255
        latent = vae.encode(real)
        shown = {"original": real, "teacher": vae.decode(latent)}
        for label, networks in students.items():
            if "decoder" in networks:
                shown[label.rstrip(":")] = networks["decoder"](latent).clamp(0, 1)
        target = os.path.join(folder, os.path.relpath(path, below).replace(os.sep, "_") + ".png")
        picture({" | ".join(shown): torch.cat(list(shown.values()))}, target)
        print(f"wrote {target}, {real.shape[-1]}x{real.shape[-2]} each: {' | '.join(shown)}", flush=True)
