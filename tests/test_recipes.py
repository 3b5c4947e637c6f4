"""The losses of published recipes, worked out by hand and as they reach a step of train.py. Every recipe trains."""
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import first_step
from recipes import published
from support.curves import NOT_LOSSES
from test_smoke import HERE, TINY, records, train


@pytest.fixture
def fake_lpips(monkeypatch):
    """Stands in for the lpips package, which downloads weights. Its distance is the mean squared error."""
    def LPIPS(net, verbose):
        module = torch.nn.Module()
        module.forward = lambda fake, real: (fake - real).square().mean((1, 2, 3), keepdim=True)
        return module
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=LPIPS))
    monkeypatch.setattr(published, "load_lpips", published.load_lpips.__wrapped__)  # without its cache


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([1.0, 0.5]), torch.tensor([-1.0, 1.5])
    assert published.hinge_adversarial_loss(real, fake).item() == pytest.approx(-0.25)
    assert published.hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 / 2 + 2.5 / 2)


def test_pixel_losses_by_hand(fake_lpips):
    fake, real = torch.rand(2, 1, 3, 8, 8)
    expected = (np.abs(np.fft.rfft2(fake)) - np.abs(np.fft.rfft2(real))) / 8
    assert published.frequency_l1(fake, real).item() == pytest.approx(np.abs(expected).mean(), rel=1e-4)
    assert published.lpips(fake, real).item() == pytest.approx(4 * F.mse_loss(fake, real).item(), rel=1e-4)


@pytest.mark.parametrize("scale_up", [False, True])
def test_the_size_of_the_adversarial_gradient(scale_up):
    """The GradScaler of float16 keeps small gradients from vanishing, and changes nothing else."""
    scaler = torch.amp.GradScaler("cpu", enabled=scale_up)
    fake = torch.rand(2, 3, 4, 4, requires_grad=True)
    slopes = torch.tensor([1e-6, 1e-5]).view(2, 1, 1, 1)  # gradients of very different sizes
    loss = published.unit_gradient((fake**3 * slopes).sum(), fake, None, None, scaler)
    gradient, direction = torch.autograd.grad(loss, fake)[0], fake.detach() ** 2 * slopes
    assert (gradient.std() * fake.numel()).item() == pytest.approx(1, rel=1e-2)
    assert torch.allclose(gradient / gradient.norm(), direction / direction.norm(), atol=1e-4)
    decoder = [SimpleNamespace(weight=torch.tensor([3.0, 4.0], requires_grad=True))]
    pixels, adversarial = decoder[0].weight.square().sum(), 2 * decoder[0].weight.sum()  # gradients (6, 8) and (2, 2)
    loss = published.adaptive(adversarial, None, pixels, decoder, scaler)
    assert loss.item() == pytest.approx(14 * 10 / 8**0.5, rel=1e-3)
    assert torch.autograd.grad(loss, decoder[0].weight, retain_graph=True)[0].norm().item() == pytest.approx(10, 1e-3)
    loss = published.adaptive(1e-30 * adversarial, None, pixels, decoder, scaler)
    assert loss.item() == pytest.approx(14e-30 * 1e4, rel=1e-3, abs=0)  # CompVis allows no larger weight


@pytest.mark.parametrize("scaling", ["unit", "adaptive"])
def test_hinge_l1_and_frequency_losses_in_a_step(scaling, tmp_path):
    """The adversarial loss is logged as it is, and only its gradient is scaled."""
    step = first_step(tmp_path / "out", "--adversarial_form=hinge", "--adversarial_weight=3", "--encoder_loss=l1",
                      "--l1_weight=2", "--frequency_weight=0.5", "--mse_weight=0", "--lowres_weight=0",
                      "--feature_matching_weight=0", f"--adversarial_scaling={scaling}")
    (real, latent, real_scores), (_, _, fake_scores) = step.seen[:2]
    encoder, decoder, d = *step.before[:2], step.after.discriminator
    fake = decoder(latent)
    losses = {"encoder": F.l1_loss(encoder(real), latent), "l1": F.l1_loss(fake, real),
              "frequency": published.frequency_l1(fake, real), "adversarial": -d(fake, latent)[0].mean(),
              "discriminator": published.hinge_discriminator_loss(real_scores, fake_scores)}
    for name, value in losses.items():
        assert step.losses[name] == pytest.approx(value.item(), rel=1e-4), name
    pixels = 2 * losses["l1"] + 0.5 * losses["frequency"]
    scaled = published.SCALINGS[scaling](losses["adversarial"], fake, pixels, decoder, step.after.scaler)
    (pixels + 3 * scaled).backward()
    for (name, weight), expected in zip(step.after.decoder.named_parameters(), decoder.parameters()):
        assert torch.allclose(weight.grad, expected.grad, rtol=1e-3, atol=1e-5), name


def test_d_judges_the_encoders_latents(tmp_path):
    """The encoder's gradient is that of its own loss, of D's scores and of the averaged decoder's first layers."""
    step = first_step(tmp_path / "out", "--encoder_adversarial_weight=30", "--encoder_feature_weight=20")
    (real, latent, real_scores), (_, _, fake_scores), (_, encoded, encoded_scores) = step.seen[:3]
    student, averaged = step.before[0](real), step.before[1]
    assert torch.allclose(encoded, student, atol=1e-5) and not torch.allclose(encoded, latent, atol=0.1)
    d_loss = 2 * (real_scores - 1).square() + (fake_scores + 1).square() + (encoded_scores + 1).square()
    assert step.losses["discriminator"] == pytest.approx(d_loss.mean().item(), rel=1e-4)
    d, features = step.after.discriminator, F.l1_loss(averaged[:6](student), averaged[:6](latent))
    adversarial = (d(real, student)[0] - d(real, latent)[0]).square().mean()
    assert step.losses["encoder_adversarial"] == pytest.approx(adversarial.item(), rel=1e-4)
    (F.mse_loss(student, latent) + 20 * features + 30 * adversarial).backward()
    for (name, weight), expected in zip(step.after.encoder.named_parameters(), step.before[0].parameters()):
        assert torch.allclose(weight.grad, expected.grad, rtol=1e-3, atol=1e-5), name


def test_latent_noise(tmp_path, monkeypatch):
    """The decoder and D get noisy latents, each with a share of noise of its own, and the encoder copies clean ones."""
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    step = first_step(tmp_path / "out", "--latent_noise=0.5")
    pool, (real, noisy, _), (fake, fake_latent, _) = step.after.crop_pool, step.seen[0], step.seen[3]
    distances = (pool.images / 255 - real[:, None]).abs().flatten(2).amax(2)  # of each crop to all in the pool
    clean = pool.latents[distances.argmin(1)].float()
    noise = (noisy - clean).flatten(1)
    assert torch.allclose(noise, noise[:, :1].expand_as(noise), atol=1e-5)
    assert 0 <= noise.min() and noise.max() <= 0.5 and len(set(noise[:, 0].tolist())) == 4
    assert torch.equal(fake_latent, noisy) and torch.allclose(fake, step.before[1](noisy), atol=1e-5)
    assert step.losses["encoder"] == pytest.approx(F.mse_loss(step.before[0](real), clean).item(), rel=1e-4)


OURS = {"mse", "lowres_mse", "feature_matching", "encoder_feature"}
RECIPES = {  # name: (optimizer, losses beside the encoder's own and the adversarial ones)
    "author": ("adam", {"lowres_mse"}), "taesd_1.0": ("adam", {"mse"}),
    "taesd_1.1": ("adam", {"lowres_mse", "frequency", "lpips"}),
    "taesd_1.2": ("adam", {"lowres_mse", "encoder_adversarial"}), "seraena": ("adamw", set()),
    "ft_ema": ("muon", {"l1", "lpips"}), "ft_mse": ("muon", {"mse", "lpips"}),
    "hour": ("muon", OURS), "quick_start": ("muon", OURS)}


@pytest.mark.parametrize("path", sorted((HERE / "recipes").glob("[!_]*[!d].py")), ids=lambda path: path.stem)
def test_a_recipe_trains_with_its_own_losses(path, tmp_path, fake_lpips):
    optimizer, losses = RECIPES[path.stem]
    late = ["--adversarial_start=1"] if path.stem.startswith("ft_") else []
    scope = train(path, *TINY, "--crop=16", "--window=0", "--replay_size=8", "--teacher=toy", "--init_from=scratch",
                  "--max_iters=2", *late, f"--out_dir={tmp_path / 'out'}")
    first, second = [line.keys() - set(NOT_LOSSES) for line in records(tmp_path / "out") if "encoder" in line]
    adversarial = {"adversarial", "discriminator"}
    assert second == {"encoder"} | adversarial | losses and scope.optimizer == optimizer
    assert first == (second - adversarial if late else second)


def test_without_the_lpips_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(SystemExit, match="--lpips_weight: needs the lpips package .* pip install lpips"):
        train(HERE / "recipes" / "ft_mse.py", *TINY, f"--out_dir={tmp_path / 'out'}")
