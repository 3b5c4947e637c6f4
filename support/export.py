"""Writes a student's weights in the formats that other programs load.

    taesd_encoder.pth, taesd_decoder.pth    taesd.py, ComfyUI, A1111, SD.Next
    taesd.safetensors                       both halves, for stable-diffusion.cpp
    diffusers/                              AutoencoderTiny, which can only hold the plain variant
    taesd_encoder.onnx, taesd_decoder.onnx  onnxruntime and others
    model.py                                the networks, for your own code; README.md shows how to load them
"""
import importlib.util
import logging
import os
import shutil
import warnings
from glob import glob
from pathlib import Path
from string import Template

import torch
import torch.nn as nn
from safetensors.torch import save_file as write_safetensors

import model
from model import Clamp
from support.files import save_file, save_text

MODEL_CARD = os.path.join(os.path.dirname(__file__), "..", "assets", "model_card.md")


def save_taesd(path, network, dtype=torch.float32):
    """Write a plain state dict, the format of taesd.py: taesd_encoder.pth or taesd_decoder.pth."""
    state = {key: value.detach().cpu().to(dtype).contiguous() for key, value in network.state_dict().items()}
    save_file(path, lambda temporary: torch.save(state, temporary))


def without_clamp(network):
    """The layers as diffusers and stable-diffusion.cpp count them: there, a decoder's Clamp is not a layer."""
    starts_with_clamp = isinstance(network, nn.Sequential) and isinstance(network[0], Clamp)
    return nn.Sequential(*list(network)[1:]) if starts_with_clamp else network


def save_safetensors(path, student, dtype=torch.float32):
    """Write {"encoder": network, "decoder": network} to one file, with names such as encoder.layers.0.weight."""
    state = {}
    for half, network in student.items():
        for name, weight in without_clamp(network).state_dict().items():
            state[f"{half}.layers.{name}"] = weight.detach().cpu().to(dtype).contiguous()
    save_file(path, lambda temporary: write_safetensors(state, temporary, {"format": "pt"}))


def save_diffusers(folder, student, shape, dtype=torch.float32, card=""):
    """Write a `diffusers.AutoencoderTiny` folder with `card` as its README.md. Returns '', or why that is not possible.
    AutoencoderTiny takes and returns images in [-1,1], and converts them itself."""
    if shape["variant"] != "plain" or len(student) < 2:
        return "AutoencoderTiny can only hold an encoder and a decoder of the plain variant"
    from diffusers import AutoencoderTiny
    depth = model.halvings(shape["factor"])
    widths = (shape["width"],) * (depth + 1)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        vae = AutoencoderTiny(
            latent_channels=shape["latent_channels"],
            encoder_block_out_channels=widths, num_encoder_blocks=(1,) + (3,) * depth,
            decoder_block_out_channels=widths, num_decoder_blocks=(3,) * depth + (1,))
    for half, network in student.items():
        theirs, ours = (each.state_dict() for each in (getattr(vae, half).layers, without_clamp(network)))
        if {name: w.shape for name, w in theirs.items()} != {name: w.shape for name, w in ours.items()}:
            return f"AutoencoderTiny cannot hold this {half}"
    save_safetensors(os.path.join(folder, "diffusion_pytorch_model.safetensors"), student, dtype)
    save_text(os.path.join(folder, "config.json"), vae.to_json_string())
    save_text(os.path.join(folder, "README.md"), card)
    return ""


def save_onnx(path, network, dtype=torch.float32):
    """Write an ONNX file of an encoder or decoder, for any batch size, height and width. Needs onnx and onnxscript."""
    if isinstance(network[0], Clamp):
        names, channels, cells = ("latent", "image"), network[1].in_channels, 16
    else:
        names, channels = ("image", "latent"), 3
        cells = 16 * 2 ** sum(getattr(layer, "stride", 0) == (2, 2) for layer in network)
    example = torch.zeros(2, channels, cells, cells + cells // 2, dtype=dtype)
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is missing, which is not needed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(network.eval().to(dtype), (example,), dynamo=True, verbose=False,
                                    input_names=names[:1], output_names=names[1:], dynamic_shapes=(sizes,))
    save_file(path, lambda temporary: program.save(temporary, external_data=False))


def model_card(checkpoint, name="taesd", preview=""):
    """README.md with the header of the Hugging Face hub. name: of the files; preview: a picture in the same folder."""
    settings, shape, halves = checkpoint["settings"], checkpoint["shape"], checkpoint["exportable"]
    rows = []
    for key, value in checkpoint["metrics"].items():
        half = "encoder" if key.startswith(("val_latent", "val_teacher")) else "decoder"
        if half in halves:
            rows.append(f"| {key.removeprefix('val_')} | {value:.4g} |")

    def last_part(path):
        return os.path.basename(os.path.normpath(path))
    losses = [f"{key} {value:g}" for key, value in settings.items() if key.endswith("_weight") and value]
    return Template(Path(MODEL_CARD).read_text(encoding="utf-8")).substitute(settings | shape | {
        "library": "diffusers" if shape["variant"] == "plain" and len(halves) == 2 else "pytorch", "name": name,
        "teacher_name": last_part(settings["teacher"]), "teacher": checkpoint["teacher"], "shape": shape,
        "halves": " and ".join(halves).capitalize(), "half": halves[-1], "builder": halves[-1].capitalize(),
        "step": f"{checkpoint['step']:,}", "images_seen": f"{checkpoint['images_seen']:,}",
        "data": last_part(settings["data_dir"] or "assets/photos"), "start": last_part(settings["init_from"]),
        "losses": ", ".join(losses), "table": "\n".join(rows) or "| not measured yet | |",
        "picture": f"\n![originals, teacher, this model]({preview})" if preview else ""})


def export_all(checkpoint, student, out_dir, name, dtype):
    """Write a run's averaged weights, {half: network}, to out_dir/export in every format that can hold them."""
    folder, written = os.path.join(out_dir, "export"), []
    pictures = sorted(glob(os.path.join(out_dir, "samples", "[0-9]*.png")))

    def path(file):
        written.append(file)
        return os.path.join(folder, file)
    for half, network in student.items():
        save_taesd(path(f"{name}_{half}.pth"), network, dtype)
    save_safetensors(path(f"{name}.safetensors"), student, dtype)
    save_file(path("model.py"), lambda temporary: shutil.copyfile(model.__file__, temporary))
    if pictures:  # of the last evaluation
        save_file(path("preview.png"), lambda temporary: shutil.copyfile(pictures[-1], temporary))
    save_text(path("README.md"), model_card(checkpoint, name, "preview.png" if pictures else ""))
    problem = save_diffusers(path("diffusers"), student, checkpoint["shape"], dtype, model_card(checkpoint))
    if problem:
        written.remove("diffusers")
        print(f"no diffusers folder: {problem}")
    if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxscript"):
        for half, network in student.items():
            save_onnx(path(f"{name}_{half}.onnx"), network, dtype)
    else:
        print("no ONNX files: they need two more packages, pip install onnx onnxscript")
    print(f"{folder}: wrote {', '.join(written)}")
