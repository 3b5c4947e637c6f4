"""What a run tells: log.jsonl, the screen, a profile, the last line before it ends. Nothing here trains.

To change what is trained, or how, nothing here needs to be read: a new term of the loss is reported by its name.
"""
import datetime
import importlib.metadata
import json
import math
import os
import platform
import signal
import sys
import time
from types import SimpleNamespace

import torch
from tqdm import tqdm  # comes with diffusers

from model import parameters
from support.configure import stop
from support.curves import draw_curves
from support.files import save_file
from support.parallel import RANK, RANKS, anywhere, leave


def introduce(settings, images, vae, networks, memories, machine):
    """Print what this run is, and what it takes."""
    s = SimpleNamespace(**settings)
    weights = {name: value for name, value in settings.items() if name.endswith("_weight") and value}
    if not s.adversarial_weight:
        weights.pop("matching_weight", None)
    sizes = ", ".join(f"{name} {parameters(networks[name]):,}" for name in ("encoder", "decoder", "discriminator"))
    print(f"machine   {machine['device']}, {machine['dtype']}, compile {'on' if machine['compile'] else 'off'}, "
          f"torch {torch.__version__}" + f", {RANKS} processes" * (RANKS > 1))
    print(f"images    {images}")
    print(f"teacher   {s.teacher}: {vae}")
    print(f"student   {s.variant}, width {s.width}; parameters: {sizes}"
          + "; diffusers cannot express it, exports are .pth only" * (s.variant != "plain"))
    print("losses    " + ", ".join(f"{value:g} x {name.removesuffix('_weight')}" for name, value in weights.items())
          + f"; {s.optimizer} at {s.learning_rate:g}; all settings are in log.jsonl")
    print(f"batch     {s.batch_size} crops of {s.crop} pixels, each used {s.echo:g} times, cut from squares of "
          f"{max(1, s.window // s.crop) * s.crop} pixels")
    states = {"muon": 1, "adam": 3, "adamw": 2}[s.optimizer]  # as many as there are weights
    weights = 4 * sum(parameters(network) * (1 if name.startswith("ema") else 1 + states)
                      for name, network in networks.items())
    bytes_of = {name: sum(tensor.nbytes for tensor in vars(memory).values() if torch.is_tensor(tensor))
                for name, memory in memories.items()}
    print("memory    " + ", ".join(f"{name} {size / 2**20:,.0f} MB" for name, size in bytes_of.items())
          + f" on the device; a checkpoint up to {(weights + RANKS * sum(bytes_of.values())) / 2**20:,.0f} MB, two are "
          f"kept", flush=True)


def stop_not_finite(settings, step, what):
    stop(f"step {step}: {what}. A checkpoint in {settings['out_dir']} is from before; go on with --init_from=resume "
         f"and a smaller --learning_rate, or --dtype=float32")


BAR = "{percentage:3.0f}% {n_fmt}/{total_fmt}, {remaining} left, {rate_fmt}{postfix}"  # losses fit into 100 columns


class Report:
    """log.jsonl and the screen: on a terminal a bar, elsewhere lines. The terms of a step stay on the device until they
    are reported: before every save."""
    def __init__(self, settings, progress, held_out, machine, started):
        self.settings, self.progress, self.device, self.started = settings, progress, machine["device"], started
        self.history, self.waited, self.images, self.seconds, self.clock = [], 0.0, 0, 0.0, time.time()
        goal, out_dir = held_out.goal, settings["out_dir"]
        print(f"goal      the teacher's own round trip of the held-out images: psnr {goal['psnr']:.2f} dB, sharpness "
              f"{goal['sharpness']:.2f}", flush=True)
        try:
            os.makedirs(out_dir, exist_ok=True)
        except OSError as error:
            stop(f"--out_dir={out_dir}: cannot be made ({error.strerror})")
        if not RANK:
            held_out.draw(os.path.join(out_dir, "samples", "teacher.png"))
        versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
        versions["python"] = platform.python_version()
        self.log({"settings": settings, "arguments": sys.argv[1:], "versions": versions, "teacher": goal}
                 | {name: str(value) for name, value in machine.items()})
        self.profiler = profiler(settings) if settings["profile"] and not RANK else None
        self.bar = None  # from the first step on, on a terminal

    def log(self, record):
        if RANK:
            return
        out_dir = self.settings["out_dir"]
        try:
            with open(os.path.join(out_dir, "log.jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            stop(f"{out_dir}: could not be written ({error}); a checkpoint there is untouched, --init_from=resume goes "
                 f"on with it")

    def say(self, line):
        if self.bar:
            self.bar.clear()
        print(line, flush=True)

    def add(self, terms):
        """Remember the terms of one step, {name: tensor}."""
        self.history.append((list(terms), torch.stack(list(terms.values())).detach()))
        self.images += self.settings["batch_size"]
        if not self.seconds and len(self.history) == 1:
            self.history[0][1].tolist()  # waits for the device
            self.say(f"start     {time.time() - self.started:.1f} s until the first step was done")
            if sys.stdout.isatty():
                self.bar = tqdm(total=self.settings["max_iters"], initial=self.progress.step - 1, unit=" steps",
                                dynamic_ncols=True, file=sys.stdout, smoothing=0.05, bar_format=BAR)
        if self.bar:
            self.bar.update()
        if self.profiler:
            self.profiler.step()

    def means(self):
        """Log and print the means of the terms since the last time, each over the steps that had it."""
        values, step, max_iters = {}, self.progress.step, self.settings["max_iters"]
        numbers = iter(torch.cat([row for _, row in self.history]).tolist())
        for age, (names, _) in zip(range(len(self.history) - 1, -1, -1), self.history):
            for name, value in zip(names, numbers):
                if not math.isfinite(value):
                    self.say("")  # below the bar
                    stop_not_finite(self.settings, step - age, f"{name} is {value}")
                values.setdefault(name, []).append(value)
        seconds = time.time() - self.clock
        rate = len(self.history) * self.settings["batch_size"] / seconds
        record = {"step": step, "images_seen": self.progress.images_seen, "images_per_second": round(rate, 2)}
        record |= {name: round(sum(found) / len(found), 6) for name, found in values.items()}
        record |= {"data_wait": round(self.waited / seconds, 3), "peak_memory_mb": peak_memory_mb(self.device)}
        self.log(record)
        shown = [f"{name} {value:.4g}" for name, value in record.items() if name not in ("step", "images_seen")]
        left = datetime.timedelta(seconds=round((max_iters - step) * self.settings["batch_size"] / rate))
        if self.bar:
            self.bar.set_postfix_str(" ".join(f"{name} {record[name]:.2g}" for name in values))
        else:
            self.say("  ".join([f"step {step}/{max_iters}  images_seen {record['images_seen']:,}", *shown,
                                f"left {left}"]))
        self.history, self.waited, self.seconds, self.clock = [], 0.0, self.seconds + seconds, time.time()

    def so_far(self):
        return {"step": self.progress.step, "images_seen": self.progress.images_seen,
                "images_per_second": round(self.images / max(self.seconds, 1e-9), 2)}

    def evaluation(self, figures):
        self.log(self.so_far() | figures)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.say(f"eval {self.progress.step}  {shown}")

    def draw(self):
        """curves.png, at the end of a pause, which does not count. A picture is no reason to end a run."""
        try:
            if not RANK:
                draw_curves([self.settings["out_dir"]], os.path.join(self.settings["out_dir"], "curves.png"))
        except (Exception, SystemExit) as error:  # matplotlib is not there, a viewer holds the file, ...
            self.say(f"no curves ({error})")
        self.clock = time.time()

    def end(self, stopped):
        """A last block of `name: value` lines; the figures are left out where they are not those of the last step."""
        if self.bar:
            self.bar.close()
        memory = {"peak_memory_mb": peak_memory_mb(self.device), "seconds": round(time.time() - self.started)}
        print(f"---\nout_dir: {self.settings['out_dir']}")
        for name, value in (self.so_far() | memory | ({} if stopped else self.progress.figures)).items():
            print(f"{name}: {value}")
        if stopped:
            print(f"stopped and saved at step {self.progress.step}; go on with --out_dir={self.settings['out_dir']} "
                  f"--init_from=resume")
        leave()


def peak_memory_mb(device):
    """Largest memory held so far: the GPU's as torch counts it, else the process's (0 where the system tells none)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_reserved() / 2**20)  # with what a CUDA graph keeps for itself
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def profile_from(settings):
    """Steps after the start: the pool is full (64 batches or windows, by two batches a step) and D at work."""
    windows_full = 32 * (settings.window // settings.crop)**2 // settings.batch_size
    return max(64, windows_full, settings.adversarial_start) + 10


def profiler(settings):
    """Its .step(), called after each training step, records `profile` of them as out_dir/trace.json."""
    path, first = os.path.join(settings["out_dir"], "trace.json"), profile_from(SimpleNamespace(**settings))

    def write(recorded):
        save_file(path, recorded.export_chrome_trace)
        print(f"profile   {settings['profile']} steps: {path}", flush=True)
    schedule = torch.profiler.schedule(skip_first=first - 1, wait=0, warmup=1, active=settings["profile"], repeat=1)
    recorder = torch.profiler.profile(schedule=schedule, on_trace_ready=write)
    recorder.start()
    return recorder


# -----------------------------------------------------------------------------
# the process

class Interrupt:
    """True once Ctrl-C or a preempted machine asks to finish the step, save and leave. A second one leaves at once."""
    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGINT, self.ask)
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, signum, frame):
        self.asked = True
        signal.signal(signum, signal.SIG_DFL)
        os.write(2, b"stopping after this step; once more to leave without saving\n")  # print is not safe in a handler

    def __bool__(self):
        return anywhere(self.asked)


def explain_out_of_memory(settings):
    """From here on, out of memory is one line; everything else as ever."""
    def explain(kind, error, trace):
        on_a_cpu = kind is RuntimeError and "DefaultCPUAllocator" in str(error)  # there it has no class of its own
        if not on_a_cpu and not issubclass(kind, (torch.OutOfMemoryError, MemoryError)):
            return sys.__excepthook__(kind, error, trace)
        large = ", ".join(f"--{name} ({settings[name]})" for name in ("batch_size", "crop", "window", "replay_size"))
        print(f"error: out of memory: a smaller {large} helps; checkpoints in {settings['out_dir']} are untouched",
              file=sys.stderr)
    sys.excepthook = explain
