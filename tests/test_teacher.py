"""The teacher: every family of VAEs against the arithmetic of diffusers' own pipelines."""
import functools
import re

import diffusers
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image

import sample
from conftest import script
from data import Images
from support import files
from teacher import Teacher
from test_smoke import HERE, TINY, records, train


def kl(depth, width=8, **config):
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth, up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=(width,) * depth, **dict(norm_num_groups=4, layers_per_block=1) | config).eval()


def scaled(vae, image):
    shift, scale = vae.config.get("shift_factor") or 0, vae.config.scaling_factor
    found = vae.encode(image)
    found = found.latent if isinstance(vae, diffusers.AutoencoderDC) else found.latent_dist.mode()
    latent = (found - shift) * scale
    return latent, vae.decode(latent / scale + shift).sample


def sdxl_by_channel(vae, image):  # StableDiffusionXLPipeline, of a VAE with latents_mean and latents_std
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


def tiny(vae, image):
    latent = vae.encode(image).latents
    return latent, vae.decode(latent).sample


def flux2_vae():
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4, norm_num_groups=4)
    vae.bn.running_mean.normal_(), vae.bn.running_var.uniform_(0.5, 2)
    return vae


def sana_vae():
    blocks, widths = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3, (8, 8, 16, 32, 32, 64)
    multiscales = (), (), (), (5,), (5,), (5,)
    return diffusers.AutoencoderDC(
        latent_channels=32, attention_head_dim=8, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6, encoder_qkv_multiscales=multiscales, decoder_qkv_multiscales=multiscales,
        decoder_norm_types="rms_norm", decoder_act_fns="silu", downsample_block_type="Conv",
        upsample_block_type="interpolate", scaling_factor=0.41407)


no_quant = dict(use_quant_conv=False, use_post_quant_conv=False)
FAMILIES = {  # name: (how to make one, channels, factor, the student's variant, latents and images by hand)
    "sd": (functools.partial(kl, 4, scaling_factor=0.18215), 4, 8, "plain", scaled),
    "sdxl": (functools.partial(kl, 4, scaling_factor=0.13025), 4, 8, "plain", scaled),
    "by_channel": (functools.partial(kl, 4, scaling_factor=0.5, latents_mean=[-1.6, 1.1, 0.1, 0.4],
                                     latents_std=[8.4, 6.0, 5.3, 5.0]), 4, 8, "plain", sdxl_by_channel),
    "sd3": (functools.partial(kl, 4, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, **no_quant),
            16, 8, "plain", scaled),
    "flux1": (functools.partial(kl, 4, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, **no_quant),
              16, 8, "plain", scaled),
    "kl-f4": (functools.partial(kl, 3, latent_channels=3), 3, 4, "plain", scaled),
    "kl-f16": (functools.partial(kl, 5, latent_channels=16), 16, 16, "plain", scaled),
    "kl-f32": (functools.partial(kl, 6, latent_channels=64), 64, 32, "plain", scaled),
    "flux2": (flux2_vae, 32, 8, "midblock_gn", flux2),
    "sana": (sana_vae, 32, 32, "f32", scaled),
    "qwen": (functools.partial(diffusers.AutoencoderKLQwenImage, base_dim=8, dim_mult=[1, 2, 4, 4]), 16, 8, "plain",
             video),  # a list, as from its config.json
    "wan": (functools.partial(diffusers.AutoencoderKLWan, base_dim=8), 16, 8, "plain", video),
    "tiny": (functools.partial(AutoencoderTiny, encoder_block_out_channels=(8,) * 4,
                               decoder_block_out_channels=(8,) * 4), 4, 8, "plain", tiny)}


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_vaes(name, tmp_path):
    make, channels, factor, variant, by_hand = FAMILIES[name]
    vae = make().eval()
    vae.save_pretrained(tmp_path / name)
    teacher, image = Teacher(tmp_path / name), torch.rand(2, 3, 64, 128)
    latent, picture = by_hand(vae, image * 2 - 1)
    assert (teacher.latent_channels, teacher.factor, teacher.student_variant) == (channels, factor, variant)
    assert torch.allclose(teacher.encode(image), latent, atol=1e-4)
    assert torch.allclose(teacher.decode(latent), (picture / 2 + 0.5).clamp(0, 1), atol=1e-4)
    with torch.enable_grad():
        train(*TINY, f"--teacher={tmp_path / name}", "--max_iters=2", f"--out_dir={tmp_path / 'out'}")
    assert records(tmp_path / "out")[-1]["images_seen"] == 8
    _, shape = files.load_taesd(tmp_path / "out" / "taesd_decoder.pth")
    assert shape == dict(latent_channels=channels, factor=factor, width=16, variant=variant)
    assert (tmp_path / "out" / "diffusers").is_dir() == (variant == "plain")


@torch.no_grad()
def test_teacher_speaks_the_vae_s_language(tmp_path):
    vae = kl(3, latent_channels=3, scaling_factor=0.5, shift_factor=0.25)
    vae.save_pretrained(tmp_path / "vae")
    teacher, image = Teacher(tmp_path), torch.rand(2, 3, 16, 24)  # the folder of a whole pipeline works, too
    assert (teacher.latent_channels, teacher.factor, 1 / teacher.std, teacher.mean) == (3, 4, 0.5, 0.25)
    latent = (vae.encode(2 * image - 1).latent_dist.mean - 0.25) * 0.5
    assert torch.allclose(teacher.encode(image), latent, atol=1e-6) and latent.shape == (2, 3, 4, 6)
    image = (vae.decode(latent / 0.5 + 0.25).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(teacher.decode(latent), image, atol=1e-6)
    assert Teacher(tmp_path, dtype=torch.float16).dtype == torch.float32  # force_upcast: it overflows in float16
    vae.register_to_config(force_upcast=False)
    vae.save_pretrained(tmp_path / "vae")
    assert Teacher(tmp_path, dtype=torch.float16).dtype == torch.float16


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


def test_a_single_file_in_the_original_layout(tmp_path):
    """The layout of CompVis: keys of diffusers renamed back, for a VAE of Stable Diffusion's depth and small width."""
    vae, original = kl(4, 32, layers_per_block=2, norm_num_groups=32, scaling_factor=0.18215), {}
    vae.save_pretrained(tmp_path / "vae")
    for key, value in vae.state_dict().items():
        for ours, theirs in ORIGINAL:
            key = re.sub(ours, theirs, key)
        original[key] = (value[..., None, None] if value.ndim == 2 and "mid.attn" in key else value).contiguous()
    whole = {f"first_stage_model.{key}": value for key, value in original.items()}
    safetensors.torch.save_file(original, tmp_path / "vae.safetensors")
    safetensors.torch.save_file(whole, tmp_path / "model.safetensors")
    torch.save({"state_dict": whole}, tmp_path / "model.ckpt")
    image = torch.rand(1, 3, 32, 32)
    latent = Teacher(tmp_path / "vae").encode(image)
    for name in ("vae.safetensors", "model.safetensors", "model.ckpt"):
        again = Teacher(f"{tmp_path / name}::{tmp_path / 'vae'}")
        assert torch.allclose(again.encode(image), latent, atol=1e-4), name
        assert 1 / again.std == pytest.approx(0.18215), name
        half = Teacher(f"{tmp_path / name}::{tmp_path / 'vae'}", dtype=torch.float16)
        assert half.dtype == torch.float32 and torch.equal(half.encode(image), again.encode(image))  # force_upcast
    vae.register_to_config(force_upcast=False)
    vae.save_pretrained(tmp_path / "vae")
    assert Teacher(f"{tmp_path / name}::{tmp_path / 'vae'}", dtype=torch.float16).dtype == torch.float16


def test_toy_teacher_draws_recognisable_pictures():
    teacher, leaves = Teacher("toy"), Images().held_out(8, 128) / 255
    latents = teacher.encode(leaves)
    assert latents.std() == pytest.approx(1, abs=0.15) and latents.mean().abs() < 0.3
    assert sample.psnr(teacher.decode(latents), leaves).mean() > 19
    assert sum(path.stat().st_size for path in (HERE / "assets" / "toy_vae").iterdir()) < 2**20


def test_a_look_at_a_teacher(tmp_path, capsys):
    script("sample.py", "--teacher=toy", "--device=cpu", "--count=3", "--size=64", f"--out_dir={tmp_path}")
    output = capsys.readouterr().out
    assert "AutoencoderKL, 358,951 parameters, factor 8, 4 channels, scaling factor 0.63889, shift 0" in output
    shown = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.startswith(("mean", "std"))}
    real = Images().held_out(3, 64) / 255
    latents = Teacher("toy").encode(real)
    for name in ("mean", "std"):
        expected = getattr(latents, name)((0, 2, 3)).tolist()
        assert [float(value) for value in shown[name]] == pytest.approx(expected, abs=0.02), name
    row = next(line for line in output.splitlines() if line.startswith("teacher round trip"))
    psnr = sample.psnr(Teacher("toy").decode(latents), real).mean().item()
    assert float(row.split()[3]) == pytest.approx(psnr, abs=0.02)
    with Image.open(tmp_path / "samples" / "look.png") as picture:  # original, round trip, latents
        assert picture.size == (3 * 64, 3 * (64 + 20))


def test_a_teacher_of_sdxl_s_size_trains(tmp_path, capsys):
    AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                  layers_per_block=2, block_out_channels=(128, 256, 512, 512), scaling_factor=0.13025,
                  sample_size=1024).save_pretrained(tmp_path / "sdxl")
    train(*TINY, f"--teacher={tmp_path / 'sdxl'}", "--window=32", "--batch_size=2", "--max_iters=2", "--eval_images=1",
          "--eval_size=32", f"--out_dir={tmp_path / 'out'}")
    assert "83,653,863 parameters, factor 8, 4 channels, scaling factor 0.13025" in capsys.readouterr().out
    assert records(tmp_path / "out")[-1]["images_seen"] == 4
