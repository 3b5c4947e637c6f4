"""Settings, and what a run does: start, record, stop, go on, measure itself."""
import functools
import re
import shutil
import signal
import sys
import time

import pytest
import torch
from diffusers import AutoencoderTiny
from torch._dynamo.testing import CompileCounterWithBackend

from conftest import DATA, evaluations, load, needs_data, script
from support import configure, report
from test_smoke import HERE, TINY, records, start, train
from test_teacher import sana_vae


# settings

@pytest.fixture
def settings(tmp_path):
    (tmp_path / "script.py").write_text("rate = 0.1   # a float\nsteps = 10   # an int\nfast = False   # a bool\n"
                                        "name = ''   # a text\nconfigure(globals())\nlater = 1  # not a setting\n")
    return {"__file__": str(tmp_path / "script.py"), "rate": 0.1, "steps": 10, "fast": False, "name": "", "other": 1}


def test_settings_come_from_files_then_from_flags(settings, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("import math\nrate = math.sqrt(9)\nsteps = 7\n_private = 1\ndef function(): pass\n")
    found, by_file, by_flag = configure.configure(settings, [str(recipe), "--steps=1e5", "--name=a=b"])
    assert found == {"rate": 3.0, "steps": 100_000, "fast": False, "name": "a=b"} and settings["steps"] == 100_000
    assert (by_file, by_flag) == ({"rate": 3.0, "steps": 7}, {"steps": 100_000, "name": "a=b"}) and settings["other"]


@pytest.mark.parametrize("flag,fast", [("--fast", True), ("--fast=true", True), ("--fast=no", False)])
def test_switches(flag, fast, settings):
    assert configure.configure(settings, [flag, "--rate=1"])[0]["fast"] is fast and settings["rate"] == 1.0


@pytest.mark.parametrize("wrong,words", [
    ("--stesp=1", "did you mean steps"), ("--steps=big", "whole number"), ("--steps=1.5", "whole number"),
    ("steps=1", "--name="), ("--rate=-1", "0 or more"), ("--rate=nan", "0 or more"), ("--fast=maybe", "true or false"),
    ("rate = 1.0; stesp = 7", "recipe.py: stesp: did you mean steps"), ("_rate = 1.0", "holds no settings"),
    ("steps = 'big'", "recipe.py: steps = 'big': must be a"),
    ("steps = ", "recipe.py: cannot be read .*SyntaxError"), ("import gone", "recipe.py: cannot be read .*gone"),
    ("gone.py", "gone.py: no such file of settings"), ("--later=1", "unknown setting --later")])
def test_wrong_settings(wrong, words, settings, tmp_path):
    if " " in wrong:
        wrong, _ = str(tmp_path / "recipe.py"), (tmp_path / "recipe.py").write_text(wrong + "\n")
    with pytest.raises(SystemExit, match=words):
        configure.configure(settings, [wrong])


def test_help(settings, capsys):
    with pytest.raises(SystemExit) as ended:
        configure.configure(settings, ["--help"])
    assert ended.value.code == 0 and "a float [0.1]" in capsys.readouterr().out


# the record

def test_the_record_of_a_run(tiny_run):
    first, *lines = records(tiny_run.out)
    assert {"settings", "arguments", "versions", "teacher", "device", "dtype", "compile"} == first.keys()
    assert first["settings"]["teacher"] == "toy" and first["settings"]["learning_rate"] == 3e-3
    assert first["settings"]["device"] == "cpu"
    assert all({"step", "images_seen", "images_per_second"} <= line.keys() for line in lines)
    assert [line["step"] for line in evaluations(tiny_run.out)] == [40, 80, 120]
    mse = [line["mse"] for line in lines if "mse" in line]
    assert len(mse) == 120 and sum(mse[-10:]) < 0.7 * sum(mse[:10])
    last = dict(line.split(": ") for line in tiny_run.output.split("---\n")[1].splitlines())
    assert {"images_per_second", "peak_memory_mb", "val_lowres_mse", "val_latent_mse", "val_sharpness"} <= last.keys()
    until_first_step = float(tiny_run.output.split("\nstart")[1].split()[0])
    assert until_first_step < float(last["seconds"]) < 3600
    assert (tiny_run.out / "samples" / "teacher.png").exists()


def test_settings_are_what_train_lists(tiny_run):
    listed = (HERE / "train.py").read_text(encoding="utf-8").split("# the settings")[1].split("# ----")[0]
    listed = re.findall(r"^(\w+) = .*# ", listed, re.MULTILINE)
    assert len(listed) > 40 and list(records(tiny_run.out)[0]["settings"]) == listed


def test_out_of_memory_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", None)
    report.explain_out_of_memory(dict(batch_size=16, crop=96, window=256, replay_size=8, out_dir="out"))
    sys.excepthook(torch.OutOfMemoryError, torch.OutOfMemoryError("tried to allocate"), None)
    line = capsys.readouterr().err
    assert line.startswith("error: out of memory: a smaller --batch_size (16), --crop (96)") and line.count("\n") == 1
    sys.excepthook(ValueError, ValueError("something else"), None)
    assert "ValueError: something else" in capsys.readouterr().err


# stop and go on

def test_a_stopped_run_is_saved(tmp_path):
    log = tmp_path / "out" / "log.jsonl"
    process = start("train.py", *TINY, "--max_iters=100000", "--eval_interval=100000", f"--out_dir={tmp_path / 'out'}")
    while process.poll() is None and not (log.exists() and '"encoder"' in log.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate()
    assert process.returncode == 0 and "--init_from=resume" in output and "stopping after this step" in errors, errors
    step = load(tmp_path / "out" / "ckpt.pt")["step"]
    assert step > 0 and records(tmp_path / "out")[-1]["step"] == step
    train(f"--out_dir={tmp_path / 'out'}", "--init_from=resume", f"--max_iters={step + 1}")
    assert records(tmp_path / "out")[-1]["step"] == step + 1


def test_a_resumed_run_keeps_its_settings(copied_run):
    before = records(copied_run)[0]["settings"]
    train(f"--out_dir={copied_run}", "--init_from=resume", "--max_iters=121", "--echo=3")
    after = [line["settings"] for line in records(copied_run) if "settings" in line][1]
    assert after == before | {"max_iters": 121, "echo": 3.0, "init_from": "resume", "out_dir": str(copied_run)}
    with pytest.raises(SystemExit, match="--max_iters=121: the run in .* has done 121 steps; raise"):
        train(f"--out_dir={copied_run}", "--init_from=resume")


def test_numbers_that_are_not_finite_stop_the_run(copied_run):
    before = (copied_run / "ckpt.pt").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        train(f"--out_dir={copied_run}", "--init_from=resume", "--max_iters=140", "--log_interval=8",
              "--learning_rate=1e30", "--cooldown=0")
    assert re.match(r"error: step 12[23]: \w+ is (nan|inf).*--init_from=resume", stopped.value.code)
    assert (copied_run / "ckpt.pt").read_bytes() == before


# halves, and weights as a start

def equal(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_the_encoder_alone(tmp_path, capsys):
    out = tmp_path / "out"
    train(*TINY, "--max_iters=2", "--train_decoder=false", f"--out_dir={out}")
    assert (out / "taesd_encoder.pth").exists() and not (out / "taesd_decoder.pth").exists()
    assert not (out / "diffusers").exists() and not {"mse", "adversarial"} & records(out)[2].keys()
    assert "encoder_feature" not in records(out)[2]  # its decoder is noise
    script("sample.py", f"--out_dir={out}", "--device=cpu")
    table = capsys.readouterr().out.split("PSNR dB")[1]
    assert "teacher round trip" in table and "our encoder, teacher's decoder" in table and "our decoder" not in table


def test_the_decoder_alone(tiny_run, tmp_path):
    flags = [flag for flag in TINY if "width" not in flag]  # the run's is taken
    scope = train(*flags, "--max_iters=2", "--train_encoder=false", f"--init_from={tiny_run.out}",
                  f"--out_dir={tmp_path / 'out'}")
    before, after = (load(out / "taesd_encoder.pth") for out in (tiny_run.out, tmp_path / "out"))
    assert equal(before, after)  # frozen as it was loaded, and exported
    assert not equal(load(tiny_run.out / "taesd_decoder.pth"), load(tmp_path / "out" / "taesd_decoder.pth"))
    assert equal(before, scope.encoder.state_dict())


def test_the_encoder_learns_through_a_decoder_that_is_given(tiny_run, copied_run):
    train("--init_from=resume", "--train_decoder=false", "--max_iters=121", f"--out_dir={copied_run}")
    line = records(copied_run)[-2]
    assert line["encoder_feature"] > 0 and "mse" not in line
    assert equal(load(tiny_run.out / "taesd_decoder.pth"), load(copied_run / "taesd_decoder.pth"))


def test_a_term_that_is_newer_than_the_run_is_off(copied_run):
    checkpoint = load(copied_run / "ckpt.pt")
    del checkpoint["settings"]["encoder_feature_weight"]
    torch.save(checkpoint, copied_run / "ckpt.pt")
    train("--init_from=resume", "--max_iters=121", f"--out_dir={copied_run}")
    assert "encoder_feature" not in records(copied_run)[-2] and "mse" in records(copied_run)[-2]


def test_a_half_that_is_frozen_later(tiny_run, copied_run):
    train("--init_from=resume", "--train_encoder=false", "--max_iters=122", f"--out_dir={copied_run}")
    assert equal(load(tiny_run.out / "taesd_encoder.pth"), load(copied_run / "taesd_encoder.pth"))
    assert not equal(load(tiny_run.out / "taesd_decoder.pth"), load(copied_run / "taesd_decoder.pth"))


@pytest.mark.parametrize("source", ["", "taesd_encoder.pth", "taesd_decoder.pth", "diffusers"])
def test_weights_of_others_are_a_start(source, tiny_run, tmp_path):
    before = evaluations(tiny_run.out)[-1]["val_psnr"]
    train(*TINY, f"--data_dir={tiny_run.folder}", "--max_iters=1", "--learning_rate=1e-6",
          f"--init_from={tiny_run.out / source}", f"--out_dir={tmp_path / 'out'}")
    first, last = evaluations(tmp_path / "out")
    assert first["step"] == 0 and first["val_psnr"] == pytest.approx(before, abs=0.05)
    assert last["val_psnr"] == pytest.approx(before, abs=0.05)  # the average was not thrown away
    d = (load(out / "ckpt.pt")["discriminator"]["blocks.2.bias"] for out in (tiny_run.out, tmp_path / "out"))
    assert torch.allclose(*d, atol=2e-3) == (source == "")  # a run brings its discriminator


def test_a_run_brings_its_teacher_and_a_small_rate(tiny_run, tmp_path):
    shutil.copytree(HERE / "assets" / "toy_vae", tmp_path / "teacher")
    flags = "--max_iters=1", *TINY
    train(*flags, f"--teacher={tmp_path / 'teacher'}", f"--out_dir={tmp_path / 'first'}")
    train(*flags, f"--init_from={tmp_path / 'first'}", f"--out_dir={tmp_path / 'second'}")
    brought = records(tmp_path / "second")[0]["settings"]
    assert brought["teacher"] == str(tmp_path / "teacher") and brought["learning_rate"] == 1e-4


@needs_data
def test_released_weights_are_a_start(tmp_path):
    released, flags = DATA / "weights", [*TINY, "--width=64", "--window=0", "--batch_size=2", "--max_iters=2"]
    sana_vae().save_pretrained(tmp_path / "sana")
    train(*flags, f"--teacher={released / 'taef2_encoder.pth'}", f"--init_from={released / 'taef2_decoder.pth'}",
          f"--val_dir={DATA / 'val'}", f"--out_dir={tmp_path / 'flux2'}", "--eval_size=128")
    train(*flags, f"--teacher={tmp_path / 'sana'}", f"--init_from={released / 'taesana_encoder.pth'}",
          f"--out_dir={tmp_path / 'f32'}")
    first, *_, last = [line["val_psnr"] for line in evaluations(tmp_path / "flux2")]
    goal = records(tmp_path / "flux2")[0]["teacher"]["psnr"]
    assert first == pytest.approx(goal, abs=0.05) and last > first - 0.2
    before, after = load(released / "taesana_encoder.pth"), load(tmp_path / "f32" / "taesd_encoder.pth")
    assert before.keys() == after.keys()
    kept = list(before)[:-2]  # the last layer was solved: that VAE's weights are random
    assert all(0 < (before[key].float() - after[key]).abs().max() < 0.01 for key in kept)


# torch.compile, profile

@pytest.fixture
def small(tmp_path):
    """Flags of a run with small graphs: of few layers, for few pixels."""
    AutoencoderTiny(encoder_block_out_channels=(8,) * 3, decoder_block_out_channels=(8,) * 3,
                    num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1)).save_pretrained(tmp_path / "tiny")
    return [*TINY, "--max_iters=4", "--eval_interval=2", "--dtype=float32", "--crop=16", "--window=16",
            "--batch_size=2", "--eval_images=1", "--eval_size=32", f"--teacher={tmp_path / 'tiny'}"]


@pytest.mark.parametrize("scaling", ["none", "adaptive"])
def test_compiled_once(scaling, small, tmp_path, monkeypatch):
    """What torch.compile traces, without the minutes that its C++ takes."""
    counter, flags = CompileCounterWithBackend("aot_eager"), [*small, f"--adversarial_scaling={scaling}"]
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=True):  # restored afterwards
        train(*flags, "--compile=true", f"--out_dir={tmp_path / 'compiled'}")
    torch._dynamo.reset()
    # encoder, decoder, teacher; D judges with a gradient for its weights, for the fake, for neither; `features`
    # with one for the student's latents, and without
    assert counter.frame_count == 8
    sizes = [size for graph in counter.graphs for node in graph.graph.nodes if node.op == "placeholder"
             for size in getattr(node.meta["example_value"], "shape", [node.meta["example_value"]])]
    assert sizes and all(type(size) is int for size in sizes)  # none left open
    train(*flags, "--compile=false", f"--out_dir={tmp_path / 'eager'}")
    for ours, theirs in zip(records(tmp_path / "compiled")[1:], records(tmp_path / "eager")[1:], strict=True):
        for name in {"encoder", "encoder_feature", "mse", "lowres_mse", "adversarial", "matching", "discriminator",
                     "val_psnr"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_compiled(small, tmp_path):
    """The whole of torch.compile, for the encoder and its teacher."""
    process = start("train.py", *small, "--compile=true", "--train_decoder=false", f"--out_dir={tmp_path / 'out'}",
                    TORCH_LOGS="recompiles,dynamic")
    output, errors = process.communicate()
    assert process.returncode == 0 and "compile on" in output, errors
    assert "Recompiling function" not in errors and "create_symbol" not in errors, errors
    assert records(tmp_path / "out")[-1]["step"] == 4
