"""Start from the student of another VAE: the layers that touch the latents are solved, not trained; the rest is kept.

What a student knows of its VAE lies next to the latents; the rest of it knows pictures. By least squares, the encoder's
last convolution learns to give the teacher's latents, and the decoder's first one to feed the layers that are kept with
what they got in the donor. That this carries most of a picture is known: arXiv 2407.13449.
"""
import copy
import time
from itertools import takewhile

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import parameters
from support.configure import stop
from support.files import student

AT_ONCE = 8  # pictures


class LeastSquares:
    """Ridge regression of y [N,K,h,w] on the 3x3 patches of x [N,C,h,w]: a convolution, from pairs added in turn."""
    def __init__(self):
        self.products = 0.0  # of all columns with each other: those of the patches, of ones, of y

    def add(self, x, y):
        x, y = F.unfold(x.float(), 3, padding=1), y.float().flatten(2)
        rows = torch.cat([x, torch.ones_like(x[:, :1]), y], 1).transpose(1, 2).flatten(0, 1).cpu().double()
        self.products = self.products + rows.T @ rows

    def solve(self, conv, ridge=1e-5):
        """Set the weights of a 3x3 convolution. Returns R²: the share of the variance of y that it gives."""
        n = 9 * conv.in_channels
        moments = self.products / self.products[n, n]
        means, variance = moments[n], moments[n + 1:, n + 1:].trace() - moments[n, n + 1:].square().sum()
        if conv.bias is not None:
            moments = moments - torch.outer(means, means)
        xx, xy, yy = moments[:n, :n], moments[:n, n + 1:], moments[n + 1:, n + 1:]
        weights = torch.linalg.solve(xx + ridge * xx.diagonal().mean() * torch.eye(n), xy)
        with torch.no_grad():
            conv.weight.copy_(weights.T.reshape(conv.weight.shape))
            if conv.bias is not None:
                conv.bias.copy_(means[n + 1:] - means[:n] @ weights)
        return 1 - ((yy.trace() - 2 * (weights * xy).sum() + (weights * (xx @ weights)).sum()) / variance).item()


def solvable(layer):
    return (isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) and layer.stride == layer.padding == (1, 1)
            and layer.groups == 1)


def fits(pair):
    """May the weights of the second layer go into the first? GroupNorm branches that it lacks are silent at first."""
    new, old = ({name: weight.shape for name, weight in layer.state_dict().items()} for layer in pair)
    return (type(pair[0]) is type(pair[1]) and old.items() <= new.items()
            and all("pool" in name for name in new.keys() - old.keys())
            and getattr(pair[0], "stride", 0) == getattr(pair[1], "stride", 0))


def keep(new, old):
    """Copy layers, from the first on, for as long as they have a counterpart; returns those that now hold copies."""
    pairs = list(takewhile(fits, zip(new, old)))
    for layer, donor in pairs:
        layer.load_state_dict(donor.state_dict(), strict=False)
    return [layer for layer, _ in pairs]


def graft_encoder(new, old):
    """Returns the layer to solve, the layers before it, and the share of weights that are the donor's."""
    kept = keep(new[:-1], old[:-1])
    return new[-1], new[:-1], sum(map(parameters, kept)) / parameters(new)


def graft_decoder(new, old):
    """Likewise, and what of the donor makes the target from its latents: layers are kept from the image's side on."""
    start = len(new) - len(keep(new[2:][::-1], old[2:][::-1]))  # not the Clamp and the first convolution
    while not solvable(new[start - 1]) and not isinstance(new[start - 1], nn.ReLU):
        start += 1  # to the next layer that gets what a convolution gives, if need be through a ReLU
    solved = start - 1 - isinstance(new[start - 1], nn.ReLU)
    return new[solved], new[:solved], sum(map(parameters, new[start:])) / parameters(new), old[:start - len(new)]


@torch.no_grad()
def adapt(checkpoint, shape, networks, vae, images, settings, amp):
    """The checkpoint as it is, if its student is this teacher's; if it is another's, with a student whose layers next
    to the latents are solved for this one. `networks` are fresh: layers without a counterpart stay as they are there.
    """
    source, theirs, started = f"--init_from={settings['init_from']}", checkpoint["shape"], time.time()
    same_teacher = checkpoint.get("settings", {}).get("teacher") == settings["teacher"]
    if settings["init_from"] == "resume" or theirs == shape and same_teacher:
        return checkpoint
    if theirs["width"] != shape["width"]:
        stop(f"--width={shape['width']}: the student of {source} has {theirs['width']} channels and keeps them; from "
             f"scratch any width will do")
    try:
        donor = {half: network.to(vae.device, memory_format=torch.channels_last)
                 for half, network in student(checkpoint).items()}
    except RuntimeError as error:  # a fork's own
        stop(f"{source}: its student does not fit Encoder and Decoder ({' '.join(str(error).split())[:200]})")
    side = max(1, 256 // vae.multiple) * vae.multiple

    def batch(k):
        pictures = images.batch(side, AT_ONCE, settings["color_augment"], [settings["seed"], k])
        pictures = pictures.to(vae.device, memory_format=torch.channels_last) / 255
        return pictures, vae.encode(pictures)

    def speaks(pictures, latent):  # does it know the latents already? Its files may not say of which VAE they are
        return "encoder" not in donor or F.mse_loss(donor["encoder"](pictures), latent) < 0.5 * latent.var()
    if theirs == shape and speaks(*batch(0)):
        return checkpoint
    if "encoder" not in donor:
        stop(f"{source}: is a decoder of another VAE; to solve it for this one, its encoder must lie beside it")

    new = {half: copy.deepcopy(networks[half]) for half in donor}
    if not all(isinstance(network, nn.Sequential) for network in new.values()) or not solvable(new["encoder"][-1]):
        stop(f"{source}: is of another VAE, and only students whose last and first layers are 3x3 convolutions can be "
             f"solved for this one")
    squares = {half: LeastSquares() for half in new}
    last, before_last, kept = graft_encoder(new["encoder"], donor["encoder"])
    if "decoder" in new:
        first, before_first, kept_of_decoder, target = graft_decoder(new["decoder"], donor["decoder"])
    n = 4 * vae.factor  # pictures, so that there are many more latents than weights; more than that gain nothing
    for k in range(n // AT_ONCE):
        pictures, latent = batch(k)
        with amp:
            features, its_latent = before_last(pictures), donor["encoder"](pictures).float()
            pairs = {"encoder": (features, latent)}
            if "decoder" in new:
                pairs["decoder"] = before_first(latent), target(its_latent)
        for half, (x, y) in pairs.items():
            squares[half].add(x, y)
    told = [f"encoder R² {squares['encoder'].solve(last):.2f}, {kept:.0%} of it kept"]
    if "decoder" in new:
        told.append(f"decoder R² {squares['decoder'].solve(first):.2f}, {kept_of_decoder:.0%} kept")
    print(f"donor     {settings['init_from']}, of another VAE: the layers that touch the latents are solved on {n} "
          f"pictures, {'; '.join(told)}; {time.time() - started:.0f} s", flush=True)
    settings["learning_rate"] = checkpoint["full_rate"]  # there is much to learn
    return checkpoint | {"shape": shape, "images_averaged": 0, "discriminator": None} | {
        f"ema_{half}": network.state_dict() for half, network in new.items()}
