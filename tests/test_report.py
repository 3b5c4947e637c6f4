"""What a run shows while it runs: curves, and a bar where the output is a terminal."""
import errno
import json
import os
import struct
import sys
import types

import numpy as np
import pytest
from PIL import Image

from conftest import script
from support import curves, report
from test_smoke import HERE, TINY, train

GOAL = {"psnr": 30.0, "ssim": 0.9, "lowres_mse": 1e-4, "sharpness": 1.0}


def write_log(folder, steps, psnr):
    """A run whose PSNR is psnr + step / 100, and its log.jsonl."""
    lines = [{"settings": {}, "teacher": GOAL}]
    for step in steps:
        seen = {"step": step, "images_seen": 16 * step, "images_per_second": 9.0}
        lines.append(seen | {"encoder": 1 / step, "mse": 0.1 / step, "data_wait": 0, "peak_memory_mb": 800})
        lines.append(seen | {"val_psnr": psnr + step / 100, "val_latent_mse": 1 / step})
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(folder)


def test_a_log_with_a_step_back(tmp_path):
    """A run that was killed at step 400 and resumed from step 200 did what lies between twice."""
    goal, found = curves.read_log(write_log(tmp_path / "run", [100, 200, 300, 400, 300, 500], 20))
    assert goal == GOAL and found.keys() == {"encoder", "mse", "val_psnr", "val_latent_mse"}
    assert found["val_psnr"] == {1600: 21, 3200: 22, 4800: 23, 8000: 25}
    with open(tmp_path / "run" / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 5, "images_se')  # the disk was full
    assert curves.read_log(str(tmp_path / "run")) == (goal, found)


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_curves_of_runs(tmp_path, monkeypatch, capsys):
    runs = [write_log(tmp_path / name, [100, 200, 300], psnr) for name, psnr in (("donor", 22), ("scratch", 19))]
    monkeypatch.chdir(tmp_path)
    script("sample.py", f"--curves={runs[0]}")
    one = pixels("curves.png")
    script("sample.py", f"--curves={','.join(runs)}")
    both = pixels("curves.png")
    assert capsys.readouterr().out == 2 * "wrote curves.png\n" and one.shape == both.shape
    orange = np.abs(both - [255, 127, 14]).sum(-1) < 30  # matplotlib's second colour: the second run's
    assert orange.sum() > 100 and (np.abs(one - [255, 127, 14]).sum(-1) < 30).sum() == 0
    with pytest.raises(SystemExit, match="error: gone.log.jsonl: not a readable log of a run"):
        script("sample.py", "--curves=gone")


def test_a_run_draws_its_curves(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw_curves", curves.draw_curves)
    train(*TINY, "--max_iters=2", "--eval_interval=1", "--eval_images=1", f"--out_dir={tmp_path / 'out'}")
    assert pixels(tmp_path / "out" / "curves.png").std() > 1


def test_a_picture_is_no_reason_to_end_a_run(tmp_path, monkeypatch, capsys):
    def broken(out_dirs, path):
        raise ValueError("no fonts here")
    monkeypatch.setattr(report, "draw_curves", broken)
    train(*TINY, "--max_iters=1", "--eval_images=1", f"--out_dir={tmp_path / 'out'}")
    assert "no curves (no fonts here)" in capsys.readouterr().out and (tmp_path / "out" / "ckpt.pt").exists()


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_bar_on_a_terminal(tmp_path):
    import fcntl
    import pty
    import subprocess
    import termios
    terminal, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "train.py", *TINY, "--max_iters=6", "--eval_interval=3", "--eval_images=1",
         f"--out_dir={tmp_path / 'out'}"],
        cwd=HERE, stdout=theirs, stderr=theirs, env=os.environ | {"OMP_NUM_THREADS": "1"})
    os.close(theirs)
    output = b""
    while True:
        try:
            output += os.read(terminal, 4096)
        except OSError as error:  # so a terminal ends on Linux
            assert error.errno == errno.EIO
            break
    assert process.wait() == 0
    shown = output.decode().replace("\r\n", "\n")
    assert "100% 6/6, 00:00 left" in shown and "adversarial" in shown
    lines = [line.rsplit("\r", 1)[-1].strip() for line in shown.split("\n")]
    assert sum(line.startswith("eval ") for line in lines) == 2  # on lines of their own
    assert not any(line.startswith("step 3/6") for line in lines)
    assert any(line.startswith("val_psnr: ") for line in lines)


def test_profile(tmp_path):
    settings = types.SimpleNamespace(window=256, crop=64, batch_size=4, adversarial_start=0)
    assert report.profile_from(settings) == 64 * 16 // 8 + 10  # the pool's 64 windows, by two batches a step
    train(*TINY, "--train_decoder=false", "--max_iters=77", "--profile=2", f"--out_dir={tmp_path / 'out'}")
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert any("convolution" in name for name in names)
    assert {name for name in names if name.startswith("ProfilerStep")} == {"ProfilerStep#74", "ProfilerStep#75"}
