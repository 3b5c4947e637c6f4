"""Several processes by torchrun, with Gloo on the CPU."""
import signal
import time

import pytest
import torch

from conftest import TINY, load, records, run, start, train
from test_smoke import HERE

TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
FLAGS = *TINY, "--dtype=float32", "--workers=1"
# Each process runs train.py together with a weight of our own that differs between them, and saves what it ends with.
BOTH = """
import os, runpy, torch
from support import device, log
probe, setup_ddp = torch.nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last), device.setup_ddp
torch.nn.init.constant_(probe.weight, 5.0 + device.RANK)
device.setup_ddp = lambda module: setup_ddp(torch.nn.ModuleList([module, probe]))
log.leave = lambda: None  # go on here when train.py has ended
scope = runpy.run_path("train.py", run_name="__main__")
(probe.weight.sum() * (1 + 2 * device.RANK)).backward()
torch.save({"probe": probe.weight.detach(), "gradient": probe.weight.grad, "crops": scope["crop_pool"].images[:8],
            "random": torch.rand(4), "share": scope["batch_size"], "networks": scope["networks"].state_dict(),
            "any": [device.any_rank(device.RANK == 1), device.any_rank(False)]},
           os.path.join(os.environ["FOLDER"], f"{device.RANK}.pt"))
device.leave()
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The out_dir of three steps by two processes, and what each of them saved."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "both.py").write_text(BOTH)
    output = run(*TORCHRUN, folder / "both.py", *FLAGS, "--max_iters=3", "--learning_rate=1e-4",
                 f"--out_dir={folder / 'out'}", PYTHONPATH=str(HERE), FOLDER=str(folder))
    return folder / "out", output, load(folder / "0.pt"), load(folder / "1.pt")


def test_both_processes_have_the_same_weights_though_their_crops_differ(two):
    out, _, first, second = two
    assert not torch.equal(first["crops"], second["crops"]) and not torch.equal(first["random"], second["random"])
    for name, weight in first["networks"].items():
        assert torch.equal(weight, second["networks"][name]), name
    assert first["share"] == 2 and load(out / "ckpt.pt")["images_seen"] == 12


def test_weights_are_those_of_the_first_process_and_gradients_are_means(two):
    for saved in two[2:]:
        assert saved["probe"].unique().tolist() == [5]  # they were 5 and 6
        assert saved["gradient"].unique().tolist() == [2]  # the mean of 1 and 3
        assert saved["any"] == [True, False]


def test_only_the_first_process_reports_and_one_process_can_go_on(two):
    out, output, _, _ = two
    assert [line["step"] for line in records(out) if "data_wait" in line] == [1, 2, 3]
    assert output.count("goal ") == 1 and output.count("---") == 1
    assert train("--init_from=resume", "--max_iters=4", f"--out_dir={out}").images_seen == 16


def test_two_processes_stop_together(tmp_path):
    """torchrun passes Ctrl-C on. Whichever process sees it first, both stop after the same step, and it is saved."""
    log = tmp_path / "out" / "log.jsonl"
    process = start(*TORCHRUN, "train.py", *FLAGS, "--max_iters=100000", "--eval_interval=100000",
                    f"--out_dir={tmp_path / 'out'}")
    while process.poll() is None and not (log.exists() and '"data_wait"' in log.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert "stopped and saved at step" in output and errors.count("stopping after this step") == 2, errors
    assert load(tmp_path / "out" / "ckpt.pt")["step"] == records(tmp_path / "out")[-1]["step"]
