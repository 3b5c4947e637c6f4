"""Defects that were seen: each of these tests failed before its mend."""
import os
import re
import shutil
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import data
import model
import sample
from support import configure, files, packs, report, run as support_run
from test_smoke import HERE, TINY, records, start, train
from tools import reference


def pictures(folder, n=4, side=64):
    folder.mkdir(parents=True)
    for i, photo in enumerate(data.find_images(data.PHOTOS)[:n]):
        ImageOps.fit(Image.open(photo), (side, side)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("place", ["photos", ".", "photos/0.png", "pack"])
def test_a_pack_replaces_nothing_but_a_pack(place, tmp_path):
    photos = pictures(tmp_path / "photos")
    pictures(tmp_path / "pack.tmp")  # somebody's, though it is named like a file that we write
    with pytest.raises(SystemExit, match="not of this program"):
        packs.write_pack(str(tmp_path / place), str(photos), data.find_images(str(photos)), data.decode, 1)
    assert len(os.listdir(photos)) == len(os.listdir(tmp_path / "pack.tmp")) == 4
    for _ in range(2):  # a pack is replaced by a newer one
        packs.write_pack(str(tmp_path / "new"), str(photos), data.find_images(str(photos)), data.decode, 1)
    assert len(data.find_images(str(tmp_path / "new"))) == 4


def test_a_file_replaces_no_folder(tmp_path):
    pictures(tmp_path / "weights.pth")
    with pytest.raises(SystemExit, match="weights.pth: is there already"):
        files.save_file(str(tmp_path / "weights.pth"), lambda aside: torch.save({}, aside))
    assert len(os.listdir(tmp_path / "weights.pth")) == 4


@pytest.mark.parametrize("place,words", [("file", "is a file"), ("file/out", "is a file|cannot be made")])
def test_an_out_dir_that_cannot_be(place, words, tmp_path):
    (tmp_path / "file").write_text("somebody's")
    with pytest.raises(SystemExit, match=words):
        train(*TINY, "--max_iters=1", f"--out_dir={tmp_path / place}")


def test_a_run_deletes_nobody_s_folder(tmp_path):
    (tmp_path / "out" / "diffusers" / ".git").mkdir(parents=True)
    with pytest.raises(SystemExit, match="diffusers: is there already"):
        train(*TINY, "--max_iters=1", f"--out_dir={tmp_path / 'out'}")
    assert (tmp_path / "out" / "diffusers" / ".git").is_dir()


@pytest.mark.parametrize("name", ["notes.txt", ".DS_Store"])
def test_a_file_that_appears_beside_an_export_ends_no_run(name, stepped, tmp_path, capsys):
    scope, out = stepped.after, tmp_path / "out"
    out.mkdir()
    for _ in range(2):
        settings = scope.settings | {"out_dir": str(out)}
        support_run.save_run(settings, scope.shape, scope.parts, scope.progress, scope.held_out)
        (out / "diffusers" / name).write_text("somebody's, or the file manager's")
    foreign = name == "notes.txt"
    assert (out / "ckpt_previous.pt").exists() and ("left as it is" in capsys.readouterr().out) == foreign
    if foreign:
        assert (out / "diffusers" / name).exists() and (out / "diffusers" / "config.json").exists()


@pytest.mark.parametrize("links", [1, 2])
def test_links_to_folders_are_walked_once(links, tmp_path):
    photos = pictures(tmp_path / "photos", 20)
    for i in range(links):
        (photos / f"again{i}").symlink_to(photos)
    assert len(data.find_images(str(photos))) == 20
    (tmp_path / "elsewhere").mkdir()
    for name in ("0.png", "1.png"):
        (tmp_path / "elsewhere" / name).symlink_to(photos / name)
    images = data.Images(str(photos), str(tmp_path / "elsewhere"))
    assert len(images.val) == 2 and len(images.train) == 18


def test_a_pack_that_holds_the_held_out_files_is_named(tmp_path, capsys):
    photos = pictures(tmp_path / "photos")
    packs.write_pack(str(tmp_path / "pack"), str(photos), data.find_images(str(photos)), data.decode, 1)
    data.Images(str(tmp_path / "pack"), str(pictures(tmp_path / "val", 1)))
    assert "may hold held-out images: 1 of its names" in capsys.readouterr().err


def test_a_flat_held_out_picture_stops_nothing(tmp_path):
    (tmp_path / "val").mkdir()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(tmp_path / "val" / "flat.png")
    train(*TINY, f"--data_dir={pictures(tmp_path / 'photos')}", f"--val_dir={tmp_path / 'val'}", "--max_iters=1",
          f"--out_dir={tmp_path / 'out'}")
    assert all(np.isfinite(value) for value in records(tmp_path / "out")[-1].values())
    assert (tmp_path / "out" / "ckpt.pt").exists()


def test_a_weight_that_is_not_finite_is_not_saved(stepped, tmp_path):
    scope, encoder = stepped.after, stepped.after.encoder
    broken = torch.nn.ParameterList([next(encoder.parameters()).detach() * torch.nan])
    settings, parts = scope.settings | {"out_dir": str(tmp_path / "out")}, scope.parts | {"decoder": broken}
    with pytest.raises(SystemExit, match="step 6: a weight of decoder is not finite"):
        support_run.save_run(settings, scope.shape, parts, scope.progress, scope.held_out)
    assert not (tmp_path / "out").exists()


def test_memories_start_afresh_where_their_latents_would_be_others(tiny_run, tmp_path, capsys):
    out = shutil.copytree(tiny_run.out, tmp_path / "out")
    scope = train("--init_from=resume", "--window=32", "--max_iters=121", f"--out_dir={out}")
    assert "start afresh: another window" in capsys.readouterr().out
    assert scope.pool.filled == 8 and scope.replay.filled == 4  # a step's
    scope = train("--init_from=resume", "--max_iters=122", f"--out_dir={out}")
    assert "start afresh" not in capsys.readouterr().out and scope.pool.filled == 16


@pytest.mark.parametrize("works", [True, False])
def test_compile_falls_back_to_eager_in_one_line(works, monkeypatch, capsys):
    def compiler(function):
        if not works:
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")
        return lambda x: None
    monkeypatch.setattr(torch, "compile", compiler), monkeypatch.setattr(torch, "zeros", lambda *a, **k: None)
    assert configure.pick_compile("auto", torch.device("cuda")) == works
    assert len(capsys.readouterr().out.splitlines()) == 1 - works
    assert not configure.pick_compile("auto", torch.device("cpu"))
    assert configure.pick_compile("true", torch.device("cpu"))


def test_a_fine_tune_is_gentle_though_a_recipe_is_not(tiny_run, tmp_path):
    (tmp_path / "recipe.py").write_text("learning_rate = 5e-3\ndiscriminator_lr = 2e-3\n")
    flags = [flag for flag in TINY if "width" not in flag] + ["--max_iters=1", f"--init_from={tiny_run.out}"]
    scope = train(tmp_path / "recipe.py", *flags, f"--out_dir={tmp_path / 'a'}")
    assert (scope.learning_rate, scope.discriminator_lr) == (1e-4, 2e-3)
    scope = train(tmp_path / "recipe.py", *flags, f"--out_dir={tmp_path / 'b'}", "--learning_rate=2e-4")
    assert scope.learning_rate == 2e-4


def test_out_of_memory_on_a_cpu_is_one_line(tmp_path):
    process = start("train.py", *TINY, "--replay_size=1e12", "--max_iters=1", f"--out_dir={tmp_path / 'out'}")
    _, errors = process.communicate()
    line = errors.strip().splitlines()[-1]
    assert line.startswith("error: out of memory: a smaller --batch_size (4)") and "Traceback" not in errors


def test_the_memories_sizes_are_told(tmp_path, capsys):
    scope = train(*TINY, "--max_iters=1", "--replay_size=4096", f"--out_dir={tmp_path / 'out'}")
    pattern = "memory +pool ([0-9]+) MB, replay ([0-9]+) MB on the device; a checkpoint up to ([0-9]+) MB"
    pool, replay, checkpoint = map(int, re.search(pattern, capsys.readouterr().out).groups())
    assert (pool, replay) == (1, 13)  # 256 and 4096 times 3 x 32 x 32 + 2 x 4 x 4 x 4 + 4 bytes
    scope.replay.filled = scope.pool.filled = 4096  # as they will be
    support_run.save_run(scope.settings, scope.shape, scope.parts, scope.progress, scope.held_out)
    assert os.path.getsize(tmp_path / "out" / "ckpt.pt") / 2**20 == pytest.approx(checkpoint, abs=2)


def test_ssim_is_exact_where_convolutions_round_to_tf32(monkeypatch):
    """0.5 and a little noise: its variance, 1e-4 of the square, is the difference of two numbers near 0.25."""
    convolve = F.conv2d

    def rounded(x):  # to the 10 bits of TF32's mantissa
        return (x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)
    monkeypatch.setattr(F, "conv2d", lambda x, w, **named: convolve(*map(rounded, (x, w.contiguous())), **named))
    torch.manual_seed(0)
    real, fake = (0.5 + 0.01 * torch.randn(1, 3, 32, 32) for _ in range(2))
    window = torch.exp(-(torch.arange(11) - 5.0).double().square() / 4.5)
    window = (torch.outer(window, window) / window.sum() ** 2).expand(3, 1, 11, 11)
    x, y = real.double(), fake.double()
    mx, my, xx, yy, xy = (convolve(each, window, groups=3) for each in (x, y, x * x, y * y, x * y))
    by_hand = ((2 * mx * my + 1e-4) * (2 * (xy - mx * my) + 9e-4) / ((mx**2 + my**2 + 1e-4)
               * (xx - mx**2 + yy - my**2 + 9e-4))).mean().item()
    assert sample.ssim(fake, real).item() == pytest.approx(by_hand, abs=1e-4)


def test_no_folder_is_not_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("index.npy", np.zeros(3))  # unrelated
    assert data.Images().held_out(1, 32).shape == (1, 3, 32, 32)


def test_dark_sixteen_bit_pictures_stay_dark(tmp_path):
    Image.fromarray(np.full((64, 64), 200, np.uint16)).save(tmp_path / "dark.png")
    assert data.square_crop(str(tmp_path / "dark.png"), 32).max() == 0  # 200 of 65,535


def test_a_long_thin_picture_is_used_from_a_pack_too(tmp_path):
    Image.effect_noise((3000, 40), 60).convert("RGB").save(tmp_path / "thin.png")
    assert data.decode(str(tmp_path / "thin.png")).shape == (16, 1200, 3)


@pytest.mark.parametrize("calls", range(5))
def test_whenever_a_signal_comes_what_is_saved_was_reported(calls, tmp_path, monkeypatch):
    """The signal may come between any two looks at whether it came."""
    looks, save = iter([False] * calls), support_run.save_run

    def checked(settings, shape, parts, progress, held_out):
        last = [line for line in records(tmp_path / "out") if "encoder" in line][-1]
        assert last["step"] == progress.step
        save(settings, shape, parts, progress, held_out)
    monkeypatch.setattr(report.Interrupt, "__bool__", lambda self: next(looks, True))
    monkeypatch.setattr(support_run, "save_run", checked)
    scope = train(*TINY, "--log_interval=100", "--eval_interval=2", "--max_iters=50", f"--out_dir={tmp_path / 'out'}")
    assert 1 <= scope.progress.step <= calls + 1 and (tmp_path / "out" / "ckpt.pt").exists()


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_the_random_state_of_the_device_is_kept(kind, monkeypatch):
    kept = types.SimpleNamespace(get_rng_state=lambda: "of the device", set_rng_state=lambda state: found.append(state))
    found, device = [], torch.device(kind)
    monkeypatch.setattr(torch, "get_device_module", {device: kept}.get)
    state = support_run.random_state(device)
    before = torch.rand(3)
    support_run.set_random_state(state, device)
    assert torch.equal(torch.rand(3), before) and found == ["of the device"]
    support_run.set_random_state(state, torch.device("cpu"))  # a run that goes on elsewhere
    assert found == ["of the device"]


def test_the_reference_s_minutes_are_of_training_alone(tmp_path, monkeypatch, capsys):
    """Steps of 10 seconds, evaluations of 1,000: six steps a minute."""
    clock = types.SimpleNamespace(now=0.0, time=lambda: clock.now)

    def loop(*settings):
        while True:
            clock.now += 10
            yield torch.nn.ModuleDict({"encoder": model.Encoder(4, 8, 4), "decoder": model.Decoder(4, 8, 4)})

    def slow(network, images):
        clock.now += 1000
        return sample.chunked(network, images)
    monkeypatch.chdir(tmp_path), monkeypatch.setattr(reference, "time", clock)
    monkeypatch.setattr(reference, "reference_loop", loop), monkeypatch.setattr(reference, "chunked", slow)
    monkeypatch.setattr(data.Images, "held_out", lambda self, n, size: torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    monkeypatch.setattr(reference, "minutes", 3.0)
    reference.main()
    steps = [int(step) for step in re.findall("minute [0-9]  step ([0-9]+)", capsys.readouterr().out)]
    assert steps == [7, 13, 19]  # the first that end after 60, 120 and 180 seconds


def test_the_reference_s_average_begins_as_in_the_notebook(tmp_path, monkeypatch):
    """A copy, then min(.95, n / 10); and a folder of any size is one endless epoch."""
    clock, shares = types.SimpleNamespace(now=0.0, time=lambda: clock.now), []
    monkeypatch.setattr(reference, "time", clock)
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda average, now, share: shares.append(round(share, 6)))
    paths = data.find_images(str(pictures(tmp_path / "photos", 2)))
    place, teacher = torch.device("cpu"), str(HERE / "assets" / "toy_vae")
    loop = reference.reference_loop(teacher, paths, place, 16, 2, 1e-4, 4)
    for _ in range(14):  # its clock starts at the first
        clock.now += 3
        next(loop)
    assert shares == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.05, 0.05]
