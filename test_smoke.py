"""python -m pytest test_smoke.py: a minute. The README's commands at tiny sizes, and the method against steps by hand.

Files of every kind, VAEs of every family and everything that can go wrong are in tests/: python -m pytest
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
import types
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: of steps so tiny, threads make slower ones

import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image, ImageOps

import model
from data import PHOTOS, find_images
from support import files
from teacher import Teacher

HERE = Path(__file__).resolve().parent
TINY = ["--device=cpu", "--crop=32", "--batch_size=4", "--width=16", "--eval_images=2", "--eval_size=64", "--window=64",
        "--replay_size=64", "--log_interval=1", "--workers=2"]


def start(*command, **environment):
    """A command in a process of its own: start("train.py", "--seed=1"), start("-m", "tools.bench")."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, env=os.environ | environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(*command, **environment):
    process = start(*command, **environment)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return output


def train(*arguments):
    """`python train.py` in this process, which saves the seconds of its imports; returns its globals."""
    scope = types.SimpleNamespace(__name__="__main__", __file__=str(HERE / "train.py"))
    argv, hook = sys.argv, sys.excepthook
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = ["train.py", *map(str, arguments)]
    try:
        exec(compile((HERE / "train.py").read_text(encoding="utf-8"), "train.py", "exec"), vars(scope))
    finally:
        sys.argv, sys.excepthook = argv, hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return scope


def records(out_dir):
    return [json.loads(line) for line in open(out_dir / "log.jsonl", encoding="utf-8")]


@functools.cache  # one for this file and those in tests/
def trained_once():
    temporary = tempfile.TemporaryDirectory()  # which is removed at the end
    pictures, out = Path(temporary.name) / "pictures", Path(temporary.name) / "run" / "out"
    (pictures / "deeper").mkdir(parents=True)
    for i, photo in enumerate(find_images(PHOTOS)[:24]):
        name = f"{i}.{('jpg', 'PNG', 'webp', 'JPEG')[i % 4]}"
        ImageOps.fit(Image.open(photo), (80, 80)).save(pictures / ("deeper" if i % 2 else ".") / name)
    (pictures / "broken.jpg").write_text("not an image")
    output = run("train.py", *TINY, f"--data_dir={pictures}", f"--out_dir={out}", "--max_iters=120",
                 "--eval_interval=40", "--learning_rate=3e-3")
    return types.SimpleNamespace(folder=pictures, out=out, output=output, temporary=temporary)


@pytest.fixture
def tiny_run():
    """A short run on a folder of pictures, `folder`; its `out` and what it printed, `output`. Not to be written to."""
    return trained_once()


@functools.cache
def stepped_once():
    temporary, seen, forward = tempfile.TemporaryDirectory(), [], model.Discriminator.forward
    out = Path(temporary.name) / "out"

    def recorded(self, image, latent):
        seen.append((image.detach().clone(), latent.detach().clone()))
        return forward(self, image, latent)
    train(*TINY, "--dtype=float32", "--optimizer=adam", "--max_iters=5", f"--out_dir={out}")
    before = torch.load(out / "ckpt.pt", weights_only=True)
    model.Discriminator.forward = recorded
    try:
        after = train("--init_from=resume", "--max_iters=6", f"--out_dir={out}")
    finally:
        model.Discriminator.forward = forward
    return types.SimpleNamespace(before=before, after=after, seen=seen, terms=records(out)[-2], temporary=temporary)


@pytest.fixture
def stepped():
    """The sixth step of a run: the checkpoint before, train.py's globals after, what D was shown, the terms."""
    return stepped_once()


RATE = 1e-3 * 1 / 3  # of the sixth of six steps: over the last three it falls to 0


def networks_before(stepped):
    networks = model.Encoder(4, 8, 16), model.Decoder(4, 8, 16), model.Discriminator(4), model.Decoder(4, 8, 16)
    for network, name in zip(networks, ("encoder", "decoder", "discriminator", "ema_decoder")):
        network.load_state_dict(stepped.before[name])
    return networks


def step_by_hand(network_parameters, loss, state, **adam):
    optimizer = torch.optim.Adam(network_parameters, **adam)
    optimizer.load_state_dict(state["adam"])
    optimizer.param_groups[0].update(lr=RATE, fused=False)  # which ignores that the memory orders differ
    loss.backward()
    optimizer.step()


def assert_same(network, expected):
    torch.testing.assert_close(network.state_dict(), expected.state_dict(), rtol=0, atol=1e-5)


def in_bytes(images):
    return {(image.clamp(0, 1) * 255).round().byte().numpy().tobytes() for image in images}


def test_what_the_discriminator_is_shown(stepped):
    """Its step: real crops of the pool, fakes half new and half old. The decoder's: the same crops, the new fakes."""
    (real, latent), (fakes, fakes_latent), (real_again, _), (fake, fake_latent) = stepped.seen
    _, decoder, *_ = networks_before(stepped)
    assert in_bytes(real) <= in_bytes(stepped.after.pool.images / 255)
    assert torch.equal(real, real_again) and torch.equal(latent, fake_latent)
    assert torch.allclose(fake, decoder(latent), atol=1e-5)
    assert torch.equal(fakes[2:], fake[2:]) and torch.equal(fakes_latent[2:], latent[2:])  # beside their real images
    old, old_latents = stepped.before["replay"]["images"] / 255, stepped.before["replay"]["latents"].float()
    assert in_bytes(fakes[:2]) <= in_bytes(old)
    assert len(in_bytes(old)) == 20  # of the five steps before
    for image, its_latent in zip(fakes[:2], fakes_latent):
        for slot in (old - image).abs().flatten(1).amax(1).lt(1e-3).nonzero().flatten():  # they stay together
            assert torch.equal(its_latent, old_latents[slot])


def test_the_step_of_the_discriminator(stepped):
    _, _, discriminator, _ = networks_before(stepped)
    (real, latent), (fakes, fakes_latent), *_ = stepped.seen
    (real_scores, _), (scores, _) = discriminator(real, latent), discriminator(fakes, fakes_latent)
    loss = ((real_scores - 1) ** 2).mean() + ((scores + 1) ** 2).mean()
    step_by_hand(discriminator.parameters(), loss, stepped.before["discriminator_optimizer"], betas=(0.5, 0.99))
    assert stepped.terms["discriminator"] == pytest.approx(loss.item(), rel=1e-4)
    assert_same(stepped.after.discriminator, discriminator)
    gradients, expected = ([w.grad for w in each.parameters()] for each in (stepped.after.discriminator, discriminator))
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)  # none of it is from the decoder's loss


def test_the_step_of_encoder_and_decoder(stepped):
    encoder, decoder, _, averaged = networks_before(stepped)
    (real, latent), *_ = stepped.seen
    discriminator, fake = copy.deepcopy(stepped.after.discriminator), decoder(latent)  # D has made its step
    (real_scores, seen), (scores, fake_seen) = discriminator(real, latent), discriminator(fake, latent)
    terms = {"encoder": ((encoder(real) - latent) ** 2).mean(), "mse": ((fake - real) ** 2).mean(),
             "encoder_feature": (averaged[:6](encoder(real)) - averaged[:6](latent)).abs().mean(),  # to its third block
             "adversarial": ((scores - real_scores) ** 2).mean(),
             "matching": sum((b - a).abs().sum() / a.abs().sum() for a, b in zip(seen, fake_seen, strict=True)) / 5,
             "lowres_mse": ((fake - real).unflatten(3, (4, 8)).unflatten(2, (4, 8)).mean((3, 5)) ** 2).mean()}
    loss = sum(terms.values()) + 9 * terms["mse"] + 9 * terms["lowres_mse"] + 4 * terms["matching"]
    step_by_hand([*encoder.parameters(), *decoder.parameters()], loss, stepped.before["student_optimizer"],
                 betas=(0.9, 0.9), amsgrad=True)
    for name, value in terms.items():
        assert stepped.terms[name] == pytest.approx(value.item(), rel=1e-4), name
    assert_same(stepped.after.encoder, encoder)
    assert_same(stepped.after.decoder, decoder)


def test_the_average(stepped):
    """A weight counts half after a tenth of the 24 images averaged so far: 2.4 images; a step brings 4."""
    for half in ("encoder", "decoder"):
        now, before = getattr(stepped.after, half).state_dict(), stepped.before[f"ema_{half}"]
        expected = {name: before[name] + (1 - 0.5 ** (4 / 2.4)) * (now[name] - before[name]) for name in now}
        torch.testing.assert_close(getattr(stepped.after, f"ema_{half}").state_dict(), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_latents_are_those_of_the_whole_window(stepped):
    """Crops and latents are cut from what the teacher encoded whole: the first four crops are a window, row by row."""
    pool, teacher = stepped.after.pool, Teacher("toy")
    crops, latents = pool.images[:4] / 255, pool.latents[:4].float()
    whole = teacher.encode(torch.cat([torch.cat(list(crops[row:row + 2]), 2) for row in (0, 2)], 1)[None])[0]
    for i, (y, x) in enumerate(((0, 0), (0, 4), (4, 0), (4, 4))):
        assert torch.allclose(latents[i], whole[:, y:y + 4, x:x + 4], atol=5e-3)
    assert (teacher.encode(crops) - latents).abs().max() > 0.1


def test_echo(stepped):
    """A crop is used twice: the pool of 256 takes in 8 a step, two windows, while it fills; then one in 2 steps."""
    scope, squares = stepped.after, torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    scope.pool, scope.loader = scope.Memory(256, (3, 32, 32), (4, 4, 4)), iter(lambda: squares, None)
    scope.progress.batches_read, scope.progress.due = 0, 0.0
    for steps, read in ((31, 62), (1, 64), (40, 64 + 20)):
        batches = [scope.get_batch() for _ in range(steps)]
        assert scope.progress.batches_read == read and batches[-1][0].shape == (4, 3, 32, 32)


@pytest.mark.parametrize("share", [0, 1])
def test_color_augmentation_reaches_the_crops(share, tmp_path):
    for i in range(4):
        Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / f"{i}.png")  # grey
    flags = f"--data_dir={tmp_path}", f"--color_augment={share}", "--max_iters=1", f"--out_dir={tmp_path / 'out'}"
    crops = train(*TINY, *flags).pool.images[:8].int()
    assert ((crops.amax(1) - crops.amin(1)).flatten(1).amax(1) > 8).all() == bool(share)


def test_training_learns_and_leaves_everything(tiny_run):
    first, *_, last = [line for line in records(tiny_run.out) if "val_psnr" in line]
    assert last["val_psnr"] > first["val_psnr"] and last["val_latent_mse"] < first["val_latent_mse"]
    terms = {"encoder", "mse", "lowres_mse", "discriminator", "adversarial", "matching"}
    assert terms <= records(tiny_run.out)[-2].keys()
    assert set(os.listdir(tiny_run.out)) == {"ckpt.pt", "ckpt_previous.pt", "curves.png", "diffusers", "log.jsonl",
                                             "samples", "taesd_decoder.pth", "taesd_encoder.pth"}
    assert sorted(os.listdir(tiny_run.out / "samples"))[:3] == ["0000040.png", "0000080.png", "0000120.png"]
    assert "images_seen: 480" in tiny_run.output and f"val_psnr: {last['val_psnr']}" in tiny_run.output


def test_sample(tiny_run, tmp_path):
    out = shutil.copytree(tiny_run.out, tmp_path / "out")
    table = run("sample.py", f"--out_dir={out}", "--device=cpu")
    assert all(row in table for row in ("teacher round trip", "our decoder", "our encoder and decoder"))
    assert Image.open(out / "samples" / "sample.png").size == (64, 7 * (64 + 20))  # one of 25 files is held out


@torch.no_grad()
def test_exports_give_the_same_pixels(tiny_run):
    student = files.student(files.load_checkpoint(str(tiny_run.out)))
    tiny, image = AutoencoderTiny.from_pretrained(tiny_run.out / "diffusers"), torch.rand(1, 3, 64, 96)
    latent = student["encoder"](image)
    assert torch.allclose(tiny.encode(image * 2 - 1).latents, latent, atol=1e-5)
    assert torch.allclose(tiny.decode(latent).sample / 2 + 0.5, student["decoder"](latent), atol=1e-5)


def test_resume_continues_as_if_never_stopped(tmp_path):
    flags = *TINY, "--crop=16", "--window=32", "--eval_interval=35", "--cooldown=0"  # its length would differ
    train(*flags, "--max_iters=70", f"--out_dir={tmp_path / 'whole'}")
    train(*flags, "--max_iters=3", f"--out_dir={tmp_path / 'parts'}")
    for step in (35, 67, 70):  # right after an evaluation, and between two; the rest comes from the checkpoint
        train("--init_from=resume", f"--max_iters={step}", f"--out_dir={tmp_path / 'parts'}")

    def figures(out_dir):
        timing = ("images_per_second", "data_wait", "peak_memory_mb")
        lines = [{key: value for key, value in line.items() if key not in timing} for line in records(out_dir)[1:]]
        return [line for line in lines if "mse" in line], [line for line in lines if "val_psnr" in line][-1]
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts") and len(figures(tmp_path / "whole")[0]) == 70
