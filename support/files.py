"""Reads weights files, which may come from a stranger, and writes files so that each is either complete or absent."""
import os
import re
from pathlib import Path

import torch
from safetensors.torch import load_file as load_safetensors

from model import Decoder, Encoder
from support.config import fail, one_line


def save_file(path, write, keep=None):
    """Call write(temporary path), then rename the result to `path`. A file that was there before is renamed to `keep`,
    if that is given, and else replaced. After an error, what was there before is untouched."""
    temporary = f"{path}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write(temporary)
        os.chmod(temporary, 0o644)  # safetensors writes files that only their owner may read
        if keep and os.path.exists(path):
            os.replace(path, keep)
        os.replace(temporary, path)
    except Exception as error:  # torch, Pillow and safetensors raise different errors when a disk is full
        if os.path.isfile(temporary):
            os.remove(temporary)
        fail(f"{path}: could not be written ({one_line(error, 120)}). What was there before is untouched")


def save_text(path, text):
    save_file(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def load_file(path):
    """Read a .safetensors file or what torch.save wrote, onto the CPU. Only tensors and plain containers are read, so a
    file cannot run code."""
    try:
        if path.endswith(".safetensors"):
            return load_safetensors(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path}: no such file")
    except Exception as error:  # a truncated archive, a pickle that wants to run code, a text file
        fail(f"{path}: not a readable weights file ({type(error).__name__}: {one_line(error, 120)})")


def load_halves(path):
    """Read a weights file with one half in taesd.py's layout, or with one or both in that of diffusers.

    Returns {"encoder": (network in float32, its arguments), "decoder": ...}, without a half that the file lacks."""
    state, states = load_file(path), {}
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        fail(f"{path}: not an encoder or decoder in taesd.py's layout")
    for half, clamp in (("encoder", 0), ("decoder", 1)):
        prefix = f"{half}.layers."
        for key, value in state.items():
            if key.startswith(prefix):
                layer, rest = key.removeprefix(prefix).split(".", 1)
                # in diffusers, the decoder's Clamp is not counted as a layer
                states.setdefault(half, {})[f"{int(layer) + clamp}.{rest}"] = value
    if not states:  # a decoder's first layer is the Clamp, which has no weights
        states["encoder" if "0.weight" in state else "decoder"] = state
    return {half: network_from_state(half_state, path) for half, half_state in states.items()}


def load_pair(path):
    """What load_halves returns, with the other half from the file beside it, if there is one: taesd_encoder.pth and
    taesd_decoder.pth, for example."""
    halves, (folder, name) = load_halves(path), os.path.split(path)
    for half in ("encoder", "decoder"):
        other = os.path.join(folder, re.sub("encoder|decoder", half, name))
        if half not in halves and os.path.isfile(other):
            halves |= load_halves(other)
    return halves


def network_from_state(state, path):
    """(network in float32, its arguments) of a state dict in taesd.py's layout. path: the file, for the error."""
    try:
        state = dict(sorted(state.items(), key=lambda item: [int(n) for n in item[0].split(".") if n.isdigit()]))
        is_decoder = "0.weight" not in state
        convs = {key: value for key, value in state.items() if value.ndim == 4}
        first, last = list(convs.values())[0], list(state.values())[-1]
        width = list(convs.values())[-1].shape[1]
        is_f32 = first.shape[0] != width
        # the convolutions that halve or double have no bias, except for two in the stem of the f32 encoder
        without_bias = [key for key in convs if key.count(".") == 1 and key.replace("weight", "bias") not in state]
        halvings = len(without_bias) + (2 if is_f32 and not is_decoder else 0)
        has_pool = any(".pool." in key for key in state)
        shape = {"latent_channels": first.shape[1] if is_decoder else len(last), "factor": 2 ** halvings,
                 "width": width, "variant": "f32" if is_f32 else "midblock_gn" if has_pool else "plain"}
        network = (Decoder if is_decoder else Encoder)(**shape)
        network.load_state_dict(state)
    except Exception as error:
        fail(f"{path}: not an encoder or decoder in taesd.py's layout; a VAE of full size is a --teacher= "
             f"({one_line(error, 300)})")
    return network.float(), shape
