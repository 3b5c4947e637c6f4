"""python -m pytest test_smoke.py: the real commands at tiny sizes, and the mathematics against values worked out by hand.

Tests on real images and released weights look for them in $TAESD_TEST_DATA and skip where they are missing.
"""
import ast
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image

import configure
import data
import model
import sample
from teacher import Teacher

HERE = Path(__file__).parent
DATA = Path(os.environ.get("TAESD_TEST_DATA", HERE.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no test images and weights at {DATA} (set TAESD_TEST_DATA)")
TINY = ["--device=cpu", "--crop=32", "--batch_size=4", "--width=8", "--eval_images=2", "--eval_size=64", "--replay_size=8", "--window=64",
        "--adversarial_start=1", "--log_interval=1", "--workers=2"]


def start(script, *arguments, **environment):
    return subprocess.Popen([sys.executable, HERE / script, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | environment)


def run(script, *arguments, **environment):
    process = start(script, *arguments, **environment)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def records(out_dir):
    return [json.loads(line) for line in open(out_dir / "log.jsonl")]


def real_images(n):
    """The first n held-out images as [1,3,H,W] in [0,1], cropped from the top left to multiples of 8."""
    for path in sorted((DATA / "val").iterdir())[:n]:
        image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None] / 255
        yield image[..., :image.shape[-2] // 8 * 8, :image.shape[-1] // 8 * 8]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A short run with its own picture folder, shared by the tests that only look at it."""
    folder, out = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("run") / "out"
    (folder / "deeper").mkdir()
    for i in range(24):
        leaves = Image.fromarray(data.dead_leaves(80, np.random.default_rng(i)))
        leaves.save(folder / ("deeper" if i % 2 else ".") / f"{i}.{('jpg', 'PNG', 'webp', 'JPEG')[i % 4]}")
    (folder / "broken.jpg").write_text("not an image")
    output = run("train.py", *TINY, f"--data_dir={folder}", f"--out_dir={out}", "--max_iters=240", "--eval_interval=80", "--learning_rate=3e-3",
                 "--adversarial_start=220")
    return types.SimpleNamespace(folder=folder, out=out, output=output)


# the networks and their files

def test_networks():
    assert model.parameters(model.Encoder(latent_channels=4)) == 1_222_532
    assert model.parameters(model.Decoder(latent_channels=4)) == 1_222_531
    for variant, factor in (("plain", 4), ("plain", 8), ("midblock_gn", 8), ("plain", 16), ("plain", 32), ("f32", 32)):
        image = torch.rand(2, 3, 64, 64)
        latent = model.Encoder(5, factor, 8, variant)(image)
        assert latent.shape == (2, 5, 64 // factor, 64 // factor)
        assert model.Decoder(5, factor, 8, variant)(latent).shape == image.shape
        assert model.Discriminator(5)(image, latent).shape == (2, 5, *latent.shape[2:])


@torch.no_grad()
def test_a_fresh_groupnorm_branch_is_silent():
    for build, given in ((model.Encoder, torch.rand(1, 3, 32, 32)), (model.Decoder, torch.randn(1, 5, 4, 4))):
        plain, branched = build(5, 8, 8), build(5, 8, 8, "midblock_gn")
        branched.load_state_dict(plain.state_dict(), strict=False)
        assert torch.equal(plain(given), branched(given))
        branched.state_dict()[next(key for key in branched.state_dict() if key.endswith("pool.3.weight"))].fill_(0.1)
        assert not torch.allclose(plain(given), branched(given), atol=1e-3)


def plain_taesd(width, channels):
    """taesd.py's layout in plain torch, written without looking at model.py's classes."""
    class B(nn.Module):
        def __init__(self):
            super().__init__()
            c = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
            self.conv = nn.Sequential(c[0], nn.ReLU(), c[1], nn.ReLU(), c[2])

        def forward(self, x):
            return (self.conv(x) + x).relu()

    class C(nn.Module):
        def forward(self, x):
            return (x / 3).tanh() * 3

    def down():
        return nn.Conv2d(width, width, 3, 2, 1, bias=False), B(), B(), B()

    def up():
        return B(), B(), B(), nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, 1, 1, bias=False)
    encoder = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), B(), *down(), *down(), *down(), nn.Conv2d(width, channels, 3, 1, 1))
    decoder = nn.Sequential(C(), nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU(), *up(), *up(), *up(), B(), nn.Conv2d(width, 3, 3, 1, 1))
    return encoder, decoder


@needs_data
@torch.no_grad()
def test_exports_give_the_same_pixels(tiny_run):
    checkpoint = torch.load(tiny_run.out / "ckpt.pt", weights_only=True)
    encoder, decoder = model.Encoder(**checkpoint["shape"]), model.Decoder(**checkpoint["shape"])
    encoder.load_state_dict(checkpoint["ema_encoder"]), decoder.load_state_dict(checkpoint["ema_decoder"])
    plain = plain_taesd(8, 4)
    for network, half in zip(plain, ("encoder", "decoder")):
        network.load_state_dict(torch.load(tiny_run.out / f"taesd_{half}.pth", weights_only=True), strict=True)
    # ComfyUI and A1111 go by these: names under a prefix of theirs, and the channels that the first convolution takes or the last gives
    files = {half: torch.load(tiny_run.out / f"taesd_{half}.pth", weights_only=True) for half in ("encoder", "decoder")}
    assert files["decoder"]["1.weight"].shape[1] == 4 and files["encoder"][list(files["encoder"])[-1]].shape == (4,)
    assert "3.conv.0.bias" in files["decoder"] and "0.weight" not in files["decoder"] and files["encoder"]["0.weight"].shape[1] == 3
    tiny = AutoencoderTiny.from_pretrained(tiny_run.out / "diffusers")
    for image in real_images(5):
        latent = encoder(image)
        picture = decoder(latent)
        assert (plain[0](image) - latent).abs().max() < 1e-5 and (plain[1](latent) - picture).abs().max() < 1e-5
        assert (tiny.encode(image * 2 - 1).latents - latent).abs().max() < 1e-5
        assert ((tiny.decode(latent).sample + 1) / 2 - picture).abs().max() < 1e-5


@torch.no_grad()
def test_stable_diffusion_pipeline_decodes_with_it(tiny_run):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=8, block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    pipe = StableDiffusionPipeline(vae=AutoencoderTiny.from_pretrained(tiny_run.out / "diffusers"), unet=unet, scheduler=DDIMScheduler(),
                                   text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    words, start_latent = torch.randn(1, 4, 8), torch.randn(1, 4, 8, 8)
    latent, image = (pipe(prompt_embeds=words, latents=start_latent, num_inference_steps=2, guidance_scale=1, output_type=kind).images
                     for kind in ("latent", "pt"))
    decoder = model.load_taesd(tiny_run.out / "taesd_decoder.pth")[0]
    assert (image - decoder(latent).clamp(0, 1)).abs().max() < 1e-4 and image.std() > 0.01


@needs_data
@torch.no_grad()
def test_released_flux2_weights():
    (encoder, shape), (decoder, _) = (model.load_taesd(DATA / "weights" / f"taef2_{half}.pth") for half in ("encoder", "decoder"))
    assert shape == {"latent_channels": 32, "width": 64, "factor": 8, "variant": "midblock_gn"}
    figures = [sample.psnr(decoder(encoder(image)).clamp(0, 1), image).item() for image in real_images(100)]
    assert np.mean(figures) == pytest.approx(31.4, abs=0.05)
    teacher = Teacher(str(DATA / "weights" / "taef2_encoder.pth"))
    image = torch.rand(1, 3, 64, 64)  # textured: on flat areas GroupNorm magnifies the rounding of another memory layout
    assert torch.allclose(teacher.encode(image), encoder(image), atol=1e-4) and (teacher.latent_channels, teacher.factor) == (32, 8)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    def full_disk(aside):
        Path(aside).write_text("half")
        raise OSError("No space left on device")
    (tmp_path / "weights").write_text("whole")
    with pytest.raises(SystemExit, match="weights: could not be written .*No space left"):
        model.save_file(str(tmp_path / "weights"), full_disk)
    assert [path.name for path in tmp_path.iterdir()] == ["weights"] and (tmp_path / "weights").read_text() == "whole"


@needs_data
def test_released_sana_encoder():
    encoder, shape = model.load_taesd(DATA / "weights" / "taesana_encoder.pth")
    assert shape == {"latent_channels": 32, "width": 64, "factor": 32, "variant": "f32"} and encoder[0].weight.dtype == torch.float32
    checkpoint = model.load_student(str(DATA / "weights" / "taesana_encoder.pth"))
    assert checkpoint["ready"] == ["encoder"] and torch.equal(checkpoint["ema_encoder"]["0.weight"], encoder[0].weight)


@pytest.mark.parametrize("variant,factor,width", [("plain", 8, 8), ("plain", 16, 4), ("midblock_gn", 8, 8), ("f32", 32, 8)])
def test_files_of_every_variant_come_back(variant, factor, width, tmp_path):
    shape = dict(latent_channels=6, factor=factor, width=width, variant=variant)
    encoder, decoder = model.Encoder(**shape), model.Decoder(**shape)
    for half, network in (("encoder", encoder), ("decoder", decoder)):
        model.save_taesd(str(tmp_path / f"my_{half}.pth"), network, torch.float16)
    sources = [tmp_path / "my_decoder.pth"]
    if variant == "plain":
        model.save_diffusers(str(tmp_path / "tiny"), encoder, decoder, torch.float16)
        sources.append(tmp_path / "tiny")
    for source in sources:
        again = model.load_student(str(source))
        assert again["shape"] == shape and sorted(again["ready"]) == ["decoder", "encoder"]
        for half, network in (("encoder", encoder), ("decoder", decoder)):
            for key, value in network.state_dict().items():
                assert torch.equal(again[f"ema_{half}"][key], value.half().float()), key


@torch.no_grad()
@pytest.mark.parametrize("channels,factor", [(3, 4), (16, 8), (16, 16), (64, 32)])
def test_diffusers_gives_the_same_pixels_at_every_factor(channels, factor, tmp_path):
    encoder, decoder, image = model.Encoder(channels, factor, 8), model.Decoder(channels, factor, 8), torch.rand(1, 3, 64, 128)
    model.save_diffusers(str(tmp_path / "tiny"), encoder, decoder)
    tiny = AutoencoderTiny.from_pretrained(tmp_path / "tiny")
    latent = tiny.encode(image * 2 - 1).latents
    assert latent.shape == (1, channels, 64 // factor, 128 // factor) and torch.allclose(latent, encoder(image), atol=1e-5)
    assert torch.allclose(tiny.decode(latent).sample / 2 + 0.5, decoder(latent), atol=1e-5)


@torch.no_grad()
def test_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    for variant, factor in (("plain", 8), ("midblock_gn", 8), ("f32", 32)):
        shape = dict(latent_channels=4, factor=factor, width=8, variant=variant)
        for half, network, channels, cell in (("encoder", model.Encoder(**shape), 3, factor), ("decoder", model.Decoder(**shape), 4, 1)):
            for weight in network.parameters():  # branches that are silent at first must be heard
                weight.add_(0.02 * torch.randn_like(weight))
            model.save_onnx(str(tmp_path / f"{half}.onnx"), network)
            session = runtime.InferenceSession(tmp_path / f"{half}.onnx")
            for n, height, width in ((1, 5, 9), (3, 8, 4)):
                given = torch.rand(n, channels, height * cell, width * cell)
                found, = session.run(None, {session.get_inputs()[0].name: given.numpy()})
                assert np.abs(found - network(given).numpy()).max() < 1e-4, (variant, half)


# the teacher

@torch.no_grad()
def test_teacher_speaks_the_vae_s_language(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=3,
                        block_out_channels=(8, 8, 8), norm_num_groups=4, scaling_factor=0.5, shift_factor=0.25).eval()
    vae.save_pretrained(tmp_path / "vae")
    teacher, image = Teacher(tmp_path), torch.rand(2, 3, 16, 24)  # the folder of a whole pipeline works, too
    assert (teacher.latent_channels, teacher.factor, 1 / teacher.std) == (3, 4, 0.5)
    latent = (vae.encode(2 * image - 1).latent_dist.mean - 0.25) * 0.5
    assert torch.allclose(teacher.encode(image), latent, atol=1e-6) and latent.shape == (2, 3, 4, 6)
    assert torch.allclose(teacher.decode(latent), (vae.decode(latent / 0.5 + 0.25).sample / 2 + 0.5).clamp(0, 1), atol=1e-6)
    assert Teacher(tmp_path, dtype=torch.float16).dtype == torch.float32  # force_upcast in its config: it overflows in float16
    vae.register_to_config(force_upcast=False)
    vae.save_pretrained(tmp_path / "vae")
    assert Teacher(tmp_path, dtype=torch.float16).dtype == torch.float16


def families():
    """(VAE, channels, factor, latents by hand, images by hand): as the pipelines of diffusers compute them."""
    import diffusers

    def scaled(vae, image):
        shift, scale = vae.config.get("shift_factor") or 0, vae.config.scaling_factor
        found = vae.encode(image)
        latent = ((found.latent if isinstance(vae, diffusers.AutoencoderDC) else found.latent_dist.mode()) - shift) * scale
        return latent, vae.decode(latent / scale + shift).sample

    def sdxl_by_channel(vae, image):  # StableDiffusionXLPipeline, of a VAE with latents_mean and latents_std
        mean, std = (torch.tensor(vae.config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
        latent = (vae.encode(image).latent_dist.mode() - mean) * vae.config.scaling_factor / std
        return latent, vae.decode(latent * std / vae.config.scaling_factor + mean).sample

    def flux2(vae, image):  # Flux2Pipeline: _patchify_latents, batch norm, _unpatchify_latents
        latent = vae.encode(image).latent_dist.mode()
        n, c, h, w = latent.shape
        mean, std = vae.bn.running_mean.view(1, -1, 1, 1), torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        patches = (latent.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, c * 4, h // 2, w // 2) - mean) / std

        def unpatchify(patches):
            return patches.reshape(n, c, 2, 2, h // 2, w // 2).permute(0, 1, 4, 2, 5, 3).reshape(n, c, h, w)
        return unpatchify(patches), vae.decode(unpatchify(patches * std + mean)).sample

    def video(vae, image):  # QwenImageImg2ImgPipeline, WanImageToVideoPipeline
        mean, std = (torch.tensor(vae.config[name]).view(1, vae.config.z_dim, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        latent = (vae.encode(image.unsqueeze(2)).latent_dist.mode() - mean) * (1.0 / std)
        return latent[:, :, 0], vae.decode(latent / (1.0 / std) + mean).sample[:, :, 0]

    def tiny(vae, image):
        latent = vae.encode(image).latents
        return latent, vae.decode(latent).sample

    def kl(depth, **config):
        return diffusers.AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * depth, up_block_types=("UpDecoderBlock2D",) * depth,
                                       block_out_channels=(8,) * depth, norm_num_groups=4, layers_per_block=1, **config)
    torch.manual_seed(0)
    four = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(8,) * 4, norm_num_groups=4)
    flux2_vae = diffusers.AutoencoderKLFlux2(**four)
    flux2_vae.bn.running_mean.normal_(), flux2_vae.bn.running_var.uniform_(0.5, 2)
    blocks, widths = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3, (8, 8, 16, 32, 32, 64)
    sana = diffusers.AutoencoderDC(
        latent_channels=32, attention_head_dim=8, encoder_block_types=blocks, decoder_block_types=blocks, encoder_block_out_channels=widths,
        decoder_block_out_channels=widths, encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6, downsample_block_type="Conv",
        encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)), decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        decoder_norm_types="rms_norm", decoder_act_fns="silu", upsample_block_type="interpolate", scaling_factor=0.41407)
    return {
        "sd": (kl(4, scaling_factor=0.18215), 4, 8, scaled), "sdxl": (kl(4, scaling_factor=0.13025), 4, 8, scaled),
        "by_channel": (kl(4, scaling_factor=0.5, latents_mean=[-1.6, 1.1, 0.1, 0.4], latents_std=[8.4, 6.0, 5.3, 5.0]), 4, 8, sdxl_by_channel),
        "sd3": (kl(4, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False), 16, 8, scaled),
        "flux1": (kl(4, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False), 16, 8, scaled),
        "kl-f4": (kl(3, latent_channels=3), 3, 4, scaled), "kl-f16": (kl(5, latent_channels=16), 16, 16, scaled),
        "kl-f32": (kl(6, latent_channels=64), 64, 32, scaled),
        "flux2": (flux2_vae, 32, 8, flux2), "sana": (sana, 32, 32, scaled),
        "qwen": (diffusers.AutoencoderKLQwenImage(base_dim=8), 16, 8, video), "wan": (diffusers.AutoencoderKLWan(base_dim=8), 16, 8, video),
        "tiny": (AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4), 4, 8, tiny)}


@torch.no_grad()
def test_every_family_of_vaes(tmp_path):
    processes = {}
    for name, (vae, channels, factor, by_hand) in families().items():
        vae.eval().save_pretrained(tmp_path / name)
        teacher, image = Teacher(tmp_path / name), torch.rand(2, 3, 64, 128)
        latent, picture = by_hand(vae, image * 2 - 1)
        assert (teacher.latent_channels, teacher.factor) == (channels, factor), name
        assert torch.allclose(teacher.encode(image), latent, atol=1e-4), name
        assert torch.allclose(teacher.decode(latent), (picture / 2 + 0.5).clamp(0, 1), atol=1e-4), name
        processes[name] = start("train.py", *TINY, f"--teacher={tmp_path / name}", "--max_iters=3", f"--out_dir={tmp_path / name / 'out'}")
    for name, process in processes.items():
        _, errors = process.communicate()
        assert process.returncode == 0, (name, errors)
        variant = {"flux2": "midblock_gn", "sana": "f32"}.get(name, "plain")
        assert model.load_taesd(tmp_path / name / "out" / "taesd_decoder.pth")[1]["variant"] == variant
        assert (tmp_path / name / "out" / "diffusers").is_dir() == (variant == "plain")


@torch.no_grad()
def test_a_single_file_in_the_original_layout(tmp_path):
    """The layout of CompVis: keys of diffusers renamed back, for a VAE of Stable Diffusion's depth and small width."""
    import safetensors.torch
    from diffusers import AutoencoderKL
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(32,) * 4,
                        layers_per_block=2, scaling_factor=0.18215).eval()
    vae.save_pretrained(tmp_path / "vae")
    original = {}
    for key, value in vae.state_dict().items():
        for ours, theirs in ORIGINAL:
            key = re.sub(ours, theirs, key)
        original[key] = value[..., None, None] if value.ndim == 2 and "mid.attn" in key else value
    original = {key: value.contiguous() for key, value in original.items()}
    safetensors.torch.save_file(original, tmp_path / "vae.safetensors")
    safetensors.torch.save_file({f"first_stage_model.{key}": value for key, value in original.items()}, tmp_path / "model.safetensors")
    torch.save({"state_dict": {f"first_stage_model.{key}": value for key, value in original.items()}}, tmp_path / "model.ckpt")
    image = torch.rand(1, 3, 32, 32)
    latent = Teacher(tmp_path / "vae").encode(image)
    for name in ("vae.safetensors", "model.safetensors", "model.ckpt"):
        again = Teacher(f"{tmp_path / name}::{tmp_path / 'vae'}")
        assert torch.allclose(again.encode(image), latent, atol=1e-4) and 1 / again.std == pytest.approx(0.18215), name


ORIGINAL = [  # patterns of keys: diffusers -> CompVis
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"), (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"), (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"), (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut")]


def test_toy_teacher_draws_recognisable_pictures():
    teacher, leaves = Teacher("toy"), data.Images().held_out(8, 128)
    latents = teacher.encode(leaves / 255)
    assert latents.std() == pytest.approx(1, abs=0.15) and latents.mean().abs() < 0.3
    assert sample.psnr(teacher.decode(latents), leaves / 255).mean() > 19
    assert sum(path.stat().st_size for path in (HERE / "assets" / "toy_vae").iterdir()) < 2**20


def test_a_look_at_a_teacher(tmp_path):
    output = run("teacher.py", "--teacher=toy", "--device=cpu", f"--out_dir={tmp_path}")
    assert "AutoencoderKL, 358,951 parameters, factor 8, 4 channels, scaling factor 0.75216" in output
    std = next(line for line in output.splitlines() if line.startswith("std"))
    assert np.mean([float(value) ** 2 for value in std.split()[1:]]) == pytest.approx(1, abs=0.2) and (tmp_path / "round_trip.png").exists()


def test_sdxl_shaped_teacher_trains(tmp_path):
    AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
                  block_out_channels=(128, 256, 512, 512), scaling_factor=0.13025, sample_size=1024).save_pretrained(tmp_path / "sdxl")
    output = run("train.py", *TINY, f"--teacher={tmp_path / 'sdxl'}", "--batch_size=2", "--max_iters=2", f"--out_dir={tmp_path / 'out'}")
    assert "factor 8, 4 channels, scaling factor 0.13025" in output
    assert records(tmp_path / "out")[-1]["images_seen"] == 4


def test_teacher_trainer(tmp_path):
    output = run("teacher.py", "--factor=16", "--latent_channels=6", "--max_iters=3", "--batch_size=2", "--vae_width=8", "--device=cpu",
                 "--crop=32", f"--out_dir={tmp_path / 'f16'}")
    teacher = Teacher(str(tmp_path / "f16"))
    assert (teacher.factor, teacher.latent_channels) == (16, 6) and f"scaling_factor: {round(1 / teacher.std, 5)}" in output


# the losses: train.py is a script, so its definitions are taken out of it

@pytest.fixture(scope="session")
def train():
    tree = ast.parse((HERE / "train.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    scope = types.SimpleNamespace(torch=torch, F=F, device="cpu")
    exec(compile(tree, "train.py", "exec"), vars(scope))
    return scope


def test_losses_by_hand(train):
    real, fake = torch.tensor([1.0, 0.5]), torch.tensor([-1.0, 1.5])
    softplus = np.log1p(np.exp([2.0, -1.0])).mean(), np.log1p(np.exp([-2.0, 1.0])).mean()  # of real - fake, of fake - real
    for train.adversarial_form, of_decoder, of_discriminator in (
            ("squares", (4 + 1) / 2, (0 + 0.25) / 2 + (0 + 6.25) / 2), ("softplus", *softplus), ("hinge", -0.25, 0.5 / 2 + 2.5 / 2)):
        assert train.adversarial_loss(real, fake).item() == pytest.approx(of_decoder)
        assert train.discriminator_loss(real, fake).item() == pytest.approx(of_discriminator)
    dark, spotted = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    spotted[0, 0, 0, 0] = 64.0  # the mean of one 8x8 patch of one channel becomes 1: 1 of 12 pooled values
    assert train.lowres_mse(spotted, dark).item() == pytest.approx(1 / 12)
    images = np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)
    amplitudes = np.abs(np.fft.rfft2(images)) / 8
    assert train.frequency_l1(*torch.from_numpy(images).split(1)).item() == pytest.approx(np.abs(amplitudes[0] - amplitudes[1]).mean(), rel=1e-4)


def test_the_size_of_the_adversarial_gradient(train):
    torch.manual_seed(0)
    train.scaler, train.zero = torch.amp.GradScaler("cpu", enabled=False), torch.zeros(())
    fake = torch.rand(2, 3, 4, 4, requires_grad=True)
    loss = (fake ** 3 * torch.tensor([1e-6, 1e-5]).view(2, 1, 1, 1)).sum()  # gradients of very different size
    gradient = torch.autograd.grad(train.of_unit_gradient(loss, fake), fake)[0]
    assert (gradient.std() * fake.numel()).item() == pytest.approx(1, rel=1e-2)
    assert torch.allclose(F.cosine_similarity(gradient.flatten(1), fake.square().flatten(1)), torch.ones(2))  # each keeps its direction
    layer = torch.tensor([3.0, 4.0], requires_grad=True)
    assert train.adaptive_weight((layer ** 2).sum(), 2 * layer.sum(), layer).item() == pytest.approx(10 / 8 ** 0.5, rel=1e-3)


def test_ramp(train):
    train.warmup_iters, train.max_iters, train.cooldown = 4, 100, 0.2
    assert [train.ramp(step) for step in (0, 3, 50, 80, 90, 99)] == pytest.approx([0.25, 1, 1, 1, 0.5, 0.05])


def test_out_of_memory_is_one_line(train, capsys):
    vars(train).update(sys=sys, batch_size=16, crop=96, window=256, replay_size=8, out_dir="out")
    train.explain(torch.OutOfMemoryError, torch.OutOfMemoryError("tried to allocate"), None)
    assert capsys.readouterr().err.startswith("error: out of memory on cpu: a smaller --batch_size (16)")
    train.explain(ValueError, ValueError("something else"), None)
    assert "ValueError: something else" in capsys.readouterr().err


def greys(value, n=4):
    """n pairs of an image of one grey and a latent that holds that value."""
    return torch.full((n, 3, 4, 4), value * 51 / 255), torch.full((n, 2, 1, 1), float(value))


def test_replay_is_half_new_half_old(train):
    torch.manual_seed(0)
    replay = train.Memory(8, (3, 4, 4), (2, 1, 1))
    for value in range(1, 6):
        mixed, latent = train.half_old(replay, *greys(value))
        assert (latent[2:] == value).all() and torch.allclose(mixed, latent[:, :1] * 51 / 255, atol=1e-6) and len(mixed) == 4
    assert replay.full and replay.images.dtype == torch.uint8
    drawn = {value.item() for _ in range(20) for value in replay.draw(4)[1][:, 0, 0, 0]}
    assert 5.0 in drawn and len(drawn) > 1  # new ones are in, older ones still are
    assert torch.equal(train.half_old(train.Memory(0, (3, 4, 4), (2, 1, 1)), *greys(2))[0], greys(2)[0])


def test_a_memory_replaces_what_was_used_most(train):
    torch.manual_seed(0)
    pool = train.Memory(64, (3, 4, 4), (2, 1, 1))
    served = torch.zeros(400)
    for n in range(100):  # 4 new ones and 8 drawn a step, each with a number of its own
        numbers = torch.arange(4 * n, 4 * n + 4.0).view(4, 1, 1, 1).expand(4, 2, 1, 1)
        pool.push(torch.rand(4, 3, 4, 4), numbers)
        _, latents = pool.draw(8)
        assert len(set(latents[:, 0, 0, 0].tolist())) == min(8, 4 * n + 4)
        served[latents[:, 0, 0, 0].long()] += 1
    gone = served[:200]
    assert gone.min() >= 1 and gone.mean() == pytest.approx(2, abs=0.5)  # none wasted
    for n in (48, 48, 4):  # it fills up though no batch fits
        again = train.Memory(64, (3, 4, 4), (2, 1, 1))
        again.push(*greys(1, 48)), again.push(*greys(2, n))
        assert again.filled == min(64, 48 + n)
    again = train.Memory(64, (3, 4, 4), (2, 1, 1))
    again.load_state_dict(pool.state_dict())
    assert all(torch.equal(getattr(again, name), getattr(pool, name)) for name in ("images", "latents", "uses")) and again.full


def test_windows_are_cut_in_their_place(train):
    squares, latents = torch.rand(2, 3, 32, 32), torch.rand(2, 5, 4, 4)
    crops, parts = train.cut(squares, 2), train.cut(latents, 2)
    assert torch.equal(crops[5], squares[1, :, :16, 16:]) and torch.equal(parts[5], latents[1, :, :2, 2:])
    assert torch.equal(train.cut(squares, 1), squares)


def test_latents_are_those_of_the_whole_window(tmp_path):
    run("train.py", *TINY, "--dtype=float32", "--max_iters=1", f"--out_dir={tmp_path / 'out'}")
    pool = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["pool"]
    crops, latents, teacher = pool["images"][:4] / 255, pool["latents"][:4].float(), Teacher("toy")  # of one window, row by row
    window = torch.cat([torch.cat(list(crops[row:row + 2]), 2) for row in (0, 2)], 1)[None]
    whole = teacher.encode(window)[0]
    for i, (y, x) in enumerate(((0, 0), (0, 4), (4, 0), (4, 4))):
        assert torch.allclose(latents[i], whole[:, y:y + 4, x:x + 4], atol=5e-3)
    assert (teacher.encode(crops) - latents).abs().max() > 0.1


def test_muon_is_that_of_torch():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(8, 8, 3, 3)) for _ in range(3)] + [nn.Parameter(torch.randn(32, 8, 1, 1))]
    theirs = [nn.Parameter(weight.detach().flatten(1).clone()) for weight in ours]
    before = [weight.detach().clone() for weight in theirs]
    optimizers = model.Muon(ours, 0.1, dtype=torch.bfloat16), torch.optim.Muon(theirs, 0.1, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    for a, b, c in zip(ours, theirs, before):
        assert (a.flatten(1) - b).abs().max() < 0.01 < 0.05 < (b - c).abs().max()
    values = torch.linalg.svdvals(model.orthogonal(torch.randn(2, 64, 16)))  # five iterations reach from 0.68 to 1.13
    assert values.min() > 0.6 and values.max() < 1.3


def test_measures_by_hand():
    real, fake = torch.full((1, 3, 32, 32), 0.5), torch.full((1, 3, 32, 32), 0.6)
    assert sample.psnr(fake, real).item() == pytest.approx(20, abs=1e-3)
    assert sample.ssim(fake, real).item() == pytest.approx((2 * 0.5 * 0.6 + 1e-4) / (0.25 + 0.36 + 1e-4), abs=1e-3)
    assert sample.lowres_mse(fake, real).item() == pytest.approx(0.01)
    noise = torch.rand(2, 3, 32, 32)
    assert sample.sharpness(noise * 0.5, noise).item() == pytest.approx(0.25)


# the images

def test_color_augmentation():
    pure = np.zeros((4, 4, 3), np.uint8)
    pure[..., 0] = 255
    crops = [data.color_augmented(pure, np.random.default_rng(i)) for i in range(200)]
    rng = np.random.default_rng(3)
    matrix, blend = 0.5 + rng.standard_normal((3, 3), dtype=np.float32), rng.random(3, dtype=np.float32)
    red = np.array([1.0, 0, 0])  # red picks out the matrix's first row
    assert np.allclose(crops[3][0, 0], 255 * (red + blend * (np.clip(matrix[0], 0, 1) - red)), atol=1)
    assert len({tuple(crop[0, 0]) for crop in crops}) > 100  # uint8 keeps them in [0,1]; they differ


def test_batches_depend_on_seed_and_number_alone(tiny_run):
    def first(n, workers, at=0, seed=1):
        loader = data.batches(data.Images(str(tiny_run.folder)), 32, 3, 0.1, seed, workers, at)
        return [next(loader) for _ in range(n)]
    once, again = first(4, workers=1), first(4, workers=3)
    assert all(torch.equal(a, b) for a, b in zip(once, again)) and torch.equal(first(1, 2, at=2)[0], once[2])
    assert not torch.equal(once[0], once[1]) and not torch.equal(once[0], first(1, 1, seed=2)[0])
    assert once[0].shape == (3, 3, 32, 32) and once[0].dtype == torch.uint8


def test_held_out_files_stay_held_out(tiny_run, tmp_path):
    images = data.Images(str(tiny_run.folder))
    assert len(images.train) + len(images.val) == 25 and images.val and not set(images.train) & set(images.val)
    shutil.copytree(tiny_run.folder, tmp_path / "more")
    for i in range(50):
        shutil.copy(tiny_run.folder / "0.jpg", tmp_path / "more" / f"new{i}.jpg")
    more = data.Images(str(tmp_path / "more"))
    assert {os.path.basename(path) for path in images.val} <= {os.path.basename(path) for path in more.val} and len(more.train) > 60
    assert not torch.equal(data.Images().held_out(1, 32), data.Images().batch(32, 1, 0, [0, 1]))  # the synthetic ones, too
    inside = data.Images(str(tiny_run.folder), str(tiny_run.folder / "deeper"))
    assert len(inside.train) == 13 and len(inside.val) == 12


def jpeg_on_its_side():
    image, exif = Image.new("RGB", (96, 48), "white"), Image.Exif()
    image.paste("red", (0, 0, 96, 24))  # the upper half, which orientation 6 shows on the right
    exif[0x0112] = 6
    return image, dict(format="JPEG", exif=exif, quality=95)


def bytes_of(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def animation():
    return bytes_of(Image.new("RGB", (64, 64), "red"), format="WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", (64, 64), "blue")])


def bomb():
    """A PNG of 60,000 x 60,000 pixels, by its header."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


FILES = {  # kind: (its bytes, the mean colour of its right half when it is read, or None if it is skipped)
    "rotated by EXIF.jpg": (lambda: bytes_of(jpeg_on_its_side()[0], **jpeg_on_its_side()[1]), (255, 0, 0)),
    "cmyk.jpg": (lambda: bytes_of(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), format="JPEG"), (255, 0, 0)),
    "grey.JPEG": (lambda: bytes_of(Image.new("L", (64, 64), 100), format="JPEG"), (100,) * 3),
    "palette.png": (lambda: bytes_of(Image.new("RGB", (64, 64), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE), format="PNG"), (10, 200, 30)),
    "palette with a clear colour.png": (lambda: bytes_of(Image.new("RGBA", (64, 64), (255, 0, 0, 0)).quantize(4), format="PNG"), (255,) * 3),
    "16 bits.png": (lambda: bytes_of(Image.fromarray(np.full((64, 64), 25700, np.uint16)), format="PNG"), (100,) * 3),
    "two bits.png": (lambda: bytes_of(Image.new("1", (64, 64), 1), format="PNG"), (255,) * 3),
    "transparent.webp": (lambda: bytes_of(Image.new("RGBA", (64, 64), (255, 0, 0, 0)), format="WEBP", lossless=True), (255,) * 3),
    "half transparent.png": (lambda: bytes_of(Image.new("LA", (64, 64), (0, 128)), format="PNG"), (127,) * 3),
    "animation.webp": (animation, (255, 0, 0)),
    "small.png": (lambda: bytes_of(Image.new("RGB", (20, 30), "lime"), format="PNG"), (0, 255, 0)),
    "40 megapixels.jpg": (lambda: bytes_of(Image.new("RGB", (8000, 5000), "blue"), format="JPEG"), (0, 0, 254)),
    "truncated.jpg": (lambda: bytes_of(Image.effect_noise((99, 99), 50), format="JPEG")[:2000], None),
    "truncated.png": (lambda: bytes_of(Image.effect_noise((99, 99), 50), format="PNG")[:2000], None),
    "empty.jpg": (lambda: b"", None), "text.jpg": (lambda: b"not an image", None), "bomb.png": (bomb, None),
    "pixel.png": (lambda: bytes_of(Image.new("RGB", (1, 1)), format="PNG"), None), "thin.png": (lambda: bytes_of(Image.new("RGB", (900, 2)), format="PNG"), None)}


@pytest.mark.parametrize("kind", FILES)
def test_a_kind_of_file(kind, tmp_path, capsys):
    content, color = FILES[kind]
    (tmp_path / kind).write_bytes(content())
    images = data.Images()
    for _ in range(2):
        square = images.read(str(tmp_path / kind), 48, None)
        crop = images.read(str(tmp_path / kind), 48, np.random.default_rng(0))
        if color is None:
            assert square is None and crop is None
        else:
            assert square.shape == crop.shape == (48, 48, 3) and np.abs(square[:, 24:].mean((0, 1)) - color).max() < 3
    assert capsys.readouterr().err.count("skipped") == (color is None)


def test_a_folder_of_all_kinds(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run.folder, tmp_path / "all")
    for kind, (content, _) in FILES.items():
        (folder / kind).write_bytes(content())
    (folder / "folder.jpg").mkdir()
    (folder / "dangling.png").symlink_to(tmp_path / "gone.png")
    process = start("train.py", *TINY, f"--data_dir={folder}", f"--val_dir={tiny_run.folder / 'deeper'}", "--max_iters=60", "--eval_interval=30",
                    "--color_augment=0.5", f"--out_dir={tmp_path / 'out'}")
    output, errors = process.communicate()
    bad = {kind for kind, (_, color) in FILES.items() if color is None} | {"dangling.png", "broken.jpg"}
    named = [line.split(":")[0] for line in errors.splitlines()]  # those that chance has come upon, once each
    assert process.returncode == 0 and set(named) <= {f"skipped {folder / name}" for name in bad} and 5 < len(named) == len(set(named))
    assert "folder.jpg" not in output and records(tmp_path / "out")[-1]["step"] == 60


@needs_data
def test_awkward_files(capsys):
    images = data.Images(str(DATA / "awkward"), str(DATA / "val"))
    for i in range(20):
        assert images.batch(64, 4, 0, [0, i]).shape == (4, 3, 64, 64)
    assert {os.path.basename(path) for path in images.bad} == {
        "one_pixel.png", "text_file.jpg", "thin_1x512.png", "truncated_small.jpg", "zero_bytes.jpg"}
    assert capsys.readouterr().err.count("skipped") == 5


def test_small_images_are_mirrored():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    wide = np.asarray(data.mirrored(Image.fromarray(pixels), 32))
    assert wide.shape == (32, 40, 3) and np.array_equal(wide[6:26], pixels) and np.array_equal(wide[:7], pixels[6::-1])


def test_pack(tiny_run, tmp_path):
    Image.new("RGBA", (90, 100), (255, 0, 0, 0)).save(tiny_run.folder / "deeper" / "glass.png")
    try:
        output = run("data.py", f"--data_dir={tiny_run.folder}", f"--out={tmp_path / 'pack'}", "--longest=64")
    finally:
        os.remove(tiny_run.folder / "deeper" / "glass.png")
    assert "25 images, 1 skipped" in output
    pack, folder = data.Images(str(tmp_path / "pack")), data.Images(str(tiny_run.folder))
    names = {os.path.basename(path) for path in pack.train + pack.val}
    assert names == {os.path.basename(path) for path in folder.train + folder.val} - {"broken.jpg"} | {"glass.png"}
    assert {os.path.basename(path) for path in folder.val} <= {os.path.basename(path) for path in pack.val}  # the split stays
    path = str(tmp_path / "pack" / "0.jpg")
    assert np.abs(pack.read(path, 64, None).astype(int) - folder.read(str(tiny_run.folder / "0.jpg"), 64, None)).mean() < 2  # 80 pixels became 64
    assert pack.read(str(tmp_path / "pack" / "deeper" / "glass.png"), 32, None).min() == 255  # transparent, on white
    run("train.py", *TINY, "--window=32", f"--data_dir={tmp_path / 'pack'}", "--max_iters=2", f"--out_dir={tmp_path / 'out'}")
    assert "crops of 32 pixels a second" in run("data.py", "--bench", f"--data_dir={tmp_path / 'pack'}", "--size=32")
    with open(tmp_path / "pack" / "pixels.bin", "ab") as file:
        file.truncate(1000)
    process = start("train.py", *TINY, f"--data_dir={tmp_path / 'pack'}", f"--out_dir={tmp_path / 'out2'}")
    assert "not a whole pack" in process.communicate()[1]


# the commands

def test_training_learns_and_leaves_everything(tiny_run):
    lines, out = records(tiny_run.out), tiny_run.out
    assert {"settings", "versions"} <= lines[0].keys() and lines[0]["settings"]["teacher"] == "toy" and "started" not in lines[0]["settings"]
    assert all({"step", "images_seen", "images_per_second"} <= line.keys() for line in lines[1:])
    evaluations = [line for line in lines if "val_psnr" in line]
    assert [line["step"] for line in evaluations] == [80, 160, 240]
    assert evaluations[-1]["val_psnr"] > evaluations[0]["val_psnr"] and evaluations[-1]["val_latent_mse"] < evaluations[0]["val_latent_mse"]
    for name in ("mse", "encoder"):
        steps = [line[name] for line in lines if name in line]
        assert np.mean(steps[200:220]) < 0.7 * np.mean(steps[:10])
    last = dict(line.split(": ") for line in tiny_run.output.split("---\n")[1].splitlines())
    assert {"images_seen", "images_per_second", "peak_memory_mb", "val_psnr", "val_lowres_mse", "val_latent_mse", "val_sharpness"} <= last.keys()
    until_first_step = float(tiny_run.output.split("\nstart")[1].split()[0])
    assert until_first_step < float(last["seconds"]) < 3600
    assert last["images_seen"] == "960" and float(last["val_psnr"]) == evaluations[-1]["val_psnr"]
    assert {path.name for path in out.iterdir()} == {"ckpt.pt", "ckpt_previous.pt", "diffusers", "log.jsonl", "samples", "taesd_decoder.pth", "taesd_encoder.pth"}
    assert {oct(path.stat().st_mode)[-3:] for path in (out / "diffusers").iterdir()} == {"644"}
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["0000080.png", "0000160.png", "0000240.png", "teacher.png"]
    process = start("train.py", "--init_from=resume", f"--out_dir={out}")
    assert "has done 240 steps" in process.communicate()[1] and process.returncode == 1


def test_sample(tiny_run):
    table = run("sample.py", f"--out_dir={tiny_run.out}", "--device=cpu")
    assert all(row in table for row in ("teacher round trip", "our decoder", "our encoder and decoder"))
    assert Image.open(tiny_run.out / "samples" / "sample.png").size == (64, 6 * (64 + 20))  # one of 25 files is held out
    run("sample.py", f"--out_dir={tiny_run.out}", f"--images={tiny_run.folder / '0.jpg'}", "--size=48", "--device=cpu")
    assert Image.open(tiny_run.out / "samples" / "sample.png").size == (48, 6 * (48 + 20))


def test_resume_continues_as_if_never_stopped(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = *TINY, "--eval_interval=35", "--cooldown=0"  # a share of max_iters, which differs
    run("train.py", *flags, "--max_iters=70", f"--out_dir={whole}")
    run("train.py", *flags, "--max_iters=3", f"--out_dir={parts}")
    for step in (35, 67, 70):  # right after an evaluation, and between two; the rest comes from the checkpoint
        run("train.py", "--init_from=resume", f"--max_iters={step}", f"--out_dir={parts}")

    def figures(out_dir):
        timing = ("images_per_second", "data_wait", "peak_memory_mb")
        lines = {json.dumps({key: value for key, value in line.items() if key not in timing}) for line in records(out_dir) if "step" in line}
        return sorted(line for line in lines if "val_psnr" not in line), [line for line in lines if '"step": 70' in line and "val_psnr" in line]
    assert figures(whole) == figures(parts) and len(figures(whole)[0]) == 70
    # a pool of 256 crops takes in 8 a step while it fills, then 2: windows of 2 x 2 crops of 32 pixels
    assert torch.load(parts / "ckpt.pt", weights_only=True)["batches_read"] == 32 * 2 + 19


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_compiled_once_and_profiled(tmp_path):
    process = start("train.py", *TINY, "--compile=true", "--max_iters=90", "--profile=2", f"--out_dir={tmp_path / 'out'}",
                    TORCH_LOGS="recompiles,dynamic")
    output, errors = process.communicate()
    assert process.returncode == 0 and "compile on" in output, errors
    # encoder and decoder are both a Sequential; D judges with a gradient for its weights, for the fake, for neither
    assert errors.count("Recompiling function") <= 3 and "create_symbol" not in errors, errors  # no sizes left open
    trace = json.loads((tmp_path / "out" / "trace.json").read_text())
    assert any("convolution" in event.get("name", "") for event in trace["traceEvents"])


def test_the_checkpoint_before_is_kept(tiny_run, tmp_path):
    out = shutil.copytree(tiny_run.out, tmp_path / "out")
    assert torch.load(out / "ckpt_previous.pt", weights_only=True)["step"] == 160
    (out / "ckpt.pt").write_bytes((out / "ckpt.pt").read_bytes()[:10_000])  # damaged
    run("sample.py", f"--out_dir={out}", "--device=cpu")
    assert (out / "ckpt.pt").exists()  # to look changes nothing
    process = start("train.py", f"--out_dir={out}", "--init_from=resume", "--max_iters=161")
    assert "going back to" in process.communicate()[1] and process.returncode == 0
    assert torch.load(out / "ckpt.pt", weights_only=True)["step"] == 161 and (out / "ckpt.pt.damaged").exists()
    os.remove(out / "ckpt.pt")  # killed between two renames
    run("train.py", f"--out_dir={out}", "--init_from=resume", "--max_iters=162")
    os.remove(out / "ckpt.pt")
    process = start("train.py", *TINY, f"--out_dir={out}", "--max_iters=1")
    assert "holds a run already" in process.communicate()[1] and process.returncode == 1


def test_numbers_that_are_not_finite_stop_the_run(tiny_run, tmp_path):
    out = shutil.copytree(tiny_run.out, tmp_path / "out")
    before = (out / "ckpt.pt").read_bytes()
    process = start("train.py", f"--out_dir={out}", "--init_from=resume", "--max_iters=260", "--log_interval=8", "--learning_rate=1e30", "--cooldown=0")
    line = process.communicate()[1].strip().splitlines()[-1]
    assert process.returncode == 1 and re.match(r"error: step 24[23]: \w+ is (nan|inf)", line) and "--init_from=resume" in line
    assert (out / "ckpt.pt").read_bytes() == before


def test_a_full_disk_loses_nothing(tiny_run, tmp_path):
    resource = pytest.importorskip("resource", reason="this system cannot limit the size of files")
    out = shutil.copytree(tiny_run.out, tmp_path / "out")
    files = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.p*")}
    process = subprocess.run([sys.executable, HERE / "train.py", f"--out_dir={out}", "--init_from=resume", "--max_iters=241"], text=True,
                             capture_output=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)))
    line = process.stderr.strip().splitlines()[-1]
    assert process.returncode == 1 and line.startswith("error: ") and "ckpt.pt: could not be written" in line and "Traceback" not in process.stderr
    assert all((out / name).read_bytes() == content for name, content in files.items()) and not list(out.glob("*.tmp"))
    run("train.py", f"--out_dir={out}", "--init_from=resume", "--max_iters=241")


def test_a_stopped_run_is_saved(tmp_path):
    process = start("train.py", *TINY, "--max_iters=100000", "--eval_interval=100000", f"--out_dir={tmp_path / 'out'}")
    while '"encoder"' not in (tmp_path / "out" / "log.jsonl").read_text() if (tmp_path / "out" / "log.jsonl").exists() else process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate()
    assert process.returncode == 0 and "--init_from=resume" in output, errors
    step = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"]
    assert step > 0 and records(tmp_path / "out")[-1]["step"] == step


def test_recipes(tmp_path):
    recipes = ("default", "taesd-1.0", "taesd-1.1", "taesd-1.2", "seraena", "ft-ema", "ft-mse")
    short = ["--max_iters=3", "--adversarial_start=1", "--lpips_weight=0", "--replay_size=8"]
    runs = {recipe: start("train.py", *TINY, *short, f"--recipe={recipe}", f"--out_dir={tmp_path / recipe}") for recipe in recipes}
    for recipe, process in runs.items():
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        settings, last = records(tmp_path / recipe)[0]["settings"], [line for line in records(tmp_path / recipe) if "adversarial" in line][-1]
        assert settings["recipe"] == recipe and settings["adversarial_start"] == 1 and last["discriminator"] > 0
        assert (settings["mse_weight"] > 0) == (recipe in ("default", "taesd-1.0", "ft-mse")) == (last.get("mse", 0) > 0)
        assert ("encoder_adversarial" in last) == (recipe == "taesd-1.2") and ("frequency" in last) == (recipe == "taesd-1.1")
        assert settings["muon"] == (recipe in ("default", "ft-ema", "ft-mse"))


def test_each_half_alone(tmp_path, tiny_run):
    run("train.py", *TINY, "--max_iters=2", "--train_decoder=false", f"--out_dir={tmp_path / 'encoder'}")
    assert not (tmp_path / "encoder" / "taesd_decoder.pth").exists() and (tmp_path / "encoder" / "taesd_encoder.pth").exists()
    run("sample.py", f"--out_dir={tmp_path / 'encoder'}")
    flags = [flag for flag in TINY if "width" not in flag]  # the run's is taken
    run("train.py", *flags, "--max_iters=2", "--train_encoder=false", f"--init_from={tiny_run.out}", f"--out_dir={tmp_path / 'decoder'}")
    before, after = (torch.load(out / "taesd_encoder.pth", weights_only=True) for out in (tiny_run.out, tmp_path / "decoder"))
    assert all(torch.equal(before[key], after[key]) for key in before)  # frozen as it was loaded, and exported
    shutil.copytree(tiny_run.out, tmp_path / "resumed")
    run("train.py", "--init_from=resume", "--train_encoder=false", "--max_iters=242", f"--out_dir={tmp_path / 'resumed'}")
    after = torch.load(tmp_path / "resumed" / "taesd_encoder.pth", weights_only=True)
    assert all(torch.equal(before[key], after[key]) for key in before)  # nor does its average move on


def test_compare_and_export(tiny_run, tmp_path):
    output = run("sample.py", f"--out_dir={tiny_run.out}", f"--compare={tiny_run.out / 'diffusers'}", "--device=cpu")
    rows = {line[:31].strip(): line[31:].split() for line in output.splitlines() if "decoder" in line}
    assert rows["our encoder and decoder"][:5] == rows["diffusers: encoder and decoder"][:5]  # the same weights, the same figures
    with Image.open(tiny_run.out / "samples" / "sample.png") as picture:
        assert picture.height == 9 * (64 + 20)
    if importlib.util.find_spec("onnxscript"):
        out = shutil.copytree(tiny_run.out, tmp_path / "out")
        run("sample.py", f"--out_dir={out}", "--export", "--export_dtype=float16")
        assert {path.name for path in (out / "export").iterdir()} == {f"taesd_{half}.{kind}" for half in ("encoder", "decoder") for kind in
                                                                       ("pth", "onnx")} | {"diffusers"}
        assert torch.load(out / "export" / "taesd_decoder.pth", weights_only=True)["1.weight"].dtype == torch.float16
        card = (out / "export" / "diffusers" / "README.md").read_text()
        assert "240 steps (960 images)" in card and f"| psnr | {records(out)[-1]['val_psnr']:.4g} |" in card


def test_weights_of_others_are_a_start(tiny_run, tmp_path):
    before = [line for line in records(tiny_run.out) if "val_psnr" in line][-1]["val_psnr"]
    flags = *TINY, f"--data_dir={tiny_run.folder}", "--max_iters=1", "--learning_rate=1e-6"
    for name, source in (("run", tiny_run.out), ("file", tiny_run.out / "taesd_encoder.pth"), ("diffusers", tiny_run.out / "diffusers")):
        run("train.py", *flags, f"--init_from={source}", f"--out_dir={tmp_path / name}")
        first = [line for line in records(tmp_path / name) if "val_psnr" in line][0]
        assert first["step"] == 0 and first["val_psnr"] == pytest.approx(before, abs=0.05), name


@needs_data
def test_released_weights_are_a_start(tmp_path):
    released, flags = DATA / "weights", ["--width=64", "--window=0", "--batch_size=2", "--replay_size=2", "--workers=1", "--eval_images=2", "--device=cpu"]
    families()["sana"][0].save_pretrained(tmp_path / "sana")
    run("train.py", *flags, f"--teacher={released / 'taef2_encoder.pth'}", f"--init_from={released / 'taef2_decoder.pth'}", "--max_iters=3",
        f"--val_dir={DATA / 'val'}", f"--out_dir={tmp_path / 'flux2'}", "--eval_size=128", "--crop=64")
    run("train.py", *flags, f"--teacher={tmp_path / 'sana'}", f"--init_from={released / 'taesana_encoder.pth'}", "--max_iters=3",
        f"--out_dir={tmp_path / 'f32'}", "--eval_size=64", "--crop=64")
    run("train.py", *flags[1:], f"--init_from={tmp_path / 'flux2'}", "--max_iters=1", f"--out_dir={tmp_path / 'more'}", "--eval_size=64", "--crop=64")
    assert records(tmp_path / "more")[0]["settings"]["teacher"] == str(released / "taef2_encoder.pth")  # a run brings its own
    first, *_, last = [line["val_psnr"] for line in records(tmp_path / "flux2") if "val_psnr" in line]
    assert first == pytest.approx(records(tmp_path / "flux2")[0]["teacher"]["psnr"], abs=0.05) and last > first - 0.2
    before, after = (torch.load(path / "taesana_encoder.pth" if path == released else path / "taesd_encoder.pth", weights_only=True)
                     for path in (released, tmp_path / "f32"))
    assert before.keys() == after.keys() and all(0 < (before[key].float() - after[key]).abs().max() < 0.01 for key in before)


class Hostile:
    def __reduce__(self):
        return os.system, ("echo hacked",)


def test_mistakes_are_one_clear_line(tmp_path, tiny_run):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hostile").mkdir()
    torch.save({"settings": Hostile()}, tmp_path / "hostile" / "ckpt.pt")
    (tmp_path / "older").mkdir()
    older = torch.load(tiny_run.out / "ckpt.pt", weights_only=True)
    del older["figures"]
    torch.save(older, tmp_path / "older" / "ckpt.pt")
    torch.save({"state_dict": Hostile()}, tmp_path / "hostile" / "vae.ckpt")
    shutil.copy(tiny_run.out / "taesd_encoder.pth", tmp_path / "lone_encoder.pth")
    (tmp_path / "half.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "half.pth").write_bytes((tiny_run.out / "taesd_encoder.pth").read_bytes()[:5000])
    (tmp_path / "texts").mkdir()
    for i in range(4):
        (tmp_path / "texts" / f"{i}.jpg").write_text("not an image")
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "config.json").write_text('{"_class_name": "AutoencoderOobleck"}')
    families()["kl-f4"][0].save_pretrained(tmp_path / "kl-f4")
    unreadable, half = f"--data_dir={tmp_path / 'texts'}", "more than half"
    mistakes = {  # arguments: what the line must say
        ("--lerning_rate=1",): "--learning_rate", ("--batch_size=big",): "whole number, for example --batch_size=16", ("--batch_size=0",): "more than 0",
        ("--compile=maybe",): "auto, true or false", ("--profile=9", "--max_iters=9"): "raise --max_iters", ("--recipe=taesd",): "taesd-1.2",
        ("--adversarial_weight=0", "--mse_weight=0", "--lowres_weight=0"): "no loss", ("--latent_noise=1", "--recipe=taesd-1.2"): "latent_noise=0",
        ("--init_from=resume", f"--out_dir={tiny_run.out}", "--muon=false"): "keeps its muon",
        ("batch_size=8",): "--name=value", ("--crop=50",): "multiple",
        ("--data_dir=nowhere",): "no such folder", (f"--data_dir={tmp_path / 'empty'}",): "holds no",
        (unreadable,): ".jpg", (unreadable, f"--val_dir={tiny_run.folder}"): half, ("--learning_rate=-1",): "0 or more",
        ("--teacher=sdlx",): "sdxl", ("--teacher=stranger/vae",): "local diffusers folder",
        (f"--teacher={tmp_path / 'flux'}",): "AutoencoderOobleck", ("--teacher=gone_encoder.pth",): "no such file",
        ("--init_from=resume",): "no such file", (f"--init_from={tmp_path / 'hostile'}",): "ckpt.pt",
        ("--width=16", f"--init_from={tiny_run.out}"): "width",
        ("--width=16", f"--init_from={tiny_run.out / 'taesd_encoder.pth'}"): "width", (f"--init_from={tiny_run.folder / '0.jpg'}",): "no such weights", ("--init_from=toy",): "a run's out_dir",
        (f"--init_from={tmp_path / 'half.pth'}",): "half.pth", (f"--teacher={tmp_path / 'hostile' / 'ckpt.pt'}",): "ckpt.pt",
        (f"--teacher={tmp_path / 'hostile' / 'vae.ckpt'}::{HERE / 'assets' / 'toy_vae'}",): "vae.ckpt",
        (f"--teacher={tmp_path / 'half.safetensors'}::{HERE / 'assets' / 'toy_vae'}",): "half.safetensors",
        ("--init_from=resume", f"--out_dir={tiny_run.out}", "--max_iters=999", "--width=16"): "'width': 8",
        ("--init_from=resume", f"--out_dir={tiny_run.out}", "--max_iters=999", f"--teacher={tmp_path / 'kl-f4'}"): "'factor': 8",
        ("--init_from=resume", f"--out_dir={tmp_path / 'older'}", "--max_iters=999"): "another version, it lacks figures",
        (f"--teacher={tmp_path / 'lone_encoder.pth'}",): "lone_decoder.pth, is missing", ("--variant=f32",): "factor 32", ("--device=tpu9",): "--device", (f"--out_dir={tiny_run.out}",): "resume"}
    # an unreachable hub: a closed port of this machine
    processes = {a: start("train.py", *TINY, f"--out_dir={tmp_path / 'out'}", *a, HF_ENDPOINT="http://127.0.0.1:9") for a in mistakes}
    for arguments, words in mistakes.items():
        output, errors = processes[arguments].communicate()
        line = errors.strip().splitlines()[-1]
        assert processes[arguments].returncode == 1 and line.startswith("error: ") and words in line, (arguments, errors)
        assert "Traceback" not in errors and "hacked" not in output, (arguments, errors)
    assert not (tmp_path / "out").exists()


def test_settings(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text("rate = 0.1   # a float\nsteps = 10   # an int\nfast = False   # a bool\nname = ''   # a text\nconfigure(globals())\n")
    settings = {"__file__": str(script), "rate": 0.1, "steps": 10, "fast": False, "name": "", "other": 1}
    assert configure.configure(settings, ["--rate=1", "--steps=1e5", "--fast=true", "--name=a=b"]) == {
        "rate": 1.0, "steps": 100_000, "fast": True, "name": "a=b"}
    assert settings["steps"] == 100_000 and settings["other"] == 1
    with pytest.raises(SystemExit):
        configure.configure(settings, ["--help"])
    assert "a float [1.0]" in capsys.readouterr().out
