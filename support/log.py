"""What a run tells: a summary at its start, log.jsonl, the console, pictures, and a last block of results."""
import datetime
import importlib.metadata
import json
import math
import os
import signal
import sys
import time

import torch

from model import count_parameters
from sample import Evaluator, save_picture
from support.checkpoint import fail_not_finite
from support.config import fail
from support.curves import draw_curves
from support.device import RANK, RANKS, any_rank, leave
from support.files import save_text

STARTED = time.time()
SLOW_STEPS = 8  # at first, in which networks are compiled and a CUDA graph is recorded; they do not count for the speed


class Log:
    """Losses stay on the device until they are reported, so that the CPU does not wait for the GPU in every step."""
    def __init__(self, settings, device, dtype, compile, images, vae, networks):
        self.settings, self.out_dir, self.device = settings, settings["out_dir"], device
        machine = {"device": str(device), "dtype": str(dtype), "compile": str(compile)}
        self.print_summary(machine, images, vae, networks)
        eval_size = settings["eval_size"] or (512 if device.type == "cuda" else 256)
        self.evaluator = Evaluator(images.held_out(settings["eval_images"], eval_size, vae.multiple), vae)
        settings["eval_size"] = self.evaluator.real.shape[-1]
        crops = images.batch(128, 16, 0, [settings["seed"], 0])  # fails now if most files cannot be read
        print(vae.describe_scale(vae.encode(crops / 255)))
        teacher_metrics = self.evaluator.teacher_metrics
        print(f"goal      the teacher's own pictures of the held-out images: psnr {teacher_metrics['psnr']:.2f} dB, "
              f"sharpness {teacher_metrics['sharpness']:.2f}", flush=True)
        if RANK == 0:
            self.draw("teacher", {"teacher": self.evaluator.teacher_picture})
            lines = ["# Written by train.py: a file of settings like those in recipes/."]
            lines += [f"{name} = {value!r}" for name, value in settings.items()]
            save_text(os.path.join(self.out_dir, "settings.py"), "\n".join(lines) + "\n")
        versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
        self.write({"settings": settings, "arguments": sys.argv[1:], "teacher": teacher_metrics, "versions": versions}
                   | machine)
        self.metrics = {}  # of the last evaluation
        self.history = []  # (names, values) of the losses of each step since the last report
        self.images, self.steps, self.untimed, self.seconds, self.waited, self.clock = 0, 0, 0, 0.0, 0.0, time.time()
        self.asked_to_stop = False  # by Ctrl-C, or where a machine is about to be taken away
        signal.signal(signal.SIGINT, self.ask_to_stop)
        signal.signal(signal.SIGTERM, self.ask_to_stop)

    def print_summary(self, machine, images, vae, networks):
        s = self.settings
        losses = [f"{value:g} x {name.removesuffix('_weight')}" for name, value in s.items()
                  if name.endswith("_weight") and value and (s["adversarial_weight"] or "matching" not in name)]
        sizes = [f"{name} {count_parameters(networks[name]):,}" for name in ("encoder", "decoder", "discriminator")]
        window = (1 if s["variant"] == "midblock_gn" else max(1, s["window"] // s["crop"])) * s["crop"]
        print(f"machine   {machine['device']}, {machine['dtype']}, compile {machine['compile']}, {RANKS} process(es), "
              f"torch {torch.__version__}")
        print(f"images    {images}")
        print(f"teacher   {s['teacher']}: {vae}")
        print(f"student   {s['variant']}, width {s['width']}; parameters: {', '.join(sizes)}")
        print(f"losses    {', '.join(losses)}; {s['optimizer']}, learning rate {s['learning_rate']:g}")
        print(f"batch     {s['batch_size']} crops of {s['crop']} pixels from windows of {window}, each used "
              f"{s['echo']:g} times\nfinish    {s['finish']:.0%} of the steps, crops of {s['finish_crop']}", flush=True)

    def write(self, record):
        if RANK:
            return
        try:
            with open(os.path.join(self.out_dir, "log.jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            fail(f"{self.out_dir}: could not be written ({error}); a checkpoint there is untouched, --init_from=resume "
                 f"goes on with it")

    def waiting_for(self, batches):
        """The same batches. The share of time that training waits for them is logged as data_wait."""
        while True:
            asked = time.time()
            batch = next(batches)
            self.waited += time.time() - asked
            yield batch

    def add(self, step, images_seen, losses):
        """Remember the losses of one step, {name: tensor}, and report their means from time to time. Returns whether
        Ctrl-C has asked to stop."""
        interrupted, s = any_rank(self.asked_to_stop), self.settings
        self.history.append((list(losses), torch.stack(list(losses.values())).detach()))
        self.images, self.steps = self.images + s["batch_size"], self.steps + 1
        if self.steps in (1, SLOW_STEPS):
            self.history[-1][1].tolist()  # waits for the device
        if self.steps == 1:
            print(f"start     {time.time() - STARTED:.1f} s until the first step was done", flush=True)
        last = interrupted or step == s["max_iters"]
        if interrupted:
            self.metrics = {}  # they are of an earlier step
        if last or step % s["log_interval"] == 0 or step % s["eval_interval"] == 0:
            self.report(step, images_seen)
        if self.steps == SLOW_STEPS:
            self.images, self.untimed, self.seconds = 0, len(self.history), 0.0
            self.waited, self.clock = 0.0, time.time()
        return interrupted

    def report(self, step, images_seen):
        """Log and print the mean of each loss since the last report, over the steps that had it."""
        found, max_iters, batch_size = {}, self.settings["max_iters"], self.settings["batch_size"]
        values = iter(torch.cat([row for _, row in self.history]).tolist())
        for age, (names, _) in zip(range(len(self.history) - 1, -1, -1), self.history):
            for name, value in zip(names, values):
                if not math.isfinite(value):
                    fail_not_finite(self.settings, step - age, name)
                found.setdefault(name, []).append(value)
        seconds = time.time() - self.clock
        rate = max(1, len(self.history) - self.untimed) * batch_size / seconds
        means = {name: round(sum(values) / len(values), 6) for name, values in found.items()}
        record = {"images_per_second": round(rate, 2)} | means
        record |= {"data_wait": round(self.waited / seconds, 3), "peak_memory_mb": peak_memory_mb(self.device)}
        self.write({"step": step, "images_seen": images_seen} | record)
        left = datetime.timedelta(seconds=round((max_iters - step) * batch_size / rate))
        shown = "  ".join(f"{name} {value:.4g}" for name, value in record.items())
        print(f"step {step}/{max_iters}  images_seen {images_seen:,}  {shown}  left {left}", flush=True)
        self.history, self.waited, self.untimed = [], 0.0, 0
        self.seconds, self.clock = self.seconds + seconds, time.time()

    def progress(self, step, images_seen):
        return {"step": step, "images_seen": images_seen,
                "images_per_second": round(self.images / max(self.seconds, 1e-9), 2)}

    def evaluate(self, step, images_seen, encoder, decoder, raw_decoder, autocast):
        """Measure the averaged encoder and decoder on the held-out images, and draw them to samples/."""
        if RANK:
            return
        students = {"our": {"encoder": encoder, "decoder": decoder}, "raw": {"decoder": raw_decoder}}
        pictures, found = self.evaluator.evaluate(students, autocast)
        raw, by_teacher = found["raw decoder"], found["our encoder, teacher's decoder"]
        metrics = by_teacher | found["our decoder"]  # the latents' metrics are in by_teacher only
        metrics |= {"teacher_psnr": by_teacher["psnr"], "teacher_lowres_mse": by_teacher["lowres_mse"]}
        metrics["psnr_raw"] = raw["psnr"]  # of the weights as they are, without averaging
        self.metrics = {f"val_{name}": round(value, 6) for name, value in metrics.items()}
        self.draw(f"{step:07d}", {row: picture for row, picture in pictures.items() if row != "raw decoder"})
        self.write(self.progress(step, images_seen) | self.metrics)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        print(f"eval {step}  {shown}", flush=True)

    def draw(self, name, rows):
        """Draw the first held-out images and {row: pictures} of them."""
        rows = {"original": self.evaluator.real} | rows
        save_picture({row: pictures[:8] for row, pictures in rows.items()},
                     os.path.join(self.out_dir, "samples", f"{name}.png"))

    def draw_curves(self):
        """Write curves.png at the end of a pause, which does not count as training time."""
        try:
            if RANK == 0:
                draw_curves([self.out_dir], os.path.join(self.out_dir, "curves.png"))
        except (Exception, SystemExit) as error:  # matplotlib is missing, for example; that must not end a run
            print(f"no curves ({error})")
        self.clock = time.time()

    def ask_to_stop(self, signum, frame):
        self.asked_to_stop = True
        signal.signal(signum, signal.SIG_DFL)
        os.write(2, b"stopping after this step; once more to leave without saving\n")  # print is unsafe in a handler

    def end(self, step, images_seen, interrupted):
        """Print a last block of `name: value` lines. Without an evaluation of the last step, it has no metrics."""
        results = {"out_dir": self.out_dir} | self.progress(step, images_seen)
        results |= {"peak_memory_mb": peak_memory_mb(self.device), "seconds": round(time.time() - STARTED)}
        results |= self.metrics
        print("---")
        for name, value in results.items():
            print(f"{name}: {value}")
        if interrupted:
            print(f"stopped and saved at step {step}; go on with --out_dir={self.out_dir} --init_from=resume")
        leave()


def peak_memory_mb(device):
    """The most memory used so far: a GPU's as PyTorch reserves it, else the process's (0 where it cannot be told)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_reserved() / 2**20)  # includes the memory of CUDA graphs
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))
