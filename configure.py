"""Settings as module-level globals, overridden by --name=value on the command line. Shared by every script here.

A script lists its settings at the top, one `name = default # comment` a line, then calls `configure(globals())`.
The type of a setting is the type of its default; its line in --help is its comment.
"""
import argparse
import difflib
import re
import sys

import torch


def stop(message):
    """End the program with one line on stderr and exit status 1: for mistakes that a user can mend."""
    sys.exit("error: " + " ".join(str(message).split()))


def whole_number(text):
    number = float(text)  # so that --max_iters=1e5 and --max_iters=100_000 both work
    if number != int(number):
        raise ValueError(text)
    return int(number)


def yes_or_no(text):
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]


RULES = {bool: (yes_or_no, "true or false"), int: (whole_number, "a whole number"), float: (float, "a number"), str: (str, "text")}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        stop(message)


def configure(settings, arguments=None):
    """Override the settings in a script's `globals()` from `--name=value` arguments (default: those of the process).

    Returns {name: value} of every setting. A wrong name, type or form stops with one line that says what would do.
    """
    source = open(settings["__file__"], encoding="utf-8").read().split("configure(globals())")[0]
    comments = dict(re.findall(r"^([a-z]\w*) *= .*?# *(.+)$", source, re.MULTILINE))
    names = [name for name in comments if type(settings.get(name)) in RULES]
    parser = Parser(usage="python %(prog)s [--name=value ...]", description=settings.get("__doc__"), allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in names:
        default = settings[name]

        def convert(text, name=name, default=default, kind=type(default)):
            parse, rule = RULES[kind]
            try:
                value = parse(text)
            except (ValueError, KeyError, OverflowError):
                stop(f"--{name}={text}: must be {rule}, for example --{name}={default}")
            if kind in (int, float) and not value >= 0:
                stop(f"--{name}={text}: must be 0 or more")
            return value
        parser.add_argument(f"--{name}", type=convert, default=default, metavar="", **{"nargs": "?", "const": True} if type(default) is bool else {},
                            help=f"{comments[name]} [{default!r}]".replace("%", "%%"))
    known, unknown = parser.parse_known_args(arguments)
    for argument in unknown:
        if not argument.startswith("--"):
            stop(f"{argument!r} is not a setting: settings are written --name=value")
        name = argument[2:].split("=")[0]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0)
        stop(f"unknown setting --{name}: did you mean --{near[0]}? --help lists every setting")
    settings.update(vars(known))
    return vars(known)


def require_positive(settings, *names):
    for name in names:
        if settings[name] <= 0:
            stop(f"--{name}={settings[name]}: must be more than 0")


# -----------------------------------------------------------------------------
# settings whose 'auto' depends on the machine

def pick_device(name):
    """'auto' -> cuda, else mps, else cpu. Stops with one line if the named device is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)  # what torch.cuda says of memory and random states is of the current device
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        stop(f"--device={name}: cannot be used here ({str(error).splitlines()[0]}); --device=auto picks one that can")


def pick_dtype(name, device):
    """'auto' -> bfloat16 where the hardware has it, float16 on older GPUs, else float32. Returns a torch.dtype."""
    if name == "auto":
        if device.type == "cuda":
            name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        else:
            fast = device.type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
            name = "bfloat16" if fast else "float32"
    if name not in ("float32", "bfloat16", "float16"):
        stop(f"--dtype={name}: must be auto, float32, bfloat16 or float16")
    return getattr(torch, name)


def peak_memory_mb(device):
    """Largest memory held so far: the GPU's as torch counts it, else the process's (0 where the system does not tell)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))
