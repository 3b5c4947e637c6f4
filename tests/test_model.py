"""The networks, the optimizers and the memories, against values by hand and other implementations."""
import pytest
import torch

import data
import model
from conftest import first_step
from test_smoke import TINY, records, train


def test_networks():
    assert model.parameters(model.Encoder()) == 1_222_532 and model.parameters(model.Decoder()) == 1_222_531
    for variant, factor in (("plain", 4), ("plain", 8), ("midblock_gn", 8), ("plain", 16), ("plain", 32), ("f32", 32)):
        image = torch.rand(2, 3, 64, 64)
        latent = model.Encoder(5, factor, 8, variant)(image)
        assert latent.shape == (2, 5, 64 // factor, 64 // factor)
        assert model.Decoder(5, factor, 8, variant)(latent).shape == image.shape
        scores, activations = model.Discriminator(5)(image, latent)
        assert scores.shape == (2, 5, *latent.shape[2:])
        assert [layer.shape[1] for layer in activations] == [32, 64, 128, 256, 256]
    with pytest.raises(ValueError, match="power of two"):
        model.Encoder(factor=12)


@torch.no_grad()
def test_a_fresh_groupnorm_branch_is_silent():
    for build, given in ((model.Encoder, torch.rand(1, 3, 32, 32)), (model.Decoder, torch.randn(1, 5, 4, 4))):
        plain, branched = build(5, 8, 8), build(5, 8, 8, "midblock_gn")
        lacking = branched.load_state_dict(plain.state_dict(), strict=False)
        assert lacking.missing_keys and all(".pool." in key for key in lacking.missing_keys)
        assert not lacking.unexpected_keys and torch.equal(plain(given), branched(given))
        branched.state_dict()[next(key for key in branched.state_dict() if key.endswith("pool.3.weight"))].fill_(0.1)
        assert not torch.allclose(plain(given), branched(given), atol=1e-3)


@torch.no_grad()
def test_the_branch_by_hand():
    """Before the residual convolutions: x + conv1x1(relu(groupnorm of 4 groups(conv1x1(x))))."""
    block, given = model.Block(4, midblock_gn=True), torch.randn(2, 4, 5, 6)
    block.pool[3].weight.normal_()
    wide = torch.einsum("oi,nihw->nohw", block.pool[0].weight[:, :, 0, 0], given).reshape(2, 4, -1)
    wide = (wide - wide.mean(2, keepdim=True)) / (wide.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
    x = given + torch.einsum("oi,nihw->nohw", block.pool[3].weight[:, :, 0, 0], wide.view(2, 16, 5, 6).relu())
    plain = model.Block(4)
    plain.load_state_dict(block.state_dict(), strict=False)
    assert torch.allclose(block(given), plain(x), atol=1e-5)
    assert not torch.allclose(block(given), plain(given), atol=0.1)


# the optimizers

def test_muon_is_that_of_torch():
    ours = [torch.nn.Parameter(torch.randn(8, 8, 3, 3)) for _ in range(3)]
    ours.append(torch.nn.Parameter(torch.randn(32, 8, 1, 1)))
    theirs = [torch.nn.Parameter(weight.detach().flatten(1).clone()) for weight in ours]
    before = [weight.detach().clone() for weight in theirs]
    muon = model.Muon(ours, 0.1, dtype=torch.bfloat16)
    reference = torch.optim.Muon(theirs, 0.1, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.flatten(1)
        muon.step(), reference.step()
    for a, b, c in zip(ours, theirs, before):
        assert (a.flatten(1) - b).abs().max() < 0.01 < 0.05 < (b - c).abs().max()
    values = torch.linalg.svdvals(model.orthogonal(torch.randn(2, 64, 16)))  # five iterations reach from 0.68 to 1.13
    assert values.min() > 0.6 and values.max() < 1.3


def test_muon_is_for_the_student_s_convolutions_and_d_s_hidden_ones(tmp_path):
    scope = train(*TINY, "--max_iters=1", f"--out_dir={tmp_path / 'out'}")
    d = scope.discriminator
    for optimizer, networks, edges, n in (
            (scope.student_optimizer, (scope.encoder, scope.decoder), (), 35 + 35),
            (scope.discriminator_optimizer, (d,), (d.blocks[0], *d.scores), 4)):
        muon, adam = ({id(weight) for group in optimizer.optimizers[name].param_groups for weight in group["params"]}
                      for name in ("muon", "adam"))
        weights = [weight for network in networks for weight in network.parameters()]
        assert muon | adam == {id(weight) for weight in weights} and not muon & adam and len(muon) == n
        assert all(weight.ndim == 4 for weight in weights if id(weight) in muon)
        assert all(id(layer.weight) in adam for layer in edges)


@pytest.mark.parametrize("name,kind,betas,decay", [("adam", torch.optim.Adam, [(0.9, 0.9), (0.5, 0.99)], 0),
                                                   ("adamw", torch.optim.AdamW, [(0.9, 0.99)] * 2, 0.01)])
def test_adam_for_all(name, kind, betas, decay, tmp_path):
    scope = train(*TINY, "--max_iters=1", f"--optimizer={name}", f"--out_dir={tmp_path / 'out'}")
    for optimizer, its_betas in zip((scope.student_optimizer, scope.discriminator_optimizer), betas):
        adam, = optimizer.optimizers.values()
        assert type(adam) is kind and adam.defaults["betas"] == its_betas and adam.defaults["weight_decay"] == decay
        assert all(adam.state[weight]["step"] == 1 for group in adam.param_groups for weight in group["params"])
    assert scope.student_optimizer.optimizers["adam"].defaults["amsgrad"] == (name == "adam")


def test_an_overflow_stops_all_optimizers_of_a_network():
    for overflowed in (0, 1):
        weights = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4, 4, 3, 3))
        together = model.optimizer_of(weights, weights[1:], torch.optim.Adam, torch.float16)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for steepness in (1.0, float("inf")):
            before = [weight.detach().clone() for weight in weights]
            together.zero_grad()
            scaler.scale(weights[overflowed].sum() * steepness + weights[1 - overflowed].sum()).backward()
            scaler.step(together)
            scaler.update()
            assert all(torch.equal(a, b) == (steepness > 1) for a, b in zip(before, weights)), overflowed
        assert scaler.get_scale() == 4


def test_float16(tmp_path, monkeypatch):
    """First steps overflow, D's at least; Adam and Muon skip them alike, and the scale is halved until none does."""
    steps, together = [], model.Together.step

    def recorded(self):
        steps.append(self)
        return together(self)
    monkeypatch.setattr(model.Together, "step", recorded)
    flags = *TINY, "--dtype=float16", "--crop=16", "--window=16", "--batch_size=2", "--eval_images=1", "--eval_size=16"
    scope = train(*flags, "--max_iters=8", f"--out_dir={tmp_path / 'out'}")
    assert scope.scaler.get_scale() < 2**16 and len(steps) < 16
    for optimizer in (scope.student_optimizer, scope.discriminator_optimizer):
        adam, muon = (optimizer.optimizers[name] for name in ("adam", "muon"))
        assert 0 < steps.count(optimizer) <= 8
        assert {int(state["step"]) for state in adam.state.values()} == {steps.count(optimizer)}
        assert len(muon.state) == len(muon.param_groups[0]["params"])
    torch.manual_seed(0)
    for name, network in (("encoder", model.Encoder(4, 8, 16)), ("decoder", model.Decoder(4, 8, 16))):
        assert all(not torch.equal(a, b) for a, b in zip(getattr(scope, name).parameters(), network.parameters())), name
    lines = records(tmp_path / "out")
    assert lines[0]["dtype"] == "torch.float16" and lines[-1]["step"] == 8


def test_ramp(stepped, monkeypatch):
    monkeypatch.setattr(stepped.after, "max_iters", 100), monkeypatch.setattr(stepped.after, "cooldown", 0.2)
    assert [stepped.after.ramp(step) for step in (0, 50, 80, 90, 99)] == pytest.approx([1, 1, 1, 0.5, 0.05])


# the memories

def greys(value, n=4):
    """n pairs of an image of one grey and a latent that holds that value."""
    return torch.full((n, 3, 4, 4), value * 51 / 255), torch.full((n, 2, 1, 1), float(value))


def test_new_fakes_are_in_and_older_ones_still_are(stepped):
    replay = stepped.after.Memory(8, (3, 4, 4), (2, 1, 1))
    for value in range(1, 6):
        replay.push(*greys(value))
        images, latents = replay.draw(2)
        assert torch.allclose(images, latents[:, :1] * 51 / 255, atol=1e-6)
    assert replay.filled == len(replay.images) == 8 and replay.images.dtype == torch.uint8
    drawn = {value.item() for _ in range(20) for value in replay.draw(4)[1][:, 0, 0, 0]}
    assert 5.0 in drawn and len(drawn) > 1


@pytest.mark.parametrize("size, old", [(64, 2), (0, 0)])
def test_half_of_the_fakes_are_old(size, old, tmp_path, monkeypatch):
    """From the second step on; without a replay buffer none are."""
    step = first_step(tmp_path / "out", monkeypatch, f"--replay_size={size}", steps=2)
    _, first_fakes, _, (first, first_latent), _, fakes, _, (fake, latent) = ([*pair] for pair in map(tuple, [
        (image, latent) for image, latent, _ in step.seen]))
    assert torch.equal(first_fakes[0], first) and torch.equal(first_fakes[1], first_latent)
    assert torch.equal(fakes[0][old:], fake[old:]) and torch.equal(fakes[1][old:], latent[old:])
    for image, its_latent in zip(fakes[0][:old], fakes[1]):
        apart = (first.clamp(0, 1) - image).abs().flatten(1).amax(1)
        assert apart.min() < 0.6 / 255 and (first_latent[apart.argmin()] - its_latent).abs().max() < 2e-3


def test_a_memory_replaces_what_was_used_most(stepped):
    pool, served = stepped.after.Memory(64, (3, 4, 4), (2, 1, 1)), torch.zeros(400)
    for n in range(100):  # 4 new ones and 8 drawn a step, each with a number of its own
        numbers = torch.arange(4 * n, 4 * n + 4.0).view(4, 1, 1, 1).expand(4, 2, 1, 1)
        pool.push(torch.rand(4, 3, 4, 4), numbers)
        _, latents = pool.draw(8)
        assert len(set(latents[:, 0, 0, 0].tolist())) == min(8, 4 * n + 4)
        served[latents[:, 0, 0, 0].long()] += 1
    gone = served[:200]
    assert gone.min() >= 1 and gone.mean() == pytest.approx(2, abs=0.5)  # none wasted
    again = stepped.after.Memory(64, (3, 4, 4), (2, 1, 1))
    again.load_state_dict(pool.state_dict())
    assert all(torch.equal(getattr(again, name), getattr(pool, name)) for name in ("images", "latents", "uses"))
    assert again.filled == 64


@pytest.mark.parametrize("n", [4, 16, 48, 100])
def test_a_memory_fills_up_though_no_batch_fits(n, stepped):
    memory = stepped.after.Memory(64, (3, 4, 4), (2, 1, 1))
    memory.push(*greys(1, 48)), memory.push(*greys(2, n))
    assert memory.filled == min(64, 48 + n)
    numbers = memory.latents[:memory.filled, 0, 0, 0]
    assert (numbers == 2).sum() == min(n, 64) and (numbers > 0).all()
    smaller = stepped.after.Memory(32, (3, 4, 4), (2, 1, 1))  # a resumed run may want fewer
    smaller.load_state_dict(memory.state_dict())
    assert smaller.filled == 32 and torch.equal(smaller.latents, memory.latents[:32])


def test_windows_are_cut_in_their_place(stepped):
    squares, latents = torch.rand(2, 3, 32, 32), torch.rand(2, 5, 4, 4)
    crops, parts = data.cut(squares, 2), data.cut(latents, 2)
    assert torch.equal(crops[5], squares[1, :, :16, 16:]) and torch.equal(parts[5], latents[1, :, :2, 2:])
    assert torch.equal(data.cut(squares, 1), squares)


def test_the_pool_holds_crops_of_64_windows(tmp_path):
    """By batches of one, too: windows of 64 pixels are four crops of 32."""
    scope = train(*TINY, "--batch_size=1", "--max_iters=1", f"--out_dir={tmp_path / 'out'}")
    assert len(scope.pool.images) == 64 * 4
