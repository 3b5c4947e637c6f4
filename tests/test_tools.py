"""The programs in tools/, at tiny sizes."""
import math
import os
import runpy
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

import model
from teacher import Teacher
from test_smoke import TINY, run
from tools import bench_parts, bench_report, context, measures, study


def tool(name, *arguments):
    """`python -m tools.name` in this process."""
    argv, sys.argv = sys.argv, [name, *map(str, arguments)]
    sys.modules.pop(f"tools.{name}", None)
    try:
        runpy.run_module(f"tools.{name}", run_name="__main__")
    finally:
        sys.argv = argv


def test_train_vae(tmp_path, capsys):
    flags = "--factor=16", "--latent_channels=6", "--max_iters=3", "--batch_size=2", "--vae_width=8", "--crop=32"
    tool("train_vae", *flags, "--device=cpu", f"--out_dir={tmp_path / 'f16'}")
    teacher = Teacher(str(tmp_path / "f16"))
    assert (teacher.factor, teacher.latent_channels) == (16, 6)
    assert f"scaling_factor: {round(1 / teacher.std, 5)}" in capsys.readouterr().out
    mistakes = {"--factor=12": "power of two", "--crop=40": "multiple", "--vae_width=9": "multiple of 8"}
    for wrong, words in mistakes.items():
        with pytest.raises(SystemExit, match=words):
            tool("train_vae", "--factor=16", wrong, f"--out_dir={tmp_path / 'other'}")
    with pytest.raises(SystemExit, match="holds files already"):
        tool("train_vae", f"--out_dir={tmp_path / 'f16'}")


def test_time_crops(capsys):
    tool("time_crops", "--crop=32", "--seconds=0.1")
    assert "crops of 32 pixels a second, one thread" in capsys.readouterr().out


def test_tiles_lack_their_surroundings(capsys):
    squares = torch.rand(5, 3, 32, 32)
    local = context.by_tiles(lambda x: F.avg_pool2d(x, 8), squares, 4)
    assert torch.allclose(local, F.avg_pool2d(squares, 8), atol=1e-6)  # in their place, and nothing is lost
    means = context.by_tiles(lambda x: x - x.mean((2, 3), keepdim=True), squares, 2)
    assert torch.allclose(means[:, :, :16, 16:].mean((2, 3)), torch.zeros(5, 3), atol=1e-6)
    tool("context", "--count=1", "--size=64", "--device=cpu")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("tiles of")]
    assert [int(row[2]) for row in rows] == [64, 32] and float(rows[0][8]) == 0 < float(rows[1][8])
    with pytest.raises(SystemExit, match="--size=72: must be 32 or more and a multiple of 16"):
        tool("context", "--size=72")


def test_a_row_is_made_once(tmp_path, capfd):
    flags = *TINY, "--teacher=toy", "--data_dir=", "--val_dir=", "--max_iters=2", "--eval_interval=1"
    command = f"--out_dir={tmp_path}", "--rows=l1", "--seeds=3", f"--flags={' '.join(flags)}"
    tool("study", *command)
    output = capfd.readouterr().out
    assert "step 2/2" in output and "encoder_feature" not in output  # the row's own flag
    row = output.splitlines()[-1]
    assert row.startswith("| l1 | ") and len([*filter(None, row.split("|"))]) == 11 and "±" not in row
    tool("study", *command)
    assert (again := capfd.readouterr().out).splitlines()[-1] == row and "step 2/2" not in again
    with pytest.raises(SystemExit, match="--rows=l2: must be of track, "):
        tool("study", "--rows=l2")
    with pytest.raises(SystemExit, match="--seeds=0;1: must be whole numbers"):
        tool("study", "--seeds=0;1")


def test_rows_and_finish_lines():
    assert study.cell([1.0, 3.0, 2.0]) == "2.00 ± 1.00" and study.cell([0.0123]) == "0.0123"
    assert study.cell([math.nan, 30.0]) == "30.00 (1 of 2)" and study.cell([math.nan]) == ""
    reached = {"val_psnr": 23.8, "val_ssim": 0.77, "val_sharpness": 0.45, "images_per_second": 10.0}
    records = [reached | {"images_seen": 6000, "val_ssim": 0.76}, reached | {"images_seen": 12000}]
    assert study.finish(records, "A") == 20 and math.isnan(study.finish(records, "B"))


def test_the_work_of_a_pass_is_counted():
    """A 3x3 convolution from 3 to 8 channels on 16x16 pixels, then a linear layer of each channel's 256 to 2."""
    network = torch.nn.Sequential(model.conv(3, 8), torch.nn.Flatten(2), torch.nn.Linear(256, 2))
    operations, traffic = measures.work(network, torch.rand(1, 3, 16, 16))
    assert operations == 2 * 16 * 16 * 8 * 27 + 2 * 8 * 2 * 256
    assert traffic == 2 * (3 * 256 + 8 * 256) + 2 * (8 * 256 + 8 * 2)


# the report

def test_a_report_of_this_machine(tmp_path):
    """From end to end at a tiny size: every part is there and none failed; pictures and logs stay, runs do not."""
    output = run("-m", "tools.bench", f"--report={tmp_path / 'here.md'}", "--teacher=toy", "--shapes=2x16",
                 "--memory_shapes=2x16", "--pairs=1", "--steps=5", "--warm_up=2", "--train_minutes=0.02",
                 "--device=cpu")
    text = (tmp_path / "here.md").read_text(encoding="utf-8")
    assert text.count("\n## ") == len(bench_parts.PARTS) and "failed" not in text + output
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert [float(row[2]) > 0 for row in rows if row[1] in ("reference", "not compiled", "float32, not compiled")
            ] == [True] * 3
    memory = next(row for row in rows if len(row) == 3 and row[0] == "2 x 16")
    assert int(memory[1]) > int(memory[2]) > 20  # MB; estimated: weights, averages and optimizers alone take 50
    assert "| 0.0e+00 | 0.0e+00 |" in text  # a resumed run's losses are those of the run itself
    assert {"samples.png", "curves.png"} < {path.name for path in (tmp_path / "here").iterdir() if path.is_file()}
    assert not [path for path in (tmp_path / "here").iterdir() if path.is_dir()]


def test_a_part_that_fails_is_one_line(tmp_path):
    options = {"files": str(tmp_path), "device": "cuda:99"}
    found, worked = bench_report.run_part("machine", options, 600)
    assert not worked and found.startswith("**failed: error: --device=cuda:99: cannot be used here")
    found, worked = bench_report.run_part("machine", options, 0.1)
    assert not worked and found == "**failed: not done after 0 s**"
    with pytest.raises(SystemExit, match="--parts=speed,machines: must be of machine, "):
        bench_report.write_report(str(tmp_path / "x.md"), {}, 1, "speed,machines")
    with pytest.raises(SystemExit, match="--shapes=32: must be batch x crop, or several"):
        bench_report.parse_shapes("shapes", "32")


def test_waits_are_counted(tmp_path, monkeypatch):
    """At the line that waits, in the steps that are looked at and in no other; what else is warned of is no wait."""
    modes = ["default"]

    def told(self, terms):
        if modes[-1] == "warn":
            warnings.warn("called a synchronizing CUDA operation")
            warnings.warn("is deprecated")
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(measures.Report, "add", told)
    monkeypatch.setattr(measures.Report, "means", lambda self: None)
    for name in ("excepthook", "stdout"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    found = measures.count_waits(str(tmp_path / "out"), "toy", "", 16, 2, 3, 2, "cpu")
    assert [*found.values()] == [3] and [*found][0].startswith("tests" + os.sep + "test_tools.py:")
    assert modes[1:] == ["default"] + ["warn"] * 3 + ["default"] * 6
