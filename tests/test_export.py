"""What a run writes for other programs, loaded by code that is not ours, or held against what that code asks for."""
import importlib.util
import json
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file

import model
from conftest import load, script
from support import export, files
from test_smoke import records


def students(variant, channels=4, factor=8, width=8):
    """{half: network} whose every branch is heard, and its shape."""
    shape = dict(latent_channels=channels, factor=factor, width=width, variant=variant)
    networks = {"encoder": model.Encoder(**shape).eval(), "decoder": model.Decoder(**shape).eval()}
    with torch.no_grad():
        for network in networks.values():
            for weight in network.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
    return networks, shape


@torch.no_grad()
@pytest.mark.parametrize("channels,factor", [(3, 4), (16, 8), (16, 16), (64, 32)])
def test_diffusers_gives_the_same_pixels_at_every_factor(channels, factor, tmp_path):
    encoder, decoder = model.Encoder(channels, factor, 8), model.Decoder(channels, factor, 8)
    image = torch.rand(1, 3, 64, 128)
    export.save_diffusers(str(tmp_path / "tiny"), encoder, decoder)
    tiny = AutoencoderTiny.from_pretrained(tmp_path / "tiny")
    latent = tiny.encode(image * 2 - 1).latents
    assert latent.shape == (1, channels, 64 // factor, 128 // factor)
    assert torch.allclose(latent, encoder(image), atol=1e-5)
    assert torch.allclose(tiny.decode(latent).sample / 2 + 0.5, decoder(latent), atol=1e-5)


def tiny_autoencoder(channels, gn):
    """{name: shape} that TinyEncoder and TinyDecoder of stable-diffusion.cpp ask for, from its src/model/vae/tae.hpp at
    97d2990: 64 channels, factor 8; use_midblock_gn gives the blocks at the latents' resolution four more tensors."""
    wanted = {}

    def conv(name, n_in, n_out, bias=True, k=3):
        wanted[f"{name}.weight"] = (n_out, n_in, k, k)
        if bias:
            wanted[f"{name}.bias"] = (n_out,)

    def block(name, gn=False):
        for i in (0, 2, 4):
            conv(f"{name}.conv.{i}", 64, 64)
        if gn:
            conv(f"{name}.pool.0", 64, 256, False, 1)
            wanted.update({f"{name}.pool.1.weight": (256,), f"{name}.pool.1.bias": (256,)})
            conv(f"{name}.pool.3", 256, 64, False, 1)
    conv("encoder.layers.0", 3, 64)
    for i in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13):
        block(f"encoder.layers.{i}", gn and i > 10)
    for i in (2, 6, 10):
        conv(f"encoder.layers.{i}", 64, 64, False)
    conv("encoder.layers.14", 64, channels)
    conv("decoder.layers.0", channels, 64)
    for i in (2, 3, 4, 7, 8, 9, 12, 13, 14, 17):
        block(f"decoder.layers.{i}", gn and i < 5)
    for i in (6, 11, 16):
        conv(f"decoder.layers.{i}", 64, 64, False)
    conv("decoder.layers.18", 64, 3)
    return wanted


@pytest.mark.parametrize("variant,channels", [("plain", 4), ("plain", 16), ("midblock_gn", 32)])
def test_stable_diffusion_cpp_finds_its_tensors(variant, channels, tmp_path):
    networks, shape = students(variant, channels, width=64)
    export.save_halves(str(tmp_path / "taesd.safetensors"), networks, shape, torch.float16)
    found = load_file(tmp_path / "taesd.safetensors")
    shapes = {name: tuple(weight.shape) for name, weight in found.items()}
    assert shapes == tiny_autoencoder(channels, variant != "plain")
    assert torch.equal(found["decoder.layers.18.bias"], networks["decoder"][19].bias.half())
    assert oct((tmp_path / "taesd.safetensors").stat().st_mode)[-3:] == "644"


@torch.no_grad()
@pytest.mark.parametrize("variant,factor", [("plain", 8), ("midblock_gn", 8), ("f32", 32)])
def test_the_module_loads_without_this_project(variant, factor, tmp_path):
    networks, shape = students(variant, 4, factor)
    export.save_halves(str(tmp_path / "mine.safetensors"), networks, shape)
    export.save_module(str(tmp_path / "taesd_student.py"), shape)
    image, latent = torch.rand(1, 3, 2 * factor, 3 * factor), torch.randn(1, 4, 2, 3)
    torch.save([image, latent], tmp_path / "given.pt")
    (tmp_path / "use.py").write_text(
        "import torch\nfrom taesd_student import load\nencoder, decoder = load('mine.safetensors')\n"
        "image, latent = torch.load('given.pt')\n"
        "with torch.no_grad():\n    torch.save([encoder(image), decoder(latent)], 'found.pt')\n")
    subprocess.run([sys.executable, "use.py"], cwd=tmp_path, check=True, timeout=300)
    latents, images = load(tmp_path / "found.pt")
    assert (latents - networks["encoder"](image)).abs().max() < 1e-5 and latents.std() > 0.01
    assert (images - networks["decoder"](latent)).abs().max() < 1e-5 and images.std() > 0.01


def test_a_lone_half(tmp_path):
    networks, shape = students("plain")
    path = str(tmp_path / "half.safetensors")
    export.save_halves(path, {"decoder": networks["decoder"]}, shape)
    encoder, decoder = export.load(path)
    assert encoder is None and torch.equal(decoder[-1].weight, networks["decoder"][-1].weight)


# ONNX

def assert_onnx(path, network, channels, cell, dtype=torch.float32):
    session = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed").InferenceSession(path)
    for n, height, width in ((1, 5, 9), (3, 8, 4)):
        given = torch.rand(n, channels, height * cell, width * cell, dtype=dtype)
        found, = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        wanted = network.float()(given.float())
        assert np.abs(found - wanted.numpy()).max() < (1e-4 if dtype == torch.float32 else 1e-2), n
        assert wanted.std() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("half,variant,dtype", [
    ("encoder", "f32", torch.float32), ("decoder", "midblock_gn", torch.float32),
    ("decoder", "midblock_gn", torch.float16)])
def test_onnx(half, variant, dtype, tmp_path):
    """Of the halves with the most peculiar parts; plain ones are in test_export."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    network = students(variant, factor=32 if variant == "f32" else 8)[0][half]
    export.save_onnx(str(tmp_path / "half.onnx"), network, dtype)
    assert_onnx(tmp_path / "half.onnx", network, *((3, 32) if half == "encoder" else (4, 1)), dtype)


# python sample.py --export

@torch.no_grad()
@pytest.mark.parametrize("packages", [False, pytest.param(True, marks=pytest.mark.skipif(
    not importlib.util.find_spec("onnxscript"), reason="onnxscript is not installed"))])
def test_export(packages, copied_run, monkeypatch, capsys):
    if not packages:
        monkeypatch.setattr(export, "importlib", types.SimpleNamespace(util=types.SimpleNamespace(
            find_spec=lambda name: None)))
    script("sample.py", f"--out_dir={copied_run}", "--export", "--export_dtype=float16", "--export_name=taetoy")
    folder, halves = copied_run / "export", ("encoder", "decoder")
    names = {*(f"taetoy_{half}.pth" for half in halves), "taetoy.safetensors", "taesd_student.py", "diffusers",
             "README.md", "preview.png"}
    onnx = {f"taetoy_{half}.onnx" for half in halves}
    assert {path.name for path in folder.iterdir()} == (names | onnx if packages else names)
    assert ("pip install onnx onnxscript" in capsys.readouterr().out) != packages
    checkpoint = load(copied_run / "ckpt.pt")
    averaged = checkpoint["ema_decoder"]
    tiny = AutoencoderTiny.from_pretrained(folder / "diffusers", torch_dtype=torch.float16)
    for key, value in load(folder / "taetoy_decoder.pth").items():
        assert value.dtype == torch.float16 and torch.equal(value, averaged[key].half()), key
    assert torch.equal(tiny.decoder.layers[-1].weight, averaged["19.weight"].half())
    for name, weight in load_file(folder / "taetoy.safetensors").items():
        assert torch.equal(tiny.state_dict()[name], weight), name
    last = [line for line in records(copied_run) if "val_psnr" in line][-1]
    for card in (folder / "README.md", folder / "diffusers" / "README.md"):
        card = card.read_text(encoding="utf-8")
        assert "120 steps (480 images)" in card and f"| psnr | {last['val_psnr']:.4g} |" in card
        assert "library_name: diffusers" in card and "| latent_mse |" in card
        assert "started from scratch" in card and "toy: AutoencoderKL, 358,951 parameters, factor 8" in card
    picture = sorted((copied_run / "samples").glob("0*.png"))[-1]
    assert (folder / "preview.png").read_bytes() == picture.read_bytes()
    if packages:
        for half, network in files.student(checkpoint).items():
            cell = (3, 8) if half == "encoder" else (4, 1)
            assert_onnx(folder / f"taetoy_{half}.onnx", network, *cell, torch.float16)


def test_export_of_a_fork_s_student(copied_run, monkeypatch, capsys):
    """Its decoder ends in another layer: what can hold it is written, what cannot says so, and nothing stops."""
    def forked(*arguments, **keywords):
        layers = list(original(*arguments, **keywords))
        return torch.nn.Sequential(*layers[:-1], torch.nn.Conv2d(8, 3, 1))
    original, checkpoint = model.Decoder, load(copied_run / "ckpt.pt")
    monkeypatch.setattr(files, "Decoder", forked)
    weights = forked(**checkpoint["shape"]).state_dict()
    torch.save(checkpoint | {"ema_decoder": weights}, copied_run / "ckpt.pt")
    monkeypatch.setattr(export, "importlib", types.SimpleNamespace(
        util=types.SimpleNamespace(find_spec=lambda _: None)))
    script("sample.py", f"--out_dir={copied_run}", "--export")
    output = capsys.readouterr().out
    assert "no diffusers folder: AutoencoderTiny cannot express this student" in output
    assert "taesd_student.py: does not load this student" in output and "wrote taesd_encoder.pth" in output
    assert load_file(copied_run / "export" / "taesd.safetensors")["decoder.layers.18.weight"].shape == (3, 8, 1, 1)


def test_export_of_another_variant(copied_run, capsys):
    checkpoint = load(copied_run / "ckpt.pt")
    networks, shape = students("midblock_gn")
    weights = {f"ema_{half}": network.state_dict() for half, network in networks.items()}
    torch.save(checkpoint | weights | {"shape": shape, "ready": ["decoder"]}, copied_run / "ckpt.pt")
    shutil.rmtree(copied_run / "samples")
    script("sample.py", f"--out_dir={copied_run}", "--export")
    assert "AutoencoderTiny cannot express the variant midblock_gn" in capsys.readouterr().out
    card = (copied_run / "export" / "README.md").read_text(encoding="utf-8")
    assert 'load("taesd.safetensors")' in card and "preview" not in card and "diffusers.AutoencoderTiny" not in card
    assert "library_name: pytorch" in card and "latent_mse" not in card and "| psnr |" in card
    found = export.load(str(copied_run / "export" / "taesd.safetensors"))
    assert found[0] is None and torch.equal(found[1][-1].weight, networks["decoder"][-1].weight)


# the preview that needs no network

def test_latent_rgb_of_a_linear_latent_space(tmp_path):
    """Latents that hold the mean colours of their patches, mixed: the matrix finds them, whatever else they hold."""
    images, mix = torch.rand(4, 3, 32, 32), torch.tensor([[2.0, 0, 1], [0, 1, 0], [-1, 0, 3]])
    colors = torch.nn.functional.avg_pool2d(images, 8) * 2 - 1
    latents = torch.cat([torch.einsum("nchw,kc->nkhw", colors, mix) + 0.7, torch.randn(4, 2, 4, 4)], 1)
    factors, bias, r2 = export.fit_latent_rgb(latents, images)
    assert r2 > 0.9999 and torch.allclose(factors[:3], torch.linalg.inv(mix).T, atol=1e-3)
    assert torch.allclose(factors[3:], torch.zeros(2, 3), atol=1e-3)
    shown = export.latent_rgb(latents, factors, bias, 4)
    assert torch.allclose(shown, (colors / 2 + 0.5), atol=1e-3)
    text, found = export.save_latent_rgb(str(tmp_path / "rgb.json"), factors, bias), {}
    exec(text, found)
    written = json.loads((tmp_path / "rgb.json").read_text())
    for name, values in (("latent_rgb_factors", factors), ("latent_rgb_factors_bias", bias)):
        assert found[name] == written[name] and torch.allclose(torch.tensor(found[name]), values, atol=1e-4)
