"""Starting from the student of another VAE: what is solved, what is kept, what is refused."""
import copy
import re

import pytest
import torch
import torch.nn as nn

import model
from conftest import DATA, evaluations, load, needs_data
from data import Images
from support import donor, files
from teacher import Teacher
from test_smoke import HERE, TINY, records, train

START = [flag for flag in TINY if "width" not in flag] + ["--dtype=float32", "--max_iters=0", "--variant=plain"]


def write(folder, encoder, decoder):
    """A pair of taesd.py files, which is a donor or a teacher."""
    folder.mkdir()
    files.save_taesd(folder / "taesd_encoder.pth", encoder)
    files.save_taesd(folder / "taesd_decoder.pth", decoder)
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
    assert "encoder R² 1.00" in (output := capsys.readouterr().out) and "decoder R² 1.00" in output
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
    told = re.search(r"encoder R² (.*), (\d+)% .*decoder R² (.*), (\d+)%", capsys.readouterr().out).groups()
    assert (int(told[1]) / 100, int(told[3]) / 100) == pytest.approx(kept, abs=0.02)
    new = load(tmp_path / "out" / "ckpt.pt")
    assert new["step"] == 0 and new["settings"]["learning_rate"] == 1e-3 and new["images_averaged"] == 0
    same = [torch.equal(new["ema_encoder"][key], value) for key, value in list(encoder.state_dict().items())[:-2]
            if key in new["ema_encoder"] and new["ema_encoder"][key].shape == value.shape]
    assert all(same) and len(same) > 30
    assert torch.equal(new["ema_decoder"][f"{len(model.Decoder(*ours, 8)) - 1}.weight"], decoder[-1].weight)
    assert new["encoder"].keys() == new["ema_encoder"].keys() and (tmp_path / "out" / "diffusers").exists()
    assert (tmp_path / "out" / "samples" / "0000000.png").exists() and len(evaluations(tmp_path / "out")) == 1


def test_groupnorm_branches_begin_silent_and_are_not_dropped():
    plain, branched = model.Encoder(4, 8, 8), model.Encoder(4, 8, 8, "midblock_gn")
    image = torch.rand(1, 3, 32, 32)
    assert len(donor.keep(copy.deepcopy(branched), plain)) == 15
    silent = copy.deepcopy(branched)
    donor.keep(silent, plain)
    assert torch.allclose(silent(image), plain(image), atol=1e-6)
    assert len(donor.keep(plain, branched)) == 11  # up to the first block that has one


def test_the_student_of_this_teacher_is_not_solved(tmp_path, capsys):
    theirs = write(tmp_path / "pair", *random_pair())
    train(*START, f"--teacher={theirs}", f"--init_from={theirs}", f"--out_dir={tmp_path / 'same'}")
    assert "R²" not in capsys.readouterr().out
    assert records(tmp_path / "same")[0]["settings"]["learning_rate"] == 1e-4
    assert evaluations(tmp_path / "same")[0]["val_latent_mse"] < 1e-6


def test_what_cannot_be_solved(tmp_path):
    theirs = write(tmp_path / "pair", *random_pair(6))
    with pytest.raises(SystemExit, match="--width=16: the student of .* has 8 channels and keeps them"):
        train(*START, "--width=16", f"--init_from={theirs}")
    (tmp_path / "pair" / "taesd_encoder.pth").unlink()
    with pytest.raises(SystemExit, match="a decoder of another VAE; .* its encoder must lie beside it"):
        train(*START, f"--init_from={tmp_path / 'pair' / 'taesd_decoder.pth'}")
    with pytest.raises(SystemExit, match="--max_iters=0: must be more than 0, unless"):
        train(*TINY, "--max_iters=0", f"--out_dir={tmp_path / 'out'}")


def test_an_encoder_alone_is_a_donor(tmp_path, capsys):
    theirs = write(tmp_path / "pair", *random_pair(6))
    (tmp_path / "pair" / "taesd_decoder.pth").unlink()
    train(*START[:-2], "--max_iters=2", f"--init_from={theirs}", f"--out_dir={tmp_path / 'out'}")
    output = capsys.readouterr().out
    assert "encoder R²" in output and "decoder R²" not in output and len(evaluations(tmp_path / "out")) == 2
    assert (tmp_path / "out" / "taesd_decoder.pth").exists()


@needs_data
def test_released_weights_are_a_donor(tmp_path):
    train(*START[:-1], f"--init_from={DATA / 'weights' / 'taef2_encoder.pth'}", f"--val_dir={DATA / 'val'}",
          f"--data_dir={DATA / 'photos'}", f"--out_dir={tmp_path / 'out'}", "--eval_images=4", "--eval_size=128")
    figures = evaluations(tmp_path / "out")[0]
    assert figures["val_psnr"] > 18 and figures["val_latent_mse"] < 0.2
    assert Teacher(str(tmp_path / "out" / "taesd_encoder.pth")).student_variant == "midblock_gn"
