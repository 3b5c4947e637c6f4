"""What a run writes for other programs, loaded by code that is not ours, or compared with what that code asks for."""
import importlib.util
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file

from conftest import HERE, evaluations, load, needs_data, plain_taesd, random_images, real_images, script, students
from support import export
from support.checkpoint import build_student, load_student

needs_onnx = pytest.mark.skipif(not importlib.util.find_spec("onnxscript"), reason="onnxscript is not installed")


@torch.no_grad()
@pytest.mark.parametrize("images", [random_images, pytest.param(real_images, marks=needs_data)])
def test_weights_of_a_run_give_the_same_pixels_in_other_programs(images, tiny_run):
    ours, plain = build_student(load(tiny_run.out / "ckpt.pt")), plain_taesd(8, 4)
    tiny = AutoencoderTiny.from_pretrained(tiny_run.out / "diffusers")
    assert (tiny.config.scaling_factor, tiny.config.shift_factor) == (1, 0)  # which pipelines apply
    for half, network in plain.items():
        network.load_state_dict(load(tiny_run.out / f"taesd_{half}.pth"), strict=True)
    for image in images(2):
        latent = ours["encoder"](image)
        picture = ours["decoder"](latent)
        assert (plain["encoder"](image) - latent).abs().max() < 1e-5
        assert (plain["decoder"](latent) - picture).abs().max() < 1e-5
        assert (tiny.encode(image * 2 - 1).latents - latent).abs().max() < 1e-5
        assert ((tiny.decode(latent).sample + 1) / 2 - picture).abs().max() < 1e-5
        assert picture.std() > 0.01 and latent.std() > 0.01


# formats

@torch.no_grad()
@pytest.mark.parametrize("channels, factor", [(3, 4), (16, 8), (16, 16), (64, 32)])
def test_diffusers_gives_the_same_pixels_at_every_factor(channels, factor, tmp_path):
    networks, shape = students("plain", channels, factor)
    image = torch.rand(1, 3, 64, 128)
    assert not export.save_diffusers(str(tmp_path / "tiny"), networks, shape)
    tiny = AutoencoderTiny.from_pretrained(tmp_path / "tiny")
    latent = tiny.encode(image * 2 - 1).latents
    assert latent.shape == (1, channels, 64 // factor, 128 // factor)
    assert torch.allclose(latent, networks["encoder"](image), atol=1e-5)
    assert torch.allclose(tiny.decode(latent).sample / 2 + 0.5, networks["decoder"](latent), atol=1e-5)


@pytest.mark.parametrize("variant, channels", [("plain", 4), ("plain", 16), ("midblock_gn", 32)])
def test_stable_diffusion_cpp_finds_its_tensors(variant, channels, tmp_path):
    """Its src/model/vae/tae.hpp (at 97d2990) asks for the layers of taesd.py, where the decoder's Clamp does not count;
    with use_midblock_gn, for those of TAEF2."""
    expected, (networks, _) = {}, students(variant, channels, width=64)
    for half, network in plain_taesd(64, channels, norm=variant != "plain").items():
        for name, weight in network.state_dict().items():
            layer, rest = name.split(".", 1)
            number = int(layer) - 1 if half == "decoder" else int(layer)
            expected[f"{half}.layers.{number}.{rest}"] = weight.shape
    export.save_safetensors(str(tmp_path / "taesd.safetensors"), networks, torch.float16)
    found = load_file(tmp_path / "taesd.safetensors")
    assert {name: weight.shape for name, weight in found.items()} == expected
    assert torch.equal(found["decoder.layers.18.bias"], networks["decoder"][19].bias.half())
    assert oct((tmp_path / "taesd.safetensors").stat().st_mode)[-3:] == "644"


def assert_onnx_gives_the_same_pixels(path, network, channels, cell, dtype, tolerance):
    """At several sizes. channels and cell: of the input, whose sides are multiples of `cell`."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = onnxruntime.InferenceSession(path)
    for n, height, width in ((1, 5, 9), (3, 8, 4)):
        given = torch.rand(n, channels, height * cell, width * cell, dtype=dtype)
        found, = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        expected = network.float()(given.float())
        assert np.abs(found - expected.numpy()).max() < tolerance and expected.std() > 0.01


@needs_onnx
@torch.no_grad()
def test_onnx_of_an_encoder_with_a_stem_and_of_a_decoder_with_groupnorm(tmp_path):
    path, encoder = str(tmp_path / "half.onnx"), students("f32", factor=32)[0]["encoder"]
    export.save_onnx(path, encoder)
    assert_onnx_gives_the_same_pixels(path, encoder, 3, 32, torch.float32, 1e-4)
    decoder = students("midblock_gn")[0]["decoder"]
    export.save_onnx(path, decoder, torch.float16)
    assert_onnx_gives_the_same_pixels(path, decoder, 4, 1, torch.float16, 1e-2)


@torch.no_grad()
def test_the_lines_of_the_model_card_load_the_weights_without_this_project(tiny_run, tmp_path):
    checkpoint, latent, expected, lines = load(tiny_run.out / "ckpt.pt"), torch.randn(1, 4, 2, 3), {}, ""
    for variant, factor in (("plain", 8), ("midblock_gn", 8), ("f32", 32)):
        networks, shape = students(variant, 4, factor)
        export.save_taesd(str(tmp_path / f"{variant}_decoder.pth"), networks["decoder"])
        card = export.model_card(checkpoint | {"shape": shape}, variant)
        lines += card.split("```python\n")[1].split("```")[0]
        lines += f"torch.save(decoder(torch.load('latent.pt')), 'found_{variant}.pt')\n"
        expected[variant] = networks["decoder"](latent)
    torch.save(latent, tmp_path / "latent.pt")
    shutil.copy(HERE / "model.py", tmp_path)
    subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, check=True, timeout=300)
    for variant, image in expected.items():
        assert (load(tmp_path / f"found_{variant}.pt") - image).abs().max() < 1e-5 and image.std() > 0.01


# python sample.py --export

@needs_onnx
@torch.no_grad()
def test_export_writes_every_format(copied_run):
    folder, picture = copied_run / "export", copied_run / "samples" / "0000060.png"
    (folder / "diffusers").mkdir(parents=True)
    (folder / "diffusers" / "notes.txt").write_text("somebody's, and stays there")
    script("sample.py", f"--out_dir={copied_run}", "--export", "--export_dtype=float16", "--export_name=taetoy")
    assert {path.name for path in folder.iterdir()} == {
        "taetoy_encoder.pth", "taetoy_decoder.pth", "taetoy.safetensors", "taetoy_encoder.onnx", "taetoy_decoder.onnx",
        "diffusers", "model.py", "README.md", "preview.png"}
    assert (folder / "model.py").read_bytes() == (HERE / "model.py").read_bytes()
    assert (folder / "preview.png").read_bytes() == picture.read_bytes()
    assert (folder / "diffusers" / "notes.txt").exists()
    checkpoint = load(copied_run / "ckpt.pt")
    averaged, decoder = checkpoint["ema_decoder"], build_student(checkpoint)["decoder"]
    assert_onnx_gives_the_same_pixels(folder / "taetoy_decoder.onnx", decoder, 4, 1, torch.float16, 1e-2)
    for key, value in load(folder / "taetoy_decoder.pth").items():
        assert value.dtype == torch.float16 and torch.equal(value, averaged[key].half()), key
    tiny = AutoencoderTiny.from_pretrained(folder / "diffusers", torch_dtype=torch.float16).state_dict()
    assert torch.equal(tiny["decoder.layers.18.weight"], averaged["19.weight"].half())
    for name, weight in load_file(folder / "taetoy.safetensors").items():
        assert torch.equal(tiny[name], weight), name
    for card in (folder / "README.md", folder / "diffusers" / "README.md"):
        text = card.read_text(encoding="utf-8")
        assert "library_name: diffusers" in text and "AutoencoderKL, 358,951 parameters, factor 8" in text
        assert "60 steps (240 images)" in text and "| latent_mse |" in text
        assert f"| psnr | {evaluations(copied_run)[-1]['val_psnr']:.4g} |" in text


def test_export_of_a_decoder_of_another_variant_without_the_onnx_packages(copied_run, monkeypatch, capsys):
    networks, shape = students("midblock_gn")
    weights = {"ema_decoder": networks["decoder"].state_dict(), "shape": shape, "exportable": ["decoder"]}
    torch.save(load(copied_run / "ckpt.pt") | weights, copied_run / "ckpt.pt")
    shutil.rmtree(copied_run / "samples")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    script("sample.py", f"--out_dir={copied_run}", "--export")
    output = capsys.readouterr().out
    assert "no diffusers folder: AutoencoderTiny can only hold" in output and "pip install onnx onnxscript" in output
    card = (copied_run / "export" / "README.md").read_text(encoding="utf-8")
    assert "library_name: pytorch" in card and "preview" not in card
    assert "latent_mse" not in card and "| psnr |" in card  # the encoder's metrics are left out
    again = build_student(load_student(str(copied_run / "export" / "taesd.safetensors")))
    assert list(again) == ["decoder"] and torch.equal(again["decoder"][-1].bias, networks["decoder"][-1].bias)
