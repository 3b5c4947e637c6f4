"""Start from the student of another VAE: the layers that touch the latents are solved, not trained; the rest is kept.

What a student knows of its VAE lies next to the latents; the rest of it knows pictures. By least squares, the encoder's
last convolution learns to give the teacher's latents, and the decoder's first one to feed the layers that are kept with
what they got in the donor. That this carries most of a picture is known: arXiv 2407.13449. A donor of another width is
first made as wide as the student.
"""
import copy
import time
from itertools import takewhile

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Block, Decoder, Encoder, parameters
from support.configure import stop
from support.files import student

AT_ONCE = 4  # pictures: no more memory than an evaluation takes
ROWS = 4096  # patches of so many pictures that least squares see, at most: neighbours are alike


class LeastSquares:
    """Ridge regression of y [N,K,h,w] on the 3x3 patches of x [N,C,h,w]: a convolution, from pairs added in turn."""
    def __init__(self):
        self.products = 0.0  # X'X in float64, where a row of X is a patch, a one and the values of y there

    def add(self, x, y, stride=1):
        x, y = F.unfold(x.float(), 3, padding=1, stride=stride), y.float().flatten(2)
        rows = torch.cat([x, torch.ones_like(x[:, :1]), y], 1).transpose(1, 2).flatten(0, 1)
        rows = rows[torch.randperm(len(rows), device=rows.device)[:ROWS]].cpu().double()
        self.products = self.products + rows.T @ rows

    def solve(self, conv, ridge=1e-5):
        """Set the weights of a 3x3 convolution. Returns R²: the share of the variance of y that it gives."""
        n = 9 * conv.in_channels
        moments = self.products / self.products[n, n]
        means, variance = moments[n], moments[n + 1:, n + 1:].trace() - moments[n, n + 1:].square().sum()
        if conv.bias is not None:
            moments = moments - torch.outer(means, means)
        xx, xy, yy = moments[:n, :n], moments[:n, n + 1:], moments[n + 1:, n + 1:]
        weights = torch.linalg.solve(xx + ridge * xx.diagonal().mean().clamp(min=1e-6) * torch.eye(n), xy)
        with torch.no_grad():
            conv.weight.copy_(weights.T.reshape(conv.weight.shape))
            if conv.bias is not None:
                conv.bias.copy_(means[n + 1:] - means[:n] @ weights)
        return 1 - ((yy.trace() - 2 * (weights * xy).sum() + (weights * (xx @ weights)).sum()) / variance).item()


# -----------------------------------------------------------------------------
# another width

def is_3x3(layer):
    shape = getattr(layer, "kernel_size", 0), getattr(layer, "padding", 0), getattr(layer, "groups", 0)
    return isinstance(layer, nn.Conv2d) and shape == ((3, 3), (1, 1), 1)


def is_resizable(network):
    """Is it a row of 3x3 convolutions, blocks without GroupNorm branches, and layers without weights?"""
    return isinstance(network, nn.Sequential) and all(
        layer.pool is None if isinstance(layer, Block) else is_3x3(layer) or not parameters(layer) for layer in network)


def widen(new, old):
    """Copy `old` into the wider `new`, which gives the same: nothing reads the channels that are added, so far."""
    for weight, theirs in zip(new.parameters(), old.parameters()):
        copied = tuple(map(slice, theirs.shape))
        weight[copied[0]] = 0
        weight[copied] = theirs


def narrow(new, old, inputs, amp):
    """Make the narrower `new` give what `old` does, on a list of inputs, layer after layer: those channels are kept
    that the layer which reads them makes most of, and solved from what is left of the layers before."""
    def run(layer, batches):
        with amp:
            return [layer(x).float() for x in batches]

    def fit(conv, batches, goals):
        squares = LeastSquares()
        for x, goal in zip(batches, goals):
            squares.add(x, goal, conv.stride)
        squares.solve(conv)

    worth = {}  # {convolution: of each channel it reads, mean square times that of its weights}

    def weigh(conv, inputs):
        found = inputs[0].float().square().mean((0, 2, 3)) * conv.weight.square().sum((0, 2, 3))
        worth[conv] = worth.get(conv, 0) + found
    hooks = [layer.register_forward_pre_hook(weigh) for layer in old.modules() if isinstance(layer, nn.Conv2d)]
    run(old, inputs)
    for hook in hooks:
        hook.remove()

    theirs, ours = inputs, inputs
    for at, (layer, donor) in enumerate(zip(new, old)):
        if isinstance(layer, nn.Conv2d):
            reader = next((after for after in old[at + 1:] if isinstance(after, nn.Conv2d)), None)
            kept = worth[reader].topk(layer.out_channels).indices if reader else slice(None)
            fit(layer, ours, [goal[:, kept] for goal in run(donor, theirs)])
        elif isinstance(layer, Block):
            x, y = theirs, ours
            for conv, same, reader in zip(layer.conv[:3:2], donor.conv[:3:2], donor.conv[2::2]):
                among = worth[reader].topk(conv.out_channels).indices
                x = run(same, x)
                fit(conv, y, [goal[:, among] for goal in x])
                x, y = [each.relu() for each in x], [each.relu() for each in run(conv, y)]
            ends = [(end + a)[:, kept] - b for end, a, b in zip(run(donor.conv[4], x), theirs, ours)]
            fit(layer.conv[4], y, ends)
        theirs, ours = run(donor, theirs), run(layer, ours)


def resized(donor, shape, pictures, latents, amp):
    """The donor's networks, {half: network}, with shape["width"] channels. latents: of the pictures, for a decoder
    whose encoder is not there."""
    new = {half: build(**shape).to(pictures[0].device, memory_format=torch.channels_last)
           for half, build in (("encoder", Encoder), ("decoder", Decoder)) if half in donor}
    inputs = {"encoder": pictures, "decoder": latents}
    if "encoder" in donor:
        with amp:
            inputs["decoder"] = [donor["encoder"](each).float() for each in pictures]
    for half, network in new.items():
        if parameters(network) > parameters(donor[half]):
            widen(network, donor[half])
        else:
            narrow(network, donor[half], inputs[half], amp)
    return new


# -----------------------------------------------------------------------------
# another VAE

def solvable(layer):
    return is_3x3(layer) and layer.stride == (1, 1)


def fits(new, old):
    """May the weights of layer `old` go into `new`? GroupNorm branches that only `new` has are silent at first."""
    shapes, theirs = ({name: weight.shape for name, weight in layer.state_dict().items()} for layer in (new, old))
    return (type(new) is type(old) and getattr(new, "stride", 0) == getattr(old, "stride", 0)
            and theirs.items() <= shapes.items() and all("pool" in name for name in shapes.keys() - theirs.keys()))


def keep(new, old):
    """Copy layers, from the first on, for as long as they have a counterpart; returns those that now hold copies."""
    pairs = list(takewhile(lambda pair: fits(*pair), zip(new, old)))
    for layer, donor in pairs:
        layer.load_state_dict(donor.state_dict(), strict=False)
    return [layer for layer, _ in pairs]


def solve_encoder(new, old, pictures, latents, amp):
    """Its last convolution, on what enters that. Returns R2, and the share of its weights that are the donor's."""
    kept, squares = keep(new[:-1], old[:-1]), LeastSquares()
    for picture, latent in zip(pictures, latents):
        with amp:
            features = new[:-1](picture)
        squares.add(features, latent)
    return squares.solve(new[-1]), sum(map(parameters, kept)) / parameters(new)


def solve_decoder(new, old, latents, theirs, amp):
    """Likewise, from the teacher's latents and the donor's own: layers are kept from the image back, the convolution
    before them is solved to give what they got in the donor. In one of a larger factor no ReLU stood at that place:
    what is negative is lost, which costs nothing."""
    start = len(new) - len(keep(new[2:][::-1], old[2:][::-1]))  # not the Clamp and the first convolution
    while not solvable(new[start - 1]) and not isinstance(new[start - 1], nn.ReLU):
        start += 1  # to the next layer that gets what a convolution gives, if need be through a ReLU
    solved, squares = start - 1 - isinstance(new[start - 1], nn.ReLU), LeastSquares()
    for latent, their_latent in zip(latents, theirs):
        with amp:
            features, goal = new[:solved](latent), old[:start - len(new)](their_latent)
        squares.add(features, goal)
    return squares.solve(new[solved]), sum(map(parameters, new[start:])) / parameters(new)


@torch.no_grad()
def adapt(checkpoint, shape, networks, vae, images, settings, amp):
    """The checkpoint as it is, if its student is this teacher's and as wide; if not, with a student of that width,
    whose layers next to the latents are solved for this teacher if it was another's; then settings["learning_rate"]
    becomes that of a run from scratch.

    networks: fresh; layers without a counterpart in the donor stay as they are there. amp: the autocast to compute in.
    """
    source, width, started = f"--init_from={settings['init_from']}", shape["width"], time.time()
    same_teacher = checkpoint.get("settings", {}).get("teacher") == settings["teacher"]
    if settings["init_from"] == "resume" or checkpoint["shape"] == shape and same_teacher:
        return checkpoint
    try:
        donor = student(checkpoint)
    except Exception as error:  # a fork's own: weights or arguments that are unknown here
        stop(f"{source}: its student does not fit Encoder and Decoder ({' '.join(str(error).split())[:200]})")
    new = {half: copy.deepcopy(networks[half]) for half in donor}
    for network in donor.values():
        network.to(vae.device, memory_format=torch.channels_last)
    side = max(1, 192 // vae.multiple) * vae.multiple

    def batch(k):
        pictures = images.batch(side, AT_ONCE, settings["color_augment"], [settings["seed"], k])
        pictures = pictures.to(vae.device, memory_format=torch.channels_last) / 255
        return pictures, vae.encode(pictures)

    def speaks():  # does it know the latents already? Files do not say of which VAE they are
        if any(checkpoint["shape"][name] != shape[name] for name in ("latent_channels", "factor")):
            return False
        if "encoder" not in donor:
            return "settings" not in checkpoint
        pictures, latent = batch(0)
        return F.mse_loss(donor["encoder"](pictures), latent) < 0.75 * latent.var()

    def kept_whole():  # do all of the donor's layers fit? Then they are copied
        fit = all(len(new[half]) == len(donor[half]) and all(map(fits, new[half], donor[half])) for half in new)
        return fit and [keep(new[half], donor[half]) for half in new]

    def weights():
        if not all(weight.isfinite().all() for network in new.values() for weight in network.parameters()):
            stop(f"{source}: the solved weights are not finite; --dtype=float32 may help")
        return {f"ema_{half}": network.state_dict() for half, network in new.items()}
    if not all(isinstance(network, nn.Sequential) for network in new.values()):
        stop(f"{source}: is not of this teacher and width; to be solved, Encoder and Decoder must be nn.Sequential")
    known = same_teacher or speaks()
    if known and kept_whole():  # another variant, perhaps
        return checkpoint | {"shape": shape} | weights()
    alone = f"{source}: is a decoder alone, and not of this teacher; to be solved for it, it needs its encoder"
    if "encoder" not in donor and not known:
        stop(alone)
    other_width = checkpoint["shape"]["width"] != width
    if other_width and not all(map(is_resizable, donor.values())):
        stop(f"--width={width}: {source} has {checkpoint['shape']['width']} channels and keeps them, for it has "
             f"GroupNorm branches or layers of a fork; from scratch any width will do")

    settings["learning_rate"] = checkpoint["rate_from_scratch"]
    fresh = {"shape": shape, "ready": list(new), "images_averaged": 0}
    n = 4 * vae.factor  # pictures, so that there are many more latents than weights; more than that gain nothing
    pictures, latents = zip(*[batch(k) for k in range(n // AT_ONCE)])
    if other_width:
        some = max(1, n // AT_ONCE // 2)
        donor = resized(donor, checkpoint["shape"] | {"width": width}, pictures[:some], latents[:some], amp)
        print(f"donor     {settings['init_from']}, {checkpoint['shape']['width']} channels made {width}; "
              f"{time.time() - started:.0f} s", flush=True)
        if known and kept_whole():
            return checkpoint | fresh | weights()
    if "encoder" not in donor:
        stop(alone)
    if not solvable(new["encoder"][-1]):
        stop(f"{source}: is not of this teacher; to be solved for it, Encoder must end in a 3x3 convolution")
    with amp:
        theirs = [donor["encoder"](each).float() for each in pictures]
    solve, told = {"encoder": (solve_encoder, pictures, latents), "decoder": (solve_decoder, latents, theirs)}, []
    for half, network in new.items():
        function, inputs, goals = solve[half]
        r2, share = function(network, donor[half], inputs, goals, amp)
        told.append(f"{half} R2 {r2:.2f}, {share:.1%} of its weights kept")
    print(f"donor     {settings['init_from']}, not of this teacher: the layers that touch the latents are solved on {n}"
          f" crops; {'; '.join(told)}; {time.time() - started:.0f} s", flush=True)
    return fresh | weights()  # and a fresh discriminator
