"""Look at a run, or at a teacher alone: draw originals, the teacher's round trip and the student's, and measure them.

    python sample.py --out_dir=out                     # on the run's held-out images
    python sample.py --out_dir=out --images=photo.jpg  # on a file or a folder of your own
    python sample.py --out_dir=out --compare=taesdxl_decoder.pth   # beside other weights, on the same latents
    python sample.py --out_dir=out --images=photos --size=0        # whole pictures, as large as they are
    python sample.py --out_dir=out --export            # weights for other programs
    python sample.py --teacher=sdxl --images=photos    # a teacher alone: is its scale right?
    python sample.py --teacher=sdxl --compare=madebyollin/taesdxl --images=photos --count=100 --size=256,512
    python sample.py --curves=out-a,out-b              # what their logs hold, over each other
"""
import os
from json import dumps

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from data import Images
from model import parameters
from support.compare import load_students, lpips_if_there, megabytes, milliseconds, print_table
from support.configure import configure, pick_device, require_positive, stop
from support.curves import draw_curves
from support.export import export as export_weights
from support.export import fit_latent_rgb, latent_rgb, save_latent_rgb, save_text
from support.files import load_checkpoint, save_file
from support.whole import draw_whole
from teacher import Teacher

# -----------------------------------------------------------------------------
# settings
out_dir = "out"            # the run to look at; the picture goes to samples/sample.png in it
images = ""                # an image or a folder; '' = the run's held-out images
count = 8                  # how many images, at most
size = "256"               # images= are measured as centre squares of this side in pixels, or of several: 256,512
                           # 0: whole pictures of at most 2048 pixels, a file each in samples/whole
compare = ""               # weights to set beside the run's: a file of them, an AutoencoderTiny, another out_dir
teacher = ""               # instead of a run: look at a teacher, named as for train.py, and at compare= if given
json = ""                  # a file for the figures, to be read by machines
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


def latent_errors(latents, goal):
    """{name: figure} of a student's latents against the teacher's, [N,C,h,w]: the mean square, in units of the latents'
    variance, 1, and how far mean and standard deviation of the worst channel are off, in its standard deviations."""
    (mean, std), (goal_mean, goal_std) = ((z.mean((0, 2, 3)), z.std((0, 2, 3))) for z in (latents, goal))
    goal_std = goal_std.clamp(min=1e-4)  # of a flat picture it is 0
    return {"latent_mse": F.mse_loss(latents, goal).item(),
            "latent_mean_error": ((mean - goal_mean).abs() / goal_std).max().item(),
            "latent_std_error": (std / goal_std - 1).abs().max().item()}


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
        self.vae, self.name, self.about = vae, name, f"{os.path.basename(os.path.normpath(name))}: {vae}"
        self.real = images.to(vae.device, memory_format=torch.channels_last) / 255
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
        by_teacher = chunked(self.vae.decode, latent)
        self.draw(path, **{"our decoder on the teacher's latents": from_teacher,
                           "our encoder and decoder": from_student,
                           "our encoder, the teacher's decoder": by_teacher})
        figures = {f"val_{name}": value for name, value in measure(from_teacher, self.real).items()}
        figures |= {f"val_{name}": value for name, value in latent_errors(latent, self.latent).items()}
        of_teacher = measure(by_teacher, self.real)
        figures |= {f"val_teacher_{name}": of_teacher[name] for name in ("psnr", "lowres_mse")}
        figures["val_psnr_raw"] = measure(raw, self.real)["psnr"]  # of the weights as they are, not averaged
        return {name: round(value, 6) for name, value in figures.items()}


# python sample.py

def look(vae, students, real, distance):
    """Of the teacher and of students on images [N,3,H,W]: ({label: their first 8}, {label: {name: figure}}, {label:
    latents}). distance: LPIPS, or None."""
    latents = chunked(vae.encode, real)
    pictures, figures, codes = {}, {}, {"the teacher's latents": latents}

    def add(label, decode, latents, *modules, **errors):
        fake = chunked(decode, latents).clamp(0, 1)
        figures[label] = measure(fake, real) | errors | {
            "decode_ms": milliseconds(decode, latents), "megabytes": sum(map(megabytes, modules)),
            "parameters": sum(map(parameters, modules))}
        pictures[label] = fake[:8]
        if distance:
            values = [distance(*pair).item() * len(pair[0]) for pair in zip(fake.split(4), real.split(4))]
            figures[label]["lpips"] = sum(values) / len(real)
    add("teacher round trip", vae.decode, latents, vae.vae)
    for label, networks in students.items():
        encoder, decoder = networks.get("encoder"), networks.get("decoder")
        if decoder:
            add(f"{label} decoder", decoder, latents, decoder)
        if encoder:
            theirs = codes[f"{label} latents"] = chunked(encoder, real)
            errors = latent_errors(theirs, latents)
            if decoder:
                add(f"{label} encoder and decoder", decoder, theirs, encoder, decoder, **errors)
            add(f"{label} encoder, teacher's decoder", vae.decode, theirs, encoder, **errors)
    return pictures, figures, codes


@torch.no_grad()
def main():
    require_positive(globals(), "count")
    if export_dtype not in ("float32", "float16"):
        stop(f"--export_dtype={export_dtype}: must be float32 or float16")
    if curves:
        draw_curves(curves.split(","), "curves.png")
        return print("wrote curves.png")
    if size == "0" and (json or not images):
        stop("--size=0: whole pictures are looked at, not measured; it needs --images= and no --json=")
    if teacher and export:
        stop(f"--export: of a run alone; --teacher={teacher} is a look at a teacher")
    if not os.path.isdir(os.path.dirname(json) or "."):
        stop(f"--json={json}: there is no such folder")
    place = pick_device(device)
    checkpoint = None if teacher else load_checkpoint(out_dir)
    if export and checkpoint:
        return export_weights(checkpoint, out_dir, export_name, getattr(torch, export_dtype))
    name, folder = teacher or checkpoint["settings"]["teacher"], os.path.join(out_dir, "samples")
    vae = Teacher(name, place)
    students, found = load_students(checkpoint, compare, vae), {}
    if size == "0":
        return draw_whole(vae, students, Images("", images), count, os.path.join(folder, "whole"), picture)
    stem = os.path.join(folder, "look" if teacher else "sample")  # a look at a teacher leaves a run's as it is
    sides = [None] if checkpoint and not images else [int(side) if side.isdigit() else 0 for side in size.split(",")]
    for side in sides:
        if side is not None and (side < 16 or side % vae.multiple):
            stop(f"--size={size}: must be 16 or more and a multiple of {vae.multiple} for this teacher, or several of "
                 f"these, as in 256,512; or 0, for whole pictures")
    print(f"{out_dir}: step {checkpoint['step']}, teacher {name}" if checkpoint else f"teacher {name}: {vae}")
    distance = lpips_if_there(place)
    for side in sides:
        real = (Images("", images).held_out(count, side) if side else checkpoint["held_out"][:count]).to(place) / 255
        side = real.shape[-1]
        pictures, figures, codes = look(vae, students, real, distance)
        latents = codes["the teacher's latents"]
        factors, bias, r2 = fit_latent_rgb(latents, real)
        colors = {f"{label}, by latent_rgb": latent_rgb(z[:8], factors, bias, side) for label, z in codes.items()}
        path = f"{stem}.png" if len(sides) == 1 else f"{stem}-{side}.png"
        picture({"original": real[:8]} | pictures | colors, path)
        print(f"\n{len(real)} images ({images or ('held out' if checkpoint else 'bundled')}) of {side}x{side}, {place} "
              f"{vae.dtype}: {path}\n".replace("torch.", ""))
        print_table(figures)
        found[side] = {"figures": figures, "latents": {label: {
            statistic: getattr(z, statistic)((0, 2, 3)).tolist() for statistic in ("mean", "std")}
            for label, z in codes.items()}}
    rgb_path = f"{stem}-latent_rgb.json"
    text = save_latent_rgb(rgb_path, factors, bias)
    if not checkpoint:
        print("\nlatents by channel; within a factor of two or so of 0 and 1 if the scale is right:")
        for statistic in ("mean", "std"):
            print(f"{statistic:5}" + " ".join(f"{v:6.2f}" for v in getattr(latents, statistic)((0, 2, 3)).tolist()))
        print(f"\nlatents to colours by one matrix, R2 {r2:.2f}; ready to paste:\n{text}")
    if json:
        save_text(json, dumps({"teacher": name, "images": images, "size": found}, indent=1))
    print(f"\nwrote {', '.join(filter(None, (path, rgb_path, json)))}")


if __name__ == "__main__":
    configure(globals())
    main()
