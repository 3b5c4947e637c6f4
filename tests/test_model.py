"""Networks, optimizers and buffers, against values worked out by hand and other implementations."""
import pytest
import torch

import model
from conftest import first_step
from test_smoke import TINY, in_bytes, train


def test_muon_takes_the_steps_of_torchs_muon():
    shapes = [(8, 8, 3, 3)] * 3 + [(32, 8, 1, 1)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(weight.detach().flatten(1).clone()) for weight in ours]
    before = [weight.detach().clone() for weight in theirs]
    muon = model.Muon(ours, 0.1, dtype=torch.bfloat16)
    reference = torch.optim.Muon(theirs, 0.1, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.flatten(1)
        muon.step(), reference.step()
    for a, b, start in zip(ours, theirs, before):
        assert (a.flatten(1) - b).abs().max() < 0.01 < 0.05 < (b - start).abs().max()


def test_muon_trains_the_students_convolutions_and_ds_hidden_ones(tmp_path):
    scope = train(*TINY, "--max_iters=1", f"--out_dir={tmp_path / 'out'}")
    student, d = torch.nn.ModuleList([scope.encoder, scope.decoder]), scope.discriminator
    convs = [weight for weight in student.parameters() if weight.ndim == 4]
    hidden = [block.weight for block in d.blocks[1:]]
    for optimizer, network, expected, n in ((scope.student_optimizer, student, convs, 35 + 35),
                                            (scope.discriminator_optimizer, d, hidden, 4)):
        muon, adam = (optimizer.optimizers[name].param_groups[0]["params"] for name in ("muon", "adam"))
        assert set(map(id, muon)) == set(map(id, expected)) and len(muon) == n
        assert sorted(map(id, muon + adam)) == sorted(map(id, network.parameters()))  # Adam trains all others


@pytest.mark.parametrize("overflowed", [0, 1])
def test_an_overflow_stops_all_optimizers_of_a_network(overflowed):
    network = torch.nn.Conv2d(4, 4, 3)
    optimizer = model.make_optimizer("muon", [network], [network.weight], torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    weights = [network.weight, network.bias]
    for slope in (1.0, float("inf")):
        before = [weight.detach().clone() for weight in weights]
        optimizer.zero_grad()
        scaler.scale(weights[overflowed].sum() * slope + weights[1 - overflowed].sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        unchanged = [torch.equal(a, b) for a, b in zip(before, weights)]
        assert unchanged == [slope > 1] * 2
    assert scaler.get_scale() == 4


def pairs(values):
    """Grey images of 8x8 pixels, whose brightness has to be rounded up to the number that their latents hold."""
    values = values.view(-1, 1, 1, 1)
    return ((values - 0.4) / 255).expand(-1, 3, 8, 8), values.expand(-1, 4, 1, 1)


def test_a_full_buffer_replaces_the_pairs_that_were_drawn_most_often(stepped, monkeypatch):
    monkeypatch.setattr(stepped.after, "crop", 8)
    buffer, uses = stepped.after.Buffer(32), torch.zeros(240)
    for new in torch.arange(240.0).split(4):  # in each step, 4 pairs are added and 8 are drawn
        buffer.add(*pairs(new))
        images, latents = buffer.sample(8)
        assert torch.allclose(images * 255, latents[:, :1].expand_as(images))  # image and latent stay together
        drawn = latents[:, 0, 0, 0].long()
        assert len(drawn.unique()) == len(drawn) == min(8, buffer.filled)
        uses[drawn] += 1
    assert buffer.filled == len(buffer.images) == 32 and buffer.images.dtype == torch.uint8
    replaced = uses[:120]
    assert replaced.min() >= 1 and replaced.mean() == pytest.approx(2, abs=0.5)  # none is wasted


def test_without_a_replay_buffer_d_sees_new_fakes_only(tmp_path):
    run = first_step(tmp_path / "out", "--replay_size=0", steps=2)
    for step in (0, 1):
        (_, _, _), (d_fakes, d_latents, _), (_, _, _), (fake, latent, _) = run.seen[4 * step:4 * step + 4]
        assert in_bytes(d_fakes) == in_bytes(fake) and torch.equal(d_latents, latent)
