"""Starting from the student of another VAE: what is solved, what is kept, what is refused."""
import contextlib
import copy
import re
import shutil

import pytest
import torch
import torch.nn as nn

import model
from conftest import DATA, evaluations, load, needs_data
from data import Images
from support import donor, export, files
from teacher import Teacher
from test_smoke import HERE, TINY, records, train

START = [flag for flag in TINY if "width" not in flag] + ["--dtype=float32", "--max_iters=0"]


def write(folder, encoder, decoder):
    """A pair of taesd.py files, which is a donor or a teacher."""
    folder.mkdir()
    export.save_taesd(folder / "taesd_encoder.pth", encoder)
    export.save_taesd(folder / "taesd_decoder.pth", decoder)
    return folder / "taesd_encoder.pth"


def random_pair(channels=4, factor=8, variant="plain"):
    return [build(channels, factor, 8, variant) for build in (model.Encoder, model.Decoder)]


def test_least_squares_against_lstsq():
    x, y, conv = torch.randn(3, 2, 6, 5).relu(), torch.randn(3, 4, 6, 5), nn.Conv2d(2, 4, 3, padding=1)
    squares = donor.LeastSquares()
    for pair in zip(x.split(2), y.split(2)):
        squares.add(*pair)
    r2 = squares.solve(conv, ridge=0)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    rows = torch.stack([padded[n, :, i:i + 3, j:j + 3].flatten() for n in range(3) for i in range(6) for j in range(5)])
    goal = y.permute(0, 2, 3, 1).flatten(0, 2)
    found = torch.linalg.lstsq(torch.cat([rows, torch.ones(90, 1)], 1), goal).solution
    assert torch.allclose(conv.weight.flatten(1).T, found[:-1], atol=1e-4)
    assert torch.allclose(conv.bias, found[-1], atol=1e-4)
    left = (goal - rows @ found[:-1] - found[-1]).square().sum() / (goal - goal.mean(0)).square().sum()
    assert r2 == pytest.approx(1 - left.item(), abs=1e-5)
    no_bias = nn.Conv2d(2, 4, 3, padding=1, bias=False)
    squares.solve(no_bias, ridge=0)
    assert torch.allclose(no_bias.weight.flatten(1).T, torch.linalg.lstsq(rows, goal).solution, atol=1e-4)


def test_a_linear_map_of_the_donors_latents_gives_the_donors_pixels(tmp_path, capsys):
    encoder, decoder = random_pair()
    other, _ = random_pair(channels=6)
    other.load_state_dict(encoder.state_dict() | {f"14.{name}": other[-1].state_dict()[name]
                                                  for name in ("weight", "bias")})
    mix = torch.randn(6, 4)
    with torch.no_grad():  # latents of random weights hardly vary, and far from 0 the decoder's clamp is not linear
        latent = encoder(Images().held_out(6, 64) / 255)
        scale = 0.01 / latent.std()
        encoder[-1].bias.sub_(latent.mean((0, 2, 3)))
        for weight in encoder[-1].parameters():
            weight.mul_(scale)
        decoder[1].weight.mul_(2000)
        other[-1].weight.copy_(torch.einsum("oi,ihwk->ohwk", mix, encoder[-1].weight))
        other[-1].bias.copy_(mix @ encoder[-1].bias)
    theirs = write(tmp_path / "donor", encoder, decoder)
    train(*START, f"--init_from={theirs}", f"--out_dir={tmp_path / 'out'}",
          f"--teacher={write(tmp_path / 'other', other, random_pair(6)[1])}")
    assert "encoder R2 1.00" in (output := capsys.readouterr().out) and "decoder R2 1.00" in output
    solved = files.student(files.load_student(str(tmp_path / "out" / "taesd_encoder.pth")))
    with torch.no_grad():
        real = Images().held_out(6, 128) / 255
        latent, goal = other(real), decoder(encoder(real))
        assert goal.std((0, 2, 3)).min() > 0.01  # there is something to find
        assert (solved["decoder"](latent) - goal).abs().max() < 1e-3
        assert (solved["encoder"](real) - latent).abs().max() < 0.01 * latent.std()


@pytest.mark.parametrize("theirs, ours, kept", [((4, 8), (6, 8), (0.99, 0.98)), ((4, 8), (4, 8), (0.99, 0.98)),
                                                ((4, 8), (4, 16), (0.76, 0.76)), ((4, 16), (4, 8), (0.99, 0.98))])
def test_what_is_kept(theirs, ours, kept, tmp_path, capsys):
    encoder, decoder = random_pair(*theirs)
    train(*START, "--eval_size=64", f"--init_from={write(tmp_path / 'donor', encoder, decoder)}",
          f"--teacher={write(tmp_path / 'vae', *random_pair(*ours))}", f"--out_dir={tmp_path / 'out'}")
    told = re.search(r"encoder R2 (.*), ([\d.]+)% .*decoder R2 (.*), ([\d.]+)%", capsys.readouterr().out).groups()
    assert (float(told[1]) / 100, float(told[3]) / 100) == pytest.approx(kept, abs=0.02)
    new = load(tmp_path / "out" / "ckpt.pt")
    assert new["step"] == 0 and new["settings"]["learning_rate"] == 1e-3 and new["images_averaged"] == 0
    same = [torch.equal(new["ema_encoder"][key], value) for key, value in list(encoder.state_dict().items())[:-2]
            if key in new["ema_encoder"] and new["ema_encoder"][key].shape == value.shape]
    assert all(same) and len(same) > 30
    assert torch.equal(new["ema_decoder"][f"{len(model.Decoder(*ours, 8)) - 1}.weight"], decoder[-1].weight)
    assert new["encoder"].keys() == new["ema_encoder"].keys() and (tmp_path / "out" / "diffusers").exists()
    assert (tmp_path / "out" / "samples" / "0000000.png").exists() and len(evaluations(tmp_path / "out")) == 1


@pytest.mark.parametrize("theirs, ours", [((8, "plain"), (8, "plain")), ((8, "plain"), (16, "plain")),
                                          ((8, "midblock_gn"), (8, "midblock_gn")), ((8, "midblock_gn"), (8, "plain")),
                                          ((8, "plain"), (8, "midblock_gn")), ((32, "f32"), (8, "plain")),
                                          ((8, "plain"), (32, "f32")), ((16, "plain"), (8, "plain"))])
def test_what_is_kept_of_a_decoder_gives_the_donors_picture_from_its_target(theirs, ours, monkeypatch):
    old, new = model.Decoder(4, theirs[0], 8, theirs[1]), model.Decoder(6, ours[0], 8, ours[1])
    for name, weight in old.named_parameters():
        if "pool.3" in name:
            nn.init.normal_(weight)  # it is silent when fresh
    seen, latent = [], torch.randn(1, 4, 4, 4)
    monkeypatch.setattr(donor.LeastSquares, "add", lambda self, x, y: seen.append((x, y)))
    monkeypatch.setattr(donor.LeastSquares, "solve", lambda self, conv: seen.append(conv))
    side = 4 * theirs[0] // ours[0]
    donor.solve_decoder(new, old, [torch.randn(1, 6, side, side)], [latent], contextlib.nullcontext())
    (features, goal), solved = seen
    at = [layer is solved for layer in new].index(True)
    assert solved(features).shape == goal.shape
    after = new[at + 1:] if not isinstance(new[at + 1], nn.ReLU) or theirs[0] <= ours[0] else new[at + 2:]
    assert torch.allclose(after(goal), old(latent), atol=1e-5)


def test_groupnorm_branches_begin_silent_and_are_not_dropped():
    plain, branched = model.Encoder(4, 8, 8), model.Encoder(4, 8, 8, "midblock_gn")
    image = torch.rand(1, 3, 32, 32)
    assert len(donor.keep(copy.deepcopy(branched), plain)) == 15
    silent = copy.deepcopy(branched)
    donor.keep(silent, plain)
    assert torch.allclose(silent(image), plain(image), atol=1e-6)
    assert len(donor.keep(plain, branched)) == 11  # up to the first block that has one


def test_a_run_of_another_teacher_is_a_donor(tiny_run, tmp_path, capsys):
    flags = *START, "--max_iters=1", f"--init_from={tiny_run.out}"
    scope = train(*flags, f"--teacher={write(tmp_path / 'vae', *random_pair())}", f"--out_dir={tmp_path / 'other'}")
    assert "encoder R2" in capsys.readouterr().out and scope.learning_rate == 1e-3
    assert scope.progress.images_averaged == 4 and scope.shape["variant"] == "plain"
    theirs = load(tiny_run.out / "ckpt.pt")["discriminator"]["blocks.2.weight"]
    assert not torch.allclose(scope.discriminator.blocks[2].weight, theirs, atol=0.05)  # a fresh one
    scope = train(*flags, "--variant=midblock_gn", f"--out_dir={tmp_path / 'variant'}")  # fits as it is
    assert "R2" not in capsys.readouterr().out and scope.learning_rate == 1e-4
    assert torch.allclose(scope.discriminator.blocks[2].weight, theirs, atol=0.02)


def test_a_run_of_the_encoder_alone_is_a_donor(tmp_path):
    train(*TINY, "--max_iters=1", "--train_decoder=false", f"--out_dir={tmp_path / 'half'}")
    train(*START, f"--init_from={tmp_path / 'half'}", f"--out_dir={tmp_path / 'out'}",
          f"--teacher={write(tmp_path / 'vae', *random_pair(6))}")
    assert load(tmp_path / "out" / "ckpt.pt")["ready"] == ["encoder"]


def test_the_student_of_this_teacher_is_not_solved(tmp_path, capsys):
    theirs = write(tmp_path / "pair", *random_pair())
    train(*START, f"--teacher={theirs}", f"--init_from={theirs}", f"--out_dir={tmp_path / 'same'}")
    assert "R2" not in capsys.readouterr().out
    assert records(tmp_path / "same")[0]["settings"]["learning_rate"] == 1e-4
    assert evaluations(tmp_path / "same")[0]["val_latent_mse"] < 1e-6


def test_what_cannot_be_solved(tmp_path):
    theirs = write(tmp_path / "pair", *random_pair(6))
    branched = write(tmp_path / "branched", *random_pair(6, variant="midblock_gn"))
    with pytest.raises(SystemExit, match="--width=16: .* has 8 channels and keeps them, for it has Group"):
        train(*START, "--width=16", f"--init_from={branched}", f"--out_dir={tmp_path / 'out'}")
    (tmp_path / "pair" / "taesd_encoder.pth").unlink()
    with pytest.raises(SystemExit, match="a decoder alone, and not of this teacher; .* it needs its encoder"):
        train(*START, f"--init_from={tmp_path / 'pair' / 'taesd_decoder.pth'}", f"--out_dir={tmp_path / 'out'}")


@pytest.mark.parametrize("factor, variant", [(8, "plain"), (16, "plain"), (32, "f32")])
def test_another_width(factor, variant):
    """Wider is the same; narrower again, too, where what is cut away was not read."""
    torch.manual_seed(0)
    for build, side in (model.Encoder, 4 * factor), (model.Decoder, 8):
        small, large = build(4, factor, 8, variant), build(4, factor, 12, variant)
        inputs = [torch.rand(2, 3, side, side) if build is model.Encoder else torch.randn(2, 4, side, side)
                  for _ in range(8 + 2)]
        with torch.no_grad():
            donor.widen(large, small)
            assert all(torch.allclose(large(each), small(each), atol=1e-6) for each in inputs)
            for weight, theirs in zip(large.parameters(), small.parameters()):
                weight[len(theirs):] = 0
            again = build(4, factor, 8, variant)
            before = [(again(each) - small(each)).square().mean() for each in inputs[8:]]
            donor.narrow(again, large, inputs[:8], contextlib.nullcontext())
            after = [(again(each) - small(each)).square().mean() for each in inputs[8:]]  # on others
        assert sum(after) < 1e-5 * sum(before)


def test_a_donor_of_another_width(tiny_run, tmp_path, capsys):
    theirs = write(tmp_path / "pair", *random_pair(6))
    for width in 4, 16:
        scope = train(*START, f"--width={width}", f"--init_from={theirs}", f"--out_dir={tmp_path / str(width)}")
        output = capsys.readouterr().out
        assert f"8 channels made {width}" in output and "encoder R2" in output and scope.learning_rate == 1e-3
        assert load(tmp_path / str(width) / "ckpt.pt")["shape"]["width"] == width
    scope = train(*START, "--width=24", f"--init_from={tiny_run.out}", f"--out_dir={tmp_path / 'same'}")
    assert "16 channels made 24" in (output := capsys.readouterr().out) and "R2" not in output  # of the same teacher
    assert scope.learning_rate == 1e-3 and scope.progress.images_averaged == 0
    decoder = tmp_path / "taesd_decoder.pth"  # alone; it is taken for one of this teacher
    shutil.copy(tiny_run.out / "taesd_decoder.pth", decoder)
    for width in 8, 24:
        train(*START, f"--width={width}", f"--init_from={decoder}", f"--out_dir={tmp_path / f'alone-{width}'}")
        assert f"16 channels made {width}" in (output := capsys.readouterr().out) and "R2" not in output
        assert load(tmp_path / f"alone-{width}" / "ckpt.pt")["ready"] == ["decoder"]
    old, new = (files.student(files.load_student(str(path))) for path in (tiny_run.out, tmp_path / "same"))
    image, latent = torch.rand(1, 3, 32, 32), torch.randn(1, 4, 4, 4)
    assert torch.allclose(new["encoder"](image), old["encoder"](image), atol=1e-5)
    assert torch.allclose(new["decoder"](latent), old["decoder"](latent), atol=1e-5)


def test_an_encoder_alone_is_a_donor(tmp_path, capsys):
    theirs = write(tmp_path / "pair", *random_pair(6))
    (tmp_path / "pair" / "taesd_decoder.pth").unlink()
    train(*START, f"--init_from={theirs}", f"--out_dir={tmp_path / 'out'}")
    output = capsys.readouterr().out
    assert "encoder R2" in output and "decoder R2" not in output
    assert {path.name for path in (tmp_path / "out").glob("taesd_*")} == {"taesd_encoder.pth"}  # no noise
    scope = train("--init_from=resume", "--max_iters=2", f"--out_dir={tmp_path / 'out'}")  # goes on from the preview
    assert scope.learning_rate == 1e-3 and (tmp_path / "out" / "taesd_decoder.pth").exists()
    with pytest.raises(SystemExit, match="has done 2 steps; raise --max_iters to go on"):
        train("--init_from=resume", "--max_iters=0", f"--out_dir={tmp_path / 'out'}")


def test_the_bundled_donor(tmp_path, capsys):
    folder = HERE / "assets" / "donor"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6e6 and (folder / "README.md").exists()
    assert files.load_student("donor")["shape"] == dict(latent_channels=32, factor=8, width=64, variant="plain")
    train(*START, "--dtype=auto", "--init_from=donor", "--eval_images=6", "--eval_size=128",
          f"--out_dir={tmp_path / 'out'}")
    figures = evaluations(tmp_path / "out")[0]
    assert figures["val_psnr"] > 17.5 and figures["val_latent_mse"] < 0.15
    assert re.search(r"donor     donor, not of this teacher: .* R2 0\.9\d, 99\.\d% .* R2 0\.[2345]\d, 99\.\d%",
                     capsys.readouterr().out)


@needs_data
def test_released_weights_are_a_donor(tmp_path):
    train(*START, "--dtype=auto", f"--init_from={DATA / 'weights' / 'taef2_encoder.pth'}", f"--val_dir={DATA / 'val'}",
          f"--data_dir={DATA / 'photos'}", f"--out_dir={tmp_path / 'out'}", "--eval_images=4", "--eval_size=128")
    figures = evaluations(tmp_path / "out")[0]
    assert figures["val_psnr"] > 18 and figures["val_latent_mse"] < 0.2
    assert Teacher(str(tmp_path / "out" / "taesd_encoder.pth")).student_variant == "midblock_gn"
