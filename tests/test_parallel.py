"""Several processes by torchrun, with Gloo on the CPU."""
import shutil
import signal
import time

import pytest
import torch

import model
from conftest import TINY, load
from support import run as rules
from test_smoke import HERE, records, run, start, train

TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
FLAGS = *TINY, "--dtype=float32", "--workers=1"
FORK = {  # of train.py: batches that are given, and double precision, for rounding, magnified, hides errors
    "    real, latent = get_batch()\n": """    given = torch.Generator().manual_seed(progress.step)
    real, latent = (torch.rand(4, *shape, generator=given).double()[RANK::RANKS] for shape in pair_shapes)
""",
    "# the loop, and a step of it\n": """
for network in networks.values():
    network.double()
HeldOut.evaluate = lambda *arguments: {}  # its images are of single precision
""",
    " / real.abs().mean()": "",  # which is that of a process's share
    ".float()": ".double()"}


def test_two_processes_learn_what_one_does(tmp_path):
    """4 crops in one process or 2 in each of two: the same weights after 20 steps."""
    source, fork = (HERE / "train.py").read_text(encoding="utf-8"), tmp_path / "fork.py"
    for line, other in FORK.items():
        assert line in source
        source = source.replace(line, other)
    fork.write_text(source, encoding="utf-8")
    flags = *FLAGS, "--max_iters=20", "--eval_interval=20", "--replay_size=0"
    run(*TORCHRUN, fork, *flags, f"--out_dir={tmp_path / 'two'}", PYTHONPATH=str(HERE))
    run(fork, *flags, f"--out_dir={tmp_path / 'one'}", PYTHONPATH=str(HERE))
    one, two = (load(tmp_path / name / "ckpt.pt") for name in ("one", "two"))
    assert one["images_seen"] == two["images_seen"] == 80
    for network in ("encoder", "decoder", "discriminator", "ema_encoder", "ema_decoder"):
        for name, weight in one[network].items():
            torch.testing.assert_close(two[network][name], weight, atol=1e-6, rtol=0)  # Muon rounds
    torch.manual_seed(0)
    for half, start_of in (("encoder", model.Encoder(4, 8, 16)), ("decoder", model.Decoder(4, 8, 16))):
        for name, weight in start_of.state_dict().items():  # the averages have moved with the weights
            assert (one[f"ema_{half}"][name] - weight).abs().max() > 1e-4, name


def test_gradients_are_means_and_weights_the_first_ones(tmp_path):
    """Of processes that differ in both; random numbers differ after it."""
    (tmp_path / "meet.py").write_text("""
import torch
from support.parallel import RANK, anywhere, average_gradients, gather, join, leave
torch.manual_seed(RANK)
layer, before = torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last), torch.rand(1)
join({"layer": layer}, {"init_from": "scratch", "seed": 0})
optimizer = torch.optim.SGD(layer.parameters(), 1.0)
layer.weight.grad, layer.bias.grad = torch.full_like(layer.weight, 1.0 + RANK), torch.arange(3.0) * (1 - RANK)
average_gradients(optimizer)
assert (layer.weight.grad == 1.5).all() and layer.bias.grad.tolist() == [0, 0.5, 1]
states = gather({"weight": layer.weight.detach(), "draw": torch.rand(1), "before": before})
if RANK == 0:
    assert torch.equal(states[0]["weight"], states[1]["weight"]) and states[0]["draw"] != states[1]["draw"]
    torch.manual_seed(0)
    assert torch.equal(states[0]["weight"], torch.nn.Conv2d(2, 3, 3).weight)
assert anywhere(RANK == 1) and not anywhere(False)
print("met")
leave()
""")
    assert run(*TORCHRUN, tmp_path / "meet.py", PYTHONPATH=str(HERE)) == "met\n"


def test_two_processes_start_from_a_donor(tmp_path):
    output = run(*TORCHRUN, "train.py", *TINY[:3], "--eval_images=2", "--eval_size=64", "--init_from=donor",
                 "--max_iters=0", f"--out_dir={tmp_path / 'out'}")
    assert output.count("donor ") == 1 and (tmp_path / "out" / "taesd_decoder.pth").exists()


def test_two_processes_resume_exactly(tmp_path, capsys):
    """Losses after a resume are those of the run that was not stopped; each process has crops of its own. One process
    that goes on says what is lost."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(*TORCHRUN, "train.py", *FLAGS, "--max_iters=6", "--eval_interval=3", f"--out_dir={straight}")
    resumed.mkdir()
    shutil.copy(straight / "ckpt_previous.pt", resumed / "ckpt.pt")
    first, second = load(resumed / "ckpt.pt")["processes"]
    assert not torch.equal(first["pool"]["images"], second["pool"]["images"])
    assert not torch.equal(first["rng"], second["rng"])
    run(*TORCHRUN, "train.py", "--init_from=resume", f"--out_dir={resumed}")
    losses = [[line for line in records(out) if "discriminator" in line][-3:] for out in (straight, resumed)]
    for one, other in zip(*losses):
        for term in ("step", "encoder", "mse", "lowres_mse", "discriminator", "adversarial", "matching"):
            assert one[term] == other[term], term
    lines = records(straight)
    assert [line["step"] for line in lines if "discriminator" in line] == [*range(1, 7)]  # the first one's alone
    capsys.readouterr()
    train("--init_from=resume", "--max_iters=7", f"--out_dir={resumed}")
    assert "start afresh: another number of processes (1, they were 2)" in capsys.readouterr().out


def test_two_processes_stop_together(tmp_path):
    """torchrun passes Ctrl-C on; whichever process sees it first, both stop after the same step, and it is saved."""
    log = tmp_path / "out" / "log.jsonl"
    process = start(*TORCHRUN, "train.py", *FLAGS, "--max_iters=100000", "--eval_interval=100000",
                    f"--out_dir={tmp_path / 'out'}")
    while process.poll() is None and not (log.exists() and '"encoder"' in log.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert "stopped and saved at step" in output and errors.count("stopping after this step") == 2, errors
    assert len(load(tmp_path / "out" / "ckpt.pt")["processes"]) == 2


def test_a_batch_is_shared_evenly(tiny_run, monkeypatch):
    settings = records(tiny_run.out)[0]["settings"]
    monkeypatch.setattr(rules, "RANKS", 3)
    with pytest.raises(SystemExit, match="--batch_size=4: must be a multiple of 3, the processes"):
        rules.check_settings(settings)
