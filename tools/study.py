"""Rows of RESULTS.md, made again: runs of train.py, one for each row and seed; their figures, mean ± deviation.

    python -m tools.study                                                 # which rows there are, and how long they take
    python -m tools.study --rows=default,l1 --flags="--teacher=taef2_encoder.pth --data_dir=pictures --val_dir=val"

A run that is in out_dir is not made again and one that was stopped goes on, so a row may be added later. Minutes are
those of training, without evaluations: as in RESULTS.md only on one core with nothing else at work (OMP_NUM_THREADS=1).
"""
import math
import os
import shlex
import statistics
import subprocess
import sys

from support.configure import configure, stop
from support.curves import read_records
from support.files import checkpoint_paths
from tools.measures import HERE

# -----------------------------------------------------------------------------
# settings
rows = ""                  # names of rows, with commas between; '' = list them
seeds = "0,1,2"            # with commas between
flags = ""                 # of train.py, for every row: teacher, data, ...
out_dir = "study"          # of the runs, as row-seed; one folder for one set of flags
# -----------------------------------------------------------------------------

TRACK = "recipes/hour.py"  # TAEF2, plain, batch 4; evaluated on 29 squares of 256 pixels
SMALL = "--crop=64"  # what ten minutes are enough for
SIXTEEN = f"{SMALL} --batch_size=16 --learning_rate=1e-3"
BEFORE = f"{SIXTEEN} --matching_weight=0"  # of tables older than feature matching
GROUPS = [  # (minutes of one EPYC core without AMX, flags beside the track's, {row: its own})
    (75, "", {"track": ""}),
    (26, f"{SMALL} --max_iters=3000 --eval_interval=600", {"track-64": ""}),
    (10, f"{SMALL} --train_encoder=false --max_iters=1600 --eval_interval=800", {
        "decoder": "", "no-window": "--window=0",
        "matching-0": "--matching_weight=0", "matching-0.3": "--matching_weight=0.3",
        "matching-1": "--matching_weight=1", "matching-3": "--matching_weight=3",
        "matching-10": "--matching_weight=10", "matching-10-no-mse": "--matching_weight=10 --mse_weight=0"}),
    (9, f"{SIXTEEN} --train_encoder=false --max_iters=400 --eval_interval=200", {
        "sixteen": "", "sixteen-matching-0": "--matching_weight=0", "sixteen-matching-1": "--matching_weight=1"}),
    (55, f"{BEFORE} --max_iters=2000", {"hour": ""}),
    (11, f"{BEFORE} --max_iters=400 --eval_interval=200", {
        "default": "", "no-features": "--encoder_feature_weight=0", "l1-features": "--encoder_loss=l1",
        "l1": "--encoder_loss=l1 --encoder_feature_weight=0"}),
    (10, f"{BEFORE} --eval_interval=90", {
        "width-16": "--width=16 --max_iters=840", "width-32": "--width=32 --max_iters=650",
        "width-96": "--width=96 --max_iters=180"}),
    (31, f"{BEFORE} --max_iters=1100 --eval_interval=220", {"full": "", "full-gn": "--variant=midblock_gn"}),
    (22, f"{BEFORE} --crop=48 --width=32 --max_iters=2500 --eval_interval=250", {
        "half": "", "half-no-augment": "--color_augment=0", "half-no-cooldown": "--cooldown=0",
        "half-unit": "--adversarial_scaling=unit", "half-gn": "--variant=midblock_gn",
        "half-judged": "--encoder_adversarial_weight=0.1", "half-late": "--adversarial_start=200",
        "half-late-no-window": "--adversarial_start=200 --window=0",
        "half-late-adam": "--adversarial_start=200 --optimizer=adam",
        "half-late-no-mse": "--adversarial_start=200 --mse_weight=0",
        "half-late-no-lowres": "--adversarial_start=200 --lowres_weight=0",
        "half-late-no-replay": "--adversarial_start=200 --replay_size=0",
        "half-late-strong": "--adversarial_start=200 --adversarial_weight=3"}),
]
ROWS = {name: (about, f"{shared} {own}") for about, shared, rows in GROUPS for name, own in rows.items()}
FIGURES = {"psnr": "PSNR dB", "ssim": "SSIM", "lowres_mse": "low-res MSE", "sharpness": "sharpness",
           "latent_mse": "latent MSE", "teacher_psnr": "teacher's picture, dB", "teacher_lowres_mse": "its low-res MSE"}
FINISH = {"A": {"psnr": 23.8, "ssim": 0.77, "sharpness": 0.45}, "B": {"psnr": 24.8, "ssim": 0.81, "sharpness": 0.77}}


def made(path, row, seed):
    """What a run logged at its evaluations; it is made first, or goes on, where it is not at its end."""
    def at_its_end():
        settings, _, records = read_records(path)
        return bool(records) and records[-1]["step"] == settings["max_iters"] and "val_psnr" in records[-1]
    resume = any(map(os.path.exists, checkpoint_paths(path)))
    arguments = [os.path.join(HERE, TRACK), *shlex.split(ROWS[row][1]), f"--seed={seed}", *shlex.split(flags)]
    command = [sys.executable, os.path.join(HERE, "train.py"), f"--out_dir={path}"]
    if not resume or not at_its_end():
        failed = subprocess.run(command + (["--init_from=resume"] if resume else arguments)).returncode
        if failed or not at_its_end():
            stop(f"{path}: this run is not at its end; the same command goes on")
    return [record for record in read_records(path)[2] if "val_psnr" in record]


def minutes(record):
    return record["images_seen"] / max(record["images_per_second"], 1e-9) / 60  # at a start from weights 0 of both


def finish(records, line):
    """Minutes to the first evaluation that reaches all figures of a finish line; nan where none does."""
    reached = (minutes(record) for record in records
               if all(record[f"val_{name}"] >= least for name, least in FINISH[line].items()))
    return next(reached, math.nan)


def cell(values):
    """Mean ± standard deviation of those values that are numbers, and how many are."""
    numbers = [value for value in values if math.isfinite(value)]
    if not numbers:
        return ""
    mean, digits = statistics.mean(numbers), 4 if max(numbers) < 0.1 else 3 if max(numbers) < 2 else 2
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{mean:.{digits}f}{spread}" + (f" ({len(numbers)} of {len(values)})" if len(numbers) < len(values) else "")


def main():
    wanted, numbers = [name for name in rows.split(",") if name], seeds.split(",")
    if not all(number.isdigit() for number in numbers):
        stop(f"--seeds={seeds}: must be whole numbers with commas between, for example 0,1,2")
    try:
        shlex.split(flags)
    except ValueError as error:
        stop(f"--flags={flags}: cannot be split ({error})")
    for name in wanted:
        if name not in ROWS:
            stop(f"--rows={name}: must be of {', '.join(ROWS)}")
    if not wanted:
        for name, (about, arguments) in ROWS.items():
            print(f"{name:16} about {about:3} minutes a seed: {TRACK} {arguments}")
        return
    lines = [*FIGURES.values(), *(f"minutes to {line}" for line in FINISH), "minutes"]
    table = [f"| row, seeds {seeds} | {' | '.join(lines)} |", "|---" * (len(lines) + 1) + "|"]
    for name in wanted:
        runs = [made(os.path.join(out_dir, f"{name}-{seed}"), name, seed) for seed in numbers]
        cells = [cell([run[-1].get(f"val_{figure}", math.nan) for run in runs]) for figure in FIGURES]
        cells += [cell([finish(run, line) for run in runs]) for line in FINISH]
        cells += [cell([minutes(run[-1]) for run in runs])]
        table.append(f"| {name} | {' | '.join(cells)} |")
        print(*table, sep="\n", flush=True)


if __name__ == "__main__":
    configure(globals())
    main()
