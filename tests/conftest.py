"""What the tests share with test_smoke.py. Tests that need real images and released weights look for them in the folder
$TAESD_TEST_DATA and are skipped without it."""
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model
from test_smoke import HERE, TINY, records, run, script, start, stepped, tiny_run, train, train_and_record

DATA = Path(os.environ.get("TAESD_TEST_DATA") or "TAESD_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="TAESD_TEST_DATA names no folder of test images and weights")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """No test depends on which test ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def copied_run(tiny_run, tmp_path):
    """A copy of the short run's out_dir, which may be written to."""
    return shutil.copytree(tiny_run.out, tmp_path / "copied")


def load(path):
    return torch.load(path, weights_only=True)


def evaluations(out_dir):
    return [line for line in records(out_dir) if "val_psnr" in line]


def random_images(n=2):
    """n images of noise, [1,3,H,W] in [0,1]. They have no flat areas, on which GroupNorm would magnify rounding."""
    rng = np.random.default_rng(0)
    for i in range(n):
        yield torch.from_numpy(rng.random((1, 3, 64, 64 + 32 * i), dtype=np.float32))


def real_images(n):
    """The first n held-out images, cropped at the right and bottom so that their sides are multiples of 8."""
    for path in sorted((DATA / "val").iterdir())[:n]:
        image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None] / 255
        yield image[..., :image.shape[-2] // 8 * 8, :image.shape[-1] // 8 * 8]


def first_step(out_dir, *flags, steps=1):
    """Train for so many steps. Returns train.py's globals, `after`; encoder, decoder and discriminator `before`; what D
    was shown and its scores, four a step, `seen`; and the last step's `losses`."""
    after, seen = train_and_record(f"--max_iters={steps}", f"--out_dir={out_dir}", *flags)
    torch.manual_seed(0)
    before = model.Encoder(width=8), model.Decoder(width=8), model.Discriminator()
    losses = [line for line in records(out_dir) if "data_wait" in line][-1]
    return SimpleNamespace(after=after, before=before, seen=seen, losses=losses)


def students(variant, channels=4, factor=8, width=8):
    """({"encoder": network, "decoder": network}, their arguments). Noise is added to all weights, because some branches
    start at zero."""
    shape = {"latent_channels": channels, "factor": factor, "width": width, "variant": variant}
    networks = {"encoder": model.Encoder(**shape).eval(), "decoder": model.Decoder(**shape).eval()}
    with torch.no_grad():
        for network in networks.values():
            for weight in network.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
    return networks, shape


def plain_taesd(width, channels, norm=False):
    """taesd.py's layout in plain PyTorch, written without looking at model.py. norm: with the GroupNorm of TAEF2."""
    class Block(nn.Module):
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

    class Clamp(nn.Module):
        def forward(self, x):
            return (x / 3).tanh() * 3

    def down(norm=False):
        return nn.Conv2d(width, width, 3, 2, 1, bias=False), Block(norm), Block(norm), Block(norm)

    def up(norm=False):
        convolution = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        return Block(norm), Block(norm), Block(norm), nn.Upsample(scale_factor=2), convolution
    encoder = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), Block(), *down(), *down(), *down(norm),
                            nn.Conv2d(width, channels, 3, 1, 1))
    decoder = nn.Sequential(Clamp(), nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU(), *up(norm), *up(), *up(), Block(),
                            nn.Conv2d(width, 3, 3, 1, 1))
    return {"encoder": encoder, "decoder": decoder}
