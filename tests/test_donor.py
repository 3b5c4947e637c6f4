"""Starting from the student of another VAE: which layers are solved, and which are copied."""
import contextlib
import re

import pytest
import torch
import torch.nn as nn

import model
from conftest import DATA, TINY, evaluations, load, needs_data, students, train
from data import Images
from support import donor
from support.checkpoint import build_student, load_student
from support.export import save_taesd

START = [*TINY, "--dtype=float32", "--max_iters=0"]


def write(folder, networks):
    """Write {half: network} as taesd.py files, which can be a donor or a teacher. Returns the encoder's path."""
    for half, network in networks.items():
        save_taesd(str(folder / f"taesd_{half}.pth"), network)
    return folder / "taesd_encoder.pth"


def test_least_squares_against_lstsq():
    x, y, conv = torch.randn(3, 2, 6, 5).relu(), torch.randn(3, 4, 6, 5), nn.Conv2d(2, 4, 3, padding=1)
    squares = donor.LeastSquares()
    for x_part, y_part in zip(x.split(2), y.split(2)):
        squares.add(x_part, y_part)
    r2 = squares.solve(conv, ridge=0)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    rows, target = (each.movedim(1, 3).flatten(3).flatten(0, 2) for each in (padded, y))
    solution = torch.linalg.lstsq(torch.cat([rows, torch.ones(90, 1)], 1), target).solution
    assert torch.allclose(conv.weight.flatten(1).T, solution[:-1], atol=1e-4)
    assert torch.allclose(conv.bias, solution[-1], atol=1e-4)
    residual = target - rows @ solution[:-1] - solution[-1]
    unexplained = residual.square().sum() / (target - target.mean(0)).square().sum()
    assert r2 == pytest.approx(1 - unexplained.item(), abs=1e-5)
    without_bias = nn.Conv2d(2, 4, 3, padding=1, bias=False)
    squares.solve(without_bias, ridge=0)
    assert torch.allclose(without_bias.weight.flatten(1).T, torch.linalg.lstsq(rows, target).solution, atol=1e-4)


@torch.no_grad()
def test_a_linear_map_of_the_donors_latents_gives_the_donors_pixels(tmp_path, capsys):
    encoder, decoder, other = model.Encoder(width=8), model.Decoder(width=8), model.Encoder(6, width=8)
    other[:-1].load_state_dict(encoder[:-1].state_dict())
    mix, real = torch.randn(6, 4), Images().held_out(6, 128) / 255
    # the latents of random weights hardly vary, and far from 0 the decoder's Clamp is not linear
    latent = encoder(real)
    encoder[-1].bias.sub_(latent.mean((0, 2, 3)))
    for weight in encoder[-1].parameters():
        weight.mul_(0.01 / latent.std())
    decoder[1].weight.mul_(2000)
    other[-1].weight.copy_(torch.einsum("oi,ihwk->ohwk", mix, encoder[-1].weight))
    other[-1].bias.copy_(mix @ encoder[-1].bias)
    theirs = write(tmp_path / "donor", {"encoder": encoder, "decoder": decoder})
    teacher = write(tmp_path / "vae", {"encoder": other, "decoder": model.Decoder(6, width=8)})
    train(*START, f"--init_from={theirs}", f"--teacher={teacher}", f"--out_dir={tmp_path / 'out'}")
    output = capsys.readouterr().out
    assert "R²: encoder 1.00, decoder 1.00" in output
    solved = build_student(load_student(str(tmp_path / "out")))
    latent, picture = other(real), decoder(encoder(real))
    assert picture.std((0, 2, 3)).min() > 0.01  # there is something to find
    assert (solved["decoder"](latent) - picture).abs().max() < 1e-3
    assert (solved["encoder"](real) - latent).abs().max() < 0.01 * latent.std()


@pytest.mark.parametrize("theirs, ours", [((4, 8), (6, 8)), ((4, 8), (4, 16)), ((4, 16), (4, 8))])
def test_layers_away_from_the_latents_are_copied(theirs, ours, tmp_path, capsys):
    (networks, _), (teacher, _) = students("plain", *theirs), students("plain", *ours)
    train(*START, f"--init_from={write(tmp_path / 'donor', networks)}", f"--teacher={write(tmp_path / 'vae', teacher)}",
          f"--out_dir={tmp_path / 'out'}")
    assert "note " not in capsys.readouterr().out  # the usual learning rate suits a donor
    new = load(tmp_path / "out" / "ckpt.pt")
    for number in range(14):  # the layers that a student of any factor has
        for name, weight in networks["encoder"][number].state_dict().items():
            assert torch.equal(new["encoder"][f"{number}.{name}"], weight)
    for number in range(1, 14):
        for name, weight in networks["decoder"][-number].state_dict().items():
            assert torch.equal(new["ema_decoder"][f"{len(teacher['decoder']) - number}.{name}"], weight)
    assert new["step"] == 0 and [line["step"] for line in evaluations(tmp_path / "out")] == [0]
    assert (tmp_path / "out" / "diffusers").exists() and (tmp_path / "out" / "samples" / "0000000.png").exists()


@pytest.mark.parametrize("theirs, ours", [((8, "plain"), (8, "plain")), ((8, "plain"), (16, "plain")),
                                          ((8, "midblock_gn"), (8, "midblock_gn")), ((8, "midblock_gn"), (8, "plain")),
                                          ((8, "plain"), (8, "midblock_gn")), ((32, "f32"), (8, "plain")),
                                          ((8, "plain"), (32, "f32")), ((16, "plain"), (8, "plain"))])
def test_the_copied_layers_of_a_decoder_draw_the_donors_picture_from_their_target(theirs, ours, monkeypatch):
    old, new = model.Decoder(4, theirs[0], 8, theirs[1]), model.Decoder(6, ours[0], 8, ours[1])
    for name, weight in old.named_parameters():
        if "pool.3" in name:
            nn.init.normal_(weight)  # otherwise the GroupNorm branch is silent
    seen, latent, side = [], torch.randn(1, 4, 4, 4), 4 * theirs[0] // ours[0]
    monkeypatch.setattr(donor.LeastSquares, "add", lambda self, x, y: seen.append((x, y)))
    monkeypatch.setattr(donor.LeastSquares, "solve", lambda self, conv: seen.append(conv))
    donor.solve_decoder(new, old, [torch.randn(1, 6, side, side)], [latent], contextlib.nullcontext())
    (features, target), solved = seen
    assert isinstance(solved, nn.Conv2d) and solved(features).shape == target.shape
    after = [layer is solved for layer in new].index(True) + 1
    if isinstance(new[after], nn.ReLU) and theirs[0] > ours[0]:
        after += 1  # the donor has no ReLU at that place
    assert torch.allclose(new[after:](target), old(latent), atol=1e-5)


def test_a_run_is_a_donor_for_another_teacher_and_is_copied_for_another_variant(tiny_run, tmp_path, capsys):
    flags, teacher = [*START, f"--init_from={tiny_run.out}"], write(tmp_path / "vae", students("plain")[0])
    scope = train(*flags, f"--teacher={teacher}", f"--out_dir={tmp_path / 'other'}")
    theirs = load(tiny_run.out / "ckpt.pt")["discriminator"]["blocks.2.weight"]
    assert "R²: encoder" in capsys.readouterr().out and scope.variant == "plain"
    assert not torch.equal(scope.discriminator.blocks[2].weight, theirs)  # D starts afresh
    scope = train(*flags, "--variant=midblock_gn", f"--out_dir={tmp_path / 'variant'}")
    assert "R²" not in capsys.readouterr().out and scope.variant == "midblock_gn"
    assert torch.equal(scope.discriminator.blocks[2].weight, theirs)


def test_a_donor_without_a_decoder(tmp_path, capsys):
    path = write(tmp_path, {"encoder": students("midblock_gn", 6)[0]["encoder"]})
    out = tmp_path / "out"
    train(*START, f"--init_from={path}", f"--out_dir={out}")
    output = capsys.readouterr().out
    assert re.search(r"R²: encoder \d.\d\d$", output, re.MULTILINE)
    assert load(out / "ckpt.pt")["exportable"] == ["encoder"] and not (out / "taesd_decoder.pth").exists()  # is noise
    assert load(out / "ckpt.pt")["settings"]["variant"] == "midblock_gn"  # that of the weights, not the teacher's
    train("--init_from=resume", "--max_iters=1", f"--out_dir={out}")
    assert load(out / "ckpt.pt")["exportable"] == ["encoder", "decoder"] and (out / "taesd_decoder.pth").exists()


@pytest.mark.parametrize("source", ["donor", pytest.param(DATA / "weights" / "taef2_encoder.pth", marks=needs_data)])
def test_bundled_and_released_weights_are_good_donors(source, tmp_path, capsys):
    train(*START, "--width=64", "--dtype=auto", f"--init_from={source}", f"--out_dir={tmp_path / 'out'}")
    metrics = evaluations(tmp_path / "out")[0]
    assert metrics["val_psnr"] > 16 and metrics["val_latent_mse"] < 0.15
    assert "a student of another teacher" in capsys.readouterr().out
