"""Where there is no GPU: train.py's own loop on torch's meta device, whose tensors have shapes and types, no numbers.
It stops with the line that would mix tensors of two devices, or make the CPU wait for the GPU in every step; where
there is none it says how much memory the tensors take. Evaluations and saves are not run, nor are starts from other
weights; a copy from memory that is not pinned is not seen.

    python -m tools.dry_run --batch_size=16 --crop=256     # any of train.py's settings
"""
import os
import runpy
import sys
import tempfile
import weakref
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
import support.configure
import support.report
import support.run

SCRIPT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "train.py")
META = torch.device("meta")
SCALER = torch.amp.GradScaler("cpu", enabled=False)  # one that is on waits for its GPU in every step


class OneDevice(TorchDispatchMode):
    """Counts the bytes that tensors on the meta device hold, `now` and at most, `peak`; operations on tensors of two
    devices are errors, as on a GPU, but for copies. A tensor of one number may be anywhere."""
    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        tensors = [x for x in tree_leaves((arguments, keywords)) if isinstance(x, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.ndim}
        if len(devices) > 1 and "copy" not in function.__name__:
            raise RuntimeError(f"{function}: tensors on {' and '.join(sorted(devices))}")
        if "index" in function.__name__ and any(tensor.dtype == torch.bool for tensor in tensors):
            raise RuntimeError(f"{function}: the GPU must tell how many are true")
        results = function(*arguments, **keywords or {})
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and tensor.device == META:
                self.count(tensor.untyped_storage())
        return results

    def count(self, storage):
        def free(key, size):
            self.alive.discard(key)
            self.now -= size
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            weakref.finalize(storage, free, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)


class Autocast(TorchFunctionMode):
    """What torch.autocast does to the layers used here; it does not know the meta device."""
    def __init__(self, device_type, dtype, enabled=True):
        super().__init__()
        self.types = {"conv2d": dtype, "linear": dtype, "group_norm": torch.float32} if enabled else {}

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        dtype = self.types.get(getattr(function, "__name__", ""))
        if dtype:
            arguments = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in arguments]
        return function(*arguments, **keywords or {})


class Silent:
    """In place of Report, and of HeldOut: what they do with numbers is done once in many steps, but for `add`."""
    waited, about = 0.0, ""

    def __init__(self, *arguments):
        pass

    def nothing(self, *arguments, **keywords):
        return {}
    means = draw = end = evaluation = evaluate = nothing

    def add(self, terms):
        torch.stack(list(terms.values()))


def dry_run(*flags, script=SCRIPT):
    """Run train.py, or a fork, with these flags. Returns the largest memory of its tensors, in bytes."""
    def unfused(kind):
        return lambda *arguments, **keywords: kind(*arguments, **keywords | {"fused": False, "foreach": True})
    with mock.patch.multiple(torch.optim, Adam=unfused(torch.optim.Adam), AdamW=unfused(torch.optim.AdamW)), \
            mock.patch.multiple(support.report, Report=Silent, Interrupt=bool), \
            mock.patch.object(support.configure, "pick_device", lambda name: META), \
            mock.patch.object(support.run, "save_run", lambda *arguments: None), \
            mock.patch.object(sample, "HeldOut", Silent), mock.patch.object(torch, "autocast", Autocast), \
            mock.patch.object(torch.amp, "GradScaler", lambda *arguments, **keywords: SCALER), \
            mock.patch.object(sys, "argv", [script, *flags]), OneDevice() as held:
        runpy.run_path(script, run_name="__main__")
    return held.peak


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:  # to which nothing is written; after 40 steps the pool is full
        peak = dry_run("--dtype=bfloat16", *sys.argv[1:], "--max_iters=40", "--adversarial_start=0",
                       "--init_from=scratch", f"--out_dir={folder}")
    print(f"found no tensors of two devices, no waiting; tensors take up to {peak / 2**20:,.0f} MB; what a GPU's "
          f"libraries work in, and evaluations, come on top")
