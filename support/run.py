"""Around train.py's loop: rules of settings, start and resume, saving.

To change what is trained, or how, nothing here needs to be read. A setting without a rule needs no entry.
"""
import os
from types import SimpleNamespace

import torch

from model import VARIANTS
from recipes.published import FORMS, SCALINGS
from support.configure import require_positive, stop
from support.export import model_card, save_diffusers, save_taesd
from support.files import (DIFFUSERS_FILES, check_ours, checkpoint_paths, is_ours, load_checkpoint, load_student,
                           save_file)
from support.parallel import RANK, RANKS, gather
from support.report import profile_from, stop_not_finite
from teacher import NAMES

# -----------------------------------------------------------------------------
# settings

def one_of(*choices):
    return f"must be {', '.join(choices[:-1])} or {choices[-1]}"


def check(settings, rules):
    """rules: (name, whether it holds, what the rule is)."""
    for name, holds, rule in rules:
        if not holds:
            stop(f"--{name}={settings[name]}: {rule}")


def check_settings(settings):
    """Stop with one line at a setting that makes no sense, before anything is loaded."""
    require_positive(settings, "batch_size", "workers", "width", "log_interval", "eval_interval",
                     "eval_images", "learning_rate", "discriminator_lr")
    s = SimpleNamespace(**settings)
    judged = s.train_encoder and s.train_decoder and s.adversarial_weight > 0 and s.latent_noise == 0
    check(settings, [
        ("batch_size", s.batch_size % RANKS == 0, f"must be a multiple of {RANKS}, the processes that torchrun starts"),
        ("echo", s.echo >= 1, "must be 1 or more"),
        ("seed", s.seed < 2**32 - 1, "must be less than 2**32 - 1"),
        ("color_augment", s.color_augment <= 1, "must be between 0 and 1"),
        ("cooldown", s.cooldown <= 1, "must be between 0 and 1"),
        ("replay_size", s.replay_size == 0 or s.replay_size >= s.batch_size,
         f"must be 0 or at least the batch size, {s.batch_size}"),
        ("optimizer", s.optimizer in ("muon", "adam", "adamw"), one_of("muon", "adam", "adamw")),
        ("encoder_loss", s.encoder_loss in ("mse", "l1"), one_of("mse", "l1")),
        ("adversarial_form", s.adversarial_form in ("squares", *FORMS), one_of("squares", *FORMS)),
        ("adversarial_scaling", s.adversarial_scaling in ("none", *SCALINGS), one_of("none", *SCALINGS)),
        ("variant", s.variant in ("auto", *VARIANTS), one_of("auto", *VARIANTS)),
        ("max_iters", s.max_iters > 0 or s.init_from != "scratch",
         "must be more than 0, unless --init_from= names weights to start from, --init_from=donor for one"),
        ("train_decoder", s.train_encoder or s.train_decoder, "nothing is left to train: train_encoder is false, too"),
        ("encoder_adversarial_weight", s.encoder_adversarial_weight == 0 or judged,
         "needs train_encoder, train_decoder and adversarial_weight, and latent_noise=0; "
         "--encoder_adversarial_weight=0 turns it off"),
        ("profile", s.profile == 0 or s.profile + profile_from(s) <= s.max_iters,
         f"begins {profile_from(s)} steps after the start; raise --max_iters"),
    ])


def check_losses(settings, pixel_losses):
    """The rules that depend on which pixel losses there are, {name: (weight, function)}."""
    pixels = any(weight > 0 for weight, _ in pixel_losses.values()) or not settings["train_decoder"]
    check(settings, [
        ("adversarial_weight", settings["adversarial_weight"] > 0 or pixels,
         "the decoder has no loss: all of its weights are 0"),
        ("adversarial_start", settings["adversarial_start"] == 0 or pixels,
         "until then the decoder has no loss: the weights of the pixels' are all 0; --mse_weight=1 is one"),
        ("adversarial_scaling", settings["adversarial_scaling"] != "adaptive" or pixels,
         "adaptive needs a pixel loss to adapt to: all of their weights are 0"),
    ])


def check_fit(settings, vae, checkpoint):
    """The rules that depend on the teacher. Returns the student's variant, and settles it in `settings`."""
    if settings["variant"] == "auto":
        settings["variant"] = checkpoint["shape"]["variant"] if checkpoint else vae.student_variant
    rule = f"must be 16 or more and a multiple of {vae.multiple} for this teacher"
    check(settings, [
        ("crop", settings["crop"] >= 16 and settings["crop"] % vae.multiple == 0, rule),
        ("eval_size", settings["eval_size"] >= 16 and settings["eval_size"] % vae.multiple == 0, rule),
        ("variant", settings["variant"] != "f32" or vae.factor == 32,
         f"is for factor 32, the teacher's is {vae.factor}; --variant=plain suits any"),
    ])
    return settings["variant"]


# -----------------------------------------------------------------------------
# start and resume

class Progress(SimpleNamespace):
    """Counters and lists that a checkpoint keeps, as attributes: add one where train.py makes it."""


MEMORIES_OF = ("teacher", "data_dir", "window")  # what pool and replay hold depends on these
OF_EACH = ("pool", "replay", "rng", "device_rng")  # what each process has of its own


def open_run(settings, by_file, by_flag):
    """The checkpoint that init_from names, or None from scratch. `settings` take over what it brings, except what files
    of settings or flags say."""
    init_from, out_dir = settings["init_from"], settings["out_dir"]
    checkpoint, brought, smaller = None, {}, {}
    if os.path.exists(out_dir) and not os.path.isdir(out_dir):
        stop(f"--out_dir={out_dir}: is a file; choose a folder, which need not exist yet")
    check_ours(os.path.join(out_dir, "diffusers"), DIFFUSERS_FILES)  # which is written only after many steps
    if init_from == "resume":
        checkpoint = load_checkpoint(out_dir, set_aside=RANK == 0)
        brought = {name: 0.0 for name in settings if name.endswith("_weight")}  # of terms that are newer than the run
        brought |= {name: value for name, value in checkpoint["settings"].items()
                    if name in settings and name not in ("out_dir", "init_from", "profile")}
        for name in ("crop", "width", "optimizer"):
            asked = (by_file | by_flag).get(name, brought.get(name))
            if asked != brought.get(name):
                stop(f"--{name}={asked}: a resumed run keeps its {name}, {brought.get(name)}; to change it, start a "
                     f"new run with --init_from={out_dir} and its own --out_dir")
    elif any(map(os.path.exists, checkpoint_paths(out_dir))):
        stop(f"--out_dir={out_dir}: holds a run already; --init_from=resume goes on with it, another --out_dir starts "
             f"a new one")
    elif init_from != "scratch":
        checkpoint = load_student(init_from)
        brought = {"width": checkpoint["shape"]["width"], "teacher": checkpoint.get("settings", settings)["teacher"]}
        smaller = {"learning_rate": 1e-4}  # what is learned already is lost in larger steps: a recipe's are for scratch
        checkpoint["rate_from_scratch"] = settings["learning_rate"]  # for support/donor.py
    settings |= brought | by_file | smaller | by_flag
    for name in ("teacher", "data_dir", "val_dir"):  # so that sample.py and resume may be called from another folder
        if settings[name] not in NAMES and os.path.exists(settings[name]):
            settings[name] = os.path.abspath(settings[name])
    return checkpoint


def restore(checkpoint, parts, progress, settings, shape, device):
    """Load into `parts` and `progress` what the checkpoint holds: all of a run's, or the weights that a new one starts
    from. Stops with one line where it does not fit."""
    init_from, out_dir = settings["init_from"], settings["out_dir"]
    resume, source = init_from == "resume", f"--init_from={init_from}"
    if checkpoint["shape"] != shape:
        stop(f"{source}: its student is {checkpoint['shape']}, this run asks for {shape}")
    if resume and (lacking := {"step", *parts, "rng", "device_rng"} - checkpoint.keys()):
        stop(f"{source}: the checkpoint in {out_dir} is of another version, it lacks {', '.join(sorted(lacking))}; "
             f"--init_from={out_dir} and a new --out_dir start from its weights")
    stale = [name for name in MEMORIES_OF if resume and checkpoint["settings"][name] != settings[name]]
    processes = checkpoint.get("processes", [{}])
    if resume and len(processes) != RANKS:
        stale.append(f"number of processes ({RANKS}, they were {len(processes)})")
    elif resume:
        checkpoint |= processes[RANK]
    if stale:
        print(f"memories  pool and replay buffer start afresh: another {', '.join(stale)}")
        checkpoint |= {"pool": None, "replay": None, "due": 0.0}
    averages, loaded = {"encoder": "ema_encoder", "decoder": "ema_decoder"}, []  # a new run starts from the better ones
    for name, part in parts.items():
        state = checkpoint.get(name if resume else averages.get(name, name))
        if not state or not (resume or isinstance(part, torch.nn.Module)):
            continue  # others' weights may be half a student, without D; a scaler that was off has no state
        if name == "discriminator" and not resume and shapes_of(state) != shapes_of(part.state_dict()):
            continue  # a fork with another D may start from our students, with a fresh D
        try:
            part.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            stop(f"{source}: its {name} does not fit ({' '.join(str(error).split())[:200]}); --init_from={out_dir} and "
                 f"a new --out_dir start from its student")
        loaded.append(name)
    if resume:
        if checkpoint["step"] >= settings["max_iters"]:
            stop(f"--max_iters={settings['max_iters']}: the run in {out_dir} has done {checkpoint['step']} steps; "
                 f"raise --max_iters to go on")
        for name in vars(progress).keys() - {"ready"}:  # a counter that is newer than the run starts at its default
            setattr(progress, name, checkpoint.get(name, getattr(progress, name)))
        set_random_state(checkpoint, device)
        if len(processes) != RANKS:
            torch.manual_seed(settings["seed"] + checkpoint["step"] + RANK)
            progress.batches_read = progress.batches_read * len(processes) // RANKS  # each process's
        print(f"resume    {out_dir}, after step {progress.step:,}")
    else:
        names = ", ".join(name for name in loaded if not name.startswith("ema"))
        print(f"weights   {names} of {init_from}; losses and optimizer are those of this command")
        if set(progress.ready) <= set(checkpoint["ready"]):  # others' count as an average at its full length
            progress.images_averaged = checkpoint.get("images_averaged", 10 * settings["ema_halflife"])
    trained = progress.ready if settings["max_iters"] else []
    progress.ready = sorted({*trained, *checkpoint["ready"]})


def random_state(device):
    """Of the CPU and, if it is another, of the device: cuda, mps, ..."""
    on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()
    return {"rng": torch.get_rng_state(), "device_rng": on_device}


def set_random_state(state, device):
    torch.set_rng_state(state["rng"])
    if state["device_rng"] is not None and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device_rng"])


def shapes_of(state):
    return {name: weight.shape for name, weight in state.items()}


def save_run(settings, shape, parts, progress, held_out):
    """Everything that resume and sample.py need, then the averaged weights in the formats that others load. Stops, and
    leaves what was saved before, if a weight is not finite."""
    out_dir = settings["out_dir"]
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module) and not all(weight.isfinite().all() for weight in part.parameters()):
            stop_not_finite(settings, progress.step, f"a weight of {name} is not finite")
    state = {"settings": settings, "shape": shape, "teacher": held_out.about} | vars(progress)
    state |= {"held_out": (held_out.real * 255).round().byte()}
    state |= {name: part.state_dict() for name, part in parts.items()}
    state |= random_state(held_out.real.device)
    if RANKS > 1:
        states = gather({name: state[name] for name in OF_EACH})
        if RANK:
            return
        state["processes"] = [{name: state[name] for name in OF_EACH}, *states[1:]]
    path, previous = checkpoint_paths(out_dir)
    save_file(path, lambda aside: torch.save(state, aside), keep=previous)
    for half in progress.ready:
        save_taesd(os.path.join(out_dir, f"taesd_{half}.pth"), parts[f"ema_{half}"])
    folder = os.path.join(out_dir, "diffusers")
    if not is_ours(folder, DIFFUSERS_FILES):  # since the start of the run: no reason to end it
        print(f"{folder}: left as it is, for it holds files that are not of this program")
    elif len(progress.ready) == 2 and shape["variant"] == "plain":  # AutoencoderTiny can express no other
        save_diffusers(folder, parts["ema_encoder"], parts["ema_decoder"], card=model_card(state))
