"""Training crops from a folder of images; without one, from thirty bundled photographs.

The only file that opens images. Batches leave here as uint8 RGB, NCHW; batch k is a pure function of (seed, k).

    python data.py --data_dir=photos --out=photos.pack   # decode every image once; then train.py --data_dir=photos.pack
"""
import math
import os
import sys
import threading
import warnings
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps

from support.colors import in_srgb, resizable
from support.configure import configure, require_positive, stop
from support.packs import Pack, is_pack, write_pack

# -----------------------------------------------------------------------------
# settings of `python data.py`
data_dir = ""              # folder of images, searched recursively
out = ""                   # the pack: write the images of data_dir here, decoded
longest = 768              # longest side of a packed image in pixels: larger ones are made smaller
workers = 4                # threads that read images for a pack
# -----------------------------------------------------------------------------

warnings.filterwarnings("ignore", module="PIL")  # one for every odd file: those that cannot be read are named below

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
SMALLEST = 16  # pixels of the shorter side of an image that is used
HELD_OUT = 0.05  # share of a folder that is never trained on
PHOTOS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "photos")  # to try things out; val/ in it


class Images:
    """A folder of images, or the bundled photographs where `folder` is ''. Held-out files are chosen by the CRC of
    their name, so that the split stays when files are added. `val_folder`: its images are held out instead.

    Unreadable files are reported once, then skipped; more of them than readable ones stop the program.
    """
    def __init__(self, folder="", val_folder=""):
        self.bundled = not folder
        folder, val_folder = folder or PHOTOS, val_folder or os.path.join(PHOTOS, "val") * self.bundled
        self.bad, self.lock = {}, threading.Lock()  # path: why it cannot be read
        self.bad_held_out = 0
        self.packs = [Pack(each) for each in (folder, val_folder) if is_pack(each)]
        self.train = find_images(folder)
        self.val = [val_folder] if os.path.isfile(val_folder) else find_images(val_folder) if val_folder else []
        if not self.val:
            crc = {path: name_crc(path, folder) for path in self.train}
            threshold = max(HELD_OUT * 2**32, min(crc.values()))  # at least one
            self.val = [path for path in self.train if crc[path] <= threshold]
        held_out = set(map(os.path.realpath, self.val))  # a val_folder may lie inside folder, or be linked into it
        self.train = [path for path in self.train if os.path.realpath(path) not in held_out]
        names = set(map(os.path.basename, self.val)) if is_pack(folder) and val_folder else set()
        if twins := [path for path in self.train if os.path.basename(path) in names]:
            print(f"warning: {folder} may hold held-out images: {len(twins)} of its names are also in {val_folder}, "
                  f"for example {os.path.basename(twins[0])}", file=sys.stderr)
        self.val.sort(key=lambda path: name_crc(path, val_folder or folder))  # as good as shuffled, the same everywhere
        if not self.train:
            stop(f"--data_dir={folder}: nothing to train on: at least two images are needed, one of them is held out")

    def __str__(self):
        return (f"{len(self.train):,} to train on, {len(self.val):,} held out"
                + "; bundled, to try things out: a real run wants --data_dir=a folder of images" * self.bundled)

    def read(self, path, size, rng):
        """A random crop of the file as [size,size,3] uint8 (rng=None: the centre square); None if it is unreadable."""
        return self.attempt(square_crop, path, size, rng)

    def attempt(self, function, path, *arguments):
        """A function of a file, or None, once said, where it is unreadable."""
        try:
            opens = [pack.open for pack in self.packs if path in pack.rows]
            return function(path, *arguments, *opens)
        except Exception as error:  # Pillow raises a dozen kinds on broken files
            with self.lock:
                if path not in self.bad:
                    self.bad[path] = str(error)
                    print(f"skipped {path}: {error}", file=sys.stderr)

    def crop(self, size, rng):
        """One random training crop, [size,size,3] uint8."""
        while True:
            if len(self.bad) - self.bad_held_out > len(self.train) / 2:
                stop(f"more than half of the image files cannot be read, for example {self.a_bad_one()}")
            # both are drawn for a broken file, too: what follows must not depend on when that was found out
            path, own = self.train[rng.integers(len(self.train))], np.random.default_rng(rng.integers(2**63))
            if path not in self.bad and (crop := self.read(path, size, own)) is not None:
                return crop

    def batch(self, size, n, color_augment, seed):
        """[n,3,size,size] uint8 tensor, a function of `seed` (a list of ints) alone."""
        rng = np.random.default_rng(seed)
        crops = [self.crop(size, rng) for _ in range(n)]
        crops = [color_augmented(crop, rng) if rng.random() < color_augment else crop for crop in crops]
        return to_tensor(crops)

    def held_out(self, n, size):
        """The first n readable held-out images as centre squares, [n,3,size,size] uint8."""
        found = []
        for path in self.val:
            if len(found) < n and (square := self.read(path, size, None)) is not None:
                found.append(square)
        self.bad_held_out = sum(path in self.bad for path in self.val)
        if not found:
            stop(f"none of {len(self.val)} held-out images can be read, for example {self.a_bad_one()}; remove "
                 f"them, or name others with --val_dir=")
        return to_tensor(found)

    def a_bad_one(self):
        return ": ".join(next(iter(self.bad.items())))


def to_tensor(squares):
    """A list of [H,W,3] uint8 arrays -> [N,3,H,W] uint8, channels_last."""
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)


def cut(squares, n):
    """Cut [N,C,H,W] into n rows of n tiles each: [N*n*n,C,H/n,W/n]."""
    return squares.unflatten(3, (n, -1)).unflatten(2, (n, -1)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def batches(images, size, n, color_augment, seed, workers, start=0, pin=False, rank=0, ranks=1):
    """Endless generator of `images.batch` for k = start, start+1, ..., made ahead of time by `workers` threads; pin: in
    pinned memory, from which a GPU copies while it computes. Of `ranks` processes, each has its own, dealt in turn.

    Threads, not processes: Pillow, NumPy and torch release the GIL for the heavy part, and nothing is pickled, so it
    works the same under every multiprocessing start method and never re-runs the calling script.
    """
    with ThreadPoolExecutor(workers) as pool:
        def submit(k):
            return pool.submit(make, [seed, k * ranks + rank])

        def make(seeds):
            batch = images.batch(size, n, color_augment, seeds)
            return batch.pin_memory() if pin else batch
        ahead = deque(submit(k) for k in range(start, start + workers + 2))
        try:
            while True:
                start += 1
                ahead.append(submit(start + workers + 1))
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


# -----------------------------------------------------------------------------
# folders and files

def find_images(folder):
    """Sorted paths of the jpg, jpeg, png and webp files under `folder`, at any depth, in any case; of a pack, what they
    were."""
    if is_pack(folder):
        return sorted(Pack(folder).rows)
    if not os.path.isdir(folder):
        stop(f"{folder}: no such folder of images")
    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        folders.sort()  # where two links lead to one folder, the first counts: the same one everywhere
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [os.path.join(root, name) for name in names if name.lower().endswith(EXTENSIONS)]
    if not found:
        stop(f"{folder}: holds no {', '.join(EXTENSIONS)} files")
    return sorted(found)


def name_crc(path, folder):
    """A number below 2**32 that depends on the name below `folder` alone."""
    return zlib.crc32(os.path.relpath(path, folder).replace(os.sep, "/").encode(errors="surrogateescape"))


def square_crop(path, size, rng=None, open_image=Image.open):
    """A file's square as [size,size,3] uint8, upright, on a background: a random one, from `size` pixels to the whole;
    the centre one for rng=None."""
    with open_image(path) as image:
        (width, height), profile = image.size, image.info.get("icc_profile")
        if min(width, height) < SMALLEST:
            raise ValueError(f"{width}x{height} pixels: the shorter side must be {SMALLEST} or more")
        if rng is not None and min(width, height) < size:  # mirrored at its edges: enlarged, it would teach blur
            image, profile = mirrored(in_srgb(ImageOps.exif_transpose(resizable(image)), profile), size), None
            width, height = image.size
        short = min(width, height)
        side, left, top = short, (width - short) / 2, (height - short) / 2
        if rng is not None:
            side = int(rng.integers(min(size, short), short + 1))
            left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        # JPEG decodes at 1/2, 1/4 or 1/8 where that is enough
        image.draft(None, (math.ceil(width * size / side), math.ceil(height * size / side)))
        image.load()
        across, down = image.width / width, image.height / height
        right, bottom = min((left + side) * across, image.width), min((top + side) * down, image.height)
        square = resizable(image).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3,
                                         box=(left * across, top * down, right, bottom))
        square = in_srgb(ImageOps.exif_transpose(square), profile)
    if square.mode == "RGBA":  # transparent art is trained on many backgrounds and evaluated on white
        color = (255,) * 3 if rng is None else tuple(int(c) for c in rng.integers(256, size=3))
        square = Image.alpha_composite(Image.new("RGBA", square.size, color), square)
    return np.asarray(square.convert("RGB"))


def mirrored(image, size):
    """Reflect an image at its edges until both sides have at least `size` pixels."""
    pixels = np.asarray(image)
    sides = [max(0, size - side) for side in pixels.shape[:2]] + [0] * (pixels.ndim - 2)
    return Image.fromarray(np.pad(pixels, [(side // 2, side - side // 2) for side in sides], "reflect"))


def color_augmented(crop, rng):
    """Mix the channels by a random matrix, to show colours that photos lack: it cures weak saturated ones (taesd#11).

    [H,W,3] uint8 -> the same; in [0,1] it is lerp(x, clip(x @ (0.5 + randn(3,3)), 0, 1), rand(3)).
    """
    image = crop / np.float32(255)
    mixed = np.clip(image @ (0.5 + rng.standard_normal((3, 3), dtype=np.float32)), 0, 1)
    return np.round(255 * (image + rng.random(3, dtype=np.float32) * (mixed - image))).astype(np.uint8)


# -----------------------------------------------------------------------------
# python data.py

def decode(path):
    """A whole image as [H,W,3 or 4] uint8, upright; None if unreadable. Its longest side has at most `longest` pixels,
    more where the shorter one would have too few."""
    try:
        with Image.open(path) as image:
            profile, side = image.info.get("icc_profile"), max(longest, SMALLEST * max(image.size) / min(image.size))
            image.draft(None, (math.ceil(side), math.ceil(side)))
            image = resizable(image)
            image.thumbnail((math.ceil(side), math.ceil(side)), Image.Resampling.BICUBIC, reducing_gap=3)
            image = in_srgb(ImageOps.exif_transpose(image), profile)
            return np.asarray(image if image.mode == "RGBA" else image.convert("RGB"))
    except Exception as error:  # Pillow raises a dozen kinds on broken files
        print(f"skipped {path}: {error}", file=sys.stderr)


if __name__ == "__main__":
    configure(globals())
    require_positive(globals(), "longest", "workers")
    if not data_dir or not out:
        stop("nothing to do: --data_dir=folder --out=pack writes the images of a folder, decoded, to a pack")
    write_pack(out, data_dir, find_images(data_dir), decode, workers)
