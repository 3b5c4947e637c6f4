"""The three networks: tiny encoder, tiny decoder, discriminator; and the files the first two are kept in.

Layer order and state-dict keys are those of taesd.py (github.com/madebyollin/taesd), so weights go both ways.
Images are [0,1], latents about N(0,1), all NCHW. The student never sees [-1,1] or a scaling factor.
"""
import math
import os
import re
import shutil
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

from configure import stop


def conv(n_in, n_out, **kwargs):
    return nn.Conv2d(n_in, n_out, 3, padding=1, **kwargs)


class Clamp(nn.Module):
    """Squash latents softly to (-3,3): a stray large value must not blow up the picture."""
    def forward(self, latent):
        return torch.tanh(latent / 3) * 3


class Block(nn.Module):
    """Residual block of three 3x3 convolutions. `midblock_gn` adds the GroupNorm branch of the released FLUX.2 weights."""
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


VARIANTS = ("plain", "midblock_gn", "f32")  # TAESD's; FLUX.2's, whose smallest blocks see the whole picture; Sana's, for factor 32


def Encoder(latent_channels=4, factor=8, width=64, variant="plain"):
    """[N,3,H,W] images in [0,1] -> [N,latent_channels,H/factor,W/factor] latents. 1,222,532 parameters at the defaults."""
    def down(gn=False):
        return conv(width, width, stride=2, bias=False), Block(width, gn), Block(width, gn), Block(width, gn)
    if variant == "f32":  # two halvings in the stem
        stem, halvings = (conv(3, width // 2, stride=2), nn.ReLU(), conv(width // 2, width, stride=2), nn.ReLU()), stages(factor) - 2
    else:
        stem, halvings = (conv(3, width),), stages(factor)
    return nn.Sequential(
        *stem, Block(width),
        *[layer for _ in range(halvings - 1) for layer in down()], *down(variant == "midblock_gn"),
        conv(width, latent_channels),
    )


def Decoder(latent_channels=4, factor=8, width=64, variant="plain"):
    """[N,latent_channels,h,w] latents -> [N,3,h*factor,w*factor] images, [0,1] but not clipped. 1,222,531 parameters."""
    def up(n_in, n_out, gn=False):
        return Block(n_in, gn), Block(n_in, gn), Block(n_in, gn), nn.Upsample(scale_factor=2), conv(n_in, n_out, bias=False)
    widths = [width] * (stages(factor) + 1)
    if variant == "f32":
        widths[:2] = 4 * width, 2 * width
    to_image = conv(width, 3)
    nn.init.constant_(to_image.bias, 0.5)  # a fresh decoder paints mid-grey, not black
    return nn.Sequential(
        Clamp(), conv(latent_channels, widths[0]), nn.ReLU(),
        *up(*widths[:2], variant == "midblock_gn"), *[layer for pair in zip(widths[1:], widths[2:]) for layer in up(*pair)],
        Block(width), to_image,
    )


class Discriminator(nn.Module):
    """Is this patch real, given its latent? Images [N,3,H,W], latents [N,C,h,w] -> scores [N,5,h,w]: real +1, fake -1.

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
        for layer in (*self.blocks, *self.scores):  # torch's own initialisation lets the signal fade: D would sleep for hundreds of steps
            nn.init.kaiming_normal_(layer.weight, 0.2)
            nn.init.zeros_(layer.bias)

    def forward(self, image, latent):
        x = torch.cat([image * 2 - 1, F.interpolate(latent, image.shape[-2:])], 1)
        scores = []
        for block, score in zip(self.blocks, self.scores):
            x = F.leaky_relu(block(x), 0.2)
            scores.append(F.adaptive_avg_pool2d(score(x), latent.shape[-2:]))
        return torch.cat(scores, 1)


def stages(factor):
    """Factor 8 -> 3 halvings."""
    if factor < 2 or factor & (factor - 1):
        raise ValueError(f"factor={factor}: must be a power of two, 2 or more")
    return int(math.log2(factor))


def parameters(module):
    return sum(p.numel() for p in module.parameters())


# -----------------------------------------------------------------------------
# the optimizer of hidden layers

class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: all directions in a layer's weights learn equally fast (Jordan et al. 2024).

    A convolution [out,in,k,k] is a matrix [out,in*k*k]. The steps are those of torch.optim.Muon with weight_decay=0 and
    adjust_lr_fn="match_rms_adamw", which takes matrices only, one by one; here all of one shape are multiplied together,
    in dtype.
    """
    def __init__(self, weights, lr, momentum=0.95, dtype=torch.float32):
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
            steps = orthogonal(steps.to(self.dtype)).to(weights[0].dtype).unflatten(2, weights[0].shape[1:])
            torch._foreach_add_(weights, list(steps.unbind()), alpha=-group["lr"] * size)


def orthogonal(matrices):
    """[B,m,n]: the same matrices with all singular values near 1, by five Newton-Schulz iterations."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x


# -----------------------------------------------------------------------------
# files

def save_file(path, write, keep=None):
    """Call write(temporary path), then rename: a file is complete or as it was before. A folder is replaced whole. What was there
    before is renamed to `keep`, if that is given."""
    path = os.path.normpath(path)
    aside = f"{path}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        write(aside)
    except Exception as error:  # a full disk, a read-only one: torch, Pillow and safetensors raise different types
        shutil.rmtree(aside, ignore_errors=True)
        if os.path.isfile(aside):
            os.remove(aside)
        stop(f"{path}: could not be written ({error}); what was there before is untouched. Free some space, then go on")
    for root, _, names in os.walk(aside):  # safetensors writes files that only their owner may read
        for name in names:
            os.chmod(os.path.join(root, name), 0o644)
    if keep and os.path.exists(path):
        os.replace(path, keep)
    shutil.rmtree(path, ignore_errors=True)  # only a folder: os.replace cannot do those
    os.replace(aside, path)


def load_file(path):
    """torch.load onto the CPU; tensors and plain containers only, so a file from a stranger cannot run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        stop(f"{path}: no such file")
    except Exception as error:  # a truncated archive, a pickle that wants to run code, a text file: many types
        stop(f"{path}: not a readable weights file ({type(error).__name__}: {str(error).splitlines()[0]})")


def checkpoint_paths(out_dir):
    """Of the last checkpoint of a run and of the one before."""
    return os.path.join(out_dir, "ckpt.pt"), os.path.join(out_dir, "ckpt_previous.pt")


def load_checkpoint(out_dir, set_aside=False):
    """Read the last checkpoint of a run, onto the CPU, or the one before where the last is missing or damaged. Stops with one
    line if neither can be read or they are not train.py's. set_aside: rename a damaged one, so that the next save does not keep
    it as the one before."""
    path, previous = checkpoint_paths(out_dir)
    if not any(map(os.path.isfile, (path, previous))):
        stop(f"--out_dir={out_dir}: no such file as {path}, so there is no run here yet")
    try:
        checkpoint = load_file(path)
    except SystemExit as error:
        if not os.path.isfile(previous):
            raise
        if set_aside and os.path.exists(path):
            os.replace(path, f"{path}.damaged")
        print(f"{error}; going back to {previous}", file=sys.stderr)
        checkpoint, path = load_file(previous), previous
    if not isinstance(checkpoint, dict) or not {"settings", "shape", "ema_encoder", "ema_decoder"} <= checkpoint.keys():
        stop(f"{path}: not a checkpoint of train.py")
    return checkpoint


def load_student(source, flag="--init_from"):
    """The student of a run's out_dir, of taesd.py files (the path of one; its partner is taken where it lies beside it), or of
    an AutoencoderTiny (a diffusers folder or a hub id).

    Returns what `load_checkpoint` does, of others than runs only "shape", "ready" and the halves that there are.
    """
    if any(map(os.path.isfile, checkpoint_paths(source))):
        return load_checkpoint(source)
    halves = {}
    if source.endswith(".pth"):
        folder, name = os.path.split(source)
        for half in ("encoder", "decoder"):
            path = os.path.join(folder, re.sub("encoder|decoder", half, name))
            if path == source or os.path.isfile(path):
                halves[half] = load_taesd(path)
    elif os.path.isfile(source) or not os.path.isdir(source) and (source.count("/") != 1 or source[0] in "./~"):
        stop(f"{flag}={source}: no such weights; it takes a run's out_dir, a taesd.py .pth file, an AutoencoderTiny folder or a hub id owner/repo")
    else:
        from teacher import load_autoencoder
        vae = load_autoencoder(source, torch.float32, flag)
        try:
            shape = dict(latent_channels=vae.config.latent_channels, factor=2 ** (len(vae.config.encoder_block_out_channels) - 1),
                         width=vae.config.encoder_block_out_channels[0], variant="plain")
            halves = {"encoder": (Encoder(**shape), shape), "decoder": (Decoder(**shape), shape)}
            halves["encoder"][0].load_state_dict(vae.encoder.layers.state_dict())
            nn.Sequential(*list(halves["decoder"][0])[1:]).load_state_dict(vae.decoder.layers.state_dict())
        except Exception as error:
            stop(f"{source}: not an AutoencoderTiny in TAESD's layout ({' '.join(str(error).split())[:300]})")
    shapes = [shape for _, shape in halves.values()]
    if shapes[0] != shapes[-1]:
        stop(f"{source}: encoder and decoder differ: {shapes[0]} and {shapes[1]}")
    return {"shape": shapes[0], "ready": list(halves)} | {f"ema_{half}": network.state_dict() for half, (network, _) in halves.items()}


def save_taesd(path, module, dtype=torch.float32):
    """Write a plain state dict: the taesd.py format (taesd_encoder.pth, taesd_decoder.pth)."""
    state = {key: value.detach().cpu().to(dtype).contiguous() for key, value in module.state_dict().items()}
    save_file(path, lambda aside: torch.save(state, aside))


def save_onnx(path, module):
    """Write an ONNX file of a float32 encoder or decoder, for any batch size, height and width. Needs onnx and onnxscript."""
    decoder = isinstance(module[0], Clamp)
    names, channels = (("latent", "image"), module[1].in_channels) if decoder else (("image", "latent"), 3)
    cells = 16 if decoder else 16 * 2 ** sum(getattr(layer, "stride", 0) == (2, 2) for layer in module)
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    program = torch.onnx.export(module.eval(), (torch.zeros(2, channels, cells, cells + cells // 2),), dynamo=True, verbose=False,
                                input_names=names[:1], output_names=names[1:], dynamic_shapes=(sizes,))
    save_file(path, lambda aside: program.save(aside, external_data=False))


def load_taesd(path):
    """Read taesd_encoder.pth or taesd_decoder.pth (float32 or float16); the shapes inside tell which network it is.

    Returns (network in float32, its arguments). Stops with one line if the file is anything else.
    """
    state = load_file(path)
    try:
        decoder = "0.weight" not in state  # index 0 of a decoder is the Clamp, which has no weights
        first, last = state["1.weight" if decoder else "0.weight"], list(state.values())[-1]
        width = [value for value in state.values() if value.ndim == 4][-1].shape[1]  # of the last convolution
        f32 = first.shape[0] != width
        halvings = sum(value.ndim == 4 and key.count(".") == 1 and key.replace("weight", "bias") not in state for key, value in state.items())
        arguments = dict(
            latent_channels=first.shape[1] if decoder else len(last), width=width, factor=2 ** (halvings + 2 * (f32 and not decoder)),
            variant="f32" if f32 else "midblock_gn" if any(".pool." in key for key in state) else "plain")
        network = (Decoder if decoder else Encoder)(**arguments)
        network.load_state_dict(state)
    except Exception as error:
        stop(f"{path}: not an encoder or decoder in taesd.py's layout ({' '.join(str(error).split())[:300]})")
    return network.float(), arguments


def model_card(checkpoint):
    """README.md, with the header of the Hugging Face hub, of a run's weights."""
    settings, figures = checkpoint["settings"], checkpoint["figures"]
    losses = {name: settings[name] for name in settings if name.endswith("_weight") and settings[name]}
    rows = "\n".join(f"| {name.removeprefix('val_')} | {value:.4g} |" for name, value in figures.items())
    return f"""---
library_name: diffusers
tags: [taesd, tiny-autoencoder]
---
# Tiny autoencoder for {os.path.basename(settings["teacher"]) or settings["teacher"]}

{checkpoint["shape"]["latent_channels"]} latent channels at factor {checkpoint["shape"]["factor"]}, width {checkpoint["shape"]["width"]}. Load with
`diffusers.AutoencoderTiny.from_pretrained`; its latents are about N(0,1): those of the teacher after its own scaling.

Trained for {checkpoint["step"]:,} steps ({checkpoint["images_seen"]:,} images) of {settings["crop"]} pixels, batch {settings["batch_size"]}, seed {settings["seed"]},
recipe `{settings["recipe"]}`: {", ".join(f"{name} {value:g}" for name, value in losses.items())}.

| held-out images, {settings["eval_size"]} pixels | |
|---|---|
{rows or "| not measured yet | |"}
"""


def save_diffusers(path, encoder, decoder, dtype=torch.float32, card=""):
    """Write a `diffusers.AutoencoderTiny` folder: encoder key k -> encoder.layers.k, decoder i.k -> decoder.layers.(i-1).k.

    AutoencoderTiny takes and gives [-1,1] images and does that conversion itself; its latents are ours. It can express the
    plain variant alone. `card` becomes the folder's README.md.
    """
    from diffusers import AutoencoderTiny
    width, depth = encoder[0].out_channels, sum(isinstance(layer, nn.Upsample) for layer in decoder)
    with torch.random.fork_rng(devices=[]):  # its weights start random: leave the run's random state alone
        vae = AutoencoderTiny(
            latent_channels=encoder[-1].out_channels,
            encoder_block_out_channels=(width,) * (depth + 1), num_encoder_blocks=(1,) + (3,) * depth,
            decoder_block_out_channels=(width,) * (depth + 1), num_decoder_blocks=(3,) * depth + (1,))
    vae.encoder.layers.load_state_dict(encoder.state_dict())
    vae.decoder.layers.load_state_dict(nn.Sequential(*list(decoder)[1:]).state_dict())  # all but the Clamp

    def write(aside):
        nn.Module.to(vae, dtype)  # the method of diffusers would warn
        vae.save_pretrained(aside)
        if card:
            with open(os.path.join(aside, "README.md"), "w", encoding="utf-8") as file:
                file.write(card)
    save_file(path, write)
