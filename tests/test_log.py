"""What a run tells: log.jsonl, lines on the console, the last block of results, and curves."""
import copy
import json
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from conftest import records, script, train
from support import curves, log


def test_the_log_of_a_run(tiny_run):
    first, *lines = records(tiny_run.out)
    assert first.keys() == {"settings", "arguments", "versions", "teacher", "device", "dtype", "compile"}
    assert first["settings"]["learning_rate"] == 3e-3 and "--learning_rate=3e-3" in first["arguments"]
    steps = [line for line in lines if "mse" in line]
    assert [(line["step"], line["images_seen"]) for line in steps] == [(n, 4 * n) for n in range(1, 61)]
    losses = {"encoder", "encoder_feature", "mse", "lowres_mse", "adversarial", "feature_matching", "discriminator"}
    assert steps[-1].keys() == losses | curves.NOT_LOSSES
    assert [line["step"] for line in lines if "val_psnr" in line] == [20, 40, 60]


def test_the_console_begins_with_a_summary_and_ends_with_the_last_metrics(tiny_run):
    first, *_, last = records(tiny_run.out)
    summary, results = tiny_run.output.split("---\n")
    assert "images    24 to train on, 1 held out" in summary and summary.count("\nstep ") == 60
    assert "1 x adversarial, 5 x feature_matching, 10 x lowres, 10 x mse, 1 x encoder_feature; muon" in summary
    assert f"pictures of the held-out images: psnr {first['teacher']['psnr']:.2f} dB" in summary
    printed = dict(line.split(": ") for line in results.splitlines())
    assert printed["out_dir"] == str(tiny_run.out) and {name: float(printed[name]) for name in last} == last


def test_reports_are_means_since_the_last_one(stepped, tmp_path, monkeypatch, capsys):
    """Steps of 4 images take 3 seconds each, of which they wait 1 second for images. D takes part in every second one.
    The first eight steps of a run are slow and do not count for its speed."""
    clock, messages = SimpleNamespace(now=1000.0), copy.copy(stepped.after.log)
    monkeypatch.setattr(log, "time", SimpleNamespace(time=lambda: clock.now))
    vars(messages).update(out_dir=str(tmp_path), history=[], clock=clock.now,
                          settings=stepped.after.settings | {"max_iters": 20, "log_interval": 10})

    def images():
        while True:
            clock.now += 1
            yield None
    loader = messages.waiting_for(images())
    for step in (7, 8, 9, 10):
        next(loader)
        clock.now += 2 if step > 8 else 99
        losses = {"mse": 1.0} if step % 2 else {"mse": 3.0, "adversarial": 5.0}
        messages.add(step, 4 * step, {name: torch.tensor(value) for name, value in losses.items()})
    report, = records(tmp_path)
    assert report.items() >= {"step": 10, "images_seen": 40, "images_per_second": round(8 / 6, 2),
                              "mse": 2.0, "adversarial": 5.0, "data_wait": round(2 / 6, 3)}.items()
    printed = capsys.readouterr().out
    assert "step 10/20  images_seen 40" in printed and "mse 2  adversarial 5" in printed and "left 0:00:30" in printed


def test_a_resumed_run_continues_its_log(tiny_run, copied_run):
    """After a kill, steps 61 and 62 were lost, and the line of step 63 was cut short. Steps 61 and 62 are repeated."""
    lines = [json.dumps({"step": step, "images_seen": 4 * step, "mse": 99.0}) for step in (61, 62)]
    with open(copied_run / "log.jsonl", "a") as file:
        file.write("\n".join(lines) + '\n{"step": 63, "images_se')
    train("--init_from=resume", "--max_iters=62", f"--out_dir={copied_run}")
    teacher_metrics, found = curves.read_log(copied_run)
    assert teacher_metrics == records(tiny_run.out)[0]["teacher"]
    assert list(found["mse"]) == list(range(4, 252, 4)) and max(found["mse"].values()) < 1


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_a_run_draws_its_curves(tiny_run, copied_run, tmp_path, monkeypatch):
    """sample.py draws the same figure. In a figure of two runs the second one is orange."""
    monkeypatch.chdir(tmp_path)
    figure = copied_run / "samples" / "curves.png"
    script("sample.py", f"--curves={copied_run}")
    one = pixels(figure)
    assert one.shape == pixels(tiny_run.out / "curves.png").shape
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.jsonl").write_text(
        '{"images_seen": 100, "val_psnr": 12}\n{"images_seen": 200, "val_psnr": 15}')
    script("sample.py", f"--curves={copied_run},other")
    orange = [(np.abs(picture - [255, 127, 14]).sum(-1) < 30).sum() for picture in (one, pixels(figure))]
    assert orange[0] == 0 and orange[1] > 100
