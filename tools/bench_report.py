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
    """(markdown, whether all of it is there) of a part in a process of its own; its stderr goes to a file."""
    process = subprocess.Popen([sys.executable, "-m", "tools.bench_parts", name, json.dumps(options)], cwd=HERE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    failed = ""
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        end(process)
        output, errors = process.communicate()
        failed = f"failed: not done after {seconds:.0f} s"
    except BaseException:  # Ctrl-C
        end(process)
        raise
    if process.returncode and not failed:
        failed = "failed: " + (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1][:300]
    log = "-".join([name, *map(str, options.get("shape", ()))])
    save_text(os.path.join(options["files"], f"{log}.log"), errors)
    return "\n\n".join(filter(None, (output.strip(), failed and f"**{failed}**"))), not failed


def end(process):
    """Kill a part, and the runs that it has begun."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
    else:
        os.killpg(process.pid, signal.SIGKILL)


def write_report(path, options, minutes, parts=""):
    """Run the parts one after another, for so many minutes, and write what they found as markdown."""
    wanted = parts.split(",") if parts else list(PARTS)
    for name in wanted:
        if name not in PARTS:
            stop(f"--parts={parts}: must be of {', '.join(PARTS)}")
    options["files"] = os.path.abspath(path.removesuffix(".md"))
    if os.path.exists(path) or os.path.exists(options["files"]):
        stop(f"--report={path}: it or the folder beside it is there already; move them away, or choose another name")
    try:
        os.makedirs(options["files"])
    except OSError as error:
        stop(f"--report={path}: the folder beside it cannot be made ({error.strerror})")
    first, *others = options["shapes"]
    todo = [(name, {"shape": first} if name in ("speed", "extras") else {}) for name in wanted]
    todo += [(name, {"shape": shape}) for name in ("speed", "extras") if name in wanted for shape in others]
    text, started = "# Measured by tools.bench\n", time.time()
    for name, more in todo:
        begun, left = time.time(), 60 * minutes - (time.time() - started)
        title, _, about = PARTS[name].__doc__.partition("\n")
        title += ", {} crops of {} pixels".format(*more["shape"]) if more else ""
        found, worked = run_part(name, options | more, left) if left > 5 else ("**not begun: the time is over**", False)
        text += "\n\n".join(filter(None, (f"\n## {title}", " ".join(about.split()), found))) + "\n"
        save_text(path, text)
        print(f"{title}: {'done' if worked else found.splitlines()[-1].strip('*')}, {time.time() - begun:.0f} s",
              flush=True)
    for name in os.listdir(options["files"]):  # runs and weights; what stays are pictures and logs
        if os.path.isdir(os.path.join(options["files"], name)):
            shutil.rmtree(os.path.join(options["files"], name), ignore_errors=True)
    print(f"wrote {path}, after {(time.time() - started) / 60:.1f} minutes")
