"""The VAE that the student imitates; and a small trainer for such VAEs.

`Teacher` is the only code that knows [-1,1] images, scaling and shift factors, posteriors and diffusers classes:
everything outside it is [0,1] images and latents about N(0,1).

Run as a script, it trains an AutoencoderKL of any factor (L1 + a small KL term) and measures its scaling factor:
    python teacher.py --out_dir=assets/toy_vae                                           # the `toy` teacher, 25 minutes on 2 cores
    python teacher.py --factor=16 --latent_channels=16 --data_dir=photos --out_dir=f16   # then train.py --teacher=f16
"""
import difflib
import os
import time

import torch
import torch.nn.functional as F

from configure import configure, pick_device, pick_dtype, require_positive, stop
from model import load_taesd, save_file

# -----------------------------------------------------------------------------
# settings of `python teacher.py`
out_dir = "vae"            # the trained VAE goes here: a diffusers folder, ready for train.py --teacher=
data_dir = ""              # folder of images, searched recursively; '' = synthetic
val_dir = ""               # folder of held-out images; '' = 5% of data_dir
factor = 8                 # pixels per latent along each side: 4, 8, 16, 32
latent_channels = 4        # channels of the latent
vae_width = 32             # channels of every layer, a multiple of 8
crop = 64                  # training crop in pixels, a multiple of the factor
batch_size = 16            # crops a step
max_iters = 3000           # steps
learning_rate = 2e-3       # peak of AdamW's, after 5% of the steps; then it falls to 0 as a cosine
kl_weight = 3e-4           # of the KL divergence per latent element, next to L1 per colour value
seed = 0                   # of the weights and of the crops
device = "auto"            # auto, cuda, mps or cpu
workers = 2                # threads that make crops
# -----------------------------------------------------------------------------

NAMES = {
    "toy": os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "toy_vae"),
    "sd": "stabilityai/sd-vae-ft-ema",
    "sd-mse": "stabilityai/sd-vae-ft-mse",
    "sdxl": "madebyollin/sdxl-vae-fp16-fix",  # the original overflows in float16
}


class Teacher:
    """A frozen VAE behind one convention: [0,1] images, NCHW; latents of about zero mean and unit variance.

    name: `toy`, `sd`, `sd-mse`, `sdxl`; a diffusers folder; a hub id, `owner/repo` or `owner/repo::subfolder`; or the
    encoder of a taesd.py pair, `path/taef2_encoder.pth`, its `_decoder.pth` beside it.
    Has `latent_channels`, `factor` (pixels per latent along a side), `scaling_factor` and `shift_factor`, all from the
    VAE's own files. Computes in `dtype`; takes and gives float32. Stops with one line if the VAE cannot be had.
    """
    def __init__(self, name, device="cpu", dtype=torch.float32):
        name, self.device, self.dtype = str(name), torch.device(device), dtype
        if name.endswith(".pth"):
            (encoder, shape), (decoder, _) = load_taesd(name), load_taesd(partner(name))
            vae = torch.nn.ModuleDict({"encoder": encoder, "decoder": decoder}).to(dtype)
            self.encoder, self.decoder = encoder, decoder
            self.latent_channels, self.factor = shape["latent_channels"], shape["factor"]
            self.scaling_factor, self.shift_factor, self.image_range = 1.0, 0.0, (0, 1)
            self.class_name = "taesd.py pair"
        else:
            vae = load_autoencoder_kl(name, dtype)
            self.encoder = lambda images: vae.encode(images).latent_dist.mode()
            self.decoder = lambda latents: vae.decode(latents).sample
            self.latent_channels, self.factor = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
            self.scaling_factor, self.shift_factor = vae.config.scaling_factor, vae.config.shift_factor or 0.0
            self.image_range, self.class_name, self.dtype = (-1, 1), "AutoencoderKL", vae.dtype
        self.vae = vae.to(device=self.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.parameters = sum(p.numel() for p in vae.parameters())

    def drop_decoder(self):
        """Free the decoder's memory, once no more round trips are due. `encode` still works."""
        self.decoder = None
        self.vae.register_module("decoder", None)

    @torch.no_grad()
    def encode(self, images):
        """[N,3,H,W] images in [0,1], H and W multiples of `factor` -> [N,latent_channels,H/factor,W/factor] ~ N(0,1)."""
        low, high = self.image_range
        images = (images * (high - low) + low).to(self.device, self.dtype, memory_format=torch.channels_last)
        return (self.encoder(images).float() - self.shift_factor) * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents):
        """[N,latent_channels,h,w] latents ~ N(0,1) -> [N,3,h*factor,w*factor] images in [0,1]."""
        low, high = self.image_range
        latents = latents.to(self.device).float() / self.scaling_factor + self.shift_factor
        images = self.decoder(latents.to(self.dtype, memory_format=torch.channels_last)).float()
        return ((images - low) / (high - low)).clamp(0, 1)


def partner(encoder_path):
    """path/taef2_encoder.pth -> path/taef2_decoder.pth"""
    folder, name = os.path.split(encoder_path)
    if "encoder" not in name:
        stop(f"--teacher={encoder_path}: name the encoder of a pair, for example taesd_encoder.pth beside taesd_decoder.pth")
    return os.path.join(folder, name.replace("encoder", "decoder"))


def load_autoencoder_kl(name, dtype):
    """Load a diffusers AutoencoderKL from a short name, a folder or the hub."""
    from diffusers import AutoencoderKL
    where, _, subfolder = NAMES.get(name, name).partition("::")
    if os.path.isdir(where):
        if not subfolder and os.path.isfile(os.path.join(where, "vae", "config.json")):
            subfolder = "vae"  # a whole pipeline
        if not os.path.isfile(os.path.join(where, subfolder, "config.json")):
            stop(f"--teacher={name}: the folder holds no config.json, so it is not a diffusers VAE")
    elif where.count("/") != 1 or where[0] in "./~":
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0)[0]
        stop(f"--teacher={name}: no such folder and no known name (did you mean {near}?); "
             f"it takes {', '.join(NAMES)}, a diffusers folder, a hub id owner/repo, or a taesd.py pair's encoder.pth")
    else:
        check_hub(name, where, f"{subfolder}/config.json".lstrip("/"))
    try:
        config = AutoencoderKL.load_config(where, subfolder=subfolder or None)
        if config.get("latents_mean") is not None or config.get("latents_std") is not None:
            stop(f"--teacher={name}: normalises its latents by channel (latents_mean, latents_std), which is not supported yet")
        if dtype == torch.float16 and config.get("force_upcast", True):
            dtype = torch.float32  # the VAE says that it overflows in float16
        kind = config.get("_class_name")
        if kind == "AutoencoderKL":
            return AutoencoderKL.from_pretrained(where, subfolder=subfolder or None, torch_dtype=dtype, low_cpu_mem_usage=False)
    except Exception as error:  # missing, cut off or mismatched weights: each library layer raises its own type
        stop(f"--teacher={name}: could not be loaded: {str(error)[:300]}")
    stop(f"--teacher={name}: its class is {kind}; supported are AutoencoderKL and taesd.py pairs")


def check_hub(name, repo, filename):
    """Stop with a true reason if a file is neither cached nor on a reachable hub (diffusers would blame a missing file)."""
    import huggingface_hub as hub
    try:
        hub.hf_hub_download(repo, filename, local_files_only=True)
        return
    except Exception:  # not in the cache, or not even a repository's name
        pass
    try:
        hub.get_session().head(hub.constants.ENDPOINT, timeout=10)  # hf_hub_download alone would retry for half a minute
    except Exception as error:
        stop(f"--teacher={name}: not in the local cache, and {hub.constants.ENDPOINT} could not be reached "
             f"({type(error).__name__}); --teacher= also takes a local diffusers folder, and --teacher=toy needs no network")
    try:
        hub.hf_hub_download(repo, filename)
    except Exception as error:  # no such repository, gated, or its VAE in a subfolder
        stop(f"--teacher={name}: {type(error).__name__} for {filename}: {error} (a VAE in a subfolder: {repo}::vae; a private or "
             f"gated repository: hf auth login)")


# -----------------------------------------------------------------------------
# python teacher.py

def initialize(vae):
    """Residual blocks start as the identity, convolutions keep the variance, the posterior starts with little noise.

    With torch's own initialisation, pictures stay grey for thousands of steps.
    """
    for layer in vae.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            torch.nn.init.zeros_(layer.bias)
    for block in vae.modules():
        if type(block).__name__ == "ResnetBlock2D":
            torch.nn.init.zeros_(block.conv2.weight)
    torch.nn.init.constant_(vae.quant_conv.bias[vae.config.latent_channels:], -6)


def train():
    from diffusers import AutoencoderKL
    from data import Images, batches
    from sample import picture, psnr

    require_positive(globals(), "latent_channels", "batch_size", "max_iters", "workers", "learning_rate")
    if os.path.isdir(out_dir) and os.listdir(out_dir):
        stop(f"--out_dir={out_dir}: holds files already; choose a new folder")
    place = pick_device(device)
    amp = torch.autocast(place.type, torch.bfloat16, enabled=pick_dtype("auto", place) == torch.bfloat16)
    torch.manual_seed(seed)
    depth = factor.bit_length()  # factor 8: four stages, three halvings
    if factor != 2 ** (depth - 1) or factor < 2:
        stop(f"--factor={factor}: must be a power of two, 2 or more")
    if crop % factor or crop < 16:
        stop(f"--crop={crop}: must be 16 or more and a multiple of the factor, {factor}")
    if vae_width % 8 or vae_width < 8:
        stop(f"--vae_width={vae_width}: must be a multiple of 8")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth, up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=(vae_width,) * depth, norm_num_groups=8, latent_channels=latent_channels,
        mid_block_add_attention=False, force_upcast=False).to(place)
    initialize(vae)
    images = Images(data_dir, val_dir)
    optimizer = torch.optim.AdamW(vae.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max_iters, pct_start=0.05, cycle_momentum=False)
    start = time.time()
    for step, batch in enumerate(batches(images, crop, batch_size, 0.07, seed, workers)):
        if step == max_iters:
            break
        real = batch.to(place) / 127.5 - 1
        with amp:
            posterior = vae.encode(real).latent_dist
            fake = vae.decode(posterior.sample()).sample
        # L1 of the pixels and of 8x8 patches: the second is for the colours, which pixels alone learn late
        l1 = F.l1_loss(fake.float(), real) + F.l1_loss(F.avg_pool2d(fake.float(), 8), F.avg_pool2d(real, 8))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        (l1 + kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            rate = (step + 1) / (time.time() - start)
            print(f"step {step}/{max_iters}  l1 {l1.item():.4f}  kl {kl.item():.2f}  {rate * batch_size:.0f} images/s  "
                  f"{(max_iters - step) / rate / 60:.1f} min left", flush=True)
        if step % 500 == 0:
            picture({"original": real[:8] / 2 + 0.5, f"round trip, step {step}": fake[:8] / 2 + 0.5}, os.path.normpath(out_dir) + ".png")

    vae.eval().requires_grad_(False)
    latents = vae.encode(images.held_out(64, crop).to(place) / 127.5 - 1).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    torch.nn.Module.to(vae, torch.float16)  # half the size; the method of diffusers would warn
    save_file(out_dir, vae.save_pretrained)

    teacher = Teacher(out_dir, place)
    held_out = images.held_out(8, 256).to(place) / 255
    latents = teacher.encode(held_out)
    round_trip = teacher.decode(latents)
    picture({"original": held_out, "round trip": round_trip}, os.path.normpath(out_dir) + ".png")
    print(f"---\nout_dir: {out_dir}\nscaling_factor: {teacher.scaling_factor}\nparameters: {teacher.parameters}\n"
          f"latent_mean: {latents.mean((0, 2, 3)).tolist()}\nlatent_std: {latents.std((0, 2, 3)).tolist()}\n"
          f"val_psnr: {psnr(round_trip, held_out).mean():.2f}")


if __name__ == "__main__":
    configure(globals())
    train()
