"""Look at a run, or at a teacher alone: draw originals, the teacher's round trip and the student's, and measure them.

    python sample.py --out_dir=out                     # on the run's held-out images
    python sample.py --out_dir=out --images=photo.jpg  # on a file or a folder of your own
    python sample.py --out_dir=out --compare=taesdxl_decoder.pth   # beside other weights, on the same latents
    python sample.py --out_dir=out --export            # weights for other programs
    python sample.py --teacher=sdxl --images=photos    # a teacher alone: is its scale right?
    python sample.py --curves=out-a,out-b              # what their logs hold, over each other
"""
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from data import Images
from model import parameters
from support.configure import configure, pick_device, require_positive, stop
from support.curves import draw_curves
from support.export import export as export_weights
from support.export import fit_latent_rgb, latent_rgb, save_latent_rgb
from support.files import load_checkpoint, load_student, save_file, student
from teacher import Teacher

# -----------------------------------------------------------------------------
# settings
out_dir = "out"            # the run to look at; the picture goes to samples/sample.png in it
images = ""                # an image or a folder; '' = the run's held-out images
count = 8                  # how many images, at most
size = 256                 # images= are shown and measured as centre squares of this side in pixels
compare = ""               # weights to set beside the run's: a file of them, an AutoencoderTiny, another out_dir
teacher = ""               # instead of a run: look at a teacher alone, named as for train.py
curves = ""                # instead: draw the logs of these runs, separated by commas, to curves.png
export = False             # instead: write the weights for other programs to out_dir/export
export_name = "taesd"      # their files are named so: taesdxl_decoder.pth in ComfyUI's models/vae_approx
export_dtype = "float32"   # of the exported weights: float32 or float16
device = "auto"            # auto, cuda, mps or cpu
# -----------------------------------------------------------------------------


# measures: [N,3,H,W] in [0,1] -> [N], one figure an image

def psnr(fake, real):
    """Peak signal-to-noise ratio in dB; 100 for identical images."""
    return -10 * torch.log10((fake - real).square().mean((1, 2, 3)).clamp(min=1e-10))


def ssim(fake, real):
    """Structural similarity (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5, on each colour channel."""
    window = torch.exp(-(torch.arange(11) - 5.0).square() / (2 * 1.5**2))
    weights = (window / window.sum()).tolist()

    def blur(x):  # not by conv2d: on a GPU that may round to TF32, and these are small differences of large numbers
        for dim in (2, 3):
            x = sum(weight * x.narrow(dim, i, x.shape[dim] - 10) for i, weight in enumerate(weights))
        return x
    mean_f, mean_r = blur(fake), blur(real)
    var_f, var_r = blur(fake * fake) - mean_f**2, blur(real * real) - mean_r**2
    covariance = blur(fake * real) - mean_f * mean_r
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mean_f * mean_r + c1) * (2 * covariance + c2)
            / ((mean_f**2 + mean_r**2 + c1) * (var_f + var_r + c2))).mean((1, 2, 3))


def lowres_mse(fake, real):
    """Mean squared error after 8x8 average pooling: colour, without detail."""
    return (F.avg_pool2d(fake, 8) - F.avg_pool2d(real, 8)).square().mean((1, 2, 3))


def high_frequency_energy(image):
    """Mean square of what a 3x3 box blur takes away."""
    return (image - F.avg_pool2d(image, 3, 1, 1, count_include_pad=False)).square().mean((1, 2, 3))


def sharpness(fake, real):
    """High-frequency energy over the original's, of the whole set (a flat image has none to compare): 1 is right."""
    return high_frequency_energy(fake).mean() / high_frequency_energy(real).mean().clamp(min=1e-8)


def measure(fake, real):
    """{name: figure} of images against originals, both [N,3,H,W] in [0,1]."""
    return {"psnr": psnr(fake, real).mean().item(), "ssim": ssim(fake, real).mean().item(),
            "lowres_mse": lowres_mse(fake, real).mean().item(), "sharpness": sharpness(fake, real).item()}


def chunked(network, images):
    """Apply a network to 4 images at a time: whole held-out sets fit in little memory. Gives float32."""
    return torch.cat([network(chunk).float() for chunk in images.split(4)])


# pictures

def picture(rows, path):
    """Write {label: [N,3,H,W] images in [0,1]} as one PNG, a labelled row each."""
    strips = [torch.cat(list(row.detach().float().cpu().clamp(0, 1)), -1) for row in rows.values()]
    font, bar = ImageFont.load_default(14), 20
    sheet = Image.new("RGB", (strips[0].shape[-1], sum(strip.shape[-2] + bar for strip in strips)))
    draw, top = ImageDraw.Draw(sheet), 0
    for label, strip in zip(rows, strips):
        draw.text((4, top + 2), label, fill=(255, 255, 255), font=font)
        pixels = np.round(strip.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        sheet.paste(Image.fromarray(pixels), (0, top + bar))
        top += strip.shape[-2] + bar
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    save_file(path, lambda aside: sheet.save(aside, format="PNG"))


# during training

class HeldOut:
    """What a student is measured on: images, [N,3,H,W] uint8, their latents and the teacher's round trip."""
    def __init__(self, images, vae, name):
        self.real, self.name = images.to(vae.device, memory_format=torch.channels_last) / 255, name
        self.about = f"{name}: {vae}"
        self.latent = chunked(vae.encode, self.real)
        self.round_trip = chunked(vae.decode, self.latent)
        self.goal = measure(self.round_trip, self.real)

    def draw(self, path, **rows):
        rows = {"original": self.real, f"teacher: {self.name}": self.round_trip} | rows
        picture({label: row[:8] for label, row in rows.items()}, path)

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # other shapes than in training, too few of them to compile for
    def evaluate(self, encoder, decoder, raw_decoder, amp, path):
        """{name: figure} of averaged weights, and a picture. Latent errors are in units of the latents' variance, 1."""
        with amp:
            latent = chunked(encoder, self.real)
            from_teacher = chunked(decoder, self.latent).clamp(0, 1)
            from_student = chunked(decoder, latent).clamp(0, 1)
            raw = chunked(raw_decoder, self.latent).clamp(0, 1)
        self.draw(path, **{"our decoder on the teacher's latents": from_teacher,
                           "our encoder and decoder": from_student})
        figures = {f"val_{name}": value for name, value in measure(from_teacher, self.real).items()}
        figures["val_latent_mse"] = F.mse_loss(latent, self.latent).item()
        (mean, std), (goal_mean, goal_std) = ((z.mean((0, 2, 3)), z.std((0, 2, 3))) for z in (latent, self.latent))
        goal_std = goal_std.clamp(min=1e-4)  # of a flat picture it is 0
        figures["val_latent_mean_error"] = ((mean - goal_mean).abs() / goal_std).max().item()  # of the worst channel
        figures["val_latent_std_error"] = (std / goal_std - 1).abs().max().item()  # likewise
        figures["val_psnr_raw"] = measure(raw, self.real)["psnr"]  # of the weights as they are, not averaged
        return {name: round(value, 6) for name, value in figures.items()}


# python sample.py

def milliseconds(decode, latents):
    """Time to decode the first of the latents: median of 5 runs after one to warm up."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        decode(latents[:1]).sum().item()  # .item() waits for the device
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times[1:])[2]


def load_students(checkpoint, vae, place):
    """{label: {"encoder": network, "decoder": network}} of the run, and of the weights to compare."""
    students = {"our": student(checkpoint)}
    if compare:
        other = load_student(compare, "--compare")
        theirs = [other["shape"][name] for name in ("latent_channels", "factor")]
        if theirs != [vae.latent_channels, vae.factor]:
            stop(f"--compare={compare}: has {theirs[0]} channels at factor {theirs[1]}, the run's teacher "
                 f"{vae.latent_channels} at {vae.factor}")
        students[f"{os.path.basename(os.path.normpath(compare))[:18]}:"] = student(other)
    for networks in students.values():
        for network in networks.values():
            network.to(place)
    return students


def print_table(rows, real):
    """rows: {label: (images, latent MSE or None, milliseconds, parameters)}."""
    wide = max(24, *map(len, rows))
    print(f"{'':{wide}} {'PSNR dB':>8} {'SSIM':>7} {'lowres MSE':>11} {'sharpness':>10} {'latent MSE':>11} "
          f"{'decode ms':>10} {'parameters':>12}")
    for label, (fake, latent_mse, decode_ms, n_parameters) in rows.items():
        figures = measure(fake, real)
        latent_mse = "" if latent_mse is None else f"{latent_mse:.4f}"
        print(f"{label:{wide}} {figures['psnr']:8.2f} {figures['ssim']:7.4f} {figures['lowres_mse']:11.6f} "
              f"{figures['sharpness']:10.3f} {latent_mse:>11} {decode_ms:10.1f} {n_parameters:12,}")


@torch.no_grad()
def main():
    require_positive(globals(), "count")
    if export_dtype not in ("float32", "float16"):
        stop(f"--export_dtype={export_dtype}: must be float32 or float16")
    if curves:
        draw_curves(curves.split(","), "curves.png")
        return print("wrote curves.png")
    place = pick_device(device)
    checkpoint = None if teacher else load_checkpoint(out_dir)
    if export and checkpoint:
        return export_weights(checkpoint, out_dir, export_name, getattr(torch, export_dtype))
    name = teacher or checkpoint["settings"]["teacher"]
    vae = Teacher(name, place)
    students = load_students(checkpoint, vae, place) if checkpoint else {}
    if images or not checkpoint:
        if size < 16 or size % vae.multiple:
            stop(f"--size={size}: must be 16 or more and a multiple of {vae.multiple} for this teacher")
        real = Images("", images).held_out(count, size)
    else:
        real = checkpoint["held_out"][:count]
    real = real.to(place) / 255

    def row(decode, latents, n_parameters, latent_mse=None):
        return chunked(decode, latents).clamp(0, 1), latent_mse, milliseconds(decode, latents), n_parameters

    latents = chunked(vae.encode, real)
    rows = {"teacher round trip": row(vae.decode, latents, vae.parameters)}
    factors, bias, r2 = fit_latent_rgb(latents, real)
    colors = {"latent_rgb_factors on the teacher's latents": latent_rgb(latents, factors, bias, real.shape[-1])}
    for label, networks in students.items():
        encoder, decoder = networks.get("encoder"), networks.get("decoder")
        if decoder:
            rows[f"{label} decoder"] = row(decoder, latents, parameters(decoder))
        if encoder:
            theirs = chunked(encoder, real)
            colors[f"{label} latents"] = latent_rgb(theirs, factors, bias, real.shape[-1])
        if encoder and decoder:
            rows[f"{label} encoder and decoder"] = row(decoder, theirs, parameters(encoder) + parameters(decoder),
                                                       F.mse_loss(theirs, latents).item())

    path = os.path.join(out_dir, "samples", "sample.png")
    picture({"original": real} | {label: row[0] for label, row in rows.items()} | colors, path)
    print(f"{out_dir}: step {checkpoint['step']}, teacher {name}" if checkpoint else f"teacher {name}: {vae}", end="")
    print(f"; {len(real)} images ({images or ('held out' if checkpoint else 'bundled')}) of {real.shape[-1]}x"
          f"{real.shape[-1]}, {place} {vae.dtype}\n".replace("torch.", ""))
    if not checkpoint:
        print("latents by channel; within a factor of two or so of 0 and 1 if the scale is right:")
        for statistic in ("mean", "std"):
            print(f"{statistic:5}" + " ".join(f"{v:6.2f}" for v in getattr(latents, statistic)((0, 2, 3)).tolist()))
    print_table(rows, real)
    rgb_path = os.path.join(out_dir, "latent_rgb_factors.json")
    text = save_latent_rgb(rgb_path, factors, bias)
    if not checkpoint:
        print(f"\nlatents to colours by one matrix, R2 {r2:.2f}; ready to paste:\n{text}")
    print(f"\nwrote {path}, {rgb_path}")


if __name__ == "__main__":
    configure(globals())
    main()
