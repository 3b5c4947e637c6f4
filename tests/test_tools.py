"""The programs in tools/, at tiny sizes."""
import runpy
import sys

import pytest
import torch

import model
from teacher import Teacher
from tools import bench


def tool(name, *arguments):
    """`python -m tools.name` in this process."""
    argv, sys.argv = sys.argv, [name, *map(str, arguments)]
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


def test_the_work_of_a_pass_is_counted():
    """A 3x3 convolution from 3 to 8 channels on 16x16 pixels, then a linear layer of each channel's 256 to 2."""
    network = torch.nn.Sequential(model.conv(3, 8), torch.nn.Flatten(2), torch.nn.Linear(256, 2))
    operations, traffic = bench.work(network, torch.rand(1, 3, 16, 16))
    assert operations == 2 * 16 * 16 * 8 * 27 + 2 * 8 * 2 * 256
    assert traffic == 2 * (3 * 256 + 8 * 256) + 2 * (8 * 256 + 8 * 2)
