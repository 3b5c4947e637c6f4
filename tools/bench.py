"""Speed: train.py beside the training loop of seraena's TAESDXL notebook, on this machine, in this run, turn by turn.

    python -m tools.bench                                               # a VAE of SDXL's size, random weights
    python -m tools.bench --teacher=taef2_encoder.pth --data_dir=photos --crop=64 --batch_size=16
    python -m tools.bench --report=RESULTS-gpu.md --data_dir=photos     # all of a machine, in 25 minutes, as markdown

The reference is tools/reference.py. An image counts each time it is trained on; train.py trains on a crop --echo times,
so the rate of new images is given, too. Also printed is the floor: the time that a step's multiplications or memory
traffic need at the rates measured here.
"""
import statistics
import tempfile

import torch

from support.configure import configure, pick_device, require_positive, stop
from tools.bench_report import parse_shapes, write_report
from tools.measures import floor, random_sdxl, rates, time_ours, time_reference

# -----------------------------------------------------------------------------
# settings
teacher = "sdxl-random"    # a VAE of SDXL's size with random weights, on which speed does not depend; or as in train.py
data_dir = ""              # folder of images; '' = the bundled photographs
crop = 96                  # training crop in pixels
batch_size = 8             # crops a step
pairs = 5                  # times that each takes its turn
steps = 10                 # steps timed in a turn
warm_up = 70               # steps of train.py before these: its pool must fill; the reference takes 3
extra = ""                 # more flags for train.py alone, separated by spaces, for example --echo=1
reference_dtype = "auto"   # of the reference: auto (as in the notebook), or as train.py's --dtype
device = "auto"            # auto, cuda, mps or cpu
# the report; crop, batch_size, extra and reference_dtype are not for it
report = ""                # markdown file to write; pictures and logs go to a folder beside it
shapes = "32x96,16x256"    # batch x crop of the speeds
memory_shapes = "16x96,16x256,16x512"  # batch x crop whose peak memory is measured
train_teacher = "toy"      # teacher of the real run
train_minutes = 10.0       # of the real run
minutes = 25.0             # after so many, what is left is not begun
parts = ""                 # '' = all: machine,the_floor,speed,training,peak_memory,waits,resume,times_by_part,extras
# -----------------------------------------------------------------------------


def main():
    require_positive(globals(), "pairs", "steps", "warm_up", "batch_size", "crop", "minutes", "train_minutes")
    if report:
        if not report.endswith(".md"):
            stop(f"--report={report}: must end in .md")
        return write_report(report, {
            "teacher": teacher, "data_dir": data_dir, "device": device, "pairs": min(pairs, 2), "warm_up": warm_up,
            "steps": steps * (10 if torch.cuda.is_available() else 1),
            "shapes": parse_shapes("shapes", shapes), "memory_shapes": parse_shapes("memory_shapes", memory_shapes),
            "train_teacher": train_teacher, "train_minutes": train_minutes}, minutes, parts)
    place = pick_device(device)
    with tempfile.TemporaryDirectory() as folder:
        name = random_sdxl(folder) if teacher == "sdxl-random" else teacher
        print(f"torch {torch.__version__}, {place}, {torch.get_num_threads()} CPU threads; teacher {teacher}, {crop} "
              f"pixels, batch {batch_size}; images/s; a pair takes minutes on a CPU", flush=True)
        references, speeds = time_reference(name, data_dir, crop, batch_size, steps, place, reference_dtype), []
        for pair in range(pairs):
            reference = next(references)
            found = time_ours(name, data_dir, crop, batch_size, steps, warm_up, device, *extra.split())
            ours = found["images_per_second"]
            speeds.append((ours, reference, ours / reference))
            print(f"{pair + 1}: train.py {ours:.2f}, reference {reference:.2f}: {ours / reference:.2f} times "
                  f"(data wait {found['data_wait']:.0%}, peak {found['peak_memory_mb']} MB)", flush=True)
        ours, reference, times = map(statistics.median, zip(*speeds))
        print(f"median: train.py {ours:.2f}, reference {reference:.2f}: {times:.2f} times "
              f"(of images never seen before: {ours / found['echo']:.2f}, {reference:.2f})")
        operations_rate, bytes_rate = rates(place)
        print(f"rates here: {operations_rate / 1e12:.2f} T operations/s in a matrix product, {bytes_rate / 1e9:.1f} "
              f"GB/s in a copy")
        rows = floor(name, crop, batch_size, found["echo"], found["width"], operations_rate, bytes_rate)
        for part, operations, traffic, least in rows:
            print(f"floor of a step: {part:14} {operations:8.1f} G operations, {traffic:6.2f} GB, {least:7.1f} ms")
        least = sum(row[-1] for row in rows)
        print(f"train.py takes {1000 * batch_size / ours:.0f} ms a step, the floor is {least:.0f} ms: "
              f"{least * ours / batch_size / 1000:.0%} of it reached")


if __name__ == "__main__":
    configure(globals())
    main()
