"""What sample.py needs to compare students: their weights, speed and sizes, a table, and whole pictures."""
import os

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.benchmark import Timer

from support.checkpoint import build_student, load_student
from support.colors import to_eight_bits, to_srgb
from support.config import fail

# metric: (heading, format)
COLUMNS = {"psnr": ("PSNR dB", "11.2f"), "ssim": ("SSIM", "11.4f"), "lowres_mse": ("lowres MSE", "11.6f"),
           "sharpness": ("sharpness", "11.3f"), "latent_mse": ("latent MSE", "11.4f"),
           "latent_mean_error": ("mean error", "11.3f"), "latent_std_error": ("std error", "11.3f"),
           "decode_ms": ("decode ms", "11.1f")}
LARGEST = 2048  # longer side of a whole picture in pixels; a student of width 64 needs 4 GB for one of this size


def load_students(checkpoint, compare, vae):
    """{label: {"encoder": network, "decoder": network}} of a run, or None, and of other weights, or ''."""
    students = {"our": build_student(checkpoint)} if checkpoint else {}
    if compare:
        other = load_student(compare, "--compare")
        channels, factor = other["shape"]["latent_channels"], other["shape"]["factor"]
        if (channels, factor) != (vae.latent_channels, vae.factor):
            fail(f"--compare={compare}: has {channels} channels at factor {factor}, the teacher {vae.latent_channels} "
                 f"at {vae.factor}")
        students[f"{os.path.basename(os.path.normpath(compare))[:18]}:"] = build_student(other)
    for networks in students.values():
        for network in networks.values():
            network.to(vae.device)
    return students


def add_decode_times(metrics, vae, students, latents):
    """Add "decode_ms" to the metrics of the teacher and of each decoder: milliseconds to decode the first latent."""
    decoders = {"teacher": vae.decode}
    decoders |= {f"{label} decoder": student["decoder"] for label, student in students.items() if "decoder" in student}
    for row, decode in decoders.items():
        timer = Timer("decode(latent)", globals={"decode": decode, "latent": latents[:1]},
                      num_threads=torch.get_num_threads())
        metrics[row]["decode_ms"] = 1000 * timer.timeit(5).median


def print_table(rows):
    """rows: {label: {metric: value}}. There is a column for each metric that any of them has."""
    width = max(24, *map(len, rows))
    columns = {name: column for name, column in COLUMNS.items() if any(name in metrics for metrics in rows.values())}
    print(" " * width, *(f"{title:>11}" for title, _ in columns.values()))
    for label, metrics in rows.items():
        cells = [f"{metrics[name]:{form}}" if name in metrics else " " * 11 for name, (_, form) in columns.items()]
        print(f"{label:{width}}", *cells)


# --- whole pictures, to look at faces, lettering and skies -----------------------------------------------------------
def whole_picture(path, multiple):
    """A file at its own size, upright, on white, in sRGB, as [H,W,3] uint8. Its longer side has at most LARGEST pixels,
    and its centre is cut to multiples of `multiple` pixels."""
    with Image.open(path) as image:
        image = to_srgb(ImageOps.exif_transpose(to_eight_bits(image)), image.info.get("icc_profile"))
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.BICUBIC)
    width, height = (side // multiple * multiple for side in image.size)
    if not width * height:
        raise ValueError(f"{image.width}x{image.height} pixels: the shorter side must be {multiple} or more")
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.array(image.convert("RGB").crop((left, top, left + width, top + height)))


def draw_whole(vae, students, images, count, folder, save_picture):
    """Write a file for each of the first `count` images: the original, the teacher's picture and the students'."""
    if vae.class_name in ("AutoencoderKL", "AutoencoderKLFlux2"):  # these can process large images in tiles
        vae.vae.enable_tiling()
    for number, path in enumerate(images.val[:count], 1):
        pixels = images.attempt(whole_picture, path, vae.multiple)
        if pixels is None:
            continue
        real = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(vae.device) / 255
        latent = vae.encode(real)
        shown = {"original": real, "teacher": vae.decode(latent)}
        for label, networks in students.items():
            if "decoder" in networks:
                shown[label.rstrip(":")] = networks["decoder"](latent).clamp(0, 1)
        target = os.path.join(folder, f"{number:03d}_{os.path.basename(path)}.png")
        save_picture({" | ".join(shown): torch.cat(list(shown.values()))}, target)
        print(f"wrote {target}, {real.shape[-1]}x{real.shape[-2]} each: {' | '.join(shown)}", flush=True)
