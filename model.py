"""The three networks: tiny encoder, tiny decoder, discriminator; and the optimizers that train them.

Layer order and state-dict keys are those of taesd.py (github.com/madebyollin/taesd), so weights go both ways.
Images are [0,1], latents about N(0,1), all NCHW. The student never sees [-1,1] or a scaling factor.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def conv(n_in, n_out, **kwargs):
    return nn.Conv2d(n_in, n_out, 3, padding=1, **kwargs)


class Clamp(nn.Module):
    """Squash latents softly to (-3,3): a stray large value must not blow up the picture."""
    def forward(self, latent):
        return torch.tanh(latent / 3) * 3


class Block(nn.Module):
    """Residual block of three 3x3 convolutions. midblock_gn: with the GroupNorm branch of the released TAEF2."""
    def __init__(self, width, midblock_gn=False):
        super().__init__()
        self.conv = nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width))
        self.pool = None
        if midblock_gn:
            self.pool = nn.Sequential(
                nn.Conv2d(width, width * 4, 1, bias=False), nn.GroupNorm(4, width * 4), nn.ReLU(),
                nn.Conv2d(width * 4, width, 1, bias=False))
            nn.init.zeros_(self.pool[-1].weight)  # a fresh branch is silent: at random it drowns the block

    def forward(self, x):
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(self.conv(x) + x)


# TAESD's; FLUX.2's, whose smallest blocks see the whole picture; Sana's, for factor 32
VARIANTS = ("plain", "midblock_gn", "f32")


def Encoder(latent_channels=4, factor=8, width=64, variant="plain"):
    """[N,3,H,W] images in [0,1] -> [N,latent_channels,H/factor,W/factor] latents. By default 1,222,532 parameters."""
    def down(gn=False):
        return conv(width, width, stride=2, bias=False), Block(width, gn), Block(width, gn), Block(width, gn)
    if variant == "f32":  # two halvings in the stem
        stem = conv(3, width // 2, stride=2), nn.ReLU(), conv(width // 2, width, stride=2), nn.ReLU()
        halvings = stages(factor) - 2
    else:
        stem, halvings = (conv(3, width),), stages(factor)
    return nn.Sequential(
        *stem, Block(width),
        *[layer for _ in range(halvings - 1) for layer in down()], *down(variant == "midblock_gn"),
        conv(width, latent_channels),
    )


def Decoder(latent_channels=4, factor=8, width=64, variant="plain"):
    """[N,latent_channels,h,w] latents -> [N,3,h*factor,w*factor] images in [0,1], not clipped. 1,222,531 parameters."""
    def up(n_in, n_out, gn=False):
        blocks = Block(n_in, gn), Block(n_in, gn), Block(n_in, gn)
        return *blocks, nn.Upsample(scale_factor=2), conv(n_in, n_out, bias=False)
    widths = [width] * (stages(factor) + 1)
    if variant == "f32":
        widths[:2] = 4 * width, 2 * width
    to_image = conv(width, 3)
    nn.init.constant_(to_image.bias, 0.5)  # a fresh decoder paints mid-grey, not black
    return nn.Sequential(
        Clamp(), conv(latent_channels, widths[0]), nn.ReLU(),
        *up(*widths[:2], variant == "midblock_gn"),
        *[layer for pair in zip(widths[1:], widths[2:]) for layer in up(*pair)],
        Block(width), to_image,
    )


class Discriminator(nn.Module):
    """Is this patch real, given its latent? Images [N,3,H,W], latents [N,C,h,w] -> scores [N,5,h,w]: real +1, fake -1;
    and its five layers' activations, a list of [N,c,H',W'].

    The image and the enlarged latent go in together; a 1x1 convolution reads a score at each of five depths, pooled to
    the latent's size. No normalisation: it lets D judge a batch by its statistics, and colours drift.
    """
    def __init__(self, latent_channels=4):
        super().__init__()
        self.blocks = nn.ModuleList([
            nn.Conv2d(3 + latent_channels, 32, 3, padding=1),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.Conv2d(64, 128, 4, stride=2, padding=1),
            nn.Conv2d(128, 256, 4, stride=2, padding=1),
            nn.Conv2d(256, 256, 3, padding=1),
        ])
        self.scores = nn.ModuleList(nn.Conv2d(block.out_channels, 1, 1) for block in self.blocks)
        # torch's own initialisation lets the signal fade: D would sleep for hundreds of steps
        for layer in (*self.blocks, *self.scores):
            nn.init.kaiming_normal_(layer.weight, 0.2)
            nn.init.zeros_(layer.bias)

    def forward(self, image, latent):
        x = torch.cat([image * 2 - 1, F.interpolate(latent, image.shape[-2:])], 1)
        scores, activations = [], []
        for block, score in zip(self.blocks, self.scores):
            x = F.leaky_relu(block(x), 0.2)
            activations.append(x)
            scores.append(F.adaptive_avg_pool2d(score(x), latent.shape[-2:]))
        return torch.cat(scores, 1), activations


def stages(factor):
    """Factor 8 -> 3 halvings."""
    if factor < 2 or factor & (factor - 1):
        raise ValueError(f"factor={factor}: must be a power of two, 2 or more")
    return int(math.log2(factor))


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def convolutions(module):
    """The weights of its convolutions, first to last."""
    return [weight for weight in module.parameters() if weight.ndim == 4]


# -----------------------------------------------------------------------------
# optimizers

class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: all directions in a layer's weights learn equally fast (Jordan et al. 2024).

    A convolution [out,in,k,k] is a matrix [out,in*k*k]. The steps are those of torch.optim.Muon with weight_decay=0 and
    adjust_lr_fn="match_rms_adamw", which takes matrices only, one by one; here all of one shape are multiplied
    together, in dtype.
    """
    def __init__(self, weights, lr=1e-3, momentum=0.95, dtype=torch.float32):
        super().__init__(weights, {"lr": lr, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        by_shape = {}
        for weight in group["params"]:
            if weight.grad is not None:
                by_shape.setdefault(weight.shape, []).append(weight)
        for weights in by_shape.values():
            gradients = [weight.grad for weight in weights]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
            momentum = [self.state[weight]["momentum"] for weight in weights]
            torch._foreach_lerp_(momentum, gradients, 1 - group["momentum"])
            steps = torch.stack(torch._foreach_lerp(gradients, momentum, group["momentum"])).flatten(2)  # Nesterov's
            size = 0.2 * max(steps.shape[1:]) ** 0.5  # makes their root mean square that of Adam's steps
            steps = orthogonal(steps.to(self.dtype)).to(weights[0].dtype) * (-group["lr"] * size)
            torch._foreach_add_(weights, list(steps.unflatten(2, weights[0].shape[1:]).unbind()))


def orthogonal(matrices):
    """[B,m,n]: the same matrices with all singular values near 1, by five Newton-Schulz iterations."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x


class Together:
    """Optimizers of different weights as one: a GradScaler lets all step, or none where a gradient overflowed."""
    def __init__(self, **optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def zero_grad(self):
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    def step(self):
        for optimizer in self.optimizers.values():
            optimizer.step()

    def state_dict(self):
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state):
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])


def optimizer_of(parameters, by_muon, adam, dtype):
    """Muon, computing in dtype, for the weights in `by_muon`; for all others `adam`, called with the list of them."""
    others = [weight for weight in parameters if not any(weight is one for one in by_muon)]
    optimizers = {"adam": adam(others, fused=others[0].device.type != "mps")} if others else {}
    if by_muon:
        optimizers["muon"] = Muon(by_muon, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    return Together(**optimizers)
