"""VAEs of diffusers from a folder, a file in the original layout, or the Hugging Face hub."""
import os

import torch

from support.configure import stop


def load_autoencoder(where, supported, dtype, named):
    """A diffusers VAE of one of the `supported` classes; named: what the user wrote, for errors.

    where: a folder, of the VAE or of a pipeline; a hub id, `owner/repo` or `owner/repo::subfolder`; or a file in the
    original layout, `vae.safetensors::folder` (of its config.json; '' = diffusers looks it up). Where the VAE's config
    says that it overflows in float16 (force_upcast), it is loaded as float32. Stops with one line if it cannot be had.
    """
    import diffusers
    where, _, subfolder = where.partition("::")
    single = where.endswith((".safetensors", ".ckpt", ".sft"))
    if single:
        if not os.path.isfile(where):
            stop(f"{named}: no such file")
    elif os.path.isdir(where):
        if not subfolder and os.path.isfile(os.path.join(where, "vae", "config.json")):
            subfolder = "vae"  # a whole pipeline
        if not os.path.isfile(os.path.join(where, subfolder, "config.json")):
            stop(f"{named}: the folder holds no config.json, so it is not a diffusers VAE (of a taesd.py pair, name "
                 f"the encoder.pth itself)")
    else:
        check_hub(named, where, f"{subfolder}/config.json".lstrip("/"))
    try:
        if single:
            vae = diffusers.AutoencoderKL.from_single_file(where, config=subfolder or None)
            return vae if overflows(vae.config, dtype) else torch.nn.Module.to(vae, dtype)
        config = diffusers.AutoencoderKL.load_config(where, subfolder=subfolder or None)
        kind = config.get("_class_name")
        if overflows(config, dtype):
            dtype = torch.float32
        if kind in supported:
            return getattr(diffusers, kind).from_pretrained(where, subfolder=subfolder or None, torch_dtype=dtype,
                                                            low_cpu_mem_usage=False)
    except Exception as error:  # missing, cut off or mismatched weights: each library layer raises its own type
        stop(f"{named}: could not be loaded: {str(error)[:300]}")
    stop(f"{named}: its class is {kind}; supported are {', '.join(supported)} and taesd.py files")


def overflows(config, dtype):
    """Does the VAE say of itself that it needs more than float16?"""
    return dtype == torch.float16 and config.get("force_upcast", True)


def is_hub_id(name):
    return name.count("/") == 1 and name[0] not in "./~"


def check_hub(named, repo, filename):
    """Stop with a true reason if a file is neither cached nor on a hub in reach (diffusers would blame the file)."""
    import huggingface_hub as hub
    try:
        hub.hf_hub_download(repo, filename, local_files_only=True)
        return
    except Exception:  # not in the cache, or not even a repository's name
        pass
    try:
        hub.get_session().head(hub.constants.ENDPOINT, timeout=10)  # hf_hub_download would retry for half a minute
    except Exception as error:
        stop(f"{named}: not in the local cache, and {hub.constants.ENDPOINT} could not be reached "
             f"({type(error).__name__}); a local diffusers folder will do, too, and --teacher=toy needs no network")
    try:
        hub.hf_hub_download(repo, filename)
    except Exception as error:  # no such repository, gated, or its VAE in a subfolder
        stop(f"{named}: {type(error).__name__} for {filename}: {error} (a VAE in a subfolder: {repo}::vae; a private "
             f"or gated repository: hf auth login)")
