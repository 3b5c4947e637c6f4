"""python -m pytest test_smoke.py: the README's commands at tiny sizes, and the method against a step by hand.

Files of every kind, VAEs of every family and mistakes of users are in tests/. All tests: python -m pytest
"""
import copy
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; for such small steps, threads only cost time

import pytest
import torch
from PIL import Image, ImageOps

import model
from data import PHOTOS, find_images
from support import log
from teacher import Teacher

HERE = Path(__file__).resolve().parent
TINY = ["--device=cpu", "--crop=32", "--batch_size=4", "--width=8", "--eval_images=2", "--eval_size=64",
        "--window=64", "--finish=0", "--replay_size=64", "--log_interval=1", "--workers=2"]


def start(*command, **environment):
    """Start a command in a process of its own: start("train.py", "--seed=1"), start("-m", "tools.bench")."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, env=os.environ | environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(*command, **environment):
    """Run a command in a process of its own, and return what it prints."""
    process = start(*command, **environment)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return output


def script(name, *arguments):
    """Run `python sample.py` or the like in this process, which saves the time of imports. Returns its globals."""
    scope = SimpleNamespace(__name__="__main__", __file__=str(HERE / name))
    source = (HERE / name).read_text(encoding="utf-8")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:  # what it changes here is restored at the end
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        patch.setattr(sys, "excepthook", sys.excepthook)
        patch.setattr(log, "draw_curves", lambda out_dirs, path: None)  # curves take a second each time
        try:
            exec(compile(source, scope.__file__, "exec"), vars(scope))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return scope


train = functools.partial(script, "train.py")


def records(out_dir):
    return [json.loads(line) for line in open(Path(out_dir) / "log.jsonl", encoding="utf-8")]


@functools.cache  # the run is shared by this file and those in tests/
def trained_once():
    temporary = tempfile.TemporaryDirectory()  # is removed at the end
    pictures, out = Path(temporary.name) / "pictures", Path(temporary.name) / "run" / "out"
    (pictures / "deeper").mkdir(parents=True)
    for i, photo in enumerate(find_images(PHOTOS)[:24]):
        name = f"{i}.{('jpg', 'PNG', 'webp', 'JPEG')[i % 4]}"
        ImageOps.fit(Image.open(photo), (80, 80)).save(pictures / ("deeper" if i % 2 else ".") / name)
    (pictures / "broken.jpg").write_text("not an image")
    output = run("train.py", *TINY, f"--data_dir={pictures}", f"--out_dir={out}", "--max_iters=60",
                 "--eval_interval=20", "--learning_rate=3e-3")
    return SimpleNamespace(folder=pictures, out=out, output=output, temporary=temporary)


@pytest.fixture
def tiny_run():
    """A run of 60 steps on a folder of 24 pictures and a broken one, `folder`, with evaluations at steps 20, 40 and 60.
    `out` is its out_dir, which must not be written to, and `output` is what it printed."""
    return trained_once()


def train_and_record(*arguments):
    """Run train.py in this process. Returns its globals, and the inputs and scores of D in each call, four a step."""
    seen, forward = [], model.Discriminator.forward

    def recorded(self, image, latent):
        scores, activations = forward(self, image, latent)
        seen.append((image.detach().clone(), latent.detach().clone(), scores.detach().clone()))
        return scores, activations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.Discriminator, "forward", recorded)
        return train(*TINY, "--dtype=float32", *arguments), seen


@pytest.fixture(scope="session")
def stepped(tmp_path_factory):
    """A run of six steps: `before` is the checkpoint after five of them, `after` holds train.py's globals at the end,
    `seen` what D was shown and answered, and `losses` the log of the sixth step."""
    out = tmp_path_factory.mktemp("stepped")
    scope, seen = train_and_record("--optimizer=adam", "--max_iters=6", "--eval_interval=5", f"--out_dir={out}")
    before = torch.load(out / "ckpt_previous.pt", weights_only=True)
    losses = [line for line in records(out) if "mse" in line][-1]
    return SimpleNamespace(before=before, after=scope, seen=seen, losses=losses)


def networks_before(stepped):
    networks = model.Encoder(width=8), model.Decoder(width=8), model.Discriminator(), model.Decoder(width=8)
    for network, name in zip(networks, ("encoder", "decoder", "discriminator", "ema_decoder")):
        network.load_state_dict(stepped.before[name])
    return networks


def step_by_hand(weights, loss, state, **adam):
    optimizer = torch.optim.Adam(weights, **adam)
    optimizer.load_state_dict(state["adam"])
    optimizer.param_groups[0].update(lr=1e-3 / 3, fused=False)  # of six steps, the rate falls to 0 over the last three
    loss.backward()
    optimizer.step()


def assert_same(network, expected):
    torch.testing.assert_close(network.state_dict(), expected.state_dict(), rtol=0, atol=1e-5)


def in_bytes(images):
    return {(image.clamp(0, 1) * 255).round().byte().numpy().tobytes() for image in images}


def test_what_the_discriminator_is_shown(stepped):
    """For D's own step: real crops from the pool, and fakes. For the decoder's: the same crops, and the new fakes."""
    (real, latent, _), (d_fakes, d_latents, _), (real_again, _, _), (fake, fake_latent, _) = stepped.seen[-4:]
    _, decoder, *_ = networks_before(stepped)
    assert in_bytes(real) <= in_bytes(stepped.after.crop_pool.images / 255)
    assert torch.equal(real, real_again) and torch.equal(latent, fake_latent)
    assert torch.allclose(fake, decoder(latent), atol=1e-5)
    in_steps = (fake[2:].clamp(0, 1) * 255).round() / 255  # real images and old fakes have these steps, too
    assert torch.equal(d_fakes[2:], in_steps)  # each new fake beside its real image
    assert torch.equal(d_latents[2:], latent[2:])


def test_half_of_the_fakes_that_the_discriminator_learns_from_are_old(stepped):
    """Each is one of the twenty fakes of the five steps before, together with its own latent."""
    old = [pair for images, latents, _ in stepped.seen[3:20:4] for pair in zip(images, latents)]
    d_fakes, d_latents, _ = stepped.seen[-3]
    for fake, latent in zip(d_fakes[:2], d_latents[:2]):
        its_latents = [old_latent for image, old_latent in old if in_bytes([image]) == in_bytes([fake])]
        assert any(torch.allclose(old_latent, latent, atol=1e-2) for old_latent in its_latents)


def test_the_step_of_the_discriminator(stepped):
    _, _, discriminator, _ = networks_before(stepped)
    (real, latent, _), (d_fakes, d_latents, _) = stepped.seen[-4:-2]
    (real_scores, _), (fake_scores, _) = discriminator(real, latent), discriminator(d_fakes, d_latents)
    loss = ((real_scores - 1) ** 2).mean() + ((fake_scores + 1) ** 2).mean()
    step_by_hand(discriminator.parameters(), loss, stepped.before["discriminator_optimizer"], betas=(0.5, 0.99))
    assert stepped.losses["discriminator"] == pytest.approx(loss.item(), rel=1e-4)
    assert_same(stepped.after.discriminator, discriminator)
    gradients = [weight.grad for weight in stepped.after.discriminator.parameters()]
    expected = [weight.grad for weight in discriminator.parameters()]
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)  # the decoder's loss has added nothing


def test_the_step_of_encoder_and_decoder(stepped):
    encoder, decoder, _, averaged = networks_before(stepped)
    real, latent, _ = stepped.seen[-4]
    discriminator, fake = copy.deepcopy(stepped.after.discriminator), decoder(latent)  # D has made its step before
    (real_scores, real_seen), (fake_scores, fake_seen) = discriminator(real, latent), discriminator(fake, latent)
    distances = [(b - a).abs().sum() / a.abs().sum() for a, b in zip(real_seen, fake_seen, strict=True)]
    losses = {"encoder": ((encoder(real) - latent) ** 2).mean(),
              "encoder_feature": (averaged[:6](encoder(real)) - averaged[:6](latent)).abs().mean(),
              "mse": ((fake - real) ** 2).mean(),
              "lowres_mse": ((fake - real).unflatten(3, (4, 8)).unflatten(2, (4, 8)).mean((3, 5)) ** 2).mean(),
              "adversarial": ((fake_scores - real_scores) ** 2).mean(),
              "feature_matching": sum(distances) / 5}
    total = (losses["encoder"] + losses["encoder_feature"] + 10 * losses["mse"] + 10 * losses["lowres_mse"]
             + losses["adversarial"] + 5 * losses["feature_matching"])
    step_by_hand([*encoder.parameters(), *decoder.parameters()], total, stepped.before["student_optimizer"],
                 betas=(0.9, 0.9), amsgrad=True)
    for name, value in losses.items():
        assert stepped.losses[name] == pytest.approx(value.item(), rel=1e-4), name
    assert_same(stepped.after.encoder, encoder)
    assert_same(stepped.after.decoder, decoder)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_the_average(half, stepped):
    """Half of the average is renewed in a tenth of the 24 images so far, which is 2.4 images; a step brings 4."""
    before, now = stepped.before[f"ema_{half}"], stepped.after.networks[half].state_dict()
    expected = {name: before[name] + (1 - 0.5 ** (4 / 2.4)) * (now[name] - before[name]) for name in now}
    torch.testing.assert_close(stepped.after.networks[f"ema_{half}"].state_dict(), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_latents_are_those_of_the_whole_window(stepped):
    """The first four crops in the pool are the four quarters of one window, which the teacher has encoded whole."""
    pool, teacher = stepped.after.crop_pool, Teacher("toy")
    crops, latents = pool.images[:4] / 255, pool.latents[:4].float()
    rows = [torch.cat([crops[0], crops[1]], 2), torch.cat([crops[2], crops[3]], 2)]
    whole = teacher.encode(torch.cat(rows, 1)[None])[0]
    for i, (y, x) in enumerate(((0, 0), (0, 4), (4, 0), (4, 4))):
        assert torch.allclose(latents[i], whole[:, y:y + 4, x:x + 4], atol=5e-3)
    assert (teacher.encode(crops) - latents).abs().max() > 0.1  # encoded one by one, crops have other latents


def test_echo(tmp_path):
    """A crop is used twice on average. The pool of 256 crops takes in 8 crops (two windows) a step while it fills, for
    32 steps. After that it takes in one window in two steps."""
    scope = train(*TINY, "--max_iters=1", f"--out_dir={tmp_path / 'out'}")
    window, read = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8), []
    scope.loader = iter(lambda: read.append(1) or window, None)
    for steps, windows in ((30, 60), (1, 62), (40, 62 + 20)):
        sizes = {len(scope.get_batch()[0]) for _ in range(steps)}
        assert len(read) == windows and sizes == {4}


@pytest.mark.parametrize("share", [0, 1])
def test_colour_augmentation_reaches_the_crops(share, tmp_path):
    for i in range(4):
        Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / f"{i}.png")  # grey
    flags = f"--data_dir={tmp_path}", f"--color_augment={share}", "--max_iters=1", f"--out_dir={tmp_path / 'out'}"
    crops = train(*TINY, *flags).crop_pool.images[:8].int()
    colourful = (crops.amax(1) - crops.amin(1)).flatten(1).amax(1) > 8
    assert colourful.tolist() == [bool(share)] * 8


def test_training_learns_and_leaves_everything(tiny_run):
    mse = [line["mse"] for line in records(tiny_run.out) if "mse" in line]
    first, *_, last = [line for line in records(tiny_run.out) if "val_psnr" in line]
    assert sum(mse[-20:]) < 0.7 * sum(mse[:20]) and last["val_latent_mse"] < first["val_latent_mse"]
    assert set(os.listdir(tiny_run.out)) == {
        "ckpt.pt", "ckpt_previous.pt", "curves.png", "diffusers", "log.jsonl", "samples", "settings.py",
        "taesd_decoder.pth", "taesd_encoder.pth"}
    assert "images_seen: 240" in tiny_run.output and f"val_psnr: {last['val_psnr']}" in tiny_run.output


def test_sample(tiny_run, tmp_path, capsys):
    out = shutil.copytree(tiny_run.out, tmp_path / "out")
    script("sample.py", f"--out_dir={out}", "--device=cpu")
    assert "our encoder and decoder" in capsys.readouterr().out
    assert (out / "samples" / "sample.png").exists()
