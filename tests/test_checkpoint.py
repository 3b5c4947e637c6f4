"""Reading weights of every layout, saving, and what is left after damage or on a full disk."""
import os

import pytest
import safetensors.torch
import torch

import model
import sample
from conftest import (DATA, TINY, evaluations, load, needs_data, plain_taesd, real_images, records, script, students,
                      train)
from support import export
from support.checkpoint import load_checkpoint, load_student, save_checkpoint
from teacher import Teacher


# reading weights


@needs_data
@torch.no_grad()
def test_released_flux2_weights_give_the_same_pixels():
    plain = plain_taesd(64, 32, norm=True)
    for half, network in plain.items():
        network.load_state_dict(load(DATA / "weights" / f"taef2_{half}.pth"), strict=True)
    teacher = Teacher(DATA / "weights" / "taef2_encoder.pth")
    assert (teacher.latent_channels, teacher.factor, teacher.student_variant) == (32, 8, "midblock_gn")
    for image in real_images(3):
        image = image[..., :128, :128]
        latent = teacher.encode(image)
        picture = teacher.decode(latent)
        assert torch.allclose(plain["encoder"](image), latent, atol=1e-3)
        assert torch.allclose(plain["decoder"](latent).clamp(0, 1), picture, atol=1e-4)
        assert 28 < sample.psnr(picture, image) < 42


@pytest.mark.parametrize("variant, factor, width", [("plain", 8, 8), ("plain", 16, 4), ("midblock_gn", 8, 8),
                                                    ("f32", 32, 8)])
def test_every_layout_of_every_variant_can_be_read_back(variant, factor, width, tmp_path):
    networks, shape = students(variant, 6, factor, width)
    for half, network in networks.items():
        export.save_taesd(str(tmp_path / f"my_{half}.pth"), network, torch.float16)
        safetensors.torch.save_file(load(tmp_path / f"my_{half}.pth"), tmp_path / f"my_{half}.safetensors")
    export.save_safetensors(str(tmp_path / "mine.safetensors"), networks, torch.float16)
    sources = ["my_decoder.pth", "my_encoder.safetensors", "mine.safetensors"]
    if variant == "plain":
        export.save_diffusers(str(tmp_path / "tiny"), networks, shape, torch.float16)
        sources.append("tiny")
    for source in sources:
        again = load_student(str(tmp_path / source))
        assert again["shape"] == shape and sorted(again["exportable"]) == ["decoder", "encoder"], source
        for half, network in networks.items():
            for key, value in network.state_dict().items():
                assert torch.equal(again[f"ema_{half}"][key], value.half().float()), (source, key)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
@pytest.mark.parametrize("name", ["weights.pth", "encoder.pth", "decoder.pth"])
def test_the_weights_and_not_the_name_say_which_half_a_file_holds(half, name, tmp_path):
    export.save_taesd(str(tmp_path / name), students("plain")[0][half])
    assert load_student(str(tmp_path / name))["exportable"] == [half]


@pytest.mark.parametrize("source", ["", "taesd_encoder.pth", "taesd_decoder.pth", "diffusers"])
def test_training_starts_from_weights_of_every_layout(source, tiny_run, tmp_path, capsys):
    """The weights' own encoder is the teacher here, so it is clear that they know its latents."""
    train(*TINY, f"--teacher={tiny_run.out / 'taesd_encoder.pth'}", f"--init_from={tiny_run.out / source}",
          "--dtype=float32", "--learning_rate=1e-6", "--max_iters=1", f"--out_dir={tmp_path / 'out'}")
    output = capsys.readouterr().out
    assert output.startswith("weights ") and "note " not in output
    first, last = evaluations(tmp_path / "out")
    goal = records(tmp_path / "out")[0]["teacher"]["psnr"]
    assert first["step"] == 0 and first["val_latent_mse"] < 1e-6
    assert first["val_psnr"] == pytest.approx(goal, abs=1e-3)
    assert last["val_psnr"] == pytest.approx(goal, abs=0.05)  # the average was not thrown away
    ours, theirs = (load(out / "ckpt.pt")["discriminator"]["blocks.2.bias"] for out in (tmp_path / "out", tiny_run.out))
    assert torch.allclose(ours, theirs, atol=2e-3) == (source == "")  # a run brings its discriminator


# checkpoints

def test_a_checkpoint_holds_no_buffers_and_at_most_60_mb_at_any_crop_size(tmp_path):
    sizes = []
    for crop in (16, 64):
        out = tmp_path / str(crop)
        train("--device=cpu", f"--crop={crop}", "--window=0", "--batch_size=1", "--eval_images=1", "--eval_size=16",
              "--max_iters=1", "--workers=1", f"--out_dir={out}")
        sizes.append((out / "ckpt.pt").stat().st_size)
    assert max(sizes) < 60e6 and max(sizes) - min(sizes) < 1e4
    assert set(load(out / "ckpt.pt")) == {
        "encoder", "decoder", "discriminator", "ema_encoder", "ema_decoder", "student_optimizer",
        "discriminator_optimizer", "scaler", "step", "images_seen", "shape", "settings", "exportable", "teacher",
        "fingerprint", "metrics"}


def test_the_checkpoint_before_is_kept_for_when_the_last_is_damaged(copied_run, capsys):
    assert [load(copied_run / name)["step"] for name in ("ckpt.pt", "ckpt_previous.pt")] == [60, 40]
    damaged = (copied_run / "ckpt.pt").read_bytes()[:10_000]
    (copied_run / "ckpt.pt").write_bytes(damaged)
    script("sample.py", f"--out_dir={copied_run}", "--device=cpu", "--count=1")
    assert (copied_run / "ckpt.pt").read_bytes() == damaged  # to look at a run changes nothing
    assert "going back to" in capsys.readouterr().err
    train(f"--out_dir={copied_run}", "--init_from=resume", "--max_iters=41")
    assert "going back to" in capsys.readouterr().err
    assert load(copied_run / "ckpt.pt")["step"] == 41


def test_a_run_that_was_killed_between_two_renames_goes_on(copied_run):
    os.remove(copied_run / "ckpt.pt")
    with pytest.raises(SystemExit, match="holds a run already"):
        train(*TINY, f"--out_dir={copied_run}", "--max_iters=1")
    train(f"--out_dir={copied_run}", "--init_from=resume", "--max_iters=41")
    assert load(copied_run / "ckpt.pt")["step"] == 41 and load(copied_run / "ckpt_previous.pt")["step"] == 40


def test_a_full_disk_loses_nothing(copied_run):
    resource = pytest.importorskip("resource", reason="this system cannot limit the size of files")
    before = {path: path.read_bytes() for path in copied_run.rglob("*.pt*")}
    arguments = f"--out_dir={copied_run}", "--init_from=resume", "--max_iters=61"
    limit, highest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, highest))  # bytes of a file
    try:
        with pytest.raises(SystemExit, match="error: .*ckpt.pt: could not be written"):
            train(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, highest))
    assert {path: path.read_bytes() for path in copied_run.rglob("*.pt*")} == before  # and no ckpt.pt.tmp
    train(*arguments)
    assert load(copied_run / "ckpt.pt")["step"] == 61


def test_a_weight_that_is_not_finite_is_not_saved(tiny_run, tmp_path):
    checkpoint = load_checkpoint(str(tiny_run.out))
    decoder = model.Decoder(**checkpoint["shape"])
    decoder[-1].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(SystemExit, match="step 60: a weight of the decoder is not finite"):
        save_checkpoint(checkpoint, {"decoder": decoder}, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
