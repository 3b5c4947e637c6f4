"""What a run does: its schedule, how it reads images, how it stops and goes on, and training one half alone."""
import os
import re
import shutil
import signal
import time

import pytest
import torch
from diffusers import AutoencoderKL

from conftest import TINY, load, records, script, start, train, train_and_record
from sample import Evaluator
from support import checkpoint
from support.log import Log
from teacher import NAMES, Teacher
from test_smoke import in_bytes


def losses(out_dir):
    """The lines of log.jsonl that report losses."""
    return [line for line in records(out_dir) if "data_wait" in line]


# the schedule, and how images are read

@pytest.mark.parametrize("cooldown, expected", [
    (0.2, [1, 1, 1, 0.5, 0.05]), (0, [1, 1, 1, 1, 1]), (1, [1, 0.5, 0.2, 0.1, 0.01])])
def test_the_learning_rates_fall_over_the_last_steps(cooldown, expected, stepped, monkeypatch):
    monkeypatch.setattr(stepped.after, "max_iters", 100)
    monkeypatch.setattr(stepped.after, "cooldown", cooldown)
    assert [stepped.after.get_lr_scale(step) for step in (0, 50, 80, 90, 99)] == pytest.approx(expected)


def test_the_discriminator_takes_part_from_adversarial_start(tmp_path):
    train(*TINY, "--max_iters=4", "--adversarial_start=2", f"--out_dir={tmp_path}")
    assert ["discriminator" in line for line in losses(tmp_path)] == [False, False, True, True]
    assert all("mse" in line for line in losses(tmp_path))


def test_the_last_steps_train_on_larger_crops_in_batches_of_as_many_pixels(tmp_path):
    scope, seen = train_and_record("--finish=0.5", "--finish_crop=64", "--batch_size=8", "--max_iters=6",
                                   "--cooldown=0", "--learning_rate=3e-4", f"--out_dir={tmp_path}")
    assert [real.shape for real, _, _ in seen[::4]] == 3 * [(8, 3, 32, 32)] + 3 * [(2, 3, 64, 64)]
    d_fakes, earlier = seen[-3][0], [fake for fakes, _, _ in seen[15:20:4] for fake in fakes]  # of steps 4 and 5
    assert in_bytes(d_fakes[:1]) <= in_bytes(torch.stack(earlier))  # half of the fakes are old, but not from before
    assert len(scope.replay_buffer.images) == 64 / 4 and scope.images_seen == 6 * 8
    for optimizer in (scope.student_optimizer, scope.discriminator_optimizer):  # D's rate is the same unless it is set
        assert {group["lr"] for group in optimizer.param_groups} == {3e-4}


# stopping, and going on

def test_a_resumed_run_goes_on_where_it_stopped(tiny_run, copied_run, stepped):
    """With a learning rate near 0, so that the weights stay as they were loaded."""
    scope = train("--init_from=resume", f"--out_dir={copied_run}", "--max_iters=61", "--learning_rate=1e-12",
                  "--discriminator_lr=1e-12")
    before, after = load(tiny_run.out / "ckpt.pt"), load(copied_run / "ckpt.pt")
    assert (after["step"], after["images_seen"]) == (61, 244)
    for name in ("encoder", "decoder", "discriminator"):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-8)
    for name in ("student_optimizer", "discriminator_optimizer"):
        steps = [state["step"].item() for state in after[name]["adam"]["state"].values()]
        assert steps == [61] * len(steps)
    old, new = (state["student_optimizer"]["muon"]["state"][0]["momentum"] for state in (before, after))
    assert (new - 0.95 * old).norm() < 0.5 * old.norm()
    assert scope.crop_pool.filled == 8 and scope.replay_buffer.filled == 4  # they are filled again
    with pytest.raises(SystemExit, match="student_optimizer of .* does not fit"):  # a run by Adam
        train("--init_from=resume", "--optimizer=adamw", "--max_iters=7", f"--out_dir={stepped.after.out_dir}")


def test_a_resumed_run_tells_what_has_changed(tmp_path, capsys):
    """More steps, and another VAE of the same name. Without changes, nothing is said."""
    flags = *TINY, f"--teacher={shutil.copytree(NAMES['toy'], tmp_path / 'vae')}", f"--out_dir={tmp_path / 'out'}"
    train(*flags, "--max_iters=4", "--eval_interval=2")
    os.replace(tmp_path / "out" / "ckpt_previous.pt", tmp_path / "out" / "ckpt.pt")  # as if it had been killed
    capsys.readouterr()
    train("--init_from=resume", flags[-1])
    unchanged = capsys.readouterr().out
    assert "rates rise again" not in unchanged and "other latents" not in unchanged
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    torch.nn.init.normal_(vae.encoder.conv_in.weight)
    vae.save_pretrained(tmp_path / "vae")
    train("--init_from=resume", "--max_iters=6", flags[-1])
    changed = capsys.readouterr().out
    assert "6 steps instead of 4, the learning rates rise again" in changed and "the teacher gives other" in changed


@pytest.mark.parametrize("place, name, number", [
    (Teacher, "encode", signal.SIGINT), (Log, "add", signal.SIGTERM), (Log, "report", signal.SIGINT),
    (Evaluator, "evaluate", signal.SIGINT), (checkpoint, "save_file", signal.SIGTERM)])
def test_whenever_ctrl_c_comes_what_is_saved_was_reported(place, name, number, tmp_path, monkeypatch, capfd):
    function, calls = getattr(place, name), []

    def with_signal(*arguments, **named):
        calls.append(name)
        if len(calls) == (5 if place is Teacher else 3):  # a teacher encodes three times before the first step
            assert callable(signal.getsignal(number))  # otherwise it would end all tests
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_DFL  # once more would end the run at once
        return function(*arguments, **named)
    monkeypatch.setattr(place, name, with_signal)
    scope = train(*TINY, "--log_interval=2", "--eval_interval=3", "--max_iters=50", f"--out_dir={tmp_path}")
    saved = load(tmp_path / "ckpt.pt")
    assert saved["step"] == scope.step == losses(tmp_path)[-1]["step"] < 12
    assert saved["metrics"] == {}  # those of an earlier step would be wrong
    output, errors = capfd.readouterr()
    assert "stopping after this step" in errors and f"stopped and saved at step {scope.step}" in output


def test_a_run_that_is_killed_loses_only_the_steps_since_the_last_save(tmp_path):
    log = tmp_path / "log.jsonl"
    process = start("train.py", *TINY, "--max_iters=100000", "--eval_interval=4", f"--out_dir={tmp_path}")
    while process.poll() is None and not (log.exists() and log.read_text().count('"data_wait"') >= 10):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done, saved = losses(tmp_path)[-1]["step"], load(tmp_path / "ckpt.pt")["step"]
    assert saved in (done - done % 4, done - done % 4 - 4)  # the latter if it was killed while it saved
    scope = train("--init_from=resume", f"--out_dir={tmp_path}", f"--max_iters={saved + 1}")
    assert scope.step == saved + 1 and losses(tmp_path)[-1]["step"] == saved + 1


def test_numbers_that_are_not_finite_stop_the_run(copied_run):
    before = (copied_run / "ckpt.pt").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        train(f"--out_dir={copied_run}", "--init_from=resume", "--max_iters=70", "--log_interval=5",
              "--learning_rate=1e30", "--cooldown=0")
    assert re.match(r"error: step 6[123]: [a-z_]+ is not finite.*--init_from=resume", stopped.value.code)
    assert (copied_run / "ckpt.pt").read_bytes() == before


# one half alone

def test_the_encoder_alone(tmp_path, capsys):
    train(*TINY, "--max_iters=2", "--train_decoder=false", f"--out_dir={tmp_path}")
    assert (tmp_path / "taesd_encoder.pth").exists()
    assert not (tmp_path / "taesd_decoder.pth").exists() and not (tmp_path / "diffusers").exists()
    assert losses(tmp_path)[-1].keys() & {"encoder", "encoder_feature", "mse", "adversarial"} == {"encoder"}
    script("sample.py", f"--out_dir={tmp_path}", "--device=cpu")
    table = capsys.readouterr().out.split("PSNR")[1]
    assert "our encoder, teacher's decoder" in table and "our decoder" not in table


@pytest.mark.parametrize("resumed", [True, False])
@pytest.mark.parametrize("frozen", ["encoder", "decoder"])
def test_a_frozen_half_is_exported_as_it_was(frozen, resumed, tiny_run, copied_run, tmp_path):
    """The encoder goes on learning through a frozen decoder."""
    out = copied_run if resumed else tmp_path / "out"
    start = ["--init_from=resume"] if resumed else [tiny_run.out / "settings.py", f"--init_from={tiny_run.out}"]
    train(*start, f"--train_{frozen}=false", f"--max_iters={62 if resumed else 2}", f"--out_dir={out}")
    names = losses(out)[-1].keys() & {"encoder", "encoder_feature", "mse"}
    assert names == ({"mse"} if frozen == "encoder" else {"encoder", "encoder_feature"})
    for half in ("encoder", "decoder"):
        before, after = load(tiny_run.out / f"taesd_{half}.pth"), load(out / f"taesd_{half}.pth")
        unchanged = all(torch.equal(before[name], after[name]) for name in before)
        assert before.keys() == after.keys() and unchanged == (half == frozen)
