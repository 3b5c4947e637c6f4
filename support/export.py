"""A student's weights in files that other programs load. Nothing here trains, or reads what a stranger wrote.

    taesd_encoder.pth, taesd_decoder.pth    taesd.py, ComfyUI, A1111, SD.Next
    taesd.safetensors                       both halves: stable-diffusion.cpp, and taesd_student.py
    taesd_student.py                        a module that needs torch and safetensors alone, for every variant
    diffusers/                              AutoencoderTiny, which can hold the plain variant alone
    taesd_encoder.onnx, taesd_decoder.onnx  onnxruntime and others
"""
import importlib.util
import inspect
import json
import logging
import os
import shutil
import warnings
from glob import glob

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file as write_safetensors

from model import Block, Clamp, Decoder, Encoder, conv, stages
from support.files import DIFFUSERS_FILES, check_ours, save_file, student


def save_taesd(path, module, dtype=torch.float32):
    """Write a plain state dict: the taesd.py format (taesd_encoder.pth, taesd_decoder.pth)."""
    state = {key: value.detach().cpu().to(dtype).contiguous() for key, value in module.state_dict().items()}
    save_file(path, lambda aside: torch.save(state, aside))


def layers_of(network):
    """{name: weight}; the decoder's layers are counted without its Clamp, as stable-diffusion.cpp and diffusers do."""
    if isinstance(network, nn.Sequential) and isinstance(network[0], Clamp):
        network = nn.Sequential(*list(network)[1:])
    return network.state_dict()


def save_halves(path, networks, shape, dtype=torch.float32):
    """Write one .safetensors file of {"encoder": network, "decoder": network}: encoder.layers.0.weight and so on."""
    state = {f"{half}.layers.{name}": weight.detach().cpu().to(dtype).contiguous()
             for half, network in networks.items() for name, weight in layers_of(network).items()}

    def write(aside):
        write_safetensors(state, aside, {"format": "pt", "shape": json.dumps(shape)})
        os.chmod(aside, 0o644)  # safetensors writes files that only their owner may read
    save_file(path, write)


def load(path):
    """[encoder, decoder] of a .safetensors file of both, in float32; None in the place of one that it lacks."""
    with safe_open(path, "pt") as file:
        shape, weights = json.loads(file.metadata()["shape"]), {name: file.get_tensor(name) for name in file.keys()}
    networks = []
    for half, build in (("encoder", Encoder), ("decoder", Decoder)):
        network, prefix = build(**shape).eval(), f"{half}.layers."
        state = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        if state:  # the file counts the decoder's layers without the first, its Clamp
            nn.Sequential(*list(network)[1 if half == "decoder" else 0:]).load_state_dict(state)
        networks.append(network if state else None)
    return networks


def save_module(path, shape):
    """Write a Python module that loads save_halves' files wherever there are torch and safetensors."""
    parts = "\n\n".join(inspect.getsource(part) for part in (conv, Clamp, Block, Encoder, Decoder, stages, load))
    channels, factor = shape["latent_channels"], shape["factor"]
    text = f'''"""A tiny autoencoder. Its files may be in float16; it needs torch and safetensors.

    from taesd_student import load
    encoder, decoder = load("taesd.safetensors")
    latents = encoder(images)                # [N,3,H,W] in [0,1] -> [N,{channels},H/{factor},W/{factor}], about N(0,1)
    images = decoder(latents).clamp(0, 1)    # and back
"""
import json
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open


{parts}'''
    save_text(path, text)


def save_text(path, text):
    def write(aside):
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
    save_file(path, write)


def save_onnx(path, module, dtype=torch.float32):
    """Write an ONNX file of an encoder or decoder, for any batch size and sides. Needs onnx and onnxscript."""
    decoder = isinstance(module[0], Clamp)
    names, channels = (("latent", "image"), module[1].in_channels) if decoder else (("image", "latent"), 3)
    cells = 16 if decoder else 16 * 2 ** sum(getattr(layer, "stride", 0) == (2, 2) for layer in module)
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which nothing here needs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval().to(dtype), (torch.zeros(2, channels, cells, cells + cells // 2, dtype=dtype),), dynamo=True,
            verbose=False,
            input_names=names[:1], output_names=names[1:], dynamic_shapes=(sizes,))
    save_file(path, lambda aside: program.save(aside, external_data=False))


def model_card(checkpoint, preview="", name=""):
    """README.md, with the header of the Hugging Face hub, of a run's weights: of a diffusers folder, or of a folder of
    exports, named so. preview: a picture beside it."""
    settings, shape, figures = checkpoint["settings"], checkpoint["shape"], checkpoint["figures"]
    teacher, data = (os.path.basename(os.path.normpath(settings[key])) for key in ("teacher", "data_dir"))
    data = data if settings["data_dir"] else "assets/photos"
    origin = os.path.basename(os.path.normpath(checkpoint.get("origin", "scratch")))
    losses = ", ".join(f"{key} {settings[key]:g}" for key in settings if key.endswith("_weight") and settings[key])
    half_of = {key: "encoder" if key.startswith(("val_latent", "val_teacher")) else "decoder" for key in figures}
    rows = "\n".join(f"| {key.removeprefix('val_')} | {value:.4g} |" for key, value in figures.items()
                     if half_of[key] in checkpoint["ready"])
    library, loader = "pytorch", f'from taesd_student import load; encoder, decoder = load("{name}.safetensors")'
    if shape["variant"] == "plain" and len(checkpoint["ready"]) == 2:
        where = '(..., subfolder="diffusers")' if name else ""
        library, loader = "diffusers", f"diffusers.AutoencoderTiny.from_pretrained{where}"
    return f"""---
library_name: {library}
tags: [taesd, tiny-autoencoder]
---
# Tiny autoencoder for {teacher}

{shape["latent_channels"]} latent channels at factor {shape["factor"]}, width {shape["width"]}, {shape["variant"]}:
{" and ".join(checkpoint["ready"])}. Load with `{loader}`.
Its images are [0,1] (for diffusers [-1,1]), its latents about N(0,1): those of the teacher after its own scaling, as
its pipeline does it.

Teacher: {checkpoint.get("teacher", teacher)}.

Trained for {checkpoint["step"]:,} steps ({checkpoint["images_seen"]:,} images) of {settings["crop"]} pixels, batch
{settings["batch_size"]}, seed {settings["seed"]}, on {data}, by {losses}; started from {origin}.

| held-out images, {settings["eval_size"]} pixels | |
|---|---|
{rows or "| not measured yet | |"}
""" + f"\n![originals, the teacher, this model]({preview})\n" * bool(preview)


def save_diffusers(path, encoder, decoder, dtype=torch.float32, card=""):
    """Write a `diffusers.AutoencoderTiny` folder.

    Encoder key k becomes encoder.layers.k, decoder key i.k decoder.layers.(i-1).k: its Clamp is no layer there.
    AutoencoderTiny takes and gives [-1,1] images and does that conversion itself; its latents are ours. It can express
    the plain variant alone. `card` becomes the folder's README.md. Returns whether it could be written; else says why.
    """
    from diffusers import AutoencoderTiny
    width, depth = encoder[0].out_channels, sum(isinstance(layer, nn.Upsample) for layer in decoder)
    with torch.random.fork_rng(devices=[]):  # its weights start random: leave the run's random state alone
        vae = AutoencoderTiny(
            latent_channels=encoder[-1].out_channels,
            encoder_block_out_channels=(width,) * (depth + 1), num_encoder_blocks=(1,) + (3,) * depth,
            decoder_block_out_channels=(width,) * (depth + 1), num_decoder_blocks=(3,) * depth + (1,))
    try:
        vae.encoder.layers.load_state_dict(layers_of(encoder))
        vae.decoder.layers.load_state_dict(layers_of(decoder))
    except RuntimeError as error:  # a fork's own encoder or decoder
        print(f"no diffusers folder: AutoencoderTiny cannot express this student ({str(error).splitlines()[0]})")
        return False

    def write(aside):
        nn.Module.to(vae, dtype)  # the method of diffusers would warn
        vae.save_pretrained(aside)
        if card:
            save_text(os.path.join(aside, "README.md"), card)
    save_file(path, write, names=DIFFUSERS_FILES)
    return True


def export(checkpoint, out_dir, name, dtype):
    """Write a run's averaged weights to out_dir/export in every format that can hold them; print which."""
    shape, networks, folder = checkpoint["shape"], student(checkpoint), os.path.join(out_dir, "export")
    check_ours(os.path.join(folder, "diffusers"), DIFFUSERS_FILES)
    os.makedirs(folder, exist_ok=True)
    written, pictures = [], sorted(glob(os.path.join(out_dir, "samples", "[0-9]*.png")))

    def path(file):
        written.append(file)
        return os.path.join(folder, file)
    for half, network in networks.items():
        save_taesd(path(f"{name}_{half}.pth"), network, dtype)
    save_halves(path(f"{name}.safetensors"), networks, shape, dtype)
    save_module(path("taesd_student.py"), shape)
    try:
        module = {}
        with open(os.path.join(folder, "taesd_student.py"), encoding="utf-8") as file:
            exec(file.read(), module)
        module["load"](os.path.join(folder, f"{name}.safetensors"))
    except Exception as error:  # a fork's own encoder or decoder
        print(f"taesd_student.py: does not load this student ({error}): what model.py has more, add to it by hand")
    if pictures:  # of the last evaluation
        save_file(path("preview.png"), lambda aside: shutil.copyfile(pictures[-1], aside))
    card = model_card(checkpoint, "preview.png" if pictures else "", name)
    save_text(path("README.md"), card)
    if shape["variant"] != "plain":
        print(f"no diffusers folder: AutoencoderTiny cannot express the variant {shape['variant']}")
    elif len(networks) < 2:
        print(f"no diffusers folder: AutoencoderTiny wants both halves, this run has the {checkpoint['ready'][0]}")
    elif not save_diffusers(path("diffusers"), *networks.values(), dtype, model_card(checkpoint)):
        written.remove("diffusers")
    if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxscript"):
        for half, network in networks.items():
            save_onnx(path(f"{name}_{half}.onnx"), network, dtype)
    else:
        print("no ONNX files: they need two more packages, pip install onnx onnxscript")
    print(f"{folder}: wrote {', '.join(written)}")


# -----------------------------------------------------------------------------
# the preview that needs no network

def fit_latent_rgb(latents, images):
    """The matrix that previews latents without a network, as ComfyUI and others keep one for each model, by least
    squares: (factors [C,3], bias [3], R²); latents @ factors + bias is the mean colour of a patch in [-1,1]."""
    colors = F.adaptive_avg_pool2d(images * 2 - 1, latents.shape[-2:]).movedim(1, -1).flatten(0, 2).cpu().double()
    values = latents.movedim(1, -1).flatten(0, 2).cpu().double()
    values = torch.cat([values, torch.ones_like(values[:, :1])], 1)
    solved = torch.linalg.lstsq(values, colors, driver="gelsd").solution  # of the least norm where many would do
    r2 = 1 - (values @ solved - colors).square().sum() / (colors - colors.mean(0)).square().sum().clamp(min=1e-9)
    return solved[:-1].float(), solved[-1].float(), r2.item()


def latent_rgb(latents, factors, bias, size):
    """That preview, in [0,1], enlarged to [N,3,size,size]."""
    colors = torch.einsum("nchw,cr->nrhw", latents.cpu(), factors) + bias.view(1, 3, 1, 1)
    return F.interpolate(colors / 2 + 0.5, size).clamp(0, 1)


def save_latent_rgb(path, factors, bias):
    """Write both as JSON, and return them as lines of Python."""
    factors, (bias,) = ([[round(v, 4) for v in row] for row in rows.tolist()] for rows in (factors, bias[None]))
    save_text(path, json.dumps({"latent_rgb_factors": factors, "latent_rgb_factors_bias": bias}, indent=1))
    rows = "".join(f"    {row},\n" for row in factors)
    return f"latent_rgb_factors = [\n{rows}]\nlatent_rgb_factors_bias = {bias}"
