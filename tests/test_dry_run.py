"""train.py's loop on the meta device, and forks of it that would fail or wait on a GPU."""
import sys

import pytest
import torch

from conftest import TINY
from test_smoke import HERE
from tools.dry_run import META, Autocast, OneDevice, dry_run


@pytest.fixture
def run_dry(tmp_path, monkeypatch):
    """run_dry(line, other): train.py for some steps, with one line replaced. Gives the bytes that it held."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # train.py sets its own

    def run(line="", other="", *flags):
        source = (HERE / "train.py").read_text(encoding="utf-8")
        assert line in source
        fork = tmp_path / "fork.py"
        fork.write_text(source.replace(line, other, 1) if line else source, encoding="utf-8")
        return dry_run(*TINY, "--dtype=bfloat16", "--max_iters=6", f"--out_dir={tmp_path / 'out'}", *flags,
                       script=str(fork))
    return run


def test_the_loop_stays_on_its_device_and_does_not_wait(run_dry):
    weights = 4 * (2 * 77540 + 1281445)  # width 16; pool 256 and replay 64 of 32x32 pixels and their latents
    assert run_dry() > 3 * weights + (256 + 64) * (3 * 32 * 32 + 2 * 4 * 4 * 4)
    run_dry("", "", "--encoder_adversarial_weight=0.1", "--adversarial_scaling=unit", "--frequency_weight=1")


LAST = "    descend(student_optimizer, loss, rate * learning_rate)\n"


@pytest.mark.parametrize("line, other, message", [
    ("+ torch.rand(self.filled, device=device)", "+ torch.rand(self.filled)", "meta"),  # a tensor of the CPU
    ("torch.randperm(self.filled, device=device)", "torch.randperm(self.filled)", "tensors on cpu and meta"),
    (LAST, LAST + "    print(loss.item())\n", "item.. cannot be called"),
    (LAST, "    if loss > 100:\n        loss = loss / 2\n" + LAST, "meta"),
    (LAST, "    fake[fake > 1] = real[fake > 1]\n" + LAST, "how many are true"),
    (LAST, "    terms['count'] = torch.tensor(1.0)\n" + LAST, "meta"),
    (LAST, "    loss_now = loss.to('cpu')\n" + LAST, "meta")])
def test_what_a_gpu_would_refuse_or_wait_for(line, other, message, run_dry):
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        run_dry(line, other)


def test_bytes_are_counted():
    with OneDevice() as held:
        first = torch.zeros(1000, device=META)
        second = first * 2
        del first
        third = second[:500]  # a view takes nothing
        second.add_(1)
        assert (held.now, held.peak) == (4000, 8000) and len(third) == 500
        del second, third
    assert (held.now, held.peak) == (0, 8000)


def test_autocast_is_that_of_torch():
    """Types of results, of gradients, and of what is not a layer: as by torch.autocast on the CPU."""
    layer, norm, x = torch.nn.Conv2d(4, 4, 3), torch.nn.GroupNorm(2, 4), torch.rand(1, 4, 8, 8)
    for autocast in (Autocast, torch.autocast):
        with autocast("cpu", torch.bfloat16):
            y = layer(x)
            z = norm(y)
        z.float().sum().backward()
        assert (y.dtype, (y + x[..., 2:, 2:]).dtype, layer.weight.grad.dtype) == (
            torch.bfloat16, torch.float32, torch.float32)
    with Autocast("cpu", torch.bfloat16, enabled=False):
        assert layer(x).dtype == torch.float32
