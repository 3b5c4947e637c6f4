"""The programs in tools/, at tiny sizes."""
import re

import pytest
import torch

import model
from conftest import script
from data import Images
from teacher import Teacher
from test_smoke import HERE
from tools import bench

TINY_BENCH = ("tools/bench.py", "--teacher=toy", "--device=cpu", "--crop=32", "--batch_size=2", "--steps=2",
              "--warm_up=2", "--extra=--width=8 --window=32")


def test_train_vae_makes_a_teacher(tmp_path, capsys):
    flags = "--factor=16", "--latent_channels=6", "--max_iters=3", "--batch_size=2", "--vae_width=8", "--crop=32"
    script("tools/train_vae.py", *flags, "--device=cpu", f"--out_dir={tmp_path / 'f16'}")
    teacher = Teacher(str(tmp_path / "f16"))
    assert (teacher.factor, teacher.latent_channels) == (16, 6)
    assert f"scaling_factor: {round(1 / teacher.std, 5)}" in capsys.readouterr().out
    latents = teacher.encode(Images().held_out(6, 32) / 255)
    assert 0.5 < latents.std() < 2


@pytest.mark.parametrize("flag, words", [
    ("--factor=12", "power of two"), ("--crop=40", "multiple of the factor"), ("--vae_width=9", "multiple of 8"),
    ("--out_dir=.", "choose a new folder")])
def test_mistakes_of_train_vae(flag, words, tmp_path):
    with pytest.raises(SystemExit, match=words):
        script("tools/train_vae.py", "--factor=16", f"--out_dir={tmp_path / 'other'}", flag)


def test_bench_compares_the_speeds_and_adds_up_the_lower_bound(monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    script(*TINY_BENCH, "--pairs=1")
    output = capsys.readouterr().out
    median = re.search(r"median: train.py (.*) images/s, reference (.*), ratio (.*)", output)
    ours, theirs, ratio = map(float, median.groups())
    assert ratio == pytest.approx(ours / theirs, rel=0.05) and "--finish=0" in bench.train_flags("toy", "out", 9, 9)
    parts = re.findall(r"^(\w+) +([\d.]+) G operations +([\d.]+) GB +([\d.]+) ms", output, re.MULTILINE)
    assert [name for name, *_ in parts] == ["teacher", "encoder", "features", "decoder", "discriminator"]
    step, bound = map(float, re.search(r"takes ([\d.]+) ms and the lower bound is ([\d.]+) ms", output).groups())
    assert sum(float(milliseconds) for *_, milliseconds in parts) == pytest.approx(bound, abs=0.1)
    assert step == pytest.approx(1000 * 2 / ours, rel=0.01)


def test_bench_profiles_a_training_step(monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    script(*TINY_BENCH, "--profile")
    output = capsys.readouterr().out
    total = float(re.search(r"a training step takes ([\d.]+) ms", output).group(1))
    kinds = re.findall(r"^([a-z, ]+?) +(-?[\d.]+) ms +-?\d+%", output, re.MULTILINE)
    assert sum(float(milliseconds) for _, milliseconds in kinds) == pytest.approx(total, rel=0.02)
    assert {"convolution, forward", "convolution, both gradients", "matrix products"} <= {kind for kind, _ in kinds}


def test_the_work_of_a_forward_pass_is_counted():
    """A 3x3 convolution from 3 to 8 channels on 16x16 pixels, and a linear layer from 256 pixels of a channel to 2."""
    network = torch.nn.Sequential(model.conv(3, 8), torch.nn.Flatten(2), torch.nn.Linear(256, 2))
    operations, traffic = bench.count_work(network, torch.rand(1, 3, 16, 16))
    assert operations == 2 * 16 * 16 * 8 * 27 + 2 * 8 * 2 * 256
    assert traffic == 2 * (3 * 256 + 8 * 256) + 2 * (8 * 256 + 8 * 2)
