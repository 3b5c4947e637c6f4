"""The three networks (tiny encoder, tiny decoder, discriminator) and Muon. A copy of this file loads our weights.

Layers and names of weights are those of taesd.py (github.com/madebyollin/taesd), so that weights go both ways. Images
are in [0,1], latents have about zero mean and unit variance; both are NCHW.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

VARIANTS = ("plain", "midblock_gn", "f32")  # TAESD; FLUX.2's TAEF2, with GroupNorm branches; Sana's, for factor 32


def conv(n_in, n_out, **kwargs):
    return nn.Conv2d(n_in, n_out, 3, padding=1, **kwargs)


class Clamp(nn.Module):
    """Squashes latents softly into (-3,3), so that a single extreme value cannot spoil the picture."""
    def forward(self, latent):
        return torch.tanh(latent / 3) * 3


class Block(nn.Module):
    """A residual block of three 3x3 convolutions. With `midblock_gn` it has the GroupNorm branch of TAEF2."""
    def __init__(self, width, midblock_gn=False):
        super().__init__()
        relu = nn.ReLU(inplace=True)  # which saves one pass over memory
        self.conv = nn.Sequential(conv(width, width), relu, conv(width, width), relu, conv(width, width))
        self.pool = None
        if midblock_gn:
            self.pool = nn.Sequential(
                nn.Conv2d(width, width * 4, 1, bias=False), nn.GroupNorm(4, width * 4), nn.ReLU(),
                nn.Conv2d(width * 4, width, 1, bias=False))
            nn.init.zeros_(self.pool[-1].weight)  # the branch starts at zero; at random it would drown the block

    def forward(self, x):
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(self.conv(x) + x, inplace=True)


def Encoder(latent_channels=4, factor=8, width=64, variant="plain"):
    """Images [N,3,H,W] in [0,1] -> latents [N,latent_channels,H/factor,W/factor]. 1,222,532 parameters by default."""
    def down(gn=False):
        return conv(width, width, stride=2, bias=False), Block(width, gn), Block(width, gn), Block(width, gn)
    if variant == "f32":  # the stem already halves the image twice
        stem = conv(3, width // 2, stride=2), nn.ReLU(), conv(width // 2, width, stride=2), nn.ReLU()
        n_down = halvings(factor) - 2
    else:
        stem, n_down = (conv(3, width),), halvings(factor)
    layers = [*stem, Block(width)]
    for _ in range(n_down - 1):
        layers += down()
    return nn.Sequential(*layers, *down(variant == "midblock_gn"), conv(width, latent_channels))


def Decoder(latent_channels=4, factor=8, width=64, variant="plain"):
    """Latents [N,latent_channels,h,w] -> images [N,3,h*factor,w*factor], not clipped to [0,1]. 1,222,531 parameters."""
    def up(n_in, n_out, gn=False):
        return (Block(n_in, gn), Block(n_in, gn), Block(n_in, gn), nn.Upsample(scale_factor=2),
                conv(n_in, n_out, bias=False))
    widths = [width] * (halvings(factor) + 1)
    if variant == "f32":
        widths[:2] = 4 * width, 2 * width
    to_image = conv(width, 3)
    nn.init.constant_(to_image.bias, 0.5)  # a fresh decoder draws mid-grey instead of black
    layers = [Clamp(), conv(latent_channels, widths[0]), nn.ReLU(), *up(widths[0], widths[1], variant == "midblock_gn")]
    for n_in, n_out in zip(widths[1:], widths[2:]):
        layers += up(n_in, n_out)
    return nn.Sequential(*layers, Block(width), to_image)


class Discriminator(nn.Module):
    """Judges whether each patch of an image is real, given the latent that belongs to it.

    Images [N,3,H,W] in [0,1] and latents [N,C,h,w] -> scores [N,5,h,w], float32 and high for real images, and a list of
    the activations of its five layers, [N,c,H',W']. A 1x1 convolution reads a score at each of five depths, averaged to
    the size of the latent. With normalisation, D would judge a batch by its statistics, and colours would drift."""
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
        # with PyTorch's own initialisation the signal fades, and D learns nothing for hundreds of steps
        for layer in (*self.blocks, *self.scores):
            nn.init.kaiming_normal_(layer.weight, 0.2)
            nn.init.zeros_(layer.bias)

    def forward(self, image, latent):
        x = torch.cat([image * 2 - 1, F.interpolate(latent, image.shape[-2:])], 1)
        scores, activations = [], []
        for block, score in zip(self.blocks, self.scores):
            x = F.leaky_relu(block(x), 0.2, inplace=True)
            activations.append(x)
            scores.append(F.adaptive_avg_pool2d(score(x), latent.shape[-2:]))
        return torch.cat(scores, 1).float(), activations


def halvings(factor):
    """How often an image is halved: 3 times for factor 8."""
    if factor < 2 or factor & (factor - 1):
        raise ValueError(f"factor={factor}: must be a power of two, 2 or more")
    return int(math.log2(factor))


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


def conv_weights(module):
    """The weights of the module's convolutions, first to last."""
    return [weight for weight in module.parameters() if weight.ndim == 4]


# --- optimizers ------------------------------------------------------------------------------------------------------
class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonalised: all directions of a layer learn equally fast (Jordan et al. 2024).

    A convolution [out,in,k,k] counts as a matrix [out,in*k*k]. The steps are those of torch.optim.Muon, which takes
    matrices only, with weight_decay=0 and adjust_lr_fn="match_rms_adamw". Weights of one shape are computed together.
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
            nesterov = torch._foreach_lerp(gradients, momentum, group["momentum"])
            matrices = torch.stack(nesterov).flatten(2)
            # this factor gives the steps the root mean square of Adam's, so that both can use one learning rate
            scale = 0.2 * max(matrices.shape[1:]) ** 0.5
            steps = orthogonalize(matrices.to(self.dtype)).to(weights[0].dtype) * (-group["lr"] * scale)
            torch._foreach_add_(weights, list(steps.unflatten(2, weights[0].shape[1:]).unbind()))


def orthogonalize(matrices):
    """Matrices [B,m,n] -> the same with all singular values near 1, by five Newton-Schulz iterations."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.mT).mT
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x


class CombinedOptimizer:
    """Several optimizers that act as one. With a GradScaler, either all of them take a step or none does."""
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


def make_optimizer(kind, modules, muon_weights, dtype, **adam):
    """kind: "muon" (Muon for `muon_weights`, Adam for the others), "adam" or "adamw" (seraena). adam: its arguments."""
    by_muon = {id(weight) for weight in muon_weights} if kind == "muon" else ()
    others = [weight for module in modules for weight in module.parameters() if id(weight) not in by_muon]
    fused = others[0].device.type != "mps"
    if kind == "adamw":
        return CombinedOptimizer(adamw=torch.optim.AdamW(others, betas=(0.9, 0.99), fused=fused))
    optimizers = {"adam": torch.optim.Adam(others, fused=fused, **adam)}
    if by_muon:
        optimizers["muon"] = Muon(muon_weights, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    return CombinedOptimizer(**optimizers)
