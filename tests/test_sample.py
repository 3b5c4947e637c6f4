"""python sample.py: students beside their teacher, at several sizes, as pictures, a table and JSON."""
import json
import os

import pytest
import torch
from PIL import Image

import data
import sample
from conftest import evaluations, load, script
from support import files, whole
from support.configure import pick_dtype
from teacher import Teacher


def test_compare(tiny_run, copied_run, capsys):
    script("sample.py", f"--out_dir={copied_run}", f"--compare={tiny_run.out / 'diffusers'}", "--device=cpu")
    output = capsys.readouterr().out
    rows = {line[:36].strip(): line[36:].split() for line in output.splitlines() if "decoder" in line}
    assert rows["our encoder and decoder"][:7] == rows["diffusers: encoder and decoder"][:7]  # the same weights
    with Image.open(copied_run / "samples" / "sample.png") as picture:
        assert picture.height == 11 * (64 + 20)
    script("sample.py", f"--out_dir={copied_run}", f"--images={tiny_run.folder / '0.jpg'}", "--size=48", "--device=cpu")
    with Image.open(copied_run / "samples" / "sample.png") as picture:
        assert picture.size == (48, 7 * (48 + 20))


@torch.no_grad()
def test_a_tiny_autoencoder_without_a_run(tiny_run, tmp_path):
    """Its figures at two sizes are those worked out here."""
    path, out = tiny_run.out / "taesd_encoder.pth", tmp_path / "out"
    script("sample.py", "--teacher=toy", f"--compare={path}", f"--images={tiny_run.folder}", "--count=1",
           "--size=32,64", "--device=cpu", f"--json={tmp_path / 'figures.json'}", f"--out_dir={out}")
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["teacher"] == "toy" and list(written["size"]) == ["32", "64"]
    teacher, ours = Teacher("toy"), files.student(files.load_student(str(path)))
    real = data.Images("", str(tiny_run.folder)).held_out(1, 64) / 255
    latent, theirs = teacher.encode(real), ours["encoder"](real)
    pictures = {"teacher round trip": teacher.decode(latent), "taesd_encoder.pth: decoder": ours["decoder"](latent),
                "taesd_encoder.pth: encoder and decoder": ours["decoder"](theirs),
                "taesd_encoder.pth: encoder, teacher's decoder": teacher.decode(theirs)}
    figures = written["size"]["64"]["figures"]
    assert figures.keys() == pictures.keys()
    for label, picture in pictures.items():
        for name, value in sample.measure(picture.clamp(0, 1), real).items():
            assert figures[label][name] == pytest.approx(value, rel=1e-3), (label, name)
    for label in list(pictures)[2:]:
        assert figures[label]["latent_mse"] == pytest.approx((theirs - latent).square().mean().item(), rel=1e-3)
    both = figures["taesd_encoder.pth: encoder and decoder"]
    assert both["parameters"] == 77_540 + 77_539 and both["megabytes"] == pytest.approx(4 * 155_079 / 2**20, rel=1e-3)
    channels = written["size"]["64"]["latents"]["taesd_encoder.pth: latents"]
    assert channels["mean"] == pytest.approx(theirs.mean((0, 2, 3)).tolist(), abs=1e-3) and len(channels["std"]) == 4
    assert {path.name for path in (out / "samples").iterdir()} == {"look-32.png", "look-64.png", "look-latent_rgb.json"}


@torch.no_grad()
def test_figures_of_a_run(tiny_run):
    """The last evaluation's, worked out from its checkpoint, in its precision: means of few latents are small."""
    dtype = pick_dtype("auto", torch.device("cpu"))
    checkpoint, teacher = load(tiny_run.out / "ckpt.pt"), Teacher("toy", "cpu", dtype)
    real, ours, figures = checkpoint["held_out"] / 255, files.student(checkpoint), evaluations(tiny_run.out)[-1]
    latent = teacher.encode(real)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        theirs, picture = ours["encoder"](real).float(), ours["decoder"](latent).float().clamp(0, 1)
    by_teacher = sample.measure(teacher.decode(theirs), real)
    expected = sample.measure(picture, real) | sample.latent_errors(theirs, latent)
    expected |= {f"teacher_{name}": by_teacher[name] for name in ("psnr", "lowres_mse")}
    for name, value in expected.items():
        assert figures[f"val_{name}"] == pytest.approx(value, rel=0.05, abs=1e-4), name


def test_errors_of_latents_by_hand():
    goal = torch.tensor([[0.0, 2.0], [1.0, 5.0]]).view(1, 2, 1, 2)  # means 1 and 3, standard deviations √2 and 2√2
    errors = sample.latent_errors(goal * torch.tensor([1.0, 0.5]).view(1, 2, 1, 1), goal)
    assert errors["latent_mse"] == pytest.approx((0.25 + 6.25) / 4)
    assert errors["latent_mean_error"] == pytest.approx(1.5 / 8**0.5)
    assert errors["latent_std_error"] == pytest.approx(0.5)


def test_whole_pictures(copied_run, tmp_path, capsys):
    gradient, pictures = Image.radial_gradient("L"), tmp_path / "pictures"
    for folder in ("a", "b"):
        os.makedirs(pictures / folder)
        gradient.resize((24, 24)).save(pictures / folder / "same.png")
    gradient.resize((75, 44)).convert("RGB").save(pictures / "photo.png")
    gradient.resize((75, 7)).save(pictures / "flat.png")
    (pictures / "broken.jpg").write_bytes(b"not a picture")
    script("sample.py", f"--out_dir={copied_run}", f"--images={pictures}", "--size=0", "--device=cpu")
    output = capsys.readouterr()
    assert "72x40 each: original | teacher | our" in output.out
    assert "broken.jpg: cannot identify" in output.err and "flat.png: 75x7 pixels: the shorter side" in output.err
    names = {path.name for path in (copied_run / "samples" / "whole").iterdir()}
    assert names == {"photo.png.png", "a_same.png.png", "b_same.png.png"}
    path = copied_run / "samples" / "whole" / "photo.png.png"
    with Image.open(path) as picture, Image.open(pictures / "photo.png") as original:
        assert picture.size == (3 * 72, 40 + 20)
        assert picture.crop((0, 20, 72, 60)).tobytes() == original.crop((1, 2, 73, 42)).tobytes()
        parts = [picture.crop((72 * i, 20, 72 * i + 72, 60)).tobytes() for i in range(3)]
        assert len(set(parts)) == 3
    assert not (copied_run / "samples" / "sample.png").exists()


def test_a_picture_on_its_side(tmp_path):
    picture = Image.radial_gradient("L").resize((40, 72)).convert("RGBA")
    picture.putalpha(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "turned.png", exif=exif)
    found = whole.whole_picture(str(tmp_path / "turned.png"), 16)
    assert found.shape == (32, 64, 3) and (found == 255).all()  # transparent: white
    Image.new("L", (5000, 100)).save(tmp_path / "long.png")
    assert whole.whole_picture(str(tmp_path / "long.png"), 8).shape == (40, 2048, 3)
