"""Starts a run from a checkpoint or from weights in any format, and saves it."""
import math
import os
import sys

import torch

from model import Decoder, Encoder
from support.checks import check_settings
from support.config import fail, one_line
from support.device import RANK, explain_out_of_memory
from support.donor import init_from_donor
from support.export import model_card, save_diffusers, save_taesd
from support.files import load_file, load_pair, save_file
from teacher import NAMES, download, is_hub_id

BUNDLED_DONOR = os.path.join(os.path.dirname(__file__), "..", "assets", "donor", "taesd_encoder.pth")
TINY_WEIGHTS = "diffusion_pytorch_model.safetensors"  # of an AutoencoderTiny folder
FINE_TUNING_RATE = 2e-4  # higher learning rates are for training from scratch
OTHER_TEACHER = 0.03  # if latents of one picture differ by more; rounding to bfloat16 makes less than .01


# --- reading ---------------------------------------------------------------------------------------------------------
def checkpoint_paths(out_dir):
    """Of a run's last checkpoint, and of the one before."""
    return os.path.join(out_dir, "ckpt.pt"), os.path.join(out_dir, "ckpt_previous.pt")


def load_checkpoint(out_dir):
    """Read a run's last checkpoint, or the one before if the last is missing or damaged."""
    path, previous = checkpoint_paths(out_dir)
    if not os.path.isfile(path) and not os.path.isfile(previous):
        fail(f"--out_dir={out_dir}: no such file as {path}, so there is no run here yet")
    try:
        checkpoint = load_file(path)
    except SystemExit as error:
        if not os.path.isfile(previous):
            raise
        print(f"{str(error).removeprefix('error: ')}; going back to {previous}", file=sys.stderr)
        checkpoint, path = load_file(previous), previous
    if not isinstance(checkpoint, dict) or not {"settings", "shape", "exportable"} <= checkpoint.keys():
        fail(f"{path}: not a checkpoint of this version of train.py; name a weights file beside it, taesd_decoder.pth")
    return checkpoint


def load_student(source, flag="--init_from"):
    """The weights of a student: of a run's out_dir; of a weights file in taesd.py's or diffusers' layout, together with
    its other half if that lies beside it; of an AutoencoderTiny, a folder or a hub id; or of the bundled one, `donor`.

    Returns what load_checkpoint does; for others than runs only "shape", "exportable" and the halves that there are."""
    if any(map(os.path.isfile, checkpoint_paths(source))):
        return load_checkpoint(source)
    path = BUNDLED_DONOR if source == "donor" else source
    if os.path.isdir(source):
        path = os.path.join(source, TINY_WEIGHTS)
    elif not os.path.isfile(path):
        if not is_hub_id(source) or source.endswith((".pth", ".safetensors")):
            fail(f"{flag}={source}: no such weights; it takes donor, a run's out_dir, a taesd.py .pth file, a "
                 f".safetensors file, an AutoencoderTiny folder or a hub id owner/repo")
        path = download(f"{flag}={source}", source, TINY_WEIGHTS)
    halves = load_pair(path)
    shapes = [shape for _, shape in halves.values()]
    if shapes[0] != shapes[-1]:
        fail(f"{source}: encoder and decoder differ: {shapes[0]} and {shapes[1]}")
    weights = {f"ema_{half}": network.state_dict() for half, (network, _) in halves.items()}
    return {"shape": shapes[0], "exportable": list(halves)} | weights


def build_student(checkpoint):
    """{"encoder": network, "decoder": network} of what load_student returned, without a half that is not exportable."""
    networks = {}
    for half, build in (("encoder", Encoder), ("decoder", Decoder)):
        if half in checkpoint["exportable"]:
            networks[half] = build(**checkpoint["shape"])
            networks[half].load_state_dict(checkpoint[f"ema_{half}"])
    return networks


# --- starting, for train.py ------------------------------------------------------------------------------------------
def open_run(settings):
    """Check the settings, and read the checkpoint that init_from names. Returns None from scratch."""
    explain_out_of_memory(settings)
    check_settings(settings)
    init_from, out_dir = settings["init_from"], settings["out_dir"]
    for name in ("teacher", "data_dir", "val_dir"):  # so that sample.py may be called from another folder
        path = settings[name].partition("::")[0]  # of a file, the name of its configuration follows
        if path not in NAMES and os.path.exists(path):
            settings[name] = settings[name].replace(path, os.path.abspath(path), 1)
    if init_from == "resume":
        checkpoint = load_checkpoint(out_dir)
        if checkpoint["step"] >= settings["max_iters"]:
            fail(f"--max_iters={settings['max_iters']}: the run in {out_dir} has done {checkpoint['step']} steps; "
                 f"raise --max_iters to go on")
        settings["init_from"] = checkpoint["settings"]["init_from"]  # what is recorded is how the run began
        return checkpoint
    if any(map(os.path.isfile, checkpoint_paths(out_dir))):
        fail(f"--out_dir={out_dir}: holds a run already; --init_from=resume goes on with it, another --out_dir starts "
             f"a new one")
    return None if init_from == "scratch" else load_student(init_from)


def start_from(checkpoint, parts, init_from, vae, images, settings, autocast):
    """Load what open_run returned into `parts`, {name: network, optimizer or scaler}: a run's whole state to resume it,
    or the weights that a new run starts from. Returns (step, images seen, halves of the student that are loaded)."""
    if init_from != "resume":
        load_weights(checkpoint, parts, vae, images, settings, autocast)
        return 0, 0, checkpoint["exportable"]
    out_dir = settings["out_dir"]
    for name, part in parts.items():
        try:
            if checkpoint[name]:  # a scaler that is not in use has no state
                part.load_state_dict(checkpoint[name])
        except (RuntimeError, ValueError, KeyError) as error:
            fail(f"--init_from=resume: the {name} of {out_dir} does not fit ({one_line(error, 200)}); to go on with "
                 f"other settings, run python train.py {out_dir}/settings.py --init_from={out_dir} --out_dir=another")
    print(f"resume    {out_dir}, after step {checkpoint['step']:,}")
    before = checkpoint["settings"]["max_iters"]
    if before < settings["max_iters"] and checkpoint["step"] > (1 - settings["cooldown"]) * before:
        print(f"note      with {settings['max_iters']:,} steps instead of {before:,}, the learning rates rise again")
    difference = vae.differs(checkpoint.get("fingerprint"))
    if OTHER_TEACHER < difference < math.inf:
        print(f"warning   the teacher gives other latents than when this run was saved (by {difference:.0%} of their "
              f"standard deviation), so its files have changed; another --out_dir= starts anew")
    torch.manual_seed(settings["seed"] + checkpoint["step"])
    return checkpoint["step"], checkpoint["images_seen"], checkpoint["exportable"]


def load_weights(checkpoint, parts, vae, images, settings, autocast):
    """Load averaged weights. From a student of another teacher, the layers next to the latents are solved."""
    source, width = f"--init_from={settings['init_from']}", checkpoint["shape"]["width"]
    if width != settings["width"]:
        fail(f"{source}: its student has a width of {width} and keeps it; add --width={width}")
    try:
        student = build_student(checkpoint)
    except Exception as error:  # a fork's weights, for example
        fail(f"{source}: its student does not fit Encoder and Decoder ({one_line(error, 200)})")
    networks = {half: parts[half] for half in student}
    same_teacher = vae.differs(checkpoint.get("fingerprint")) < OTHER_TEACHER
    known = init_from_donor(student, networks, same_teacher, vae, images, settings, autocast)
    for half, network in networks.items():
        parts[f"ema_{half}"].load_state_dict(network.state_dict())
    if known:
        state, fresh = checkpoint.get("discriminator", {}), parts["discriminator"].state_dict()
        fits = {name: w.shape for name, w in state.items()} == {name: w.shape for name, w in fresh.items()}
        if fits:  # weights files have no discriminator, and a fork may have changed its own
            parts["discriminator"].load_state_dict(state)
        print(f"weights   {settings['init_from']}; the optimizers{'' if fits else ' and D'} start afresh")
        if settings["learning_rate"] > FINE_TUNING_RATE:
            print(f"note      a learning_rate of {settings['learning_rate']:g} is for training from scratch and can "
                  f"spoil these weights; --learning_rate=1e-4 is usual for fine-tuning")


# --- saving ----------------------------------------------------------------------------------------------------------
def save_checkpoint(checkpoint, networks, out_dir):
    """Write ckpt.pt and keep the one before, then the averaged weights in the formats that other programs load. Fails,
    and keeps what was saved before, if a weight is not finite."""
    for name, network in networks.items():
        if not all(weight.isfinite().all() for weight in network.parameters()):
            fail_not_finite(checkpoint["settings"], checkpoint["step"], f"a weight of the {name}")
    if RANK:
        return
    path, previous = checkpoint_paths(out_dir)
    save_file(path, lambda temporary: torch.save(checkpoint, temporary), keep=previous)
    student = {half: networks[f"ema_{half}"] for half in checkpoint["exportable"]}
    for half, network in student.items():
        save_taesd(os.path.join(out_dir, f"taesd_{half}.pth"), network)
    save_diffusers(os.path.join(out_dir, "diffusers"), student, checkpoint["shape"], card=model_card(checkpoint))


def fail_not_finite(settings, step, what):
    fail(f"step {step}: {what} is not finite. Checkpoints in {settings['out_dir']} are from before; go on with "
         f"--init_from=resume and a smaller --learning_rate, or --dtype=float32")
