"""Weights that are read, and checkpoints; support/export.py writes those of students for other programs.

Files are written aside and renamed: each is complete or as it was before. Those that are read may be a stranger's.
"""
import os
import re
import shutil
import sys

import torch
import torch.nn as nn
from safetensors import safe_open

from model import Decoder, Encoder
from support.configure import stop
from support.hub import is_hub_id, load_autoencoder

DONOR = os.path.join(os.path.dirname(__file__), "..", "assets", "donor", "taesd_encoder.pth")
DIFFUSERS_FILES = ("README.md", "config.json", "diffusion_pytorch_model.safetensors")
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")  # of file managers: to look into a folder must not make it another's


def is_ours(path, names):
    """Is there nothing at `path`, or a folder of some of our files, `names`? Such a folder may be replaced."""
    folder = os.path.isdir(path) and not os.path.islink(path)
    return not os.path.lexists(path) or folder and not set(os.listdir(path)) - {*names, *LITTER}


def check_ours(path, names):
    """Stop with one line if `path` is anything else."""
    if not is_ours(path, names):
        stop(f"{path}: is there already, and not of this program; choose another place, or move it away")


def save_file(path, write, keep=None, names=()):
    """Call write(temporary path), then rename: a file is complete or as it was before. What was there before is renamed
    to `keep`, if that is given. names: of the files, where write makes a folder; only such a folder is replaced."""
    path = os.path.normpath(path)
    aside = f"{path}.tmp"
    for place in (path, aside):
        if names or os.path.isdir(place):
            check_ours(place, names)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        write(aside)
    except Exception as error:  # a full disk, a read-only one: torch, Pillow and safetensors raise different types
        shutil.rmtree(aside, ignore_errors=True)
        if os.path.isfile(aside):
            os.remove(aside)
        reason = " ".join(str(error).split())[:120]
        stop(f"{path}: could not be written ({reason}): is the disk full? What was there before is untouched")
    for root, _, written in os.walk(aside):  # safetensors writes files that only their owner may read
        for name in written:
            os.chmod(os.path.join(root, name), 0o644)
    if keep and os.path.exists(path):
        os.replace(path, keep)
    shutil.rmtree(path, ignore_errors=True)  # only a folder: os.replace cannot do those
    os.replace(aside, path)


def load_file(path):
    """torch.load onto the CPU; tensors and plain containers only, so a file from a stranger cannot run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        stop(f"{path}: no such file")
    except Exception as error:  # a truncated archive, a pickle that wants to run code, a text file: many types
        stop(f"{path}: not a readable weights file ({type(error).__name__}: {str(error).splitlines()[0][:120]})")


def checkpoint_paths(out_dir):
    """Of the last checkpoint of a run and of the one before."""
    return os.path.join(out_dir, "ckpt.pt"), os.path.join(out_dir, "ckpt_previous.pt")


def load_checkpoint(out_dir, set_aside=False):
    """Read the last checkpoint of a run, onto the CPU, or the one before where the last is missing or damaged. Stops
    with one line if neither can be read or they are not train.py's. set_aside: rename a damaged one, so that the next
    save does not keep it as the one before."""
    path, previous = checkpoint_paths(out_dir)
    if not any(map(os.path.isfile, (path, previous))):
        stop(f"--out_dir={out_dir}: no such file as {path}, so there is no run here yet")
    try:
        checkpoint = load_file(path)
    except SystemExit as error:
        if not os.path.isfile(previous):
            raise
        if set_aside and os.path.exists(path):
            os.replace(path, f"{path}.damaged")
        print(f"{str(error).removeprefix('error: ')}; going back to {previous}", file=sys.stderr)
        checkpoint, path = load_file(previous), previous
    if not isinstance(checkpoint, dict) or not {"settings", "shape", "ema_encoder", "ema_decoder"} <= checkpoint.keys():
        stop(f"{path}: not a checkpoint of train.py")
    return checkpoint


def load_student(source, flag="--init_from"):
    """The student of a run's out_dir, of taesd.py files (the path of one; its partner is taken where it lies beside
    it), of a .safetensors file of both halves, of an AutoencoderTiny (a diffusers folder or a hub id), or the bundled
    one, `donor`.

    Returns what `load_checkpoint` does, of others than runs only "shape", "ready" and the halves that there are.
    """
    if any(map(os.path.isfile, checkpoint_paths(source))):
        return load_checkpoint(source)
    source, halves = DONOR if source == "donor" else source, {}
    if source.endswith(".pth"):
        folder, name = os.path.split(source)
        for half in ("encoder", "decoder"):
            path = os.path.join(folder, re.sub("encoder|decoder", half, name))
            if path == source or os.path.isfile(path):
                halves[half] = load_taesd(path)
    elif source.endswith(".safetensors") and os.path.isfile(source):
        halves = load_halves(source)
    elif not os.path.isdir(source) and not is_hub_id(source) or os.path.isfile(source):
        stop(f"{flag}={source}: no such weights; it takes donor, a run's out_dir, a taesd.py .pth file, a .safetensors "
             f"file of both halves, an AutoencoderTiny folder or a hub id owner/repo")
    else:
        vae = load_autoencoder(source, ("AutoencoderTiny",), torch.float32, f"{flag}={source}")
        try:
            widths = vae.config.encoder_block_out_channels
            shape = dict(latent_channels=vae.config.latent_channels, factor=2 ** (len(widths) - 1), width=widths[0],
                         variant="plain")
            halves = {"encoder": (Encoder(**shape), shape), "decoder": (Decoder(**shape), shape)}
            halves["encoder"][0].load_state_dict(vae.encoder.layers.state_dict())
            nn.Sequential(*list(halves["decoder"][0])[1:]).load_state_dict(vae.decoder.layers.state_dict())
        except Exception as error:
            stop(f"{source}: not an AutoencoderTiny in TAESD's layout ({' '.join(str(error).split())[:300]})")
    shapes = [shape for _, shape in halves.values()]
    if shapes[0] != shapes[-1]:
        stop(f"{source}: encoder and decoder differ: {shapes[0]} and {shapes[1]}")
    weights = {f"ema_{half}": network.state_dict() for half, (network, _) in halves.items()}
    return {"shape": shapes[0], "ready": list(halves)} | weights


def student(checkpoint):
    """{"encoder": network, "decoder": network} of what `load_student` gave; a half that it lacks is left out."""
    networks = {}
    for half, build in (("encoder", Encoder), ("decoder", Decoder)):
        if half in checkpoint["ready"]:
            networks[half] = build(**checkpoint["shape"])
            networks[half].load_state_dict(checkpoint[f"ema_{half}"])
    return networks


def load_taesd(path):
    """Read taesd_encoder.pth or taesd_decoder.pth (float32 or float16); the shapes inside tell which network it is.

    Returns (network in float32, its arguments). Stops with one line if the file is anything else.
    """
    return network_of(load_file(path), path)


def load_halves(path):
    """Read a .safetensors file of both halves, as save_halves in support/export.py and AutoencoderTiny write it.

    Returns {"encoder": (network in float32, its arguments), "decoder": ...}, of those that it has.
    """
    states = {"encoder": {}, "decoder": {}}
    try:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys(), key=lambda name: [int(part) for part in name.split(".") if part.isdigit()]):
                half, _, layer, rest = name.split(".", 3) if ".layers." in name else (None,) * 4
                if half in states:  # the decoder's Clamp is no layer there
                    states[half][f"{int(layer) + (half == 'decoder')}.{rest}"] = file.get_tensor(name)
    except Exception as error:
        stop(f"{path}: not a readable weights file ({type(error).__name__}: {str(error).splitlines()[0][:120]})")
    if not any(states.values()):
        stop(f"{path}: has no weights named encoder.layers.0.weight and so on; a VAE of full size is a --teacher=")
    return {half: network_of(state, path) for half, state in states.items() if state}


def network_of(state, path):
    """(network in float32, its arguments) of a state dict in taesd.py's layout, of the file at path."""
    try:
        decoder = "0.weight" not in state  # index 0 of a decoder is the Clamp, which has no weights
        first, last = state["1.weight" if decoder else "0.weight"], list(state.values())[-1]
        width = [value for value in state.values() if value.ndim == 4][-1].shape[1]  # of the last convolution
        f32 = first.shape[0] != width
        # the convolutions that halve or double have no bias, except for two in the stem of the f32 encoder
        halvings = sum(value.ndim == 4 and key.count(".") == 1 and key.replace("weight", "bias") not in state
                       for key, value in state.items()) + 2 * (f32 and not decoder)
        arguments = dict(
            latent_channels=first.shape[1] if decoder else len(last), width=width, factor=2 ** halvings,
            variant="f32" if f32 else "midblock_gn" if any(".pool." in key for key in state) else "plain")
        network = (Decoder if decoder else Encoder)(**arguments)
        network.load_state_dict(state)
    except Exception as error:
        stop(f"{path}: not an encoder or decoder in taesd.py's layout ({' '.join(str(error).split())[:300]})")
    return network.float(), arguments
