"""Settings as module-level globals, overridden by files of settings and by --name=value. Shared by every script here.

A script lists its settings at the top, one `name = default  # help` a line, then calls `configure(globals())`.
The type of a setting is the type of its default; its line in --help is its comment.
"""
import argparse
import difflib
import os
import re
import sys

import torch

from support.parallel import LOCAL_RANK, RANKS


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


TYPES = {bool: (yes_or_no, "true or false"), int: (whole_number, "a whole number"), float: (float, "a number"),
         str: (str, "text")}  # type: (how it is read, what it must be)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        stop(message)


def configure(settings, arguments=None):
    """Override the settings in a script's `globals()`: by files of settings (recipes/ft_mse.py), then by --name=value.

    Returns {name: value} of every setting, of those that a file gave and of those that a flag gave. arguments: None =
    the command line. A wrong name, type or form stops with one line that says what would do.
    """
    with open(settings["__file__"], encoding="utf-8") as file:
        source = file.read().split("configure(globals())")[0].split("# ---", 1)[-1]  # from the first rule to the call
    comments = dict(re.findall(r"^([a-z]\w*) *= .*?# *(.+)$", source, re.MULTILINE))
    names = [name for name in comments if type(settings.get(name)) in TYPES]
    parser = Parser(usage="python %(prog)s [settings.py ...] [--name=value ...]", description=settings.get("__doc__"),
                    argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    for name in names:
        switch = {"nargs": "?", "const": "true"} if type(settings[name]) is bool else {}
        parser.add_argument(f"--{name}", metavar="", help=f"{comments[name]} [{settings[name]!r}]".replace("%", "%%"),
                            **switch)
    flags, others = parser.parse_known_args(arguments)
    by_file, by_flag = {}, {}
    for argument in others:
        if argument.startswith("--"):
            unknown(f"--{argument[2:].split('=')[0]}", names)
        if not argument.endswith(".py"):
            stop(f"{argument!r} is not a setting: settings are written --name=value, files of settings end in .py")
        values = read_settings(argument)
        for name, value in values.items():
            if name in names:
                by_file[name] = converted(f"{argument}: {name} = {value!r}", str(value), settings[name])
            elif type(value) in TYPES:  # not what the file imports or defines
                unknown(f"{argument}: {name}", names)
        if not values.keys() & set(names):
            stop(f"{argument}: holds no settings; those in recipes/ show how they are written")
    for name, text in vars(flags).items():
        by_flag[name] = converted(f"--{name}={text}", text, settings[name])
    settings.update(by_file | by_flag)
    return {name: settings[name] for name in names}, by_file, by_flag


def converted(written, text, default):
    """The text as a value of the default's type; `written` is what the user wrote."""
    parse, rule = TYPES[type(default)]
    try:
        value = parse(text)
    except (ValueError, KeyError, OverflowError):
        stop(f"{written}: must be {rule}, for example {default!r}")
    if type(value) in (int, float) and not value >= 0:
        stop(f"{written}: must be 0 or more")
    return value


def read_settings(path):
    """{name: value} of a Python file of settings, such as those in recipes/. It is run: read a stranger's first."""
    values = {}
    if not os.path.isfile(path):
        stop(f"{path}: no such file of settings")
    try:
        with open(path, encoding="utf-8") as file:
            exec(compile(file.read(), path, "exec"), values)
    except Exception as error:  # missing, or any mistake that Python code may hold
        stop(f"{path}: cannot be read as a file of settings ({type(error).__name__}: {error})")
    return {name: value for name, value in values.items() if not name.startswith("_")}


def unknown(name, names):
    near = difflib.get_close_matches(re.split("--|: ", name)[-1], names, n=1, cutoff=0)
    helper = "" if name.startswith("--") else "; a helper's name begins with _"
    stop(f"unknown setting {name}: did you mean {near[0]}? --help lists every setting{helper}")


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
    if name == "cuda" and RANKS > 1:
        name = f"cuda:{LOCAL_RANK}"
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


def pick_compile(name, device):
    """'auto' -> True on a GPU for which it works; one line says why where it does not. Returns a bool."""
    if name.lower() not in ("auto", "true", "false"):
        stop(f"--compile={name}: must be auto, true or false")
    if name.lower() != "auto" or device.type != "cuda":
        return name.lower() == "true"
    try:  # Triton wants compute capability 7.0 and a C compiler: the least that shows both
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
        return True
    except Exception as error:
        print(f"machine   not compiled, which is slower: {' '.join(str(error).split())[:200]}")
        return False
