"""What the tests share with test_smoke.py: commands, one short run, and where the real test data is.

The real images and released weights are looked for in $TAESD_TEST_DATA; what needs them is skipped where they are not.
"""
import os
import runpy
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model
from support import report
from test_smoke import HERE, TINY, records, stepped, tiny_run, train  # two of them fixtures

DATA = Path(os.environ.get("TAESD_TEST_DATA") or "TAESD_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="TAESD_TEST_DATA names no folder of test images and weights")

torch.set_num_threads(1)  # as test_smoke.py says to the processes that it starts


@pytest.fixture(autouse=True)
def seeded():
    """No test depends on which ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def no_curves():
    """They take a second each; test_report.py draws some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_curves", lambda out_dirs, path: None)
        yield


@pytest.fixture
def copied_run(tiny_run, tmp_path):
    """A copy of the short run's out_dir, to be written to."""
    return shutil.copytree(tiny_run.out, tmp_path / "copied")


def script(name, *arguments):
    """`python sample.py` and the like in this process, which saves the seconds of their imports."""
    argv = sys.argv
    sys.argv = [name, *map(str, arguments)]
    try:
        runpy.run_path(str(HERE / name), run_name="__main__")
    finally:
        sys.argv = argv


def load(path):
    return torch.load(path, weights_only=True)


def evaluations(out_dir):
    return [line for line in records(out_dir) if "val_psnr" in line]


def first_step(out_dir, monkeypatch, *flags, steps=1):
    """Runs so many steps of train.py. Its globals after them; the networks before, in `before`; what D was shown and
    its scores, four a step, in `seen`; the terms of the last step."""
    seen, forward = [], model.Discriminator.forward

    def recorded(self, image, latent):
        scores, activations = forward(self, image, latent)
        seen.append((image.detach().clone(), latent.detach().clone(), scores.detach().clone()))
        return scores, activations
    with monkeypatch.context() as patch:
        patch.setattr(model.Discriminator, "forward", recorded)
        after = train(*TINY, "--dtype=float32", f"--max_iters={steps}", f"--out_dir={out_dir}", *flags)
    torch.manual_seed(0)
    before = model.Encoder(4, 8, 16), model.Decoder(4, 8, 16), model.Discriminator(4)
    terms = [line for line in records(out_dir) if "data_wait" in line][-1]
    return types.SimpleNamespace(after=after, before=before, seen=seen, terms=terms)


def random_images(n=2):
    """n of noise, [1,3,H,W] in [0,1]: textured, for on flat areas GroupNorm magnifies rounding."""
    rng = np.random.default_rng(0)
    for i in range(n):
        yield torch.from_numpy(rng.random((1, 3, 64, 64 + 32 * i), dtype=np.float32))


def real_images(n):
    """The first n held-out images, from the top left to multiples of 8."""
    for path in sorted((DATA / "val").iterdir())[:n]:
        image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None] / 255
        yield image[..., :image.shape[-2] // 8 * 8, :image.shape[-1] // 8 * 8]


def plain_taesd(width, channels, norm=False):
    """taesd.py's layout in plain torch, written without looking at model.py's classes; norm: TAEF2's."""
    class B(nn.Module):
        def __init__(self, norm=False):
            super().__init__()
            c = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
            self.conv = nn.Sequential(c[0], nn.ReLU(), c[1], nn.ReLU(), c[2])
            wide = 4 * width
            self.pool = nn.Sequential(nn.Conv2d(width, wide, 1, bias=False), nn.GroupNorm(4, wide),
                                      nn.ReLU(), nn.Conv2d(wide, width, 1, bias=False)) if norm else None

        def forward(self, x):
            x = x if self.pool is None else x + self.pool(x)
            return (self.conv(x) + x).relu()

    class C(nn.Module):
        def forward(self, x):
            return (x / 3).tanh() * 3

    def down(norm=False):
        return nn.Conv2d(width, width, 3, 2, 1, bias=False), B(norm), B(norm), B(norm)

    def up(norm=False):
        return B(norm), B(norm), B(norm), nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, 1, 1, bias=False)
    encoder = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), B(), *down(), *down(), *down(norm),
                            nn.Conv2d(width, channels, 3, 1, 1))
    decoder = nn.Sequential(C(), nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU(), *up(norm), *up(), *up(), B(),
                            nn.Conv2d(width, 3, 3, 1, 1))
    return {"encoder": encoder, "decoder": decoder}
