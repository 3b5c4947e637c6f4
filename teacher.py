"""The VAE that the student imitates, behind one convention.

Teacher is the only code that knows [-1,1] images, scaling and shift factors, posteriors and the classes of diffusers.
Everywhere else, images are in [0,1] and latents have about zero mean and unit variance. To look at a teacher, run
`python sample.py --teacher=sdxl`.
"""
import difflib
import functools
import math
import os

import torch
import torch.nn.functional as F

from support.config import fail, one_line
from support.files import load_file, load_pair

NAMES = {
    "toy": os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "toy_vae"),
    "sd": "stabilityai/sd-vae-ft-ema",
    "sd-mse": "stabilityai/sd-vae-ft-mse",
    "sdxl": "madebyollin/sdxl-vae-fp16-fix",  # the original VAE overflows in float16
}
CONFIGS = {name: NAMES["toy"].replace("toy_vae", f"vae_configs/{name}")
           for name in ("sd", "sdxl", "sd3", "flux1", "wan")}  # Qwen-Image's VAE is like Wan 2.1's, with the same scale
WAN_KEYS = {"decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma"}  # original; diffusers
FACTORS = {"sd": 0.18215, "sdxl": 0.13025, "sd3": 1.5305, "flux1": 0.3611}  # published scaling factors
VARIANTS = {  # class of diffusers: variant of its student
    "AutoencoderKL": "plain", "AutoencoderKLFlux2": "midblock_gn", "AutoencoderDC": "f32",
    "AutoencoderKLQwenImage": "plain", "AutoencoderKLWan": "plain", "AutoencoderTiny": "plain"}


class Teacher:
    """A frozen VAE behind one convention: images [N,3,H,W] in [0,1], latents of about zero mean and unit variance.

    name: `toy`, `sd`, `sd-mse` or `sdxl`; a diffusers folder; a hub id, `owner/repo` or `owner/repo::subfolder`; a file
    in the original layout with its configuration, `vae.safetensors::sdxl` (sd, sdxl, sd3, flux1) or `vae.ckpt::folder`
    of a config.json (Wan 2.1 and Qwen-Image need none); or `taef2_encoder.pth`, with its taesd.py decoder beside it.

    Attributes: `latent_channels`; `factor`, the pixels per latent along a side; `multiple`, of which the sides of all
    images must be multiples; `mean` and `std` of the raw latents, numbers or [1,C,1,1], read from the VAE's own files;
    `student_variant`, which suits it; `fingerprint`, its latent of a fixed image [1,C,h,w]. It computes in `dtype`;
    inputs and outputs are float32."""
    def __init__(self, name, device="cpu", dtype=torch.float32):
        name, self.device, self.dtype = str(name), torch.device(device), dtype
        self.mean, self.std, self.image_range = 0.0, 1.0, (0, 1)
        self.patch = 1      # FLUX.2 normalises each of the four places in a 2x2 patch of latents separately
        self.video = False  # made for [N,3,frames,H,W]
        self.student_variant = "plain"
        if name.endswith(".pth"):
            halves = load_pair(name)
            if len(halves) < 2:
                fail(f"--teacher={name}: its other half is missing; a teacher needs taesd_encoder.pth and "
                     f"taesd_decoder.pth, or the like, in one folder")
            (encoder, shape), (decoder, _) = halves["encoder"], halves["decoder"]
            self.vae = torch.nn.ModuleDict({"encoder": encoder, "decoder": decoder}).to(dtype)
            self.raw_encode, self.raw_decode = encoder, decoder
            self.class_name, self.student_variant = "taesd.py pair", shape["variant"]
        else:
            self.vae = load_autoencoder(name, dtype)
            self.class_name, self.dtype, self.image_range = type(self.vae).__name__, self.vae.dtype, (-1, 1)
            self.raw_encode, self.raw_decode = self.diffusers_encode, lambda latents: self.vae.decode(latents).sample
            self.student_variant = VARIANTS[self.class_name]
            self.video = self.class_name in ("AutoencoderKLQwenImage", "AutoencoderKLWan")
            self.read_normalisation(self.vae)
        self.vae.to(self.device).eval().requires_grad_(False)
        if not self.video:  # channels_last is for four dimensions only
            self.vae.to(memory_format=torch.channels_last)
        self.parameters = sum(p.numel() for p in self.vae.parameters())
        colors = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        image = F.interpolate(colors, 128)  # squares of 8 pixels
        try:
            self.fingerprint = self.encode(image).cpu()
            picture = self.decode(self.fingerprint)
        except Exception as error:  # grey images or RGBA, for example; each class fails in a way of its own
            fail(f"--teacher={name}: this {self.class_name} cannot encode and decode an RGB image, {[*image.shape]}: "
                 f"{one_line(error, 300)}")
        if picture.shape != image.shape:
            fail(f"--teacher={name}: this {self.class_name} decodes an RGB image, {[*image.shape]}, to "
                 f"{[*picture.shape]}; a teacher must return what it encodes")
        self.latent_channels, self.factor = self.fingerprint.shape[1], 128 // self.fingerprint.shape[2]
        self.multiple = self.factor * self.patch
        if self.student_variant == "f32" and self.factor != 32:
            self.student_variant = "plain"

    def read_normalisation(self, vae):
        """Set mean and std from the VAE's config or, for FLUX.2, from its batch-norm statistics."""
        def per_channel(values):
            return torch.as_tensor(values, dtype=torch.float32, device=self.device).view(1, -1, 1, 1)
        config = vae.config
        if self.class_name == "AutoencoderKLFlux2":
            self.patch = config.patch_size[0]
            self.mean = per_channel(vae.bn.running_mean)
            self.std = per_channel((vae.bn.running_var.float() + config.batch_norm_eps).sqrt())
        elif config.get("latents_mean") is not None and config.get("latents_std") is not None:
            self.mean = per_channel(config.latents_mean)
            self.std = per_channel(config.latents_std) / (config.get("scaling_factor") or 1.0)
        else:
            self.mean, self.std = config.get("shift_factor") or 0.0, 1 / (config.get("scaling_factor") or 1.0)

    def __str__(self):
        scale = "mean and standard deviation per channel"
        if self.patch > 1:
            scale += ", in patches of 2x2"
        if not torch.is_tensor(self.mean):
            scale = f"scaling factor {1 / self.std:g}, shift {self.mean:g}"
        return (f"{self.class_name}, {self.parameters:,} parameters, factor {self.factor}, {self.latent_channels} "
                f"channels, {scale}")

    def describe_scale(self, latents):
        """A line with the standard deviation of latents, and a warning if their scale seems to be wrong. The range is
        from measurements (TAEF2: .77 to .85, Sana: .93 to 1.12) and publications: SD's factor was chosen to give 1, the
        statistics of SDXL's channels amount to .90. With each other's factor, they would have .72 and 1.26."""
        low, high, std = 0.75, 1.2, latents.std().item()
        line = f"latents   standard deviation {std:.2f}; {low} to {high} is usual"
        if low < std < high:
            return line
        if torch.is_tensor(self.std):
            return f"{line}\nwarning   the teacher's statistics per channel may be those of another VAE"
        factor = 1 / max(std * self.std, 1e-6)  # would give a standard deviation of 1
        name, near = min(FACTORS.items(), key=lambda item: abs(math.log(item[1] / factor)))
        likely = f"{near}, that of {name}, is likely" if low < near / factor < high else f"{factor:.3g} would give 1"
        return f"{line}\nwarning   the teacher's scaling factor, {1 / self.std:g}, may be wrong: {likely}"

    def differs(self, fingerprint):
        """By how much its latents of one picture differ from those that another teacher, or None, gave: 0 is equal."""
        if fingerprint is None or fingerprint.shape != self.fingerprint.shape:
            return math.inf
        return ((fingerprint - self.fingerprint).abs().mean() / fingerprint.std().clamp(min=1e-6)).item()

    def check_fit(self, variant="plain", **sides):
        """Fail unless a student of this variant, and images with these sides in pixels, suit this teacher."""
        if variant == "f32" and self.factor != 32:
            fail(f"--variant=f32: is for factor 32, the teacher's is {self.factor}; --variant=plain suits any")
        for name, side in sides.items():
            if side < 16 or side % self.multiple:
                fail(f"--{name}={side}: must be 16 or more and a multiple of {self.multiple} for this teacher")

    def diffusers_encode(self, images):
        output = self.vae.encode(images)
        return output.latent_dist.mode() if hasattr(output, "latent_dist") else output[0]  # .latent or .latents

    @torch.no_grad()
    def encode(self, images):
        """Images [N,3,H,W] in [0,1], sides multiples of `multiple` -> latents [N,latent_channels,H/factor,W/factor]."""
        low, high = self.image_range
        images = (images * (high - low) + low).to(self.device, self.dtype, memory_format=torch.channels_last)
        latents = (self.raw_encode(images.unsqueeze(2)).squeeze(2) if self.video else self.raw_encode(images)).float()
        return F.pixel_shuffle((F.pixel_unshuffle(latents, self.patch) - self.mean) / self.std, self.patch)

    @torch.no_grad()
    def decode(self, latents):
        """Latents [N,latent_channels,h,w] -> images [N,3,h*factor,w*factor] in [0,1]."""
        low, high = self.image_range
        latents = F.pixel_unshuffle(latents.to(self.device).float(), self.patch) * self.std + self.mean
        latents = F.pixel_shuffle(latents, self.patch).to(self.dtype, memory_format=torch.channels_last)
        images = (self.raw_decode(latents.unsqueeze(2)).squeeze(2) if self.video else self.raw_decode(latents)).float()
        return ((images - low) / (high - low)).clamp(0, 1)


# --- VAEs of diffusers -----------------------------------------------------------------------------------------------
def load_autoencoder(name, dtype):
    """A VAE of diffusers, from one of NAMES, a folder (of the VAE or of a whole pipeline), a hub id, or a file in the
    original layout. A VAE whose config says that it overflows in float16 (force_upcast) is loaded in float32."""
    import diffusers  # takes seconds, so it is imported only where it is needed
    written, file = f"--teacher={name}", ""
    where, _, subfolder = NAMES.get(name, name).partition("::")
    if where.endswith((".safetensors", ".ckpt", ".sft")):
        if not os.path.isfile(where):
            fail(f"{written}: no such file")
        if not subfolder and WAN_KEYS.intersection(load_file(where)):
            subfolder = "wan"
        if not subfolder:  # files of SD and SDXL, for example, differ in nothing but the scale of their latents
            fail(f"{written}: a file does not say how its latents are scaled; add ::sd, ::sdxl, ::sd3 or ::flux1, or "
                 f"::folder of the VAE's config.json")
        file, where, subfolder = where, CONFIGS.get(subfolder, subfolder), ""  # `where` is that of the config
    if os.path.isdir(where):
        if not subfolder and os.path.isfile(os.path.join(where, "vae", "config.json")):
            subfolder = "vae"  # a whole pipeline
        if not os.path.isfile(os.path.join(where, subfolder, "config.json")):
            fail(f"{written}: the folder holds no config.json, so it is not a diffusers VAE (of a taesd.py pair, name "
                 f"the encoder.pth itself)")
    elif not is_hub_id(where):
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0)[0]
        fail(f"{written}: no such folder and no known name (did you mean {near}?); it takes {', '.join(NAMES)}, a "
             f"diffusers folder, a hub id owner/repo, a .safetensors or .ckpt file, or a taesd.py pair's encoder.pth")
    else:
        download(written, where, f"{subfolder}/config.json".lstrip("/"))
    try:
        config = diffusers.AutoencoderKL.load_config(where, subfolder=subfolder or None)
        kind = config.get("_class_name")
        if dtype == torch.float16 and config.get("force_upcast", True):
            dtype = torch.float32
        if kind in VARIANTS and file:
            vae = getattr(diffusers, kind).from_single_file(file, config=f"{where}/{subfolder}".rstrip("/"))
            return torch.nn.Module.to(vae, dtype)
        if kind in VARIANTS:
            load = functools.partial(getattr(diffusers, kind).from_pretrained, where, subfolder=subfolder or None,
                                     torch_dtype=dtype, low_cpu_mem_usage=False)
            try:
                return load()
            except OSError as error:
                try:
                    return load(variant="fp16")  # some have nothing but diffusion_pytorch_model.fp16.safetensors
                except OSError:
                    raise error
    except Exception as error:  # weights are missing, cut off or do not fit; each library raises an error of its own
        fail(f"{written}: could not be loaded: {str(error)[:300]}")
    fail(f"{written}: its class is {kind}; supported are {', '.join(VARIANTS)} and taesd.py files")


def is_hub_id(name):
    return name.count("/") == 1 and name[0] not in "./~"


def download(written, repo, filename):
    """The path of a file of a hub repository, from the local cache or from the hub. Fails with the true reason, where
    diffusers would blame the file."""
    import huggingface_hub as hub
    for local in (True, False):
        try:
            if not local:
                hub.get_session().head(hub.constants.ENDPOINT, timeout=10)  # a download would retry for half a minute
            return hub.hf_hub_download(repo, filename, local_files_only=local)
        except Exception as error:
            reason = error
    fail(f"{written}: {filename} is not in the local cache and cannot be downloaded ({type(reason).__name__}: "
         f"{one_line(reason, 300)}); a local diffusers folder will do, too; a VAE in a subfolder is {repo}::vae; a "
         f"private or gated repository needs hf auth login")
