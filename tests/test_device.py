"""CUDA graphs and torch.compile. Where there is no GPU, a stand-in takes the place of CUDA."""
import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import TINY, records, train
from support import device
from support.device import WARM_UP, CudaGraphed

STEPS = [(), ("--optimizer=adam", "--adversarial_scaling=unit", "--encoder_adversarial_weight=1"),
         ("--optimizer=adamw", "--adversarial_scaling=adaptive", "--frequency_weight=1", "--adversarial_start=1")]


@pytest.fixture
def cuda(monkeypatch):
    """In the place of CUDA's graphs, one that counts recordings and replays. Recording fails if `fails` is set."""
    seen = SimpleNamespace(recorded=0, replays=[], fails=False)
    stream = SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def recording(graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"  # otherwise threads that pin memory would end the recording
        try:
            yield
        finally:
            if seen.fails:
                raise RuntimeError("operation failed due to a previous error during capture")
        seen.recorded += 1
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: seen.replays.append(1)))
    monkeypatch.setattr(torch.cuda, "graph", recording)
    return seen


def test_a_step_is_recorded_after_the_warm_up_and_again_for_other_shapes(cuda):
    calls = []
    graphed = CudaGraphed(lambda *inputs: calls.append(inputs) or len(calls))
    for n in range(WARM_UP):
        assert graphed(torch.ones(2), 0.5) == n + 1 and not cuda.recorded
    for n in range(3):  # it is recorded once; later calls write into the tensors that it was recorded with
        assert graphed(torch.full((2,), n), 0.1 * n) == WARM_UP + 1
        image, rate = calls[-1]
        assert image.tolist() == [n, n] and rate == pytest.approx(0.1 * n)
    assert cuda.recorded == 1 and len(cuda.replays) == 3
    for _ in range(WARM_UP + 1):  # two kinds of calls in turns have a recording each
        graphed(torch.ones(2), 0.5, torch.ones(1))
        graphed(torch.ones(2), 0.5)
    assert cuda.recorded == 2 and len(cuda.replays) == 3 + 1 + 6 and len(calls) == 2 * (WARM_UP + 1)


@pytest.mark.parametrize("error, ending, words", [
    (RuntimeError("forbidden\nwhen capturing"), SystemExit, "test_device.py:[0-9]+: .*forbidden when capturing"),
    (torch.OutOfMemoryError("tried to allocate"), torch.OutOfMemoryError, "tried to allocate")])
def test_an_error_while_recording_is_one_line_that_names_the_place(error, ending, words, cuda):
    def function(x):
        if len(calls) == WARM_UP:
            raise error
        calls.append(x)
    graphed, calls, cuda.fails = CudaGraphed(function), [], True
    for _ in range(WARM_UP):
        graphed(torch.ones(1))
    with pytest.raises(ending, match=words):
        graphed(torch.ones(1))


@pytest.mark.parametrize("kind, compile, scales, ranks, recorded", [
    ("cpu", "auto", False, 1, False), ("cuda", "False", False, 1, False), ("cuda", "auto", True, 1, False),
    ("cuda", "auto", False, 2, False), ("cuda", "auto", False, 1, True)])
def test_when_a_step_is_recorded(kind, compile, scales, ranks, recorded, cuda, monkeypatch):
    monkeypatch.setattr(device, "RANKS", ranks)
    scaler = SimpleNamespace(is_enabled=lambda: scales)
    assert (device.cuda_graphed(torch.device(kind), compile, scaler)(len) is not len) == recorded


class NoValueIsAskedFor(TorchDispatchMode):
    """Fails where a GPU would have to wait, or could not record: at .item(), `if tensor` and tensor[mask]."""
    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function._schema.name.removeprefix("aten::")
        if name == "index":
            assert not [x for x in arguments[1] if x is not None and x.dtype == torch.bool]
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select")
        return function(*arguments, **named or {})


@pytest.mark.parametrize("flags", STEPS)
def test_nothing_in_a_step_asks_for_the_value_of_a_tensor(flags, tmp_path):
    scope = train(*TINY, *flags, "--max_iters=2", f"--out_dir={tmp_path}")
    pairs = scope.crop_pool.sample(4), scope.replay_buffer.sample(2)
    with NoValueIsAskedFor():
        _, fake, latent = scope.train_step(*pairs[0], torch.tensor(0.5), *pairs[1])
        scope.replay_buffer.add(fake, latent)
        scope.replay_buffer.sample(2)


def assert_same_losses(out_dir, other_dir, tolerance):
    for ours, theirs in zip(records(out_dir), records(other_dir), strict=True):
        for name in theirs.keys() & {"encoder", "encoder_feature", "mse", "adversarial", "discriminator", "val_psnr"}:
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=1e-4), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flags", STEPS)
def test_a_recorded_step_computes_the_same(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "pick_compile", lambda name, device: False)  # compiling takes a minute
    for compile in "auto", "false":
        out = tmp_path / compile
        train(*TINY[1:], *flags, "--dtype=float32", "--max_iters=15", f"--compile={compile}", f"--out_dir={out}")
        scope = train("--init_from=resume", "--max_iters=25", f"--out_dir={out}")
        recordings = getattr(scope.train_step, "recordings", {}).values()
        assert any(recording.graph for recording in recordings) == (compile == "auto")
    assert_same_losses(tmp_path / "auto", tmp_path / "false", 0.02)


@pytest.mark.parametrize("error, works", [(None, True), (RuntimeError("Failed to find C compiler.\nSet CC"), False)])
def test_without_a_compiler_networks_are_not_compiled(error, works, monkeypatch, capsys):
    def compiled(x):
        if error:
            raise error
    monkeypatch.setattr(torch, "compile", lambda function: compiled)
    monkeypatch.setattr(torch, "zeros", lambda *arguments, **named: None)
    assert device.pick_compile("auto", torch.device("cuda")) == works
    assert capsys.readouterr().out.count("\n") == (not works)
    assert not device.pick_compile("auto", torch.device("cpu")) and device.pick_compile("true", torch.device("cpu"))
