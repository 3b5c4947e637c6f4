"""Look at a run: rebuild teacher and student from `out_dir`, draw them side by side, and measure both.

    python sample.py --out_dir=out                     # on the run's held-out images
    python sample.py --out_dir=out --images=photo.jpg  # on a file or a folder of your own
    python sample.py --out_dir=out --compare=taesdxl_decoder.pth   # beside other weights, on the same latents
    python sample.py --out_dir=out --export            # weights for other programs
"""
import importlib.util
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from configure import configure, pick_device, require_positive, stop
from data import Images
from model import (Decoder, Encoder, load_checkpoint, load_student, model_card, parameters, save_diffusers, save_file, save_onnx,
                   save_taesd)
from teacher import Teacher

# -----------------------------------------------------------------------------
# settings
out_dir = "out"            # the run to look at
images = ""                # an image or a folder; '' = the run's held-out images
count = 8                  # how many images, at most
size = 256                 # images= are shown and measured as centre squares of this side in pixels
compare = ""               # weights to set beside the run's: a taesd.py file, an AutoencoderTiny folder or hub id, another out_dir
export = False             # instead: write the weights as taesd.py, diffusers and ONNX files to out_dir/export
export_dtype = "float32"   # of the exported weights: float32 or float16
device = "auto"            # auto, cuda, mps or cpu
# -----------------------------------------------------------------------------


# measures: [N,3,H,W] in [0,1] -> [N], one figure an image

def psnr(fake, real):
    """Peak signal-to-noise ratio in dB; 100 for identical images."""
    return -10 * torch.log10((fake - real).square().mean((1, 2, 3)).clamp(min=1e-10))


def ssim(fake, real):
    """Structural similarity (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5, on each colour channel."""
    offset = torch.arange(11, device=real.device) - 5.0
    window = torch.exp(-offset.square() / (2 * 1.5**2))
    window = (torch.outer(window, window) / window.sum() ** 2).expand(3, 1, 11, 11)

    def blur(x):
        return F.conv2d(x, window, groups=3)
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
    return high_frequency_energy(fake).mean() / high_frequency_energy(real).mean()


def measure(fake, real):
    """{name: figure} of images against originals, both [N,3,H,W] in [0,1]."""
    return {"psnr": psnr(fake, real).mean().item(), "ssim": ssim(fake, real).mean().item(),
            "lowres_mse": lowres_mse(fake, real).mean().item(), "sharpness": sharpness(fake, real).item()}


def chunked(network, images):
    """Apply a network to 4 images at a time: whole held-out sets fit in little memory. Gives float32."""
    return torch.cat([network(chunk).float() for chunk in images.split(4)])


# pictures

def latent_colors(latents, size):
    """The first three channels as RGB, -3..3 -> 0..1, enlarged to [N,3,size,size]."""
    colors = F.pad(latents[:, :3], (0, 0, 0, 0, 0, max(0, 3 - latents.shape[1])))
    return F.interpolate(colors / 6 + 0.5, size)


def picture(rows, path):
    """Write {label: [N,3,H,W] images in [0,1]} as one PNG, a labelled row each."""
    strips = [torch.cat(list(row.detach().float().cpu().clamp(0, 1)), -1) for row in rows.values()]
    font, bar = ImageFont.load_default(14), 20
    sheet = Image.new("RGB", (strips[0].shape[-1], sum(strip.shape[-2] + bar for strip in strips)))
    draw, top = ImageDraw.Draw(sheet), 0
    for label, strip in zip(rows, strips):
        draw.text((4, top + 2), label, fill=(255, 255, 255), font=font)
        sheet.paste(Image.fromarray(np.round(strip.permute(1, 2, 0).numpy() * 255).astype(np.uint8)), (0, top + bar))
        top += strip.shape[-2] + bar
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    save_file(path, lambda aside: sheet.save(aside, format="PNG"))


# python sample.py

def milliseconds(decode, latents):
    """Time to decode the first of the latents: median of 5 runs after one to warm up."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        decode(latents[:1]).sum().item()  # .item() waits for the device
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times[1:])[2]


def write_exports(checkpoint):
    """Write the run's averaged weights in every format that can hold them, in export_dtype (ONNX: float32), to out_dir/export."""
    folder, ready, shape = os.path.join(out_dir, "export"), checkpoint["ready"], checkpoint["shape"]
    os.makedirs(folder, exist_ok=True)
    networks = student(checkpoint)
    written = []
    for half in ready:
        written.append(f"taesd_{half}.pth")
        save_taesd(os.path.join(folder, written[-1]), networks[half], getattr(torch, export_dtype))
    if len(ready) == 2 and shape["variant"] == "plain":
        written.append("diffusers")
        save_diffusers(os.path.join(folder, "diffusers"), *networks.values(), getattr(torch, export_dtype), model_card(checkpoint))
    if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxscript"):
        for half in ready:
            written.append(f"taesd_{half}.onnx")
            save_onnx(os.path.join(folder, written[-1]), networks[half])
    else:
        print("no ONNX files: they need two more packages, pip install onnx onnxscript")
    if shape["variant"] != "plain":
        print(f"no diffusers folder: AutoencoderTiny cannot express the variant {shape['variant']}")
    print(f"{folder}: wrote {', '.join(written)}")


def student(checkpoint):
    """{"encoder": network, "decoder": network} of what `load_student` gave; halves that it lacks are left out."""
    networks = {}
    for half, build in (("encoder", Encoder), ("decoder", Decoder)):
        if half in checkpoint["ready"]:
            networks[half] = build(**checkpoint["shape"])
            networks[half].load_state_dict(checkpoint[f"ema_{half}"])
    return networks


@torch.no_grad()
def main():
    require_positive(globals(), "count")
    if export_dtype not in ("float32", "float16"):
        stop(f"--export_dtype={export_dtype}: must be float32 or float16")
    place = pick_device(device)
    checkpoint = load_checkpoint(out_dir)
    if export:
        return write_exports(checkpoint)
    teacher = Teacher(checkpoint["settings"]["teacher"], place)
    students = {"our": student(checkpoint)}
    if compare:
        other = load_student(compare, "--compare")
        if [other["shape"][name] for name in ("latent_channels", "factor")] != [teacher.latent_channels, teacher.factor]:
            stop(f"--compare={compare}: has {other['shape']['latent_channels']} channels at factor {other['shape']['factor']}, the run's teacher "
                 f"{teacher.latent_channels} at {teacher.factor}")
        students[f"{os.path.basename(os.path.normpath(compare))[:18]}:"] = student(other)

    if images:
        if size < 16 or size % teacher.multiple:
            stop(f"--size={size}: must be 16 or more and a multiple of {teacher.multiple} for this teacher")
        real = Images("", images).held_out(count, size)
    else:
        real = checkpoint["held_out"][:count]
    real = real.to(place) / 255

    latents = chunked(teacher.encode, real)
    pictures = {"original": real, "teacher round trip": chunked(teacher.decode, latents)}
    table = {"teacher round trip": (None, milliseconds(teacher.decode, latents), teacher.parameters)}
    shown_latents = {"the teacher's latents (channels 1-3)": latent_colors(latents, real.shape[-1])}
    for name, networks in students.items():
        for network in networks.values():
            network.to(place)
        encoder, decoder = networks.get("encoder"), networks.get("decoder")
        if decoder:
            pictures[f"{name} decoder"] = chunked(decoder, latents).clamp(0, 1)
            table[f"{name} decoder"] = (None, milliseconds(decoder, latents), parameters(decoder))
        if encoder:
            theirs = chunked(encoder, real)
            shown_latents[f"{name} latents"] = latent_colors(theirs, real.shape[-1])
        if encoder and decoder:
            pictures[f"{name} encoder and decoder"] = chunked(decoder, theirs).clamp(0, 1)
            table[f"{name} encoder and decoder"] = (F.mse_loss(theirs, latents).item(), milliseconds(decoder, theirs),
                                                    parameters(encoder) + parameters(decoder))

    path = os.path.join(out_dir, "samples", "sample.png")
    picture(pictures | shown_latents, path)
    print(f"{out_dir}: step {checkpoint['step']}, teacher {checkpoint['settings']['teacher']}, {len(real)} images "
          f"({images or 'held out'}) of {real.shape[-1]}x{real.shape[-1]}, {place} float32\n")
    wide = max(24, *map(len, table))
    print(f"{'':{wide}} {'PSNR dB':>8} {'SSIM':>7} {'lowres MSE':>11} {'sharpness':>10} {'latent MSE':>11} {'decode ms':>10} {'parameters':>12}")
    for row, (latent_mse, decode_ms, n_parameters) in table.items():
        figures = measure(pictures[row], real)
        latent_mse = "" if latent_mse is None else f"{latent_mse:.4f}"
        print(f"{row:{wide}} {figures['psnr']:8.2f} {figures['ssim']:7.4f} {figures['lowres_mse']:11.6f} {figures['sharpness']:10.3f} "
              f"{latent_mse:>11} {decode_ms:10.1f} {n_parameters:12,}")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    configure(globals())
    main()
