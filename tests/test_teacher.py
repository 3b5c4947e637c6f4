"""The teacher: every family of VAEs against the arithmetic of diffusers' own pipelines."""
import re

import diffusers
import pytest
import safetensors.torch
import torch

from conftest import plain_taesd
from support.files import load_halves
from teacher import CONFIGS, Teacher
from test_smoke import TINY, train


def kl(depth, width=8, **config):
    defaults = {"norm_num_groups": 4, "layers_per_block": 1, "block_out_channels": (width,) * depth}
    return diffusers.AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * depth,
                                   up_block_types=("UpDecoderBlock2D",) * depth, **defaults | config).eval()


def scaled(vae, image):
    shift, scale = vae.config.get("shift_factor") or 0, vae.config.scaling_factor
    raw = vae.encode(image)
    raw = raw.latent_dist.mode() if isinstance(vae, diffusers.AutoencoderKL) else raw[0]
    latent = (raw - shift) * scale
    return latent, vae.decode(latent / scale + shift).sample


def by_channel(vae, image):  # StableDiffusionXLPipeline, where the VAE has latents_mean and latents_std
    mean, std = (torch.tensor(vae.config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    latent = (vae.encode(image).latent_dist.mode() - mean) * vae.config.scaling_factor / std
    return latent, vae.decode(latent * std / vae.config.scaling_factor + mean).sample


def flux2(vae, image):  # Flux2Pipeline: _patchify_latents, batch norm, _unpatchify_latents
    latent = vae.encode(image).latent_dist.mode()
    n, c, h, w = latent.shape
    mean, std = vae.bn.running_mean, torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    mean, std = mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
    patches = latent.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
    patches = (patches.reshape(n, c * 4, h // 2, w // 2) - mean) / std

    def unpatchify(patches):
        return patches.reshape(n, c, 2, 2, h // 2, w // 2).permute(0, 1, 4, 2, 5, 3).reshape(n, c, h, w)
    return unpatchify(patches), vae.decode(unpatchify(patches * std + mean)).sample


def video(vae, image):  # QwenImageImg2ImgPipeline, WanImageToVideoPipeline
    mean, std = (torch.tensor(vae.config[name]).view(1, vae.config.z_dim, 1, 1, 1)
                 for name in ("latents_mean", "latents_std"))
    latent = (vae.encode(image.unsqueeze(2)).latent_dist.mode() - mean) * (1.0 / std)
    return latent[:, :, 0], vae.decode(latent / (1.0 / std) + mean).sample[:, :, 0]


def flux2_vae():
    vae = diffusers.AutoencoderKLFlux2(block_out_channels=(8,) * 4, norm_num_groups=4)
    vae.bn.running_mean.normal_(), vae.bn.running_var.uniform_(0.5, 2)
    return vae


def sana_vae(more=0):
    """more: how many more times than Sana's it halves an image."""
    blocks, widths = ("ResBlock",) * 3 + ("EfficientViTBlock",) * (3 + more), (8, 8, 16, 32, 32, 64) + (64,) * more
    multiscales, ones = ((),) * 3 + ((5,),) * (3 + more), (1,) * (6 + more)
    return diffusers.AutoencoderDC(
        latent_channels=32, attention_head_dim=8, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, encoder_layers_per_block=ones,
        decoder_layers_per_block=ones, encoder_qkv_multiscales=multiscales, decoder_qkv_multiscales=multiscales,
        decoder_norm_types="rms_norm", decoder_act_fns="silu", downsample_block_type="Conv",
        upsample_block_type="interpolate", scaling_factor=0.41407)


BY_CHANNEL = {"latents_mean": [-1.6, 1.1, 0.1, 0.4], "latents_std": [8.4, 6.0, 5.3, 5.0]}
SD3 = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
       "use_post_quant_conv": False}
TAESD = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
FAMILIES = {  # name: (how to make one, channels, factor, the student's variant, how to encode and decode by hand)
    "sd and sdxl": (lambda: kl(4, scaling_factor=0.18215), 4, 8, "plain", scaled),
    "by channel": (lambda: kl(4, scaling_factor=0.5, **BY_CHANNEL), 4, 8, "plain", by_channel),
    "sd3 and flux1": (lambda: kl(4, **SD3), 16, 8, "plain", scaled),
    "kl-f4": (lambda: kl(3, latent_channels=3), 3, 4, "plain", scaled),
    "kl-f32": (lambda: kl(6, latent_channels=64), 64, 32, "plain", scaled),
    "flux2": (flux2_vae, 32, 8, "midblock_gn", flux2), "sana": (sana_vae, 32, 32, "f32", scaled),
    "dc-ae-f128": (lambda: sana_vae(2), 32, 128, "plain", scaled),
    "qwen": (lambda: diffusers.AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 2, 4, 4]), 16, 8, "plain", video),
    "wan": (lambda: diffusers.AutoencoderKLWan(base_dim=8), 16, 8, "plain", video),
    "tiny": (lambda: diffusers.AutoencoderTiny(**TAESD), 4, 8, "plain", scaled)}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_vaes_can_be_a_teacher(name, tmp_path, monkeypatch):
    make, channels, factor, variant, by_hand = FAMILIES[name]
    vae, folder, out = make().eval(), tmp_path / "vae", tmp_path / "out"
    vae.save_pretrained(folder)
    side = max(64, factor)
    teacher, image = Teacher(folder), torch.rand(2, 3, side, 2 * side)
    with torch.no_grad():
        latent, picture = by_hand(vae, image * 2 - 1)
    if name in ("sd and sdxl", "sana", "wan"):  # diffusers reads these from a file, by the class that the config names
        monkeypatch.setitem(CONFIGS, "wan", str(folder))  # a file of Wan needs no name of a config
        config = "" if name == "wan" else f"::{folder}"
        from_file = Teacher(f"{folder / 'diffusion_pytorch_model.safetensors'}{config}")
        assert torch.equal(from_file.encode(image), teacher.encode(image))
    assert (teacher.latent_channels, teacher.factor, teacher.student_variant) == (channels, factor, variant)
    assert torch.allclose(teacher.encode(image), latent, atol=1e-4)
    assert torch.allclose(teacher.decode(latent), (picture / 2 + 0.5).clamp(0, 1), atol=1e-4)
    scope = train(*TINY, f"--teacher={folder}", f"--crop={side}", f"--window={2 * side}", f"--eval_size={side}",
                  "--batch_size=2", "--max_iters=1", f"--out_dir={out}")
    _, shape = load_halves(str(out / "taesd_decoder.pth"))["decoder"]
    assert shape == {"latent_channels": channels, "factor": factor, "width": 8, "variant": variant}
    assert ((out / "diffusers").is_dir(), scope.tiles_per_side) == (variant == "plain", 1 + (variant != "midblock_gn"))


@torch.no_grad()
def test_a_pair_of_taesd_files_is_a_teacher(tmp_path):
    plain, image = plain_taesd(8, 5), torch.rand(2, 3, 32, 64)
    for half, network in plain.items():
        torch.save(network.state_dict(), tmp_path / f"my_{half}.pth")
    teacher = Teacher(tmp_path / "my_encoder.pth")
    latent = teacher.encode(image)
    assert (teacher.latent_channels, teacher.factor, teacher.student_variant) == (5, 8, "plain")
    assert torch.allclose(latent, plain["encoder"](image), atol=1e-5)
    assert torch.allclose(teacher.decode(latent), plain["decoder"](latent).clamp(0, 1), atol=1e-5)


ORIGINAL = [  # patterns of keys: diffusers -> CompVis
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut")]


def original_layout(vae):
    """The VAE's weights with the names that CompVis gave them."""
    original = {}
    for key, value in vae.state_dict().items():
        for ours, theirs in ORIGINAL:
            key = re.sub(ours, theirs, key)
        is_attention = value.ndim == 2 and "mid.attn" in key
        original[key] = (value[..., None, None] if is_attention else value).contiguous()
    return original


@pytest.mark.parametrize("name, scale, shift", [
    ("sd", 0.18215, None), ("sdxl", 0.13025, None), ("sd3", 1.5305, 0.0609), ("flux1", 0.3611, 0.1159)])
def test_files_get_the_published_scale_of_the_vae_that_is_named(name, scale, shift):
    config = diffusers.AutoencoderKL.load_config(CONFIGS[name])
    assert (config["scaling_factor"], config.get("shift_factor")) == (scale, shift)


def test_a_single_file_in_the_original_layout(tmp_path, monkeypatch):
    vae = kl(4, 32, layers_per_block=2, norm_num_groups=32, scaling_factor=0.18215)  # as deep as Stable Diffusion's
    vae.save_pretrained(tmp_path / "vae")
    original = original_layout(vae)
    whole = {f"first_stage_model.{key}": value for key, value in original.items()}
    safetensors.torch.save_file(original, tmp_path / "vae.safetensors")
    safetensors.torch.save_file(whole, tmp_path / "model.safetensors")
    torch.save({"state_dict": whole}, tmp_path / "model.ckpt")
    image = torch.rand(1, 3, 32, 32)
    latent = Teacher(tmp_path / "vae").encode(image)
    monkeypatch.setitem(CONFIGS, "sdxl", str(tmp_path / "vae"))
    for name in ("vae.safetensors::sdxl", f"model.safetensors::{tmp_path / 'vae'}", "model.ckpt::sdxl"):
        teacher = Teacher(f"{tmp_path / name}")
        assert torch.allclose(teacher.encode(image), latent, atol=1e-4) and 1 / teacher.std == pytest.approx(0.18215)


@pytest.mark.parametrize("overflows, dtype", [(True, torch.float32), (False, torch.float16)])
def test_a_vae_that_overflows_in_float16_stays_in_float32(overflows, dtype, tmp_path):
    vae, file = kl(4, force_upcast=overflows), tmp_path / "vae.ckpt"
    vae.save_pretrained(tmp_path / "vae")
    torch.save({"state_dict": original_layout(vae)}, file)
    assert Teacher(tmp_path, dtype=torch.float16).dtype == dtype  # the folder of a whole pipeline works, too
    assert Teacher(f"{file}::{tmp_path / 'vae'}", dtype=torch.float16).dtype == dtype


def test_a_folder_that_has_float16_weights_only(tmp_path):
    kl(4).save_pretrained(tmp_path, variant="fp16")
    assert Teacher(tmp_path).latent_channels == 4


@pytest.mark.parametrize("factor, words", [
    (0.13025, ""), (0.18215, "factor, 0.18215, may be wrong: 0.13025, that of sdxl, is likely"), (1.0, "that of sdxl"),
    (0.5 * torch.ones(1, 4, 1, 1), "per channel may be those of another VAE")])
def test_a_wrong_scale_is_reported(factor, words):
    teacher = Teacher("toy")
    teacher.std = 1 / factor
    latents = 0.9 * torch.randn(4, 4, 32, 32) * factor / 0.13025  # SDXL's, as published
    assert words in teacher.describe_scale(latents) and ("warning" in teacher.describe_scale(latents)) == bool(words)
