"""Training crops and held-out images from a folder; without one, from thirty bundled photographs.

This is the only file that opens images. They leave it as uint8 RGB, NCHW.
"""
import functools
import itertools
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

from support.colors import to_eight_bits, to_srgb
from support.config import fail
from support.device import RANK, RANKS

warnings.filterwarnings("ignore", module="PIL")  # Pillow warns of every odd file; files that cannot be read are named

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
SMALLEST = 16  # images whose shorter side has fewer pixels are skipped
HELD_OUT = 0.05  # the share of a folder that is never trained on
PHOTOS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "photos")  # to try things out


class Images:
    """Images to train on, `train`, and images that are held out for evaluation, `val`: lists of paths.

    folder: '' = the bundled photographs. val_folder: '' = 5% of `folder`, chosen by a checksum of their names, so that
    an image stays on its side when others are added. A file that cannot be read is reported once and skipped; if more
    than half of them cannot be read, the program ends with one line."""
    def __init__(self, folder="", val_folder=""):
        self.bundled = not folder
        if self.bundled:
            folder, val_folder = PHOTOS, val_folder or os.path.join(PHOTOS, "val")
        self.broken, self.lock = {}, threading.Lock()  # path: why it cannot be read
        self.train = find_images(folder)
        if val_folder:
            self.val = [val_folder] if os.path.isfile(val_folder) else find_images(val_folder)
        else:
            checksums = [checksum(path, folder) for path in self.train]
            limit = max(HELD_OUT * 2**32, min(checksums))  # at least one image
            self.val = [path for path, value in zip(self.train, checksums) if value <= limit]
        held_out = set(map(real_path, self.val))  # val_folder may be inside folder, or linked into it
        self.train = [path for path in self.train if real_path(path) not in held_out]
        self.val.sort(key=lambda path: checksum(path, val_folder or folder))  # a mixed order, the same on all machines
        if not self.train:
            fail(f"--data_dir={folder}: nothing to train on: at least two images are needed, one of them is held out")

    def __str__(self):
        numbers = f"{len(self.train):,} to train on, {len(self.val):,} held out"
        return numbers + ("; bundled, to try things out: a real run needs --data_dir=" if self.bundled else "")

    def attempt(self, function, path, *arguments):
        """function(path, *arguments), or None for a file that cannot be read, which is reported once."""
        try:
            return function(path, *arguments)
        except Exception as error:  # Pillow raises a dozen kinds of errors on broken files
            with self.lock:
                if path not in self.broken:
                    self.broken[path] = str(error)
                    print(f"skipped {path}: {error}", file=sys.stderr)

    def crop(self, size, rng):
        """One random training crop, [size,size,3] uint8."""
        half = len(self.train) / 2
        while True:
            if len(self.broken) > half and sum(path in self.broken for path in self.train) > half:
                fail(f"more than half of the image files cannot be read, {self.broken_example()}")
            # drawn for a broken file, too, so that a crop does not depend on what was read before
            path, own_rng = self.train[rng.integers(len(self.train))], np.random.default_rng(rng.integers(2**63))
            crop = None if path in self.broken else self.attempt(square_crop, path, size, own_rng)
            if crop is not None:
                return crop

    def batch(self, size, n, color_augment, seed):
        """n random crops, [n,3,size,size] uint8. They depend only on `seed`, a list of ints."""
        rng = np.random.default_rng(seed)
        crops = [self.crop(size, rng) for _ in range(n)]
        crops = [color_augmented(crop, rng) if rng.random() < color_augment else crop for crop in crops]
        return to_tensor(crops)

    def held_out(self, n, size, multiple=1):
        """The first n held-out images whose shorter side has `size` pixels or more, as centre squares,
        [n,3,size,size] uint8. Enlarged ones would measure blur. If all are smaller, the size is the largest multiple of
        `multiple` that one of them has."""
        squares, largest, smaller = [], 0, 0
        for path in self.val:
            side = self.attempt(shorter_side, path) if len(squares) < n else None
            if side and side < size:
                largest, smaller = max(largest, side // multiple * multiple), smaller + 1
            elif side and (square := self.attempt(square_crop, path, size)) is not None:
                squares.append(square)
        if not squares and largest:
            return self.held_out(n, largest, multiple)
        if not squares:
            fail(f"none of {len(self.val)} held-out images can be used: {self.broken_example()}; remove them, or name "
                 f"others with --val_dir=")
        print(f"held out  {len(squares)} images of {size} pixels"
              + (f"; {smaller} smaller ones are not used" if smaller else ""))
        return to_tensor(squares)

    def broken_example(self):
        return "for example " + ": ".join(next(iter(self.broken.items()), ("all of them", "too small")))


def to_tensor(squares):
    """A list of [H,W,3] uint8 arrays -> [N,3,H,W] uint8, in the channels_last memory format."""
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)


def to_tiles(windows, n):
    """Cut [N,C,H,W] into n rows of n tiles each: [N*n*n,C,H/n,W/n]."""
    return windows.unflatten(3, (n, -1)).unflatten(2, (n, -1)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def batches(images, size, n, color_augment, seed, workers, pin=False):
    """Endless generator of images.batch(size, n, ...), which threads prepare ahead of time. workers: 0 = one per core.

    pin: in pinned memory, from which a GPU copies while it computes. With several GPUs, each process gets its own
    batches. Threads are enough, because Pillow, NumPy and torch release Python's lock for the heavy part."""
    workers = workers or os.cpu_count() or 1

    def make(k):
        batch = images.batch(size, n, color_augment, [seed, k * RANKS + RANK])
        return batch.pin_memory() if pin else batch
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque(pool.submit(make, k) for k in range(workers + 2))
        try:
            for k in itertools.count(len(ahead)):
                ahead.append(pool.submit(make, k))
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


# --- folders and files -----------------------------------------------------------------------------------------------
def find_images(folder):
    """Sorted paths of the jpg, jpeg, png and webp files under `folder`, at any depth, in upper or lower case."""
    if not os.path.isdir(folder):
        fail(f"{folder}: no such folder of images")
    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        folders.sort()  # where two links lead to one folder, the first one counts, on every machine
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [os.path.join(root, name) for name in names if name.lower().endswith(EXTENSIONS)]
    if not found:
        fail(f"{folder}: holds no {', '.join(EXTENSIONS)} files")
    return sorted(found)


real_folder = functools.cache(os.path.realpath)


def real_path(path):
    """What os.path.realpath gives, but faster: a folder with a million images should be ready within seconds."""
    folder, name = os.path.split(path)
    return os.path.realpath(path) if os.path.islink(path) else os.path.join(real_folder(folder), name)


def checksum(path, folder):
    """A number below 2**32 that depends only on the path below `folder`."""
    below = path[len(folder):].replace(os.sep, "/").lstrip("/")
    return zlib.crc32(below.encode(errors="surrogateescape"))


def shorter_side(path):
    """Of an image file, in pixels, without decoding it."""
    with Image.open(path) as image:
        return min(image.size)


def square_crop(path, size, rng=None):
    """A square of a file as [size,size,3] uint8, upright and in sRGB. With `rng` it is a random one, from `size` pixels
    to the shorter side of the image, and transparent images get a random background. Without, it is the centre square
    on white."""
    with Image.open(path) as image:
        (width, height), profile = image.size, image.info.get("icc_profile")
        if min(width, height) < SMALLEST:
            raise ValueError(f"{width}x{height} pixels: the shorter side must be {SMALLEST} or more")
        if rng is not None and min(width, height) < size:  # mirrored at its edges; enlarged, it would teach blur
            image = mirrored(to_srgb(ImageOps.exif_transpose(to_eight_bits(image)), profile), size)
            (width, height), profile = image.size, None
        short = min(width, height)
        side, left, top = short, (width - short) // 2, (height - short) // 2
        if rng is not None:
            side = int(rng.integers(min(size, short), short + 1))
            left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        # JPEG files can be decoded at 1/2, 1/4 or 1/8 of their size where that is enough
        image.draft(None, (math.ceil(width * size / side), math.ceil(height * size / side)))
        image.load()
        across, down = image.width / width, image.height / height
        right, bottom = min((left + side) * across, image.width), min((top + side) * down, image.height)
        square = to_eight_bits(image).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3,
                                             box=(left * across, top * down, right, bottom))
    color = (255,) * 3 if rng is None else tuple(int(c) for c in rng.integers(256, size=3))
    return np.asarray(to_rgb(square, profile, color))


def whole_image(path, largest, multiple):
    """A file as [H,W,3] uint8, upright, in sRGB and on white. Its longer side is reduced to `largest` pixels if it has
    more, and its centre is cut to multiples of `multiple`."""
    with Image.open(path) as image:
        image = to_rgb(to_eight_bits(image), image.info.get("icc_profile"), (255,) * 3)
    image.thumbnail((largest, largest), Image.Resampling.BICUBIC)
    width, height = (side // multiple * multiple for side in image.size)
    if not width * height:
        raise ValueError(f"{image.width}x{image.height} pixels: the shorter side must be {multiple} or more")
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def to_rgb(image, profile, background):
    """An image of to_eight_bits as RGB: upright, in sRGB, and on a background where it is transparent."""
    image = to_srgb(ImageOps.exif_transpose(image), profile)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def mirrored(image, size):
    """Reflect an image at its edges until both sides have at least `size` pixels."""
    pixels = np.asarray(image)
    missing = [max(0, size - side) for side in pixels.shape[:2]] + [0] * (pixels.ndim - 2)
    return Image.fromarray(np.pad(pixels, [(n // 2, n - n // 2) for n in missing], "reflect"))


def color_augmented(crop, rng):
    """Mix the channels of a crop, [H,W,3] uint8, by a random matrix. It shows colours that photographs lack, and cures
    weak saturated colours (taesd issue 11). In [0,1] it is lerp(x, clip(x @ (0.5 + randn(3,3)), 0, 1), rand(3))."""
    image = crop / np.float32(255)
    mixed = np.clip(image @ (0.5 + rng.standard_normal((3, 3), dtype=np.float32)), 0, 1)
    return np.round(255 * (image + rng.random(3, dtype=np.float32) * (mixed - image))).astype(np.uint8)
