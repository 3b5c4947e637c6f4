"""Starts from the student of another VAE, the donor. What it knows of its VAE is in the layers next to the latents; the
other layers know pictures, and are copied. Least squares solve the encoder's last convolution to give the teacher's
latents, and the decoder's first one to give the copied layers the same input as in the donor (arXiv 2407.13449).
"""
from itertools import takewhile

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.config import fail

CHUNK = 4    # pictures that are computed at once
ROWS = 4096  # patches of a chunk that enter the least squares, at most, because neighbouring patches are alike


class LeastSquares:
    """Ridge regression of y [N,K,h,w] on the 3x3 patches of x [N,C,h,w], which amounts to a convolution."""
    def __init__(self):
        self.products = 0.0  # X'X in float64, where a row of X is a patch, a one and the values of y there

    def add(self, x, y):
        x, y = F.unfold(x.float(), 3, padding=1), y.float().flatten(2)
        rows = torch.cat([x, torch.ones_like(x[:, :1]), y], 1).transpose(1, 2).flatten(0, 1)
        rows = rows[torch.randperm(len(rows), device=rows.device)[:ROWS]].cpu().double()
        self.products = self.products + rows.T @ rows

    def solve(self, conv, ridge=1e-5):
        """Set the weights of a 3x3 convolution. Returns R², the share of the variance of y that it explains."""
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
        residual = yy.trace() - 2 * (weights * xy).sum() + (weights * (xx @ weights)).sum()
        return 1 - (residual / variance).item()


def is_solvable(layer):
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) and layer.stride == (1, 1)


def fits(new, old):
    """Whether the weights of `old` fit into `new`, which may have additional GroupNorm branches that start at 0."""
    shapes, old_shapes = ({name: weight.shape for name, weight in layer.state_dict().items()} for layer in (new, old))
    only_new = shapes.keys() - old_shapes.keys()
    return (type(new) is type(old) and getattr(new, "stride", 0) == getattr(old, "stride", 0)
            and old_shapes.items() <= shapes.items() and all("pool" in name for name in only_new))


def copy_layers(new, old):
    """Copy layers, from the first on, until one has no counterpart. Returns the layers of `new` that hold copies."""
    pairs = list(takewhile(lambda pair: fits(*pair), zip(new, old)))
    for layer, donor in pairs:
        layer.load_state_dict(donor.state_dict(), strict=False)
    return [layer for layer, _ in pairs]


def solve_encoder(new, old, pictures, latents, autocast):
    """Copy all layers but the last, a convolution, and solve that. Returns R²."""
    copy_layers(new[:-1], old[:-1])
    squares = LeastSquares()
    for picture, latent in zip(pictures, latents):
        with autocast:
            features = new[:-1](picture)
        squares.add(features, latent)
    return squares.solve(new[-1])


def solve_decoder(new, old, latents, old_latents, autocast):
    """Copy layers from the image back towards the latent, and solve the convolution before them. Returns R²."""
    start = len(new) - len(copy_layers(new[2:][::-1], old[2:][::-1]))  # not the Clamp and the first convolution
    while not is_solvable(new[start - 1]) and not isinstance(new[start - 1], nn.ReLU):
        start += 1  # until a convolution, or a ReLU after one, comes right before the copied layers
    solved, squares = start - 1 - isinstance(new[start - 1], nn.ReLU), LeastSquares()
    for latent, old_latent in zip(latents, old_latents):
        with autocast:
            features, target = new[:solved](latent), old[:start - len(new)](old_latent)
        squares.add(features, target)
    return squares.solve(new[solved])


def knows_latents(donor, picture, latent):
    """Whether a student was trained on these latents. Weights files do not say of which VAE they are."""
    if "encoder" in donor:
        output, target = donor["encoder"](picture), latent
    else:
        if donor["decoder"][1].in_channels != latent.shape[1]:
            return False
        output, target = donor["decoder"](latent), picture
    return output.shape == target.shape and (F.mse_loss(output, target) < 0.75 * target.var()).item()


@torch.no_grad()
def init_from_donor(donor, networks, same_teacher, vae, images, settings, autocast):
    """Set fresh networks, {half: network}, from those of a donor. If it knows the teacher's latents, it is copied whole
    and True is returned. Otherwise, the layers next to the latents are solved, and layers without a counterpart in the
    donor stay as they are. autocast: the context to compute in."""
    source = f"--init_from={settings['init_from']}"
    if not all(isinstance(network, nn.Sequential) for network in [*networks.values(), *donor.values()]):
        fail(f"{source}: to start from other weights, Encoder and Decoder must be nn.Sequential")
    for network in donor.values():
        network.to(vae.device, memory_format=torch.channels_last)
    side = max(1, 192 // vae.multiple) * vae.multiple

    def batch(k):
        pictures = images.batch(side, CHUNK, settings["color_augment"], [settings["seed"], k])
        pictures = pictures.to(vae.device, memory_format=torch.channels_last) / 255
        return pictures, vae.encode(pictures)
    if same_teacher or knows_latents(donor, *batch(0)):
        copied = [copy_layers(networks[half], donor[half]) for half in donor]
        if all(len(layers) == len(networks[half]) == len(donor[half]) for layers, half in zip(copied, donor)):
            return True
    if "encoder" not in donor:
        fail(f"{source}: this decoder does not know the teacher's latents; to solve it for them, its encoder is needed")

    n = 4 * vae.factor  # pictures: this gives many more latents than weights, and more pictures gain nothing
    pictures, latents = zip(*[batch(k) for k in range(n // CHUNK)])
    with autocast:
        old_latents = [donor["encoder"](picture).float() for picture in pictures]
    results = {"encoder": solve_encoder(networks["encoder"], donor["encoder"], pictures, latents, autocast)}
    if "decoder" in donor:
        results["decoder"] = solve_decoder(networks["decoder"], donor["decoder"], latents, old_latents, autocast)
    told = ", ".join(f"{half} {r2:.2f}" for half, r2 in results.items())
    print(f"donor     {settings['init_from']}, a student of another teacher; its layers next to the latents are solved "
          f"on {n} crops; R²: {told}", flush=True)
    return False
