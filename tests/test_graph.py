"""CUDA graphs: what is recorded, when, and that it computes the same. Where there is no GPU, a stand-in for CUDA."""
import contextlib
from types import SimpleNamespace

import pytest
import torch

from conftest import records, train
from support import configure, graph
from test_smoke import TINY


@pytest.fixture
def cuda(monkeypatch):
    """In place of torch.cuda's graphs, one that can be recorded, unless it `fails`, and counts its replays."""
    seen = SimpleNamespace(recorded=0, replays=0, fails=False)

    class Graph:
        def replay(self):
            seen.replays += 1

    @contextlib.contextmanager
    def recording(graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"  # or threads that pin memory break it
        try:
            yield
        finally:
            if seen.fails:
                raise RuntimeError("operation failed due to a previous error during capture")
        seen.recorded += 1
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {"Stream": lambda: stream, "current_stream": lambda: stream, "CUDAGraph": Graph,
                        "stream": lambda stream: contextlib.nullcontext(), "graph": recording}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return seen


def test_recorded_after_the_warm_up_and_anew_for_other_shapes(cuda):
    calls = []
    replayed = graph.Replayed(lambda *inputs: calls.append(inputs) or len(calls))
    for n in range(graph.WARM_UP):
        assert replayed(torch.ones(2), 0.5) == n + 1 and not cuda.recorded
    for n in range(3):  # recorded once; then what it was recorded with is written to, and it is replayed
        assert replayed(torch.full((2,), n), 0.1 * n) == graph.WARM_UP + 1
        image, rate = calls[-1]
        assert torch.equal(image, torch.full((2,), float(n))) and rate == pytest.approx(0.1 * n)
    assert cuda.recorded == 1 and cuda.replays == 3 and len(calls) == graph.WARM_UP + 1
    for _ in range(graph.WARM_UP + 1):
        replayed(torch.ones(2), 0.5, torch.ones(1))
    assert cuda.recorded == 2 and cuda.replays == 4 and len(calls) == 2 * (graph.WARM_UP + 1)


def test_what_cannot_be_recorded_ends_the_run_with_one_line(cuda):
    def function(x):
        if replayed.calls > graph.WARM_UP:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")  # as .item() does
    replayed, cuda.fails = graph.Replayed(function), True
    for n in range(graph.WARM_UP):
        replayed(torch.ones(1))
    where = f"test_graph.py:{function.__code__.co_firstlineno + 2}: "
    with pytest.raises(SystemExit, match=where + r".* \(operation not permitted when stream is capturing\); --com"):
        replayed(torch.ones(1))


def test_out_of_memory_while_recording_is_told_as_anywhere(cuda):
    def function(x):
        if replayed.calls > graph.WARM_UP:
            raise torch.OutOfMemoryError("tried to allocate")
    replayed, cuda.fails = graph.Replayed(function), True
    for n in range(graph.WARM_UP):
        replayed(torch.ones(1))
    with pytest.raises(torch.OutOfMemoryError, match="tried to allocate"):
        replayed(torch.ones(1))


@pytest.mark.parametrize("device, compile, scales", [("cpu", "auto", False), ("cuda", "False", False),
                                                     ("cuda", "auto", True), ("cuda", "auto", False)])
def test_where_it_is_replayed(device, compile, scales, cuda):
    scaler, function = SimpleNamespace(is_enabled=lambda: scales), lambda: None
    found = graph.replayed(torch.device(device), compile, scaler)(function)
    assert (found is not function) == ((device, compile, scales) == ("cuda", "auto", False))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flags", [(), ("--optimizer=adam", "--latent_noise=0"), ("--optimizer=adamw",),
                                   ("--encoder_adversarial_weight=0.1", "--adversarial_scaling=adaptive"),
                                   ("--adversarial_start=8", "--adversarial_scaling=unit", "--l1_weight=1")])
def test_a_replayed_step_computes_the_same(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(configure, "pick_compile", lambda name, device: False)  # for it takes a minute
    common = [*TINY[1:], "--dtype=float32", "--max_iters=20", *flags]
    scope = train(*common, f"--out_dir={tmp_path / 'replayed'}")
    assert scope.train_step.graph is not None
    train("--init_from=resume", "--max_iters=30", f"--out_dir={tmp_path / 'replayed'}")  # optimizers come back
    train(*common, "--compile=false", f"--out_dir={tmp_path / 'called'}")
    train("--init_from=resume", "--max_iters=30", f"--out_dir={tmp_path / 'called'}")
    replayed, called = ([line for line in records(tmp_path / name) if "mse" in line] for name in ("replayed", "called"))
    assert len(replayed) == len(called) == 30
    for ours, theirs in zip(replayed, called):
        for name in theirs.keys() - {"images_per_second", "data_wait", "peak_memory_mb"}:
            assert ours[name] == pytest.approx(theirs[name], rel=0.02, abs=1e-4), (theirs["step"], name)
