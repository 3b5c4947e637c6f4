"""The parts of tools.bench's report, each run in a process of its own: `python -m tools.bench_parts name options`. They
print markdown; the first line of a part's text is its title, the rest explains it.
"""
import contextlib
import copy
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time

import torch

from data import PHOTOS, Images
from model import Decoder, Discriminator, Encoder, convolutions, optimizer_of
from support.configure import pick_device, pick_dtype
from teacher import Teacher
from tools.measures import count_waits, floor, random_sdxl, rates, run_train, time_ours, time_reference


def table(head, rows):
    """Print a markdown table, each row as soon as it is there: what comes after it may fail."""
    for row in itertools.chain((head, ["---"] * len(head)), rows):
        cells = [f"{cell:,.4g}" if isinstance(cell, float) else str(cell).replace("|", "/") for cell in row]
        print(f"| {' | '.join(cells)} |", flush=True)


def attempt(call):
    """(result, '') or (None, the last line of what went wrong)."""
    try:
        return call(), ""
    except (Exception, SystemExit) as error:  # whatever a machine that nobody has seen has in store
        return None, "failed: " + (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


def teacher_of(o):
    return random_sdxl(o["files"]) if o["teacher"] == "sdxl-random" else o["teacher"]


# -----------------------------------------------------------------------------
# the parts; `o` are their options

def machine(o):
    """The machine"""
    place = pick_device(o["device"])
    rows = [("python, torch", f"{platform.python_version()}, {torch.__version__}"),
            ("system", f"{platform.platform()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"),
            ("device", f"{place}, {str(pick_dtype('auto', place)).removeprefix('torch.')}")]
    if place.type == "cuda":
        about = torch.cuda.get_device_properties(place)
        rows += [("GPU", f"{about.name}, {about.total_memory / 2**30:.0f} GB, capability {about.major}.{about.minor}"),
                 ("CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}"),
                 ("TF32", f"convolutions {torch.backends.cudnn.allow_tf32}, products "
                          f"{torch.backends.cuda.matmul.allow_tf32}")]
        driver = attempt(lambda: subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"], text=True,
            stdout=subprocess.PIPE, check=True).stdout.splitlines()[0])
        rows.append(("driver, power limit, clock", driver[0] or driver[1]))
    table(("", ""), rows)


def the_floor(o):
    """The floor of a step
    The least time that multiplications, at the rate of a large matrix product here, or memory traffic, at that of a
    copy, take. A forward pass counts once, a backward pass twice."""
    place = pick_device(o["device"])
    operations_rate, bytes_rate = rates(place, 4096 if place.type == "cuda" else 1024)
    print(f"A matrix product: {operations_rate / 1e12:.2f} T operations/s; a copy: {bytes_rate / 1e9:.1f} GB/s.\n")
    rows = []
    for batch_size, crop in o["shapes"]:
        found = floor(teacher_of(o), crop, batch_size, 2.0, 64, operations_rate, bytes_rate)
        rows += [(f"{batch_size} x {crop}", *row) for row in found]
        rows.append((f"{batch_size} x {crop}", "**all**", *(sum(column) for column in list(zip(*found))[1:])))
    table(("batch x crop", "part", "G operations", "GB", "ms"), rows)


def times_by_part(o):
    """The time of a step, by part
    Each part alone, not compiled, its backward pass included; the sum is not train.py's step, which shares some."""
    place = pick_device(o["device"])
    dtype = pick_dtype("auto", place)
    amp = torch.autocast(place.type, dtype, enabled=dtype != torch.float32)
    vae, images = Teacher(teacher_of(o), place, dtype), Images(o["data_dir"] or PHOTOS)

    def milliseconds(call):
        calls = 20 if place.type == "cuda" else 2
        for n in (3, calls):
            start = time.perf_counter()
            for _ in range(n):
                call()
            if place.type == "cuda":
                torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start) / calls
    torch.backends.cudnn.benchmark = True  # as in train.py
    rows = []
    for batch_size, crop in o["shapes"]:
        square = max(1, 256 // crop) * crop
        n = max(1, round(batch_size / 2 / (square // crop)**2))
        networks = [Encoder(vae.latent_channels, vae.factor), Decoder(vae.latent_channels, vae.factor),
                    Discriminator(vae.latent_channels)]
        encoder, decoder, discriminator = [each.to(place, memory_format=torch.channels_last) for each in networks]
        squares = torch.rand(n, 3, square, square, device=place).to(memory_format=torch.channels_last)
        image = torch.rand(batch_size, 3, crop, crop, device=place).to(memory_format=torch.channels_last)
        latent = torch.randn(batch_size, vae.latent_channels, crop // vae.factor, crop // vae.factor, device=place)

        def learn(network, *inputs):
            with amp:
                output = network(*inputs)
            output.float().square().mean().backward()

        def pull(network, of_teacher, of_student):  # a network of several outputs
            with amp:
                pairs = zip(network(*of_teacher), network(*of_student))
            sum(torch.nn.functional.l1_loss(a.movedim(1, 3), b.movedim(1, 3)).float() for a, b in pairs).backward()
        pulled, encoded = (x.clone().requires_grad_() for x in (image, latent))  # through them the students learn
        features = copy.deepcopy(decoder[:6]).requires_grad_(False)
        by_muon = [weight for each in networks for weight in convolutions(each)[each is discriminator:]
                   if weight.shape[-1] > 1]
        optimizer = optimizer_of([weight for each in networks for weight in each.parameters()], by_muon,
                                 torch.optim.Adam, dtype)
        found = {"teacher": milliseconds(lambda: vae.encode(squares)) * batch_size / 2 / (n * (square // crop)**2),
                 "encoder": milliseconds(lambda: learn(encoder, image)),
                 "features": milliseconds(lambda: pull(lambda z: [features(z)], (latent,), (encoded,))),
                 "decoder": milliseconds(lambda: learn(decoder, latent)),
                 "D learns": 2 * milliseconds(lambda: learn(lambda *pair: discriminator(*pair)[0], image, latent)),
                 "D judges": milliseconds(lambda: pull(lambda *pair: discriminator.requires_grad_(False)(*pair)[1],
                                                       (image, latent), (pulled, latent)))}
        discriminator.requires_grad_(True)
        found["optimizers"] = milliseconds(optimizer.step)
        found["data, one thread"] = milliseconds(lambda: images.batch(square, n, 0, [0, 0])) * batch_size / 2 / (
            n * (square // crop)**2)
        rows.append((f"{batch_size} x {crop}", *found.values()))
    table(("batch x crop, ms", *found), rows)


def peak_memory(o):
    """Peak memory
    Of train.py with its own evaluation, 16 pictures of 256 pixels: on a GPU what torch holds for tensors, what its
    context and libraries take comes on top. `estimated` is that of the tensors of the loop alone (tools.dry_run)."""
    table(("batch x crop", "MB", "MB, estimated"), memory_rows(o))


def memory_rows(o):
    from tools.dry_run import dry_run  # which is not for a process that trains
    for batch_size, crop in o["memory_shapes"]:
        flags = {"teacher": teacher_of(o), "data_dir": o["data_dir"] or PHOTOS, "batch_size": batch_size, "crop": crop,
                 "max_iters": 6, "device": o["device"], "compile": "false"}
        run, failed = attempt(lambda: run_train(os.path.join(o["files"], f"memory-{batch_size}x{crop}"), **flags))
        dry = [f"--{name}={value}" for name, value in (flags | {"dtype": "bfloat16"}).items()]
        with contextlib.redirect_stdout(sys.stderr):  # what train.py says of itself
            estimated, failed_too = attempt(lambda: dry_run(*dry, f"--out_dir={o['files']}/dry"))
        measured = re.search(r"^peak_memory_mb: (\d+)", run[0], re.MULTILINE).group(1) if run else failed
        yield f"{batch_size} x {crop}", measured, f"{estimated / 2**20:.0f}" if estimated else failed_too


def waits(o):
    """Waits of the CPU for the GPU
    In 50 steps of the loop, between two reports; each is a place in the code that is slower than it need be."""
    if pick_device(o["device"]).type != "cuda":
        return print("There is no GPU here; `python -m tools.dry_run` looks for them without one.")
    batch_size, crop = o["memory_shapes"][0]
    found = count_waits(os.path.join(o["files"], "waits"), teacher_of(o), o["data_dir"], crop, batch_size, 50,
                        o["warm_up"], o["device"])
    table(("times", "where"), [(n, where) for where, n in found.most_common(20)] or [(0, "none")])


def resume(o):
    """Resume
    The losses of steps 11 to 20, in a run and in one that goes on from its checkpoint of step 10: the largest relative
    difference. Beside it that of two runs of one command, for kernels that add in any order."""
    flags = {"teacher": "toy", "data_dir": o["data_dir"] or PHOTOS, "max_iters": 20, "eval_interval": 10,
             "log_interval": 1, "device": o["device"], "compile": "false", "eval_images": 1}
    flags["batch_size"], flags["crop"] = o["memory_shapes"][0]
    flags["eval_size"] = flags["crop"]
    one, two, three = (os.path.join(o["files"], f"resume-{name}") for name in ("one", "two", "three"))
    runs = [run_train(out, **flags)[1] for out in (one, two)]
    os.makedirs(three)
    shutil.copy(os.path.join(one, "ckpt_previous.pt"), os.path.join(three, "ckpt.pt"))
    runs.append(run_train(three, init_from="resume")[1])
    losses = [{(line["step"], name): line[name] for line in run if line.get("step", 0) > 10 and "data_wait" in line
               for name in ("encoder", "mse", "discriminator", "adversarial", "matching")} for run in runs]
    assert len(losses[2]) == 50 and losses[0].keys() == losses[1].keys() == losses[2].keys()
    apart = [max(abs(losses[0][key] - other[key]) / abs(losses[0][key]) for key in losses[0]) for other in losses[1:]]
    table(("resumed", "the same command twice"), [(f"{apart[1]:.1e}", f"{apart[0]:.1e}")])


VARIANTS = {  # name: (flags, environment), in turns with the reference; on a GPU alone but for the first
    "not compiled": (("--compile=false",), {}), "compiled": (("--compile=true",), {})}
EXTRAS = {
    "float32, not compiled": (("--compile=false", "--dtype=float32"), {}),
    "float16, not compiled": (("--compile=false", "--dtype=float16"), {}),
    "max-autotune": (("--compile=true",), {"TORCHINDUCTOR_MAX_AUTOTUNE": "1"})}


def turns(o, variants, pairs, with_reference):
    """Rows of images a second of each, turn by turn."""
    place = pick_device(o["device"])
    shape, name = (o["shape"][1], o["shape"][0], o["steps"]), teacher_of(o)  # crop, batch, steps
    references = time_reference(name, o["data_dir"], *shape, place)
    for turn in range(pairs):
        reference, failed = attempt(lambda: next(references)) if with_reference else (None, "")
        if with_reference:
            yield turn + 1, "reference", reference or failed, "", "", ""
        for label, (flags, environment) in variants.items():
            found, failed = attempt(lambda: time_ours(name, o["data_dir"], *shape, o["warm_up"], o["device"], *flags,
                                                      environment=environment))
            if failed:
                yield turn + 1, label, failed, "", "", ""
                continue
            speed = found["images_per_second"]
            yield (turn + 1, label, speed, speed / reference if reference else "", found["first_step"],
                   found["peak_memory_mb"])


TURNS = "turn", "", "images/s", "times the reference", "s to the first step", "MB"


def speed(o):
    """Speed"""
    here = VARIANTS if pick_device(o["device"]).type == "cuda" else dict([*VARIANTS.items()][:1])
    table(TURNS, turns(o, here, o["pairs"], with_reference=True))


def extras(o):
    """Speed of other settings"""
    here = EXTRAS if pick_device(o["device"]).type == "cuda" else dict([*EXTRAS.items()][:1])
    table(TURNS, turns(o, here, 1, with_reference=False))


def training(o):
    """A real run"""
    teacher, data_dir, (batch_size, crop) = o["train_teacher"], o["data_dir"] or PHOTOS, o["memory_shapes"][0]
    rate = time_ours(teacher, data_dir, crop, batch_size, o["steps"], o["warm_up"], o["device"])["images_per_second"]
    steps = max(10, round(60 * o["train_minutes"] * rate / batch_size))
    out = os.path.join(o["files"], "training")
    flags = {"teacher": teacher, "crop": crop, "batch_size": batch_size, "max_iters": steps, "device": o["device"],
             "eval_interval": max(5, steps // 10), "log_interval": max(1, steps // 100)}
    output, lines = run_train(out, data_dir=data_dir, **flags)
    print(f"`python train.py {' '.join(f'--{name}={value}' for name, value in flags.items())}`; the teacher itself: "
          f"{lines[0]['teacher']['psnr']:.2f} dB\n")
    names = ("psnr", "ssim", "lowres_mse", "sharpness", "latent_mse", "teacher_psnr")
    table(("step", "images/s", *names), [(line["step"], line["images_per_second"], *(line[f"val_{name}"]
                                          for name in names)) for line in lines if "val_psnr" in line])
    last = sorted(os.listdir(os.path.join(out, "samples")))[-2]  # the last is teacher.png
    for name, path in (("samples.png", os.path.join("samples", last)), ("curves.png", "curves.png")):
        shutil.copy(os.path.join(out, path), os.path.join(o["files"], name))
        print(f"\n![{name}]({os.path.basename(o['files'])}/{name})")


PARTS = {part.__name__: part for part in (  # what matters most comes first: the last may find no time
    machine, the_floor, speed, training, peak_memory, waits, resume, times_by_part, extras)}


if __name__ == "__main__":
    PARTS[sys.argv[1]](json.loads(sys.argv[2]))
