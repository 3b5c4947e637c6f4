"""The losses by hand, one by one and as they reach a step of train.py; every file in recipes/ runs."""
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import first_step
from recipes import published as terms
from support.configure import read_settings
from test_smoke import HERE, TINY, records, train

RECIPES = sorted(path.stem for path in (HERE / "recipes").glob("*.py") if path.stem not in ("__init__", "published"))


class LPIPS(torch.nn.Module):
    """Stands in for that of the package, which downloads weights: the MSE of images that must come in [-1,1]."""
    def __init__(self, net, verbose):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, fake, real):
        assert not self.weight.requires_grad and real.min() < -0.2
        return (self.weight * (fake - real).square()).mean((1, 2, 3), keepdim=True)


@pytest.fixture
def fake_lpips(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))


# the losses

def test_adversarial_losses_by_hand(stepped):
    real, fake = torch.tensor([1.0, 0.5]), torch.tensor([-1.0, 1.5])
    assert stepped.after.adversarial_loss(real, fake).item() == pytest.approx((4 + 1) / 2)
    assert stepped.after.discriminator_loss(real, fake).item() == pytest.approx((0 + 0.25) / 2 + (0 + 6.25) / 2)
    assert terms.hinge_adversarial_loss(real, fake).item() == pytest.approx(-0.25)
    assert terms.hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 / 2 + 2.5 / 2)


def test_pixel_losses_by_hand(stepped):
    dark, spotted = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    spotted[0, 0, 0, 0] = 64.0  # the mean of one 8x8 patch of one channel becomes 1: 1 of 12 pooled values
    assert stepped.after.lowres_mse(spotted, dark).item() == pytest.approx(1 / 12)
    images = np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)
    amplitudes = np.abs(np.fft.rfft2(images)) / 8
    expected = np.abs(amplitudes[0] - amplitudes[1]).mean()
    assert terms.frequency_l1(*torch.from_numpy(images).split(1)).item() == pytest.approx(expected, rel=1e-4)


def test_lpips(fake_lpips):
    real, fake = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    distance = terms.lpips(torch.device("cpu"))(fake, real)
    assert distance.shape == () and distance.item() == pytest.approx(4 * F.mse_loss(fake, real).item(), rel=1e-5)


@pytest.mark.parametrize("scale", [None, 2.0**16])
def test_the_size_of_the_adversarial_gradient(scale):
    """The scaler of float16 changes nothing but keeps small gradients from vanishing."""
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    fake = torch.rand(2, 3, 4, 4, requires_grad=True)
    steepness = torch.tensor([1e-6, 1e-5]).view(2, 1, 1, 1)  # gradients of very different size
    loss = terms.unit_gradient((fake ** 3 * steepness).sum(), fake, None, None, scaler)
    gradient = torch.autograd.grad(loss, fake)[0]
    assert (gradient.std() * fake.numel()).item() == pytest.approx(1, rel=1e-2)
    expected = fake.detach().square() * steepness  # its direction stays
    assert torch.allclose(gradient / gradient.norm(), expected / expected.norm(), atol=1e-4)

    layer = torch.tensor([3.0, 4.0], requires_grad=True)
    pixels, adversarial = (layer ** 2).sum(), 2 * layer.sum()  # gradients (6, 8) and (2, 2)
    loss = terms.adaptive(adversarial, None, pixels, layer, scaler)
    gradient = torch.autograd.grad(loss, layer, retain_graph=True)[0]  # the weight itself is a constant
    assert loss.item() == pytest.approx(14 * 10 / 8 ** 0.5, rel=1e-3)
    assert gradient.norm().item() == pytest.approx(10, rel=1e-3)
    loss = terms.adaptive(1e-30 * adversarial, None, pixels, layer, scaler)
    assert loss.item() == pytest.approx(14e-30 * 1e4)  # no larger weight than CompVis allows


# the first step

def test_encoder_loss_l1_and_hinge(tmp_path, monkeypatch):
    step = first_step(tmp_path / "out", monkeypatch, "--encoder_loss=l1", "--adversarial_form=hinge",
                      "--l1_weight=2", "--frequency_weight=0.5")
    (real, latent, real_scores), (_, _, fake_scores), (_, _, _), (fake, _, again) = step.seen
    expected = {"encoder": (step.before[0](real) - latent).abs().mean(), "l1": (fake - real).abs().mean(),
                "discriminator": F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean(),
                "adversarial": -again.mean(), "frequency": terms.frequency_l1(fake, real)}
    for name, value in expected.items():
        assert step.terms[name] == pytest.approx(value.item(), rel=1e-4), name
    assert torch.allclose(fake, step.before[1](latent), atol=1e-5)


def test_d_judges_the_encoder_s_latents(tmp_path, monkeypatch):
    step = first_step(tmp_path / "out", monkeypatch, "--encoder_adversarial_weight=0.01", "--replay_size=0")
    seen = step.seen[:3], step.seen[3:]
    for (real, latent, _), (_, _, _), (image, encoded, _) in seen:
        assert torch.equal(image, real) and torch.allclose(encoded, step.before[0](real), atol=1e-5)
        assert not torch.allclose(encoded, latent, atol=0.1)
    (of_real, of_fake, of_encoded), (real_again, _, encoded_again) = ([scores for *_, scores in half] for half in seen)
    d = 2 * (of_real - 1).square().mean() + (of_fake + 1).square().mean() + (of_encoded + 1).square().mean()
    assert step.terms["discriminator"] == pytest.approx(d.item(), rel=1e-4)
    pull = (encoded_again - real_again).square().mean().item()
    assert step.terms["encoder_adversarial"] == pytest.approx(pull, rel=1e-4)


@pytest.mark.parametrize("weight,feature_weight", [(0, 0), (30, 0), (0, 20)])
def test_the_encoder_feels_it(weight, feature_weight, tmp_path, monkeypatch):
    """Its gradient is that of its own loss and, with the weights, of D's scores and of the decoder's first layers."""
    step = first_step(tmp_path / "out", monkeypatch, f"--encoder_adversarial_weight={weight}", "--adversarial_weight=1",
                      f"--encoder_feature_weight={feature_weight}")
    (real, latent, _), (encoder, averaged, _), d = step.seen[0], step.before, step.after.discriminator
    encoded = seen = encoder(real)
    loss = F.mse_loss(encoded, latent) + weight * (d(real, encoded)[0] - d(real, latent)[0]).square().mean()
    with torch.no_grad():
        goal = averaged[5](averaged[4](averaged[3](averaged[1](averaged[0](latent)).relu())))
    for layer in list(averaged)[:6]:  # the average is that of the start
        seen = layer(seen)
    (loss + feature_weight * (seen - goal).abs().mean()).backward()
    assert ("encoder_feature" in step.terms) == (feature_weight > 0)
    assert all(weight.grad is None for weight in step.after.ema_decoder.parameters())
    for (name, weight), expected in zip(step.after.encoder.named_parameters(), encoder.parameters()):
        assert torch.allclose(weight.grad, expected.grad, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("scaling", ["none", "unit", "adaptive"])
def test_the_decoder_feels_the_scaled_gradient(scaling, tmp_path, monkeypatch):
    step = first_step(tmp_path / "out", monkeypatch, f"--adversarial_scaling={scaling}", "--adversarial_weight=3",
                      "--mse_weight=2", "--lowres_weight=0")
    (real, latent, _), decoder, d = step.seen[0], step.before[1], step.after.discriminator
    fake = decoder(latent)
    (scores, seen), (real_scores, real_seen) = d(fake, latent), d(real, latent)
    pixels, pull = 2 * F.mse_loss(fake, real), (scores - real_scores).square().mean()
    matching = sum((a - b).abs().sum() / b.abs().sum() for a, b in zip(seen, real_seen)) / 5
    if scaling == "unit":
        gradient = torch.autograd.grad(pull, fake, retain_graph=True)[0]
        pull = (fake * gradient / gradient.std()).mean()
    elif scaling == "adaptive":
        sizes = [torch.autograd.grad(loss, decoder[19].weight, retain_graph=True)[0].norm() for loss in (pixels, pull)]
        pull = pull * (sizes[0] / (sizes[1] + 1e-4)).item()
    (pixels + 3 * pull + 5 * matching).backward()
    for (name, weight), expected in zip(step.after.decoder.named_parameters(), decoder.parameters()):
        assert torch.allclose(weight.grad, expected.grad, rtol=1e-3, atol=1e-5), name
    assert decoder[19].weight.grad.norm() > 1e-3


def test_latent_noise(tmp_path, monkeypatch):
    """The decoder paints, and D judges, noisy latents, each with its own share of it; the encoder copies clean ones."""
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    step = first_step(tmp_path / "out", monkeypatch, "--latent_noise=0.5")
    pool, (real, noisy, _), (fake, of_fake, _) = step.after.pool, step.seen[0], step.seen[3]
    crops = [image.numpy().tobytes() for image in pool.images]
    clean = torch.stack([pool.latents[crops.index((image * 255).round().byte().numpy().tobytes())].float()
                         for image in real])
    noise = (noisy - clean).flatten(1)
    assert torch.allclose(noise, noise[:, :1].expand_as(noise), atol=1e-5)  # of "randn" 1
    assert noise.min() >= 0 and noise.max() <= 0.5 and len(set(noise[:, 0].tolist())) == 4
    assert torch.equal(of_fake, noisy) and torch.allclose(fake, step.before[1](noisy), atol=1e-5)
    assert step.terms["encoder"] == pytest.approx(F.mse_loss(step.before[0](real), clean).item(), rel=1e-4)


# recipes/

ADAM = {"taesd_1.0", "taesd_1.1", "taesd_1.2", "author"}
OF = {  # recipe: the terms that the student minimises, beside the encoder's own and the adversarial one
    "author": {"lowres_mse"}, "taesd_1.0": {"mse"}, "taesd_1.1": {"lowres_mse", "frequency", "lpips"},
    "taesd_1.2": {"lowres_mse", "encoder_adversarial"}, "seraena": set(), "ft_ema": {"l1", "lpips"},
    "ft_mse": {"mse", "lpips"}}


def test_every_recipe_is_known_here():
    assert set(RECIPES) >= OF.keys()


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe, tmp_path, fake_lpips):
    values = read_settings(str(HERE / "recipes" / f"{recipe}.py"))
    late, judged = values.get("adversarial_start", 0) > 0, values.get("adversarial_weight", 1) > 0
    flags = [*TINY, "--crop=16", "--batch_size=2", "--window=0", "--max_iters=3", "--replay_size=8", "--teacher=toy",
             "--adversarial_start=1", f"--out_dir={tmp_path / 'out'}"]
    if values.get("init_from") == "donor":  # which has a width of its own
        flags.remove("--width=16")
    if not late:  # refused where no pixel loss has a weight
        flags.remove("--adversarial_start=1")
    train(HERE / "recipes" / f"{recipe}.py", *flags)
    first, *steps = records(tmp_path / "out")
    steps = [{name for name in line if name not in ("step", "images_seen", "images_per_second", "data_wait",
                                                    "peak_memory_mb")} for line in steps if "data_wait" in line]
    for name in values.keys() & first["settings"].keys() - {flag[2:].split("=")[0] for flag in flags}:
        assert first["settings"][name] == values[name], name
    adversarial = {"adversarial", "discriminator"} if judged else set()
    assert len(steps) == 3 and steps[2] >= {"encoder"} | adversarial
    assert steps[0] == steps[2] - (adversarial if late else set())
    if recipe in OF:
        assert steps[2] == {"encoder"} | adversarial | OF[recipe]
        expected = "adam" if recipe in ADAM else "adamw" if recipe == "seraena" else "muon"
        assert first["settings"]["optimizer"] == expected
    if recipe == "ft_mse":
        line = records(tmp_path / "out")[1]
        assert line["lpips"] == pytest.approx(4 * line["mse"], rel=1e-3)


def test_without_the_lpips_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(SystemExit, match="--lpips_weight: needs the lpips package .* pip install lpips"):
        train(*TINY, HERE / "recipes" / "ft_mse.py", f"--out_dir={tmp_path / 'out'}")
    train(*TINY, HERE / "recipes" / "ft_mse.py", "--train_decoder=false", "--max_iters=1", "--replay_size=0",
          f"--out_dir={tmp_path / 'out'}")  # an encoder alone needs none
