"""Measure how fast train.py is on this machine, in turns with the training loop of seraena's notebook.

    python -m tools.bench                              # the teacher is a VAE of SDXL's size with random weights
    python -m tools.bench --teacher=taef2_encoder.pth --data_dir=photos --crop=64 --batch_size=16
    python -m tools.bench --profile                    # what does a training step spend its time on?

The lower bound is the time that the multiplications or the memory traffic of a step would take at the rates of a large
matrix product and of a copy. An image counts every time it is trained on; train.py uses each crop --echo times.
"""
import json
import os
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from unittest import mock

import torch
from diffusers import AutoencoderKL
from torch.utils.benchmark import Timer

from data import Images
from model import Decoder, Discriminator, Encoder
from support.config import configure, fail, require_positive
from support.device import pick_device, pick_dtype
from support.log import Log
from teacher import Teacher
from tools.reference import reference_loop

# --- settings --------------------------------------------------------------------------------------------------------
teacher = ""               # named as for train.py; '' = a VAE of SDXL's size with random weights
data_dir = ""              # folder of images; '' = the bundled photographs
crop = 96                  # training crop in pixels
batch_size = 8             # crops per step
pairs = 5                  # turns of train.py and of the reference
steps = 10                 # steps that are timed in a turn (ten times as many on a GPU), or that are profiled
warm_up = 70               # steps of train.py before these, in which its pool of crops becomes full
extra = ""                 # more flags for train.py, separated by spaces, for example --echo=1
profile = False            # true = only print the time of a training step by kind of kernel; needs cuda or cpu
device = "auto"            # auto, cuda, mps or cpu
# -----------------------------------------------------------------------------

# The first pattern in the name of a GPU kernel or CPU operator counts. Fused kernels are named after their parts.
KINDS = {
    "fused elementwise and reductions": r"triton_(?!tem)|cpp_fused",
    "convolution, weight gradient": r"wgrad",
    "convolution, data gradient": r"dgrad",
    "convolution, both gradients": r"convolution_backward|conv2d_backward",
    "convolution, forward": r"fprop|winograd|convolution(?!backward)|convolve|conv2d",
    "matrix products": r"gemm|gemv|nvjet|splitk|triton_tem|attention|flash|fmha|::linear|matmul|mm$",
    "layout changes and copies": r"nhwctonchw|nchwtonhwc|transpose|mem(cpy|set)|copy|catarray|:cat$|:stack$|index",
    "elementwise and reductions": r"^aten::|elementwise|reduce|multi_tensor|norm|pool|upsample|distribution",
}


def train_flags(teacher, out_dir, max_iters, log_interval):
    """Flags for train.py, which reports every log_interval steps, hardly evaluates, and ends without larger crops."""
    flags = {"teacher": teacher, "data_dir": data_dir, "crop": crop, "batch_size": batch_size, "device": device,
             "out_dir": out_dir, "max_iters": max_iters, "log_interval": log_interval, "variant": "plain", "finish": 0,
             "eval_interval": 10**9, "eval_images": 1, "eval_size": crop}
    return [f"--{name}={value}" for name, value in flags.items()] + extra.split()


def time_train(teacher, steps):
    """Run train.py in a process of its own. Returns a dict of its settings, its last report, which is about `steps`
    steps, and "first_step", the seconds until the first step was done."""
    before = max(warm_up, steps)  # train.py reports after these steps and at the end
    with tempfile.TemporaryDirectory() as out_dir:
        command = [sys.executable, "train.py", *train_flags(teacher, out_dir, before + steps, before)]
        process = subprocess.run(command, text=True, capture_output=True)
        if process.returncode:
            fail(f"train.py failed: {(process.stderr.strip() or 'no message').splitlines()[-1]}")
        with open(os.path.join(out_dir, "log.jsonl"), encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
    first_step = re.search(r"^start +([\d.]+) s", process.stdout, re.MULTILINE).group(1)
    report = [line for line in lines if "data_wait" in line][-1]
    return lines[0]["settings"] | report | {"first_step": float(first_step)}


def compare_speeds(teacher, place):
    """Print the speeds of all pairs and their medians. Returns what time_train does, with the median of its speed."""
    timed_steps = 10 * steps if place.type == "cuda" else steps
    loop = reference_loop(teacher, Images(data_dir).train, place, crop, batch_size)
    speeds = []
    for pair in range(1, pairs + 1):
        for _ in range(30 if place.type == "cuda" else 3):  # uses up what its workers read during train.py's turn
            next(loop)
        start = time.perf_counter()
        for _ in range(timed_steps):
            next(loop)  # waits for the device, because a step ends with loss.item()
        theirs = timed_steps * batch_size / (time.perf_counter() - start)
        torch.cuda.empty_cache()  # leaves the memory to train.py
        found = time_train(teacher, timed_steps)
        ours = found["images_per_second"]
        speeds.append((ours, theirs, ours / theirs))
        print(f"pair {pair}: train.py {ours:.2f} images/s ({found['first_step']:.1f} s to the first step, peak memory "
              f"{found['peak_memory_mb']} MB), reference {theirs:.2f}, ratio {ours / theirs:.2f}", flush=True)
    ours, theirs, ratio = (statistics.median(column) for column in zip(*speeds))
    print(f"median: train.py {ours:.2f} images/s, reference {theirs:.2f}, ratio {ratio:.2f}")
    return found | {"images_per_second": ours}


def count_work(network, *inputs):
    """(operations, bytes of inputs and outputs) of the convolutions and linear layers in a forward pass in bfloat16."""
    operations = traffic = 0

    def count(layer, inputs, output):
        nonlocal operations, traffic
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            operations += 2 * output.numel() * layer.weight[0].numel()
            traffic += 2 * (inputs[0].numel() + output.numel())
    with torch.nn.modules.module.register_module_forward_hook(count):
        network(*inputs)
    return operations, traffic


@torch.no_grad()
def print_lower_bound(teacher, place, found):
    """Print the least time of each part of a step with the default losses. found: what compare_speeds returns."""
    vae = Teacher(teacher)
    shape = vae.latent_channels, vae.factor, found["width"]
    image, decoder = torch.rand(1, 3, crop, crop), Decoder(*shape)
    latent = vae.encode(image)
    parts = {  # number of forward passes; a backward pass counts 2, or 1 if only the gradient of the input is needed
        "teacher": (1 / found["echo"], count_work(vae.vae.encoder, image)),
        "encoder": (3, count_work(Encoder(*shape), image)),
        "features": (2 + 1, count_work(decoder[:6], latent)),
        "decoder": (3, count_work(decoder, latent)),
        "discriminator": (2 * 3 + 2 + 1, count_work(Discriminator(vae.latent_channels), image, latent)),
    }
    size = 8192 if place.type == "cuda" else 2048
    matrix = torch.randn(size, size, device=place, dtype=pick_dtype("auto", place))
    source, target = torch.zeros(2, size, 8192, device=place)
    options = {"globals": locals(), "num_threads": torch.get_num_threads()}
    operations_rate = 2 * size**3 / min(Timer("matrix @ matrix", **options).blocked_autorange().times)
    bytes_rate = 2 * source.nbytes / min(Timer("target.copy_(source)", **options).blocked_autorange().times)
    print(f"lower bound of a step at {operations_rate / 1e12:.2f} T operations/s and {bytes_rate / 1e9:.1f} GB/s:")
    bound = 0.0
    for name, (passes, work) in parts.items():
        operations, traffic = (batch_size * passes * amount for amount in work)
        seconds = max(operations / operations_rate, traffic / bytes_rate)
        bound += seconds
        print(f"{name:14}{operations / 1e9:10.1f} G operations{traffic / 1e9:9.2f} GB{1000 * seconds:9.2f} ms")
    step = batch_size / found["images_per_second"]
    print(f"a step of train.py takes {1000 * step:.1f} ms and the lower bound is {1000 * bound:.1f} ms, so train.py "
          f"reaches {bound / step:.0%} of the possible speed")


def print_profile(teacher, place):
    """Run train.py in this process, record `steps` of its training steps and print their time by kind of kernel."""
    on_gpu = place.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    profiler = torch.profiler.profile(activities=[activity])
    add, times = Log.add, Counter()

    def add_and_record(log, step, images_seen, losses):
        """Stands in for Log.add, which train.py calls once after every step."""
        interrupted = add(log, step, images_seen, losses)
        if step == warm_up:
            next(iter(losses.values())).item()  # waits until the device has finished the earlier steps
            profiler.start()
        elif step == warm_up + steps:
            profiler.stop()
        return interrupted
    with tempfile.TemporaryDirectory() as out_dir:
        flags = train_flags(teacher, out_dir, warm_up + steps, warm_up + steps)
        with mock.patch.object(Log, "add", add_and_record), mock.patch.object(sys, "argv", ["train.py", *flags]):
            runpy.run_path("train.py", run_name="__main__")
    events = [event for event in profiler.events()
              if not event.is_user_annotation and (event.device_type.name == "CUDA") == on_gpu]
    for event in events:
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.name.lower())), "other")
        times[kind] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    total = max(event.time_range.end for event in events) - min(event.time_range.start for event in events)
    times["no kernel or operator runs"] = total - sum(times.values())
    print(f"a training step takes {total / 1000 / steps:.2f} ms")
    for kind, microseconds in times.most_common():
        print(f"{kind:34}{microseconds / 1000 / steps:10.2f} ms{microseconds / total:6.0%}")


def main():
    require_positive(globals(), "crop", "batch_size", "pairs", "steps", "warm_up")
    place = pick_device(device)
    print(f"torch {torch.__version__}, {place}, {torch.get_num_threads()} CPU threads; {crop} pixels, batch "
          f"{batch_size}, teacher {teacher or 'of SDXL size, random weights'}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if not teacher:
            AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                          layers_per_block=2, block_out_channels=(128, 256, 512, 512), scaling_factor=0.13025,
                          force_upcast=False).save_pretrained(folder)
        name = teacher or folder
        if profile:
            return print_profile(name, place)
        print_lower_bound(name, place, compare_speeds(name, place))


if __name__ == "__main__":
    configure(globals())
    main()
