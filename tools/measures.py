"""What tools.bench and its report measure: the floor of a step, and the speed of train.py and of the reference loop."""
import contextlib
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from unittest import mock

import torch
import torch.nn as nn

from data import PHOTOS, find_images
from model import Decoder, Discriminator, Encoder
from support.configure import pick_dtype
from support.report import Report
from tools.reference import reference_loop, reference_teacher

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def random_sdxl(folder):
    """Write a VAE of SDXL's size with random weights, on which speed does not depend, unless it is there. Its path."""
    path = os.path.join(folder, "sdxl-random")
    if not os.path.exists(path):
        from diffusers import AutoencoderKL
        vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                            layers_per_block=2, block_out_channels=(128, 256, 512, 512), scaling_factor=0.13025,
                            force_upcast=False)
        vae.save_pretrained(path)
    return path


# -----------------------------------------------------------------------------
# the floor

def work(network, *inputs):
    """(multiply-add operations x 2, bytes in and out) of a forward pass: of convolutions and linear layers, 2 bytes a
    value."""
    total = [0, 0]

    def count(layer, inputs, output):
        total[0] += 2 * output.numel() * layer.weight[0].numel()
        total[1] += 2 * (inputs[0].numel() + output.numel())
    hooks = [layer.register_forward_hook(count) for layer in network.modules()
             if isinstance(layer, (nn.Conv2d, nn.Linear))]
    network(*inputs)
    for hook in hooks:
        hook.remove()
    return total


def rate(amount, call, seconds=3):
    """amount / seconds of a call, the best of some that take `seconds` together."""
    found, since = [], time.perf_counter()
    while len(found) < 2 or time.perf_counter() < since + seconds:
        start = time.perf_counter()
        results = [call() for _ in range(5)]
        results[-1][0, 0].item()  # waits for the device
        found.append((time.perf_counter() - start) / 5)
    return amount / min(found)


def rates(place, size=4096):
    """(operations a second in a matrix product, bytes a second in a copy) of a device."""
    matrix = torch.randn(size, size, device=place, dtype=pick_dtype("auto", place))
    large, other = (torch.zeros(size // 256, size * 2048, device=place) for _ in range(2))
    return (rate(2 * size**3, lambda: matrix @ matrix), rate(2 * large.nbytes, lambda: other.copy_(large)))


@torch.no_grad()
def floor(teacher, crop, batch_size, echo, width, operations_rate, bytes_rate):
    """(part, G operations, GB, ms) of a training step, by part: the least that its multiplications or its memory
    traffic take."""
    _, latent_channels, factor, teacher_encoder = reference_teacher(teacher, "cpu", torch.float32)
    image, latent = torch.rand(1, 3, crop, crop), torch.randn(1, latent_channels, crop // factor, crop // factor)
    parts = {  # forward passes, or as much work: a backward pass counts 2, or 1 if only the input's gradient is wanted
        "teacher": (1 / echo, work(teacher_encoder, image)),
        "encoder": (3, work(Encoder(latent_channels, factor, width), image)),
        "features": (2 + 1, work(Decoder(latent_channels, factor, width)[:6], latent)),
        "decoder": (3, work(Decoder(latent_channels, factor, width), latent)),
        "discriminator": (2 * 3 + 2 + 1, work(Discriminator(latent_channels), image, latent))}
    rows = []
    for name, (passes, (operations, traffic)) in parts.items():
        operations, traffic = operations * passes * batch_size, traffic * passes * batch_size
        least = max(operations / operations_rate, traffic / bytes_rate)
        rows.append((name, operations / 1e9, traffic / 1e9, 1000 * least))
    return rows


# -----------------------------------------------------------------------------
# the speed

def run_train(out_dir, *flags, environment=None, **settings):
    """train.py in a process of its own. Returns (what it printed, the lines of its log.jsonl)."""
    command = [sys.executable, os.path.join(HERE, "train.py"), f"--out_dir={out_dir}", *flags,
               *(f"--{name}={value}" for name, value in settings.items())]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=HERE,
                          env=os.environ | (environment or {}))
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout).splitlines()[-1])
    with open(os.path.join(out_dir, "log.jsonl"), encoding="utf-8") as file:
        return done.stdout, [json.loads(line) for line in file]


def time_ours(teacher, data_dir, crop, batch_size, steps, warm_up, device, *flags, environment=None):
    """Speed of train.py in so many steps after those of the warm-up: its settings and its last report, "first_step" in
    seconds."""
    warm_up = max(warm_up, steps)  # it reports after each warm_up steps, and at the end
    with tempfile.TemporaryDirectory() as out_dir:
        output, lines = run_train(
            os.path.join(out_dir, "out"), *flags, environment=environment, teacher=teacher, data_dir=data_dir or PHOTOS,
            crop=crop, batch_size=batch_size, device=device, variant="plain", log_interval=warm_up, eval_images=1,
            eval_size=crop, eval_interval=10**9, max_iters=warm_up + steps)
    first = float(re.search(r"^start +([\d.]+) s", output, re.MULTILINE).group(1))
    return lines[0]["settings"] | [line for line in lines if "data_wait" in line][-1] | {"first_step": first}


def time_reference(teacher, data_dir, crop, batch_size, steps, place, dtype="auto"):
    """Images a second of the reference, an endless generator of them: each measures so many steps."""
    loop = reference_loop(teacher, find_images(data_dir or PHOTOS), place, crop, batch_size, 3e-5, 64, dtype)
    while True:
        for _ in range(30 if place.type == "cuda" else 3):  # more than its workers read ahead while train.py runs
            next(loop)
        start = time.time()
        for _ in range(steps):
            next(loop)  # ends with loss.item(), which waits for the device
        speed = steps * batch_size / (time.time() - start)
        if place.type == "cuda":
            torch.cuda.empty_cache()  # train.py's turn
        yield speed


# -----------------------------------------------------------------------------
# waits

def count_waits(out_dir, teacher, data_dir, crop, batch_size, steps, warm_up, device):
    """Counter of the lines at which train.py waits for the GPU in so many steps after those of the warm-up."""
    found, add, done = Counter(), Report.add, []

    def counted(report, terms):
        add(report, terms)
        done.append(terms)
        torch.cuda.set_sync_debug_mode("warn" if warm_up <= len(done) < warm_up + steps else "default")

    def heard(message, category, path, line, *others):
        if "called a synchronizing" in str(message):
            found[f"{path.removeprefix(HERE + os.sep)}:{line}"] += 1
    flags = {"out_dir": out_dir, "teacher": teacher, "data_dir": data_dir or PHOTOS, "batch_size": batch_size,
             "crop": crop, "max_iters": warm_up + steps + 5, "log_interval": 10**6, "compile": "false",
             "device": device, "eval_images": 1, "eval_size": crop}
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr), \
            mock.patch.object(warnings, "showwarning", heard), mock.patch.object(Report, "add", counted), \
            mock.patch.object(sys, "argv", ["train.py", *(f"--{name}={value}" for name, value in flags.items())]):
        warnings.simplefilter("always")
        runpy.run_path(os.path.join(HERE, "train.py"), run_name="__main__")
    return found
