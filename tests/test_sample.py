"""sample.py: metrics, and tables and pictures of a run, of a teacher and of other weights."""
import re

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sample
from conftest import evaluations, script
from data import Images
from support import latent_rgb
from support.checkpoint import build_student, load_student
from teacher import Teacher


def test_metrics_by_hand():
    real, fake, noise = torch.full((1, 3, 32, 32), 0.5), torch.full((1, 3, 32, 32), 0.6), torch.rand(2, 3, 32, 32)
    assert sample.psnr(fake, real).item() == pytest.approx(20, abs=1e-3)
    assert sample.psnr(real, real).item() == 100
    assert sample.lowres_mse(fake, real).item() == pytest.approx(0.01)
    assert sample.lowres_mse(noise, real).max() < 0.005  # noise has the right mean colours
    assert sample.sharpness(noise * 0.5, noise).item() == pytest.approx(0.25)


def test_metrics_of_latents_by_hand():
    target = torch.tensor([[0.0, 2.0], [1.0, 5.0]]).view(1, 2, 1, 2)  # means 1 and 3, standard deviations √2 and 2√2
    metrics = sample.compute_latent_metrics(target * torch.tensor([1.0, 0.5]).view(1, 2, 1, 1), target)
    assert metrics["latent_mse"] == pytest.approx((0.25 + 6.25) / 4)
    assert metrics["latent_mean_error"] == pytest.approx(1.5 / 8**0.5)
    assert metrics["latent_std_error"] == pytest.approx(0.5)


def test_ssim_is_that_of_convolutions_in_double_precision(monkeypatch):
    """The variances are small differences of large numbers, and a GPU that rounds convolutions to TF32 loses them."""
    convolve = F.conv2d
    monkeypatch.delattr(F, "conv2d")
    real, fake = (0.5 + 0.01 * torch.randn(2, 1, 3, 32, 32)).unbind()
    window = torch.exp(-(torch.arange(11) - 5.0).double().square() / 4.5)
    window = (torch.outer(window, window) / window.sum() ** 2).expand(3, 1, 11, 11)
    x, y = real.double(), fake.double()
    mx, my, xx, yy, xy = (convolve(each, window, groups=3) for each in (x, y, x * x, y * y, x * y))
    by_hand = ((2 * mx * my + 1e-4) / (mx**2 + my**2 + 1e-4)
               * (2 * (xy - mx * my) + 9e-4) / (xx - mx**2 + yy - my**2 + 9e-4)).mean().item()
    assert sample.ssim(fake, real).item() == pytest.approx(by_hand, abs=1e-4)


def test_latent_rgb_finds_a_linear_map():
    """The first three channels are mixed mean colours of the patches, and two more channels are noise."""
    images, mix = torch.rand(4, 3, 32, 32), torch.tensor([[2.0, 0, 1], [0, 1, 0], [-1, 0, 3]])
    colors = F.avg_pool2d(images, 8) * 2 - 1
    latents = torch.cat([torch.einsum("nchw,kc->nkhw", colors, mix) + 0.7, torch.randn(4, 2, 4, 4)], 1)
    factors, bias, r2 = latent_rgb.fit_latent_rgb(latents, images)
    assert r2 > 0.9999 and torch.allclose(factors, torch.cat([torch.linalg.inv(mix).T, torch.zeros(2, 3)]), atol=1e-3)
    assert torch.allclose(latent_rgb.latent_rgb(latents, factors, bias, (4, 4)), colors / 2 + 0.5, atol=1e-3)
    pasted = {}
    exec(latent_rgb.as_python(factors, bias), pasted)
    assert torch.allclose(torch.tensor(pasted["latent_rgb_factors"]), factors, atol=1e-4)


def table(output):
    """{row: its numbers} of the last table that sample.py has printed."""
    rows = re.findall(r"^(.*(?:teacher|decoder)) +(\d[\d. -]+)$", output, re.MULTILINE)
    return {row.strip(): [float(number) for number in numbers.split()] for row, numbers in rows}


def test_a_run_and_other_weights(tiny_run, copied_run, capsys):
    """The other weights are the run's own, so they have the same metrics, and so has the run's last evaluation."""
    script("sample.py", f"--out_dir={copied_run}", f"--compare={tiny_run.out / 'diffusers'}", "--device=cpu")
    rows, last = table(capsys.readouterr().out), evaluations(tiny_run.out)[-1]
    assert len(rows) == 1 + 3 + 3
    assert rows["our encoder and decoder"] == rows["diffusers: encoder and decoder"]
    for name, number in zip(("psnr", "ssim", "lowres_mse", "sharpness"), rows["our decoder"]):
        assert number == pytest.approx(last[f"val_{name}"], abs=0.0101 if name == "psnr" else 1.1e-3), name
    assert rows["our encoder, teacher's decoder"][0] == pytest.approx(last["val_teacher_psnr"], abs=0.0101)
    assert rows["our encoder, teacher's decoder"][4] == pytest.approx(last["val_latent_mse"], abs=1.1e-4)
    assert Image.open(copied_run / "samples" / "sample.png").height == (1 + len(rows) + 1) * (64 + 20)


@torch.no_grad()
def test_a_teacher_and_other_weights_at_two_sizes(tiny_run, tmp_path, capsys):
    path = tiny_run.out / "taesd_encoder.pth"
    script("sample.py", "--teacher=toy", f"--compare={path}", f"--images={tiny_run.folder}", "--count=6",
           "--size=32,64", "--device=cpu", f"--out_dir={tmp_path}")
    assert (tmp_path / "samples" / "look-32.png").exists()
    teacher, student = Teacher("toy"), build_student(load_student(str(path)))
    real = Images("", str(tiny_run.folder)).held_out(6, 64) / 255
    latent, encoded = teacher.encode(real), student["encoder"](real)
    pictures = {"teacher": teacher.decode(latent), "taesd_encoder.pth: decoder": student["decoder"](latent),
                "taesd_encoder.pth: encoder and decoder": student["decoder"](encoded),
                "taesd_encoder.pth: encoder, teacher's decoder": teacher.decode(encoded)}
    output = capsys.readouterr().out
    rows = table(output)
    assert rows.keys() == pictures.keys()
    for row, picture in pictures.items():
        metrics = sample.compute_metrics(picture.clamp(0, 1), real)
        assert rows[row][:4] == pytest.approx(list(metrics.values()), rel=1e-3, abs=6e-4), row
    assert rows[row][4] == pytest.approx(F.mse_loss(encoded, latent).item(), rel=1e-3)
    assert f"latents   standard deviation {latent.std():.2f}" in output


def test_whole_pictures(copied_run, tmp_path, capsys):
    gradient, pictures = Image.radial_gradient("L"), tmp_path / "pictures"
    for folder in ("a", "b"):
        (pictures / folder).mkdir(parents=True)
        gradient.resize((24, 24)).save(pictures / folder / "same.png")
    gradient.resize((75, 44)).convert("RGB").save(pictures / "photo.png")
    gradient.resize((75, 7)).save(pictures / "flat.png")
    script("sample.py", f"--out_dir={copied_run}", f"--images={pictures}", "--size=0", "--device=cpu")
    output = capsys.readouterr()
    assert "of 72x40, cpu" in output.out and "flat.png: 75x7 pixels: the short" in output.err
    whole = [Image.open(path) for path in (copied_run / "samples").glob("sample-*.png")]
    original, picture = Image.open(pictures / "photo.png"), max(whole, key=lambda image: image.width)
    parts = [picture.crop((0, top + 20, 72, top + 60)).tobytes() for top in range(0, picture.height, 60)]
    assert parts[0] == original.crop((1, 2, 73, 42)).tobytes()
    assert len(whole) == 3 and len(set(parts)) == len(parts) == 1 + 4 + 1
