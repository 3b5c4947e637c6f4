"""Look at a run, or at a teacher alone: draw the originals, the teacher's and the student's pictures, and measure them.

    python sample.py --out_dir=out                     # on its held-out images, or --images=a file or folder
    python sample.py --out_dir=out --compare=taesdxl_decoder.pth   # together with other weights, on the same latents
    python sample.py --out_dir=out --images=photos --size=0        # whole pictures, at their own size
    python sample.py --out_dir=out --export            # weights for other programs
    python sample.py --teacher=sdxl --images=photos    # a teacher alone: is its scale right?
    python sample.py --teacher=sdxl --compare=madebyollin/taesdxl --images=photos --count=100 --size=256,512
    python sample.py --curves=out-a,out-b              # the logs of two runs in one figure
"""
import contextlib
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from data import Images, to_tensor, whole_image
from support.checkpoint import build_student, load_checkpoint, load_student
from support.config import configure, fail
from support.curves import draw_curves
from support.device import pick_device, pick_dtype
from support.export import export_all
from support.files import save_file
from support.latent_rgb import as_python, fit_latent_rgb, latent_rgb
from teacher import Teacher

# --- settings --------------------------------------------------------------------------------------------------------
out_dir = "out"            # the run to look at; the picture is written to samples/sample.png in it
images = ""                # an image or a folder; '' = the run's held-out images
count = 0                  # how many images, at most; 0 = those that the run is evaluated on, or 16 of images=
size = ""                  # measure centre squares of this side in pixels, or of several: 256,512,1024; '' = eval_size
                           # of the run, or 256; 0 = whole pictures of at most 2048 pixels, one file each
compare = ""               # other weights to look at as well: a weights file, an AutoencoderTiny or another out_dir
teacher = ""               # look at this teacher instead of a run, named as for train.py, and at compare= if given
curves = ""                # instead: draw the logs of these runs, separated by commas, to samples/ of the first one
export = False             # instead: write the weights for other programs to out_dir/export
export_name = "taesd"      # name of the exported files: taesdxl gives taesdxl_decoder.pth, as ComfyUI expects it
export_dtype = "float32"   # of the exported weights: float32 or float16
device = "auto"            # auto, cuda, mps or cpu
dtype = "auto"             # auto = as the run is evaluated, or else float32; float32, bfloat16 or float16
# -----------------------------------------------------------------------------

# metric: (heading, format)
COLUMNS = {"psnr": ("PSNR dB", "11.2f"), "ssim": ("SSIM", "11.4f"), "lowres_mse": ("lowres MSE", "11.6f"),
           "sharpness": ("sharpness", "11.3f"), "latent_mse": ("latent MSE", "11.4f"),
           "latent_mean_error": ("mean error", "11.3f"), "latent_std_error": ("std error", "11.3f")}
LARGEST = 2048  # longer side of a whole picture in pixels; a student of width 64 needs 4 GB for one of this size


# The metrics take images [N,3,H,W] in [0,1], and return one number for each image, [N].
def psnr(fake, real):
    """Peak signal-to-noise ratio in dB. Identical images give 100."""
    return -10 * torch.log10((fake - real).square().mean((1, 2, 3)).clamp(min=1e-10))


def ssim(fake, real):
    """Structural similarity (Wang et al. 2004), with a Gaussian window of 11 pixels and sigma 1.5, on each channel."""
    window = torch.exp(-(torch.arange(11) - 5.0).square() / (2 * 1.5**2))
    weights = (window / window.sum()).tolist()

    def blur(x):  # not by conv2d, which may round to TF32 on a GPU; these are small differences of large numbers
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
    """Mean squared error after 8x8 average pooling, which measures colour without detail."""
    return (F.avg_pool2d(fake, 8) - F.avg_pool2d(real, 8)).square().mean((1, 2, 3))


def high_frequency_energy(image):
    """Mean square of what a 3x3 box blur removes."""
    return (image - F.avg_pool2d(image, 3, 1, 1, count_include_pad=False)).square().mean((1, 2, 3))


def sharpness(fake, real):
    """High-frequency energy of all images, divided by that of the originals: 1 is right, and less is blurry."""
    return high_frequency_energy(fake).mean() / high_frequency_energy(real).mean().clamp(min=1e-8)


def compute_metrics(fake, real):
    """{name: mean over the images}. fake, real: [N,3,H,W] in [0,1]."""
    return {"psnr": psnr(fake, real).mean().item(), "ssim": ssim(fake, real).mean().item(),
            "lowres_mse": lowres_mse(fake, real).mean().item(), "sharpness": sharpness(fake, real).item()}


def compute_latent_metrics(latents, target):
    """{name: value} of a student's latents against the teacher's, both [N,C,h,w]: the mean squared error, and the error
    of mean and standard deviation in the worst channel, in units of that channel's standard deviation."""
    target_std = target.std((0, 2, 3)).clamp(min=1e-4)  # that of an even picture is 0
    mean_error = (latents.mean((0, 2, 3)) - target.mean((0, 2, 3))).abs() / target_std
    std_error = (latents.std((0, 2, 3)) / target_std - 1).abs()
    return {"latent_mse": F.mse_loss(latents, target).item(), "latent_mean_error": mean_error.max().item(),
            "latent_std_error": std_error.max().item()}


def one_by_one(network, images):
    """Apply a network to one image at a time, so that a whole held-out set fits in little memory. Returns float32."""
    return torch.cat([network(image).float() for image in images.split(1)])


def save_picture(rows, path):
    """Write {label: images [N,3,H,W] in [0,1]} as one PNG, with a labelled row for each entry."""
    strips = [torch.cat(list(row.detach().float().cpu().clamp(0, 1)), -1) for row in rows.values()]
    font, bar = ImageFont.load_default(14), 20
    sheet = Image.new("RGB", (strips[0].shape[-1], sum(strip.shape[-2] + bar for strip in strips)))
    draw, top = ImageDraw.Draw(sheet), 0
    for label, strip in zip(rows, strips):
        draw.text((4, top + 2), label, fill=(255, 255, 255), font=font)
        pixels = np.round(strip.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        sheet.paste(Image.fromarray(pixels), (0, top + bar))
        top += strip.shape[-2] + bar
    save_file(path, lambda temporary: sheet.save(temporary, format="PNG"))


class Evaluator:
    """Measures students on images, [N,3,H,W] uint8, together with the teacher's own pictures of these images."""
    def __init__(self, images, vae):
        self.vae = vae
        self.real = images.to(vae.device, memory_format=torch.channels_last) / 255
        self.latent = one_by_one(vae.encode, self.real)
        self.teacher_picture = one_by_one(vae.decode, self.latent)
        self.teacher_metrics = compute_metrics(self.teacher_picture, self.real)

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # in training: these shapes are too few to compile for
    def evaluate(self, students, autocast=contextlib.nullcontext()):
        """students: {label: {"encoder": network, "decoder": network}}, where one may be missing; autocast: the context
        for them. Returns ({row: pictures [N,3,H,W]}, {row: {metric: value}}), beginning with the teacher's own."""
        pictures, metrics = {"teacher": self.teacher_picture}, {"teacher": self.teacher_metrics}

        def apply(network, inputs):
            with autocast:
                return one_by_one(network, inputs)

        def add(row, picture, latent_metrics):
            pictures[row] = picture.clamp(0, 1)
            metrics[row] = compute_metrics(pictures[row], self.real) | latent_metrics
        for label, networks in students.items():
            if "decoder" in networks:
                add(f"{label} decoder", apply(networks["decoder"], self.latent), {})
            if "encoder" in networks:
                latent = apply(networks["encoder"], self.real)
                latent_metrics = compute_latent_metrics(latent, self.latent)
                if "decoder" in networks:
                    add(f"{label} encoder and decoder", apply(networks["decoder"], latent), latent_metrics)
                add(f"{label} encoder, teacher's decoder", one_by_one(self.vae.decode, latent), latent_metrics)
        return pictures, metrics


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


def print_table(rows):
    """rows: {label: {metric: value}}. There is a column for each metric that any of them has."""
    width = max(24, *map(len, rows))
    columns = {name: column for name, column in COLUMNS.items() if any(name in metrics for metrics in rows.values())}
    print(" " * width, *(f"{title:>11}" for title, _ in columns.values()))
    for label, metrics in rows.items():
        cells = [f"{metrics[name]:{form}}" if name in metrics else " " * 11 for name, (_, form) in columns.items()]
        print(f"{label:{width}}", *cells)


# --- python sample.py ------------------------------------------------------------------------------------------------
@torch.no_grad()
def main():
    if export_dtype not in ("float32", "float16"):
        fail(f"--export_dtype={export_dtype}: must be float32 or float16")
    if teacher and export:
        fail(f"--export: exports a run; --teacher={teacher} looks at a teacher")
    if size and not all(side.isdigit() for side in size.split(",")):
        fail(f"--size={size}: must be a number of pixels, or several, as in 256,512; or 0 for whole pictures")
    if curves:
        out_dirs = curves.split(",")
        path = os.path.join(out_dirs[0], "samples", "curves.png")
        draw_curves(out_dirs, path)
        return print(f"wrote {path}")
    place = pick_device(device)
    checkpoint = None if teacher else load_checkpoint(out_dir)
    if export and checkpoint:
        return export_all(checkpoint, build_student(checkpoint), out_dir, export_name, getattr(torch, export_dtype))
    settings = {"teacher": teacher, "data_dir": "", "val_dir": "", "dtype": "float32", "eval_size": 256}
    settings |= checkpoint["settings"] if checkpoint else {}
    precision = pick_dtype(settings["dtype"] if dtype == "auto" else dtype, place)
    autocast = torch.autocast(place.type, precision, enabled=precision != torch.float32)
    n = count or (16 if images or teacher else settings["eval_images"])
    pictures = Images("", images) if images else Images(settings["data_dir"], settings["val_dir"])
    vae, samples = Teacher(settings["teacher"], place, precision), os.path.join(out_dir, "samples")
    students = load_students(checkpoint, compare, vae)
    sides = [int(side) for side in size.split(",")] if size else [settings["eval_size"]]
    if size == "0":
        if vae.class_name in ("AutoencoderKL", "AutoencoderKLFlux2"):  # these can process large images in tiles
            vae.vae.enable_tiling()
        wholes = [pictures.attempt(whole_image, path, LARGEST, vae.multiple) for path in pictures.val[:n]]
        batches = [(f"{number:03d}", to_tensor([whole])) for number, whole in enumerate(wholes, 1) if whole is not None]
    else:
        for side in sides:
            vae.check_fit(size=side)
        batches = [(side, pictures.held_out(n, side, vae.multiple)) for side in sides]
    print(f"{out_dir}: step {checkpoint['step']}, teacher {settings['teacher']}" if checkpoint else
          f"teacher {teacher}: {vae}")
    stem = os.path.join(samples, "look" if teacher else "sample")  # a look at a teacher leaves the run's picture alone
    written = []
    for label, batch in batches:
        evaluator = Evaluator(batch, vae)
        drawn, metrics = evaluator.evaluate(students, autocast)
        factors, bias, r2 = fit_latent_rgb(evaluator.latent, evaluator.real)
        drawn = {"original": evaluator.real} | drawn
        drawn["the teacher's latents, by latent_rgb"] = latent_rgb(evaluator.latent, factors, bias, batch.shape[-2:])
        written.append(f"{stem}.png" if len(batches) == 1 else f"{stem}-{label}.png")
        save_picture({row: images[:8] for row, images in drawn.items()}, written[-1])
        print(f"\n{len(batch)} images ({images or 'held out'}) of {batch.shape[-1]}x{batch.shape[-2]}, "
              f"{place}, {vae.dtype}: {written[-1]}\n")
        print_table(metrics)
    if not checkpoint:
        print(f"\n{vae.describe_scale(evaluator.latent)}")
        print(f"\nthe best matrix from latents to colours (R² {r2:.2f}), ready to paste:\n{as_python(factors, bias)}")
    print(f"\nwrote {', '.join(written)}")


if __name__ == "__main__":
    configure(globals())
    main()
