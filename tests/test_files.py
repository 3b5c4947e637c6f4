"""Weights on disk, against code that is not ours; what is left of a run when a file is damaged or a disk is full."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor

import model
import sample
from conftest import DATA, load, needs_data, plain_taesd, random_images, real_images, script
from support import export, files
from teacher import Teacher
from test_smoke import HERE, TINY, train

PICTURES = {"random": lambda: random_images(2), "real": lambda: real_images(5)}
KINDS = ["random", pytest.param("real", marks=needs_data)]


@torch.no_grad()
@pytest.mark.parametrize("pictures", KINDS)
def test_exports_give_the_same_pixels(pictures, tiny_run):
    ours, plain = files.student(load(tiny_run.out / "ckpt.pt")), plain_taesd(16, 4)
    tiny = AutoencoderTiny.from_pretrained(tiny_run.out / "diffusers")
    for half, network in plain.items():
        network.load_state_dict(load(tiny_run.out / f"taesd_{half}.pth"), strict=True)
    for image in PICTURES[pictures]():
        latent = ours["encoder"](image)
        picture = ours["decoder"](latent)
        assert (plain["encoder"](image) - latent).abs().max() < 1e-5
        assert (plain["decoder"](latent) - picture).abs().max() < 1e-5
        assert (tiny.encode(image * 2 - 1).latents - latent).abs().max() < 1e-5
        assert ((tiny.decode(latent).sample + 1) / 2 - picture).abs().max() < 1e-5
        assert picture.std() > 0.01 and latent.std() > 0.01  # not the same because they are nothing


def test_what_other_programs_go_by(tiny_run):
    """ComfyUI and A1111: names under a prefix of theirs, and the channels of the first or the last convolution."""
    encoder, decoder = (load(tiny_run.out / f"taesd_{half}.pth") for half in ("encoder", "decoder"))
    assert decoder["1.weight"].shape[1] == 4 and encoder[list(encoder)[-1]].shape == (4,)
    assert "3.conv.0.bias" in decoder and "0.weight" not in decoder and encoder["0.weight"].shape[1] == 3
    assert {oct(path.stat().st_mode)[-3:] for path in (tiny_run.out / "diffusers").iterdir()} == {"644"}


@torch.no_grad()
def test_pipelines_decode_with_it(tiny_run):
    """The last lines of every image pipeline of diffusers: unscale, decode, postprocess."""
    vae, latent = AutoencoderTiny.from_pretrained(tiny_run.out / "diffusers"), torch.randn(1, 4, 8, 8)
    image = vae.decode(latent / vae.config.scaling_factor + vae.config.shift_factor).sample
    image = VaeImageProcessor(vae_scale_factor=8).postprocess(image, output_type="pt")
    decoder = files.load_taesd(tiny_run.out / "taesd_decoder.pth")[0]
    assert (image - decoder(latent).clamp(0, 1)).abs().max() < 1e-4 and image.std() > 0.01


@torch.no_grad()
def test_stable_diffusion_pipeline_decodes_with_it(tiny_run):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    pipe = StableDiffusionPipeline(
        vae=AutoencoderTiny.from_pretrained(tiny_run.out / "diffusers"), unet=unet, scheduler=DDIMScheduler(),
        text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    given = dict(prompt_embeds=torch.randn(1, 4, 8), latents=torch.randn(1, 4, 8, 8), num_inference_steps=2)
    latent, image = (pipe(**given, guidance_scale=1, output_type=kind).images for kind in ("latent", "pt"))
    decoder = files.load_taesd(tiny_run.out / "taesd_decoder.pth")[0]
    assert (image - decoder(latent).clamp(0, 1)).abs().max() < 1e-4 and image.std() > 0.01


@torch.no_grad()
def test_taef2_s_layout_gives_the_same_pixels(tmp_path):
    shape = dict(latent_channels=6, factor=8, width=8, variant="midblock_gn")
    plain = plain_taesd(8, 6, norm=True)
    for half, given in (("encoder", torch.rand(1, 3, 64, 96)), ("decoder", torch.randn(1, 6, 8, 12))):
        torch.save(plain[half].state_dict(), tmp_path / f"their_{half}.pth")
        ours, found = files.load_taesd(tmp_path / f"their_{half}.pth")
        assert found == shape and torch.allclose(ours(given), plain[half](given), atol=1e-5)


@needs_data
@torch.no_grad()
def test_released_flux2_weights():
    plain, ours = plain_taesd(64, 32, norm=True), {}
    for half, network in plain.items():
        path = DATA / "weights" / f"taef2_{half}.pth"
        network.load_state_dict(load(path), strict=True)
        ours[half], shape = files.load_taesd(path)
        assert shape == {"latent_channels": 32, "width": 64, "factor": 8, "variant": "midblock_gn"}
    for image in real_images(3):
        image = image[..., :256, :256]
        latent = ours["encoder"](image)
        picture = ours["decoder"](latent)
        assert torch.allclose(plain["encoder"](image), latent, atol=1e-4)
        assert torch.allclose(plain["decoder"](latent), picture, atol=1e-4)
        assert 30 < sample.psnr(picture.clamp(0, 1), image) < 40
    teacher, image = Teacher(DATA / "weights" / "taef2_encoder.pth"), next(random_images(1))
    assert torch.allclose(teacher.encode(image), ours["encoder"](image), atol=1e-4)
    assert (teacher.latent_channels, teacher.factor) == (32, 8)


@needs_data
def test_released_sana_encoder():
    path = DATA / "weights" / "taesana_encoder.pth"
    encoder, shape = files.load_taesd(path)
    assert shape == {"latent_channels": 32, "width": 64, "factor": 32, "variant": "f32"}
    checkpoint = files.load_student(str(path))
    assert encoder[0].weight.dtype == torch.float32 and checkpoint["ready"] == ["encoder"]
    assert torch.equal(checkpoint["ema_encoder"]["0.weight"], encoder[0].weight)
    assert list(files.student(checkpoint)) == ["encoder"]


@pytest.mark.parametrize("variant,factor,width", [("plain", 8, 8), ("plain", 16, 4), ("midblock_gn", 8, 8),
                                                  ("f32", 32, 8)])
def test_files_of_every_variant_come_back(variant, factor, width, tmp_path):
    shape = dict(latent_channels=6, factor=factor, width=width, variant=variant)
    networks = {"encoder": model.Encoder(**shape), "decoder": model.Decoder(**shape)}
    for half, network in networks.items():
        export.save_taesd(str(tmp_path / f"my_{half}.pth"), network, torch.float16)
    export.save_halves(str(tmp_path / "mine.safetensors"), networks, shape, torch.float16)
    sources = [tmp_path / "my_decoder.pth", tmp_path / "mine.safetensors"]
    if variant == "plain":
        export.save_diffusers(str(tmp_path / "tiny"), *networks.values(), torch.float16)
        sources.append(tmp_path / "tiny")
    for source in sources:
        again = files.load_student(str(source))
        assert again["shape"] == shape and sorted(again["ready"]) == ["decoder", "encoder"]
        for half, network in networks.items():
            for key, value in network.state_dict().items():
                assert torch.equal(again[f"ema_{half}"][key], value.half().float()), key


# checkpoints

def test_a_failed_write_leaves_the_old_file(tmp_path):
    def full_disk(aside):
        Path(aside).write_text("half")
        raise OSError("No space left on device")
    (tmp_path / "weights").write_text("whole")
    with pytest.raises(SystemExit, match="weights: could not be written .*No space left"):
        files.save_file(str(tmp_path / "weights"), full_disk)
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    assert (tmp_path / "weights").read_text() == "whole"


def test_the_checkpoint_before_is_kept(copied_run, capsys):
    def steps():
        return [load(copied_run / name)["step"] for name in ("ckpt.pt", "ckpt_previous.pt")]
    assert steps() == [120, 80]
    damaged = (copied_run / "ckpt.pt").read_bytes()[:10_000]
    (copied_run / "ckpt.pt").write_bytes(damaged)
    script("sample.py", f"--out_dir={copied_run}", "--device=cpu")
    assert (copied_run / "ckpt.pt").read_bytes() == damaged  # to look changes nothing
    assert "going back to" in capsys.readouterr().err
    train(f"--out_dir={copied_run}", "--init_from=resume", "--max_iters=81")
    assert "going back to" in capsys.readouterr().err
    assert steps() == [81, 80] and (copied_run / "ckpt.pt.damaged").read_bytes() == damaged
    os.remove(copied_run / "ckpt.pt")  # killed between two renames
    train(f"--out_dir={copied_run}", "--init_from=resume", "--max_iters=82")
    assert steps() == [82, 80]
    os.remove(copied_run / "ckpt.pt")
    with pytest.raises(SystemExit, match="holds a run already"):
        train(*TINY, f"--out_dir={copied_run}", "--max_iters=1")


def test_a_full_disk_loses_nothing(copied_run):
    resource = pytest.importorskip("resource", reason="this system cannot limit the size of files")
    weights = {path: path.read_bytes() for path in copied_run.rglob("*.p*")}
    command = [sys.executable, "train.py", f"--out_dir={copied_run}", "--init_from=resume", "--max_iters=121"]
    process = subprocess.run(command, cwd=HERE, text=True, capture_output=True,
                             preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)))
    line = process.stderr.strip().splitlines()[-1]
    assert process.returncode == 1 and line.startswith("error: ") and "Traceback" not in process.stderr
    assert "ckpt.pt: could not be written" in line
    assert all(path.read_bytes() == content for path, content in weights.items())
    assert not list(copied_run.glob("*.tmp"))
    train(*command[2:])
    assert load(copied_run / "ckpt.pt")["step"] == 121
