"""Draw what log.jsonl holds: held-out figures over images seen, the teacher's own beside them, and the losses below."""
import json
import os

from support.configure import stop
from support.files import save_file

# key in log.jsonl: (what it is, whether its axis is logarithmic)
FIGURES = {"val_psnr": ("PSNR, dB", False), "val_ssim": ("SSIM", False), "val_sharpness": ("sharpness", False),
           "val_lowres_mse": ("low-res MSE", True), "val_latent_mse": ("latent MSE", True)}
NO_LOSSES = ("step", "images_seen", "images_per_second", "data_wait", "peak_memory_mb")


def read_records(out_dir):
    """(settings, figures of the teacher's round trip, what was logged since, in order of the images seen) of a run.
    What it did again after it was killed and resumed counts once; a line that was cut short counts nothing."""
    path, settings, goal, records = os.path.join(out_dir, "log.jsonl"), {}, {}, []
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.readlines()
    except (OSError, ValueError) as error:
        stop(f"{path}: not a readable log of a run ({' '.join(str(error).split())[:120]})")
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        settings, goal = record.get("settings", settings), record.get("teacher", goal)
        if "images_seen" in record:
            while records and records[-1]["images_seen"] > record["images_seen"]:
                records.pop()
            records.append(record)
    return settings, goal, records


def read_log(out_dir):
    """(figures of the teacher's round trip, {key: {images seen: value}}) of a run."""
    _, goal, records = read_records(out_dir)
    curves = {}
    for record in records:
        for key in record.keys() - set(NO_LOSSES):
            curves.setdefault(key, {})[record["images_seen"]] = record[key]
    return goal, curves


def draw_curves(out_dirs, path):
    """Write the curves of some runs over each other as one PNG."""
    from matplotlib.figure import Figure  # takes a second: not before a picture is due
    logs = [(out_dir, *read_log(out_dir)) for out_dir in out_dirs]
    losses = sorted({key for _, _, curves in logs for key in curves if not key.startswith("val_")})
    rows = 1 + -(-len(losses) // len(FIGURES))
    figure = Figure((20, 4 * rows))
    axes = figure.subplots(rows, len(FIGURES), squeeze=False).flatten()
    figure.subplots_adjust(left=0.04, right=0.99, top=1 - 0.1 / rows, bottom=0.16 / rows, wspace=0.3)
    wanted = FIGURES | {name: (f"loss: {name}", True) for name in losses}
    for ax, (key, (label, logarithmic)) in zip(axes, wanted.items()):
        for number, (out_dir, goal, curves) in enumerate(logs):
            values = curves.get(key, {})
            marker = "." if len(values) < 50 else ""
            ax.plot(list(values), list(values.values()), color=f"C{number}", label=out_dir, marker=marker)
            if key.removeprefix("val_") in goal and key in FIGURES:
                ax.axhline(goal[key.removeprefix("val_")], color=f"C{number}", linestyle="--", alpha=0.5)
            logarithmic = logarithmic and all(value > 0 for value in values.values())
        ax.set(title=label, yscale="log" if logarithmic else "linear")
        ax.grid(alpha=0.3)
    for ax in axes[len(wanted):]:
        ax.set_axis_off()
    axes[0].legend()
    figure.supxlabel("images seen (dashed: the teacher's own round trip)", y=0)
    save_file(path, lambda aside: figure.savefig(aside, format="png", dpi=80))
