"""The VAE that the student imitates; and a small trainer for such VAEs.

`Teacher` is the only code that knows [-1,1] images, scaling and shift factors, posteriors and diffusers classes:
everything outside it is [0,1] images and latents about N(0,1).

Run as a script, it shows what a teacher is, and whether its latents are about N(0,1):
    python teacher.py --teacher=sdxl --images=photos --out_dir=out-look
or trains an AutoencoderKL of any factor (L1 + a small KL term) and measures its scaling factor:
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
teacher = ""               # the VAE to look at, as train.py takes it; '' = train one
images = ""                # a file or folder to look at it with; '' = synthetic
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


SUPPORTED = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderDC", "AutoencoderKLQwenImage", "AutoencoderKLWan", "AutoencoderTiny")


class Teacher:
    """A frozen VAE behind one convention: [0,1] images, NCHW; latents of about zero mean and unit variance.

    name: `toy`, `sd`, `sd-mse`, `sdxl`; a diffusers folder; a hub id, `owner/repo` or `owner/repo::subfolder`; a file in
    the original layout, `vae.safetensors` or `vae.ckpt` (`::folder` names a folder with its config.json, '' = diffusers
    looks it up on the hub); or the encoder of a taesd.py pair, `path/taef2_encoder.pth`, its `_decoder.pth` beside it.

    Has `latent_channels`, `factor` (pixels per latent along a side), `multiple` (which sides of images must be) and the
    `mean` and `std` of raw latents, numbers or [1,C,1,1], all from the VAE's own files; and the `student_variant` that
    suits it. Computes in `dtype`; takes and
    gives float32. Stops with one line if the VAE cannot be had.
    """
    def __init__(self, name, device="cpu", dtype=torch.float32):
        name, self.device, self.dtype = str(name), torch.device(device), dtype
        self.mean, self.std, self.image_range = 0.0, 1.0, (0, 1)
        self.patch = 1     # FLUX.2 normalises each place of a 2x2 patch of latents by its own statistics
        self.video = False  # made for [N,3,frames,H,W]
        if name.endswith(".pth"):
            (encoder, shape), (decoder, _) = load_taesd(name), load_taesd(partner(name))
            self.vae = torch.nn.ModuleDict({"encoder": encoder, "decoder": decoder}).to(dtype)
            self.raw_encode, self.raw_decode, self.class_name, self.student_variant = encoder, decoder, "taesd.py pair", shape["variant"]
        else:
            self.vae = vae = load_autoencoder(name, dtype)
            self.class_name, self.dtype, self.image_range = type(vae).__name__, vae.dtype, (-1, 1)
            self.raw_encode, self.raw_decode = self.encode_by_diffusers, lambda latents: vae.decode(latents).sample
            self.student_variant = {"AutoencoderKLFlux2": "midblock_gn", "AutoencoderDC": "f32"}.get(self.class_name, "plain")
            self.video = self.class_name in ("AutoencoderKLQwenImage", "AutoencoderKLWan")
            self.read_normalisation(vae)
        self.vae.to(self.device).eval().requires_grad_(False)
        if not self.video:  # channels_last is for 4-D weights only
            self.vae.to(memory_format=torch.channels_last)
        self.parameters = sum(p.numel() for p in self.vae.parameters())
        side = 64 * self.patch
        latent = self.encode(torch.zeros(1, 3, side, side))
        self.latent_channels, self.factor = latent.shape[1], side // latent.shape[2]
        self.multiple = self.factor * self.patch
        if self.student_variant == "f32" and self.factor != 32:
            self.student_variant = "plain"

    def read_normalisation(self, vae):
        """Sets mean and std from the VAE's config, or, for FLUX.2, from its batch-norm statistics."""
        def per_channel(values):
            return torch.as_tensor(values, dtype=torch.float32, device=self.device).view(1, -1, 1, 1)
        config = vae.config
        if self.class_name == "AutoencoderKLFlux2":
            self.patch = config.patch_size[0]
            self.mean, self.std = per_channel(vae.bn.running_mean), per_channel((vae.bn.running_var.float() + config.batch_norm_eps).sqrt())
        elif config.get("latents_mean") is not None and config.get("latents_std") is not None:
            self.mean, self.std = per_channel(config.latents_mean), per_channel(config.latents_std) / (config.get("scaling_factor") or 1.0)
        else:
            self.mean, self.std = config.get("shift_factor") or 0.0, 1 / (config.get("scaling_factor") or 1.0)

    def __str__(self):
        if torch.is_tensor(self.mean):
            scale = "mean and standard deviation by channel" + ", in patches of 2x2" * (self.patch > 1)
        else:
            scale = f"scaling factor {1 / self.std:g}, shift {self.mean:g}"
        return f"{self.class_name}, {self.parameters:,} parameters, factor {self.factor}, {self.latent_channels} channels, {scale}"

    def encode_by_diffusers(self, images):
        found = self.vae.encode(images)
        return found.latent_dist.mode() if hasattr(found, "latent_dist") else found[0]  # .latent or .latents

    def drop_decoder(self):
        """Free the decoder's memory, once no more round trips are due. `encode` still works."""
        self.raw_decode = None
        self.vae.decoder = torch.nn.Identity()

    @torch.no_grad()
    def encode(self, images):
        """[N,3,H,W] images in [0,1], H and W multiples of `multiple` -> [N,latent_channels,H/factor,W/factor] ~ N(0,1)."""
        low, high = self.image_range
        images = (images * (high - low) + low).to(self.device, self.dtype, memory_format=torch.channels_last)
        latents = (self.raw_encode(images.unsqueeze(2)).squeeze(2) if self.video else self.raw_encode(images)).float()
        return F.pixel_shuffle((F.pixel_unshuffle(latents, self.patch) - self.mean) / self.std, self.patch)

    @torch.no_grad()
    def decode(self, latents):
        """[N,latent_channels,h,w] latents ~ N(0,1) -> [N,3,h*factor,w*factor] images in [0,1]."""
        low, high = self.image_range
        latents = F.pixel_unshuffle(latents.to(self.device).float(), self.patch) * self.std + self.mean
        latents = F.pixel_shuffle(latents, self.patch).to(self.dtype, memory_format=torch.channels_last)
        images = (self.raw_decode(latents.unsqueeze(2)).squeeze(2) if self.video else self.raw_decode(latents)).float()
        return ((images - low) / (high - low)).clamp(0, 1)


def partner(encoder_path):
    """path/taef2_encoder.pth -> path/taef2_decoder.pth"""
    folder, name = os.path.split(encoder_path)
    if "encoder" not in name:
        stop(f"--teacher={encoder_path}: name the encoder of a pair, for example taesd_encoder.pth beside taesd_decoder.pth")
    decoder_path = os.path.join(folder, name.replace("encoder", "decoder"))
    if os.path.isfile(encoder_path) and not os.path.isfile(decoder_path):
        stop(f"--teacher={encoder_path}: its other half, {decoder_path}, is missing; a teacher needs both")
    return decoder_path


def load_autoencoder(name, dtype, flag="--teacher"):
    """Load one of the supported diffusers autoencoders from a short name, a folder, the hub, or a single file; flag: to be named
    in errors."""
    import diffusers
    where, _, subfolder = NAMES.get(name, name).partition("::")
    single = where.endswith((".safetensors", ".ckpt", ".sft"))
    if single:
        if not os.path.isfile(where):
            stop(f"{flag}={name}: no such file")
    elif os.path.isdir(where):
        if not subfolder and os.path.isfile(os.path.join(where, "vae", "config.json")):
            subfolder = "vae"  # a whole pipeline
        if not os.path.isfile(os.path.join(where, subfolder, "config.json")):
            stop(f"{flag}={name}: the folder holds no config.json, so it is not a diffusers VAE (of a taesd.py pair, name the encoder.pth itself)")
    elif where.count("/") != 1 or where[0] in "./~":
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0)[0]
        stop(f"{flag}={name}: no such folder and no known name (did you mean {near}?); it takes {', '.join(NAMES)}, a diffusers folder, "
             f"a hub id owner/repo, a .safetensors or .ckpt file, or a taesd.py pair's encoder.pth")
    else:
        check_hub(f"{flag}={name}", where, f"{subfolder}/config.json".lstrip("/"))
    try:
        if single:
            return diffusers.AutoencoderKL.from_single_file(where, config=subfolder or None, torch_dtype=dtype)
        config = diffusers.AutoencoderKL.load_config(where, subfolder=subfolder or None)
        kind = config.get("_class_name")
        if dtype == torch.float16 and config.get("force_upcast", True):
            dtype = torch.float32  # the VAE says that it overflows in float16
        if kind in SUPPORTED:
            return getattr(diffusers, kind).from_pretrained(where, subfolder=subfolder or None, torch_dtype=dtype, low_cpu_mem_usage=False)
    except Exception as error:  # missing, cut off or mismatched weights: each library layer raises its own type
        stop(f"{flag}={name}: could not be loaded: {str(error)[:300]}")
    stop(f"{flag}={name}: its class is {kind}; supported are {', '.join(SUPPORTED)} and taesd.py pairs")


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
        stop(f"{name}: not in the local cache, and {hub.constants.ENDPOINT} could not be reached "
             f"({type(error).__name__}); --teacher= also takes a local diffusers folder, and --teacher=toy needs no network")
    try:
        hub.hf_hub_download(repo, filename)
    except Exception as error:  # no such repository, gated, or its VAE in a subfolder
        stop(f"{name}: {type(error).__name__} for {filename}: {error} (a VAE in a subfolder: {repo}::vae; a private or "
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
    print(f"---\nout_dir: {out_dir}\nscaling_factor: {vae.config.scaling_factor}\nparameters: {teacher.parameters}\n"
          f"latent_mean: {latents.mean((0, 2, 3)).tolist()}\nlatent_std: {latents.std((0, 2, 3)).tolist()}\n"
          f"val_psnr: {psnr(round_trip, held_out).mean():.2f}")


@torch.no_grad()
def look():
    """Print what was found and the latents' statistics (about 0 and 1 if the scale is right); write a round-trip picture."""
    from data import Images
    from sample import chunked, measure, picture
    place = pick_device(device)
    vae = Teacher(teacher, place, pick_dtype("auto", place))
    real = Images("", images).held_out(8, 256).to(place) / 255
    latents = chunked(vae.encode, real)
    round_trip = chunked(vae.decode, latents)
    path = os.path.join(out_dir, "round_trip.png")
    picture({"original": real, f"{teacher}: round trip": round_trip}, path)
    print(f"{teacher}: {vae}, {vae.dtype}\n{len(real)} images of 256x256 pixels; latents by channel, about 0 and 1 if the scale is right:")
    for name, values in (("mean", latents.mean((0, 2, 3))), ("std", latents.std((0, 2, 3)))):
        print(f"{name:5}" + " ".join(f"{value:6.2f}" for value in values.tolist()))
    print("round trip: " + ", ".join(f"{name} {value:.4g}" for name, value in measure(round_trip, real).items()) + f"\nwrote {path}")


if __name__ == "__main__":
    configure(globals())
    look() if teacher else train()
