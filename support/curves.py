"""Draws what log.jsonl holds: metrics and losses over the images seen, with the teacher's own metrics dashed."""
import json
import os

from support.config import fail, one_line
from support.files import save_file

# name in log.jsonl: (title, whether the axis is logarithmic)
METRICS = {"val_psnr": ("PSNR, dB", False), "val_ssim": ("SSIM", False), "val_sharpness": ("sharpness", False),
           "val_lowres_mse": ("low-res MSE", True), "val_latent_mse": ("latent MSE", True)}
NOT_LOSSES = {"step", "images_seen", "images_per_second", "data_wait", "peak_memory_mb"}


def read_log(out_dir):
    """(metrics of the teacher, {name: {images seen: value}}) of a run. Steps that were repeated after a kill count
    once, and a line that was cut short is ignored."""
    path, teacher_metrics, curves = os.path.join(out_dir, "log.jsonl"), {}, {}
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.readlines()
    except (OSError, ValueError) as error:
        fail(f"{path}: not a readable log of a run ({one_line(error, 120)})")
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        teacher_metrics = record.get("teacher", teacher_metrics)
        if "images_seen" in record:
            for name in record.keys() - NOT_LOSSES:
                curves.setdefault(name, {})[record["images_seen"]] = record[name]
    return teacher_metrics, {name: dict(sorted(values.items())) for name, values in curves.items()}


def draw_curves(out_dirs, path):
    """Write the curves of several runs as one PNG."""
    from matplotlib.figure import Figure  # takes a second, so it is imported only when a figure is drawn
    logs = [(out_dir, *read_log(out_dir)) for out_dir in out_dirs]
    losses = sorted({name for _, _, curves in logs for name in curves if not name.startswith("val_")})
    titles = METRICS | {name: (f"loss: {name}", True) for name in losses}
    rows = 1 + -(-len(losses) // len(METRICS))
    figure = Figure((20, 4 * rows), layout="constrained")
    axes = figure.subplots(rows, len(METRICS), squeeze=False).flatten()
    for ax, (name, (title, logarithmic)) in zip(axes, titles.items()):
        for number, (out_dir, teacher_metrics, curves) in enumerate(logs):
            values, color = curves.get(name, {}), f"C{number}"
            ax.plot(list(values), list(values.values()), color=color, label=out_dir, marker=".")
            if name in METRICS and name.removeprefix("val_") in teacher_metrics:
                ax.axhline(teacher_metrics[name.removeprefix("val_")], color=color, linestyle="--", alpha=0.5)
            logarithmic = logarithmic and all(value > 0 for value in values.values())
        ax.set(title=title, yscale="log" if logarithmic else "linear")
    for ax in axes[len(titles):]:
        ax.set_axis_off()
    axes[0].legend()
    figure.supxlabel("images seen (dashed: the teacher's own pictures)")
    save_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=80))
