"""What sample.py stands on: students to set side by side, how fast they are, a table of their figures."""
import importlib.util
import os
import time

from recipes import published
from support.configure import stop
from support.files import load_student, student

# name of a figure: (its heading, its format)
COLUMNS = {"psnr": ("PSNR dB", "8.2f"), "ssim": ("SSIM", "7.4f"), "lowres_mse": ("lowres MSE", "11.6f"),
           "sharpness": ("sharpness", "10.3f"), "lpips": ("LPIPS", "7.4f"), "latent_mse": ("latent MSE", "11.4f"),
           "latent_mean_error": ("mean error", "11.3f"), "latent_std_error": ("std error", "10.3f"),
           "decode_ms": ("decode ms", "10.1f"), "megabytes": ("MB", "7.1f"), "parameters": ("parameters", "12,")}


def load_students(checkpoint, compare, vae):
    """{label: {"encoder": network, "decoder": network}} of a run, if there is one, and of other weights, if named."""
    students = {"our": student(checkpoint)} if checkpoint else {}
    if compare:
        other = load_student(compare, "--compare")
        theirs = [other["shape"][name] for name in ("latent_channels", "factor")]
        if theirs != [vae.latent_channels, vae.factor]:
            stop(f"--compare={compare}: has {theirs[0]} channels at factor {theirs[1]}, the teacher "
                 f"{vae.latent_channels} at {vae.factor}")
        students[f"{os.path.basename(os.path.normpath(compare))[:18]}:"] = student(other)
    for networks in students.values():
        for network in networks.values():
            network.to(vae.device)
    return students


def lpips_if_there(place):
    """The perceptual distance of fake and real images, where the lpips package and its weights are, or None."""
    if importlib.util.find_spec("lpips"):
        try:
            return published.lpips(place)
        except SystemExit as error:
            print(f"no LPIPS ({error})")


def milliseconds(decode, latents):
    """Time to decode the first of the latents: median of 5 runs after one to warm up."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        decode(latents[:1]).sum().item()  # .item() waits for the device
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times[1:])[2]


def megabytes(module):
    """Of its weights."""
    return sum(weight.numel() * weight.element_size() for weight in module.parameters()) / 2**20


def print_table(rows):
    """rows: {label: {name of a figure: its value}}; a column for each figure that any of them has."""
    wide = max(24, *map(len, rows))
    shown = {name: column for name, column in COLUMNS.items() if any(name in figures for figures in rows.values())}
    width = {name: int(form.split(".")[0].rstrip(",")) for name, (_, form) in shown.items()}
    print(" " * wide, *(f"{title:>{width[name]}}" for name, (title, _) in shown.items()))
    for label, figures in rows.items():
        print(f"{label:{wide}}", *(f"{figures[name]:{form}}" if name in figures else " " * width[name]
                                   for name, (_, form) in shown.items()))
