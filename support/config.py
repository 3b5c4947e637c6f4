"""Settings are the globals at the top of a script. Files of settings (recipes) and flags override them.

A script lists its settings as `name = default  # help`, one a line, between two rules, and calls configure(globals()).
The type of a setting is the type of its default, and its comment is its line in --help.
"""
import argparse
import difflib
import os
import re
import signal
import sys

RULES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def fail(message):
    """End the program with one line on stderr and exit status 1. For mistakes that the user can correct."""
    sys.exit("error: " + one_line(message))


def one_line(text, length=2000):
    return " ".join(str(text).split())[:length]


def configure(settings, arguments=None):
    """Override a script's `globals()` by files of settings (recipes/ft_mse.py), then by --name=value.

    --init_from=resume first reads the settings.py that the run has written into its out_dir. Returns {name: value} of
    every setting. A wrong name, type or value ends the program. arguments: None = the command line."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program without a traceback
    with open(settings["__file__"], encoding="utf-8") as file:
        source = file.read().split("configure(globals())")[0].split("# ---", 1)[-1]  # from the first rule to the call
    comments = dict(re.findall(r"^([a-z]\w*)(?:: *\w+)? *=.*?(?:# *(.+))?$", source, re.MULTILINE))
    defaults = {name: settings[name] for name in comments if type(settings.get(name)) in RULES}
    parser = argparse.ArgumentParser(
        usage="python %(prog)s [settings.py ...] [--name=value ...]", description=settings.get("__doc__"),
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = fail
    for name, default in defaults.items():
        help_line = f"{comments[name]} [{default!r}]".replace("%", "%%")
        switch = {"nargs": "?", "const": "true"} if type(default) is bool else {}
        parser.add_argument(f"--{name}", metavar="", help=help_line, **switch)
    flags, others = parser.parse_known_args(arguments)
    given = {}
    for argument in others:
        if argument.startswith("--"):
            fail_unknown("--", argument[2:].split("=")[0], defaults)
        if not argument.endswith(".py"):
            fail(f"{argument!r} is not a setting: settings are written --name=value, files of settings end in .py")
        given |= read_settings(argument, defaults)
    for name, text in vars(flags).items():
        given[name] = convert(f"--{name}={text}", text, defaults[name])
    if given.get("init_from") == "resume":
        out_dir = given.get("out_dir", defaults["out_dir"])
        given = read_settings(os.path.join(out_dir, "settings.py"), defaults) | given | {"out_dir": out_dir}
    settings.update(given)
    return defaults | given


def convert(written, text, default):
    """The text as a value of the default's type. `written` is what the user wrote, for the error."""
    kind = type(default)
    try:
        value = BOOLEANS[text.lower()] if kind is bool else text if kind is str else float(text)
        if kind is int and value != int(value):
            raise ValueError(text)
    except (ValueError, KeyError, OverflowError):
        fail(f"{written}: must be {RULES[kind]}, for example {default!r}")
    if kind in (int, float) and not 0 <= value < float("inf"):
        fail(f"{written}: must be 0 or more")
    return kind(value)  # so that --max_iters=1e5 works, too


def read_settings(path, defaults):
    """{name: value} of a Python file of settings, such as those in recipes/. The file is executed, so read a stranger's
    file before you use it."""
    values, found = {}, {}
    if not os.path.isfile(path):
        fail(f"{path}: no such file of settings")
    try:
        with open(path, encoding="utf-8") as file:
            exec(compile(file.read(), path, "exec"), values)
    except Exception as error:  # a Python file can hold any mistake
        fail(f"{path}: cannot be read as a file of settings ({type(error).__name__}: {error})")
    for name, value in values.items():
        if name in defaults:
            found[name] = convert(f"{path}: {name} = {value!r}", str(value), defaults[name])
        elif type(value) in RULES and not name.startswith("_"):  # not what the file imports or defines
            fail_unknown(f"{path}: ", name, defaults)
    if not found:
        fail(f"{path}: holds no settings; the files in recipes/ show how they are written")
    return found


def fail_unknown(where, name, names):
    near = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
    helper = "" if where == "--" else "; in a file, the names of other values begin with _"
    fail(f"unknown setting {where}{name}: did you mean {near}? --help lists every setting{helper}")


def require_positive(settings, *names):
    for name in names:
        if settings[name] <= 0:
            fail(f"--{name}={settings[name]}: must be more than 0")
