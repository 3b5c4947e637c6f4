"""Reads weights files, which may come from a stranger, and writes files so that each is either complete or absent."""
import os

import torch
from safetensors import safe_open

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
        fail(f"{path}: could not be written ({one_line(error, 120)}): is the disk full? What was there before is "
             f"untouched")


def save_text(path, text):
    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
    save_file(path, write)


def load_file(path):
    """torch.load onto the CPU. It reads tensors and plain containers only, so a file cannot run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path}: no such file")
    except Exception as error:  # a truncated archive, a pickle that wants to run code, a text file
        fail(f"{path}: not a readable weights file ({type(error).__name__}: {one_line(error, 120)})")


def load_taesd(path):
    """Read taesd_encoder.pth or taesd_decoder.pth, in float32 or float16. The shapes inside tell which network it is.

    Returns (network in float32, its arguments). Fails if the file is anything else.
    """
    return network_from_state(load_file(path), path)


def load_safetensors(path):
    """Read a .safetensors file of both halves, as support/export.py and AutoencoderTiny write it.

    Returns {"encoder": (network in float32, its arguments), "decoder": ...}, without a half that the file lacks.
    """
    states = {"encoder": {}, "decoder": {}}
    try:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys(), key=layer_numbers):
                half, _, key = name.partition(".layers.")
                if half in states:
                    layer, rest = key.split(".", 1)
                    layer = int(layer) + (half == "decoder")  # the decoder's Clamp is not counted there
                    states[half][f"{layer}.{rest}"] = file.get_tensor(name)
    except Exception as error:
        fail(f"{path}: not a readable weights file ({type(error).__name__}: {one_line(error, 120)})")
    if not any(states.values()):
        fail(f"{path}: has no weights named encoder.layers.0.weight and so on; a VAE of full size is a --teacher=")
    return {half: network_from_state(state, path) for half, state in states.items() if state}


def layer_numbers(name):
    return [int(part) for part in name.split(".") if part.isdigit()]


def network_from_state(state, path):
    """(network in float32, its arguments) of a state dict in taesd.py's layout. path: the file, for the error."""
    try:
        is_decoder = "0.weight" not in state  # the first layer of a decoder is the Clamp, which has no weights
        first, last = state["1.weight" if is_decoder else "0.weight"], list(state.values())[-1]
        width = [value for value in state.values() if value.ndim == 4][-1].shape[1]  # inputs of the last convolution
        is_f32 = first.shape[0] != width
        # the convolutions that halve or double have no bias, except for two in the stem of the f32 encoder
        no_bias = [key for key, value in state.items() if value.ndim == 4 and key.count(".") == 1
                   and key.replace("weight", "bias") not in state]
        halvings = len(no_bias) + (2 if is_f32 and not is_decoder else 0)
        has_pool = any(".pool." in key for key in state)
        shape = {"latent_channels": first.shape[1] if is_decoder else len(last), "factor": 2 ** halvings,
                 "width": width, "variant": "f32" if is_f32 else "midblock_gn" if has_pool else "plain"}
        network = (Decoder if is_decoder else Encoder)(**shape)
        network.load_state_dict(state)
    except Exception as error:
        fail(f"{path}: not an encoder or decoder in taesd.py's layout ({one_line(error, 300)})")
    return network.float(), shape
