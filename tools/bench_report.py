"""The report of tools.bench: everything about the speed of a machine, unattended. Every part is a process of its own:
whatever happens to it, the others go on. The report is written again after each.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

from support.configure import stop
from support.export import save_text
from tools.bench_parts import PARTS
from tools.measures import HERE


def parse_shapes(name, text):
    """'32x96,16x256' -> [(32, 96), (16, 256)], batch and crop."""
    try:
        return [(int(batch_size), int(crop)) for batch_size, crop in (shape.split("x") for shape in text.split(","))]
    except ValueError:
        stop(f"--{name}={text}: must be batch x crop, or several of these, for example 32x96,16x256")


def run_part(name, options, seconds):
    """(markdown, True) of a part in a process of its own, or (why there is none, False)."""
    process = subprocess.Popen([sys.executable, "-m", "tools.bench_parts", name, json.dumps(options)], cwd=HERE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)  # with the runs that it has begun
        process.kill()
        process.communicate()
        return f"failed: not done after {seconds:.0f} s", False
    save_text(os.path.join(options["files"], f"{name}.log"), errors)
    if process.returncode:
        return "failed: " + (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1][:300], False
    return output, True


def write_report(path, options, minutes):
    """Run the parts one after another, for so many minutes, and write what they found as markdown."""
    options["files"] = os.path.abspath(path.removesuffix(".md"))
    if os.path.exists(path) or os.path.exists(options["files"]):
        stop(f"--report={path}: it or the folder beside it is there already; move them away, or choose another name")
    os.makedirs(options["files"])
    text, started = "# Measured by tools.bench\n", time.time()
    todo = [(name, {}) for name in PARTS if name not in ("speed", "training", "extras")]
    todo += [("speed", {"shape": shape}) for shape in options["shapes"]] + [("training", {})]
    todo += [("extras", {"shape": shape}) for shape in options["shapes"]]
    for name, more in todo:
        begun, left = time.time(), 60 * minutes - (time.time() - started)
        if name != "training" and any(each == "training" for each, _ in todo[todo.index((name, more)):]):
            left -= 60 * options["train_minutes"] + 60  # it takes its time and starts
        title, _, about = PARTS[name].__doc__.partition("\n")
        title += ", {} crops of {} pixels".format(*more["shape"]) if more else ""
        found, worked = run_part(name, options | more, left) if left > 5 else ("not begun: the time is over", False)
        blocks = [f"\n## {title}", " ".join(about.split()), found if worked else f"**{found}**\n"]
        text += "\n\n".join(filter(None, blocks))
        save_text(path, text)
        print(f"{title}: {'done' if worked else found}, {time.time() - begun:.0f} s", flush=True)
    for name in os.listdir(options["files"]):  # runs and weights; what stays are pictures and logs
        if os.path.isdir(os.path.join(options["files"], name)):
            shutil.rmtree(os.path.join(options["files"], name))
    print(f"wrote {path}, after {(time.time() - started) / 60:.1f} minutes")
