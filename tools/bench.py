"""Speed: train.py beside the training loop of seraena's TAESDXL notebook, on this machine, in this run, turn by turn.

    python -m tools.bench                                               # a VAE of SDXL's size, random weights
    python -m tools.bench --teacher=taef2_encoder.pth --data_dir=photos --crop=64 --batch_size=16

The reference is tools/reference.py. An image counts each time it is trained on; train.py trains on a crop --echo times,
so the rate of new images is given, too. Also printed is the floor: the time that a step's multiplications or memory
traffic need at the rates measured here.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn as nn

from data import PHOTOS, find_images
from model import Decoder, Discriminator, Encoder
from support.configure import configure, pick_device, pick_dtype, require_positive
from tools.reference import reference_loop, reference_teacher

# -----------------------------------------------------------------------------
# settings
teacher = "sdxl-random"    # a VAE of SDXL's size with random weights, on which speed does not depend; or as in train.py
data_dir = ""              # folder of images; '' = the bundled photographs
crop = 96                  # training crop in pixels
batch_size = 8             # crops a step
pairs = 5                  # times that each takes its turn
steps = 10                 # steps timed in a turn, after some to warm up (reference 3, train.py 70: its pool must fill)
extra = ""                 # more flags for train.py alone, separated by spaces, for example --echo=1
reference_dtype = "auto"   # of the reference: auto (as in the notebook), or as train.py's --dtype
device = "auto"            # auto, cuda, mps or cpu
# -----------------------------------------------------------------------------


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


def rate(amount, call):
    """amount / seconds of a call, the best of some that take 3 seconds together."""
    seconds, since = [], time.perf_counter()
    while len(seconds) < 2 or time.perf_counter() < since + 3:
        start = time.perf_counter()
        results = [call() for _ in range(5)]
        results[-1][0, 0].item()  # waits for the device
        seconds.append((time.perf_counter() - start) / 5)
    return amount / min(seconds)


@torch.no_grad()
def floor(teacher, echo, width):
    """Print the operations, bytes and least seconds of a training step, by part. Returns the seconds."""
    place = pick_device(device)
    _, latent_channels, factor, teacher_encoder = reference_teacher(teacher, "cpu", torch.float32)
    image, latent = torch.rand(1, 3, crop, crop), torch.randn(1, latent_channels, crop // factor, crop // factor)
    parts = {  # forward passes, or as much work: a backward pass counts 2, or 1 if only the input's gradient is wanted
        "teacher": (1 / echo, work(teacher_encoder, image)),
        "encoder": (3, work(Encoder(latent_channels, factor, width), image)),
        "decoder": (3, work(Decoder(latent_channels, factor, width), latent)),
        "discriminator": (2 * 3 + 2 + 1, work(Discriminator(latent_channels), image, latent))}
    matrix = torch.randn(4096, 4096, device=place, dtype=pick_dtype("auto", place))
    operations_rate = rate(2 * 4096**3, lambda: matrix @ matrix)
    large, other = torch.zeros(16, 2**23, device=place), torch.zeros(16, 2**23, device=place)
    bytes_rate = rate(2 * large.nbytes, lambda: other.copy_(large))
    print(f"rates here: {operations_rate / 1e12:.2f} T operations/s in a matrix product, {bytes_rate / 1e9:.1f} GB/s "
          f"in a copy")
    total = 0.0
    for name, (passes, (operations, traffic)) in parts.items():
        operations, traffic = operations * passes * batch_size, traffic * passes * batch_size
        total += (least := max(operations / operations_rate, traffic / bytes_rate))
        print(f"floor of a step: {name:14} {operations / 1e9:8.1f} G operations, {traffic / 1e9:6.2f} GB, "
              f"{1000 * least:7.1f} ms")
    return total


# -----------------------------------------------------------------------------
# the comparison

def time_ours(teacher, data, folder):
    """(settings, last report) of train.py, in a process of its own: its pool is full by then."""
    warm_up = 70
    out_dir = tempfile.mkdtemp(dir=folder)
    flags = dict(teacher=teacher, data_dir=data, crop=crop, batch_size=batch_size, device=device, out_dir=out_dir,
                 variant="plain", log_interval=warm_up, eval_images=1, eval_interval=10**9, max_iters=warm_up + steps)
    script = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "train.py")
    command = [sys.executable, script, *(f"--{name}={value}" for name, value in flags.items()), *extra.split()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with open(os.path.join(out_dir, "log.jsonl"), encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return lines[0]["settings"], [line for line in lines if "data_wait" in line][-1]


def time_reference(loop):
    for _ in range(3):
        next(loop)
    start = time.time()
    for _ in range(steps):
        next(loop)
    return steps * batch_size / (time.time() - start)


def main():
    require_positive(globals(), "pairs", "steps", "batch_size", "crop")
    with tempfile.TemporaryDirectory() as folder:
        name, data = teacher, data_dir or PHOTOS
        if teacher == "sdxl-random":
            from diffusers import AutoencoderKL
            name = os.path.join(folder, "vae")
            vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                                layers_per_block=2, block_out_channels=(128, 256, 512, 512), scaling_factor=0.13025,
                                force_upcast=False)
            vae.save_pretrained(name)
        place = pick_device(device)
        print(f"torch {torch.__version__}, {place}, {torch.get_num_threads()} CPU threads; teacher {teacher}, {crop} "
              f"pixels, batch {batch_size}; images/s; a pair takes minutes on a CPU", flush=True)
        loop = reference_loop(name, find_images(data), place, crop, batch_size, 3e-5, 64, reference_dtype)
        speeds = []
        for pair in range(pairs):
            reference = time_reference(loop)
            settings, report = time_ours(name, data, folder)
            ours = report["images_per_second"]
            speeds.append((ours, reference, ours / reference))
            print(f"{pair + 1}: train.py {ours:.2f}, reference {reference:.2f}: {ours / reference:.2f} times "
                  f"(data wait {report['data_wait']:.0%}, peak {report['peak_memory_mb']} MB)", flush=True)
        ours, reference, times = map(statistics.median, zip(*speeds))
        print(f"median: train.py {ours:.2f}, reference {reference:.2f}: {times:.2f} times "
              f"(of images never seen before: {ours / settings['echo']:.2f}, {reference:.2f})")
        least = floor(name, settings["echo"], settings["width"])
        print(f"train.py takes {1000 * batch_size / ours:.0f} ms a step, the floor is {1000 * least:.0f} ms: "
              f"{least * ours / batch_size:.0%} of it reached")


if __name__ == "__main__":
    configure(globals())
    main()
