"""The lines of the model card for diffusers' pipelines in which a tiny VAE cannot replace the big one."""
from pathlib import Path

import diffusers
import pytest
import torch

from support.export import MODEL_CARD
from teacher import Teacher
from test_teacher import flux2_vae

pytest.importorskip("transformers", reason="transformers is not installed, and these pipelines need it")
SMALL = {"num_layers": 1, "num_attention_heads": 2}


def qwen_image():
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=64, out_channels=16, attention_head_dim=16, joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6), **SMALL)
    vae = diffusers.AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 2, 4, 4])
    return diffusers.QwenImagePipeline, vae, transformer, {"prompt_embeds_mask": torch.ones(1, 7, dtype=torch.long)}


def wan():
    transformer = diffusers.WanTransformer3DModel(
        attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=32, rope_max_seq_len=32, **SMALL)
    options = {"num_frames": 1, "guidance_scale": 1.0}
    return diffusers.WanPipeline, diffusers.AutoencoderKLWan(base_dim=8), transformer, options


def flux2(pipeline="Flux2Pipeline"):
    transformer = diffusers.Flux2Transformer2DModel(
        num_single_layers=1, attention_head_dim=16, joint_attention_dim=16, timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4), **SMALL)
    return getattr(diffusers, pipeline), flux2_vae(), transformer, {"guidance_scale": 1.0}


@pytest.mark.parametrize("make", [qwen_image, wan, flux2, lambda: flux2("Flux2KleinPipeline")])
def test_the_callback_gives_the_pipelines_own_picture(make, tmp_path):
    """The teacher stands in for the decoder, so its picture of the last latents must be what the pipeline returns."""
    kind, vae, transformer, options = make()
    pipe = kind(vae=vae, transformer=transformer, text_encoder=None, tokenizer=None,
                scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    vae.save_pretrained(tmp_path)
    scope = {"decoder": Teacher(tmp_path).decode, "height": 64, "width": 96}
    card = Path(MODEL_CARD).read_text(encoding="utf-8")
    exec(card.split("```python\n")[2].split("pipe(prompt")[0], scope)
    result = pipe(height=64, width=96, num_inference_steps=2, prompt_embeds=torch.randn(1, 7, 16), output_type="pt",
                  callback_on_step_end=scope["decode_step"], **options)
    expected = result.frames[:, 0] if kind is diffusers.WanPipeline else result.images
    assert len(scope["pictures"]) == 2 and expected.std() > 0.02
    assert torch.allclose(scope["pictures"][-1], expected, atol=1e-4)
