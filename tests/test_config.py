"""Settings: defaults, recipes, flags, and the settings.py that every run writes. Mistakes are in test_mistakes.py."""
import os

import pytest

from conftest import evaluations, records, script, train
from support.config import configure, read_settings


@pytest.fixture
def settings(tmp_path):
    """The globals of a script with four settings."""
    (tmp_path / "script.py").write_text(
        "# ---\nrate = 0.1   # a float\nsteps = 10   # an int\nfast = False   # a switch\nname = ''   # a text\n# ---\n"
        "configure(globals())\nlater = 1  # not a setting\n")
    return {"__file__": str(tmp_path / "script.py"), "rate": 0.1, "steps": 10, "fast": False, "name": "", "other": 1}


def test_flags_override_recipes_and_recipes_override_defaults(settings, tmp_path):
    (tmp_path / "first.py").write_text("import math\nrate = math.sqrt(9)\nsteps = 7\n_own = 1\ndef function(): ...\n")
    (tmp_path / "second.py").write_text("from pathlib import Path\nfast = True\nsteps = 8\n")
    arguments = ["--name=a=b", str(tmp_path / "first.py"), str(tmp_path / "second.py")]
    assert configure(settings, arguments) == {"rate": 3.0, "steps": 8, "fast": True, "name": "a=b"}
    assert configure(settings, [*arguments, "--steps=1e5"])["steps"] == 100_000
    assert settings["steps"] == 100_000 and settings["rate"] == 3.0  # the script's own globals change, too
    assert settings["other"] == 1


@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_help_lists_every_setting(name, tiny_run, capsys):
    with pytest.raises(SystemExit) as ended:
        script(name, "--help")
    output = capsys.readouterr().out
    assert ended.value.code == 0 and f"python {name}" in output
    names = records(tiny_run.out)[0]["settings"] if name == "train.py" else ("compare", "export_dtype", "curves")
    assert all(f"  --{each} " in output for each in names)
    assert "[96]" in output or name == "sample.py"  # the default of crop


# settings.py

def test_a_run_writes_its_settings_as_a_recipe(tiny_run):
    settings = records(tiny_run.out)[0]["settings"]
    assert read_settings(str(tiny_run.out / "settings.py"), settings) == settings
    assert settings["learning_rate"] == 3e-3 and settings["train_encoder"] is True
    assert settings["variant"] == "plain"  # what "auto" meant


def test_resume_reads_settings_py_then_recipes_then_flags(copied_run, tmp_path):
    before = records(copied_run)[0]["settings"]
    with open(copied_run / "settings.py", "a", encoding="utf-8") as file:
        file.write("eval_images = 1\necho = 5.0\nseed = 5\n")
    (tmp_path / "recipe.py").write_text("echo = 3.0\nseed = 3\n")
    train("--init_from=resume", f"--out_dir={copied_run}", tmp_path / "recipe.py", "--seed=1", "--max_iters=61")
    after = [line["settings"] for line in records(copied_run) if "settings" in line][1]
    changed = {"eval_images": 1, "echo": 3.0, "seed": 1, "max_iters": 61}
    assert after == before | changed | {"out_dir": str(copied_run)}  # the folder was moved
    assert read_settings(str(copied_run / "settings.py"), before) == after
    assert after["init_from"] == "scratch"  # how the run began
    with pytest.raises(SystemExit, match="--max_iters=61: the run in .* has done 61 steps; raise"):
        train(f"--out_dir={copied_run}", "--init_from=resume")


def test_a_run_can_continue_with_other_settings(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny_run.folder.parent)
    train(tiny_run.out / "settings.py", f"--init_from={tiny_run.out}", f"--out_dir={tmp_path / 'b'}", "--crop=48",
          f"--data_dir={os.path.basename(tiny_run.folder)}", "--max_iters=1", "--eval_interval=1")
    before, after = (records(out)[0]["settings"] for out in (tiny_run.out, tmp_path / "b"))
    changed = {"crop": 48, "max_iters": 1, "eval_interval": 1, "init_from": str(tiny_run.out)}
    assert after == before | changed | {"out_dir": str(tmp_path / "b")}  # data_dir is recorded as an absolute path
    start, last = evaluations(tmp_path / "b")
    goal = evaluations(tiny_run.out)[-1]
    assert start["step"] == 0 and start["val_psnr"] == pytest.approx(goal["val_psnr"], abs=1e-3)
    assert last["step"] == 1 and last["images_seen"] == 4
    assert "note      a learning_rate of 0.003 is for training from scratch" in capsys.readouterr().out
