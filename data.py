"""Training crops: from a folder of images, or, without one, from an endless stream of synthetic "dead leaves".

The only file that opens images. Batches leave here as uint8 RGB, NCHW; batch k is a pure function of (seed, k).

    python data.py --data_dir=photos --out=photos.pack   # decode every image once; then train.py --data_dir=photos.pack
    python data.py --data_dir=photos --bench             # how fast are crops made?
"""
import json
import math
import os
import sys
import threading
import time
import warnings
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from configure import configure, require_positive, stop
from model import save_file

# -----------------------------------------------------------------------------
# settings of `python data.py`
data_dir = ""              # folder of images, searched recursively, or a pack; '' = synthetic
out = ""                   # write the images of data_dir here, decoded
bench = False              # instead: measure the speed of crops
longest = 768              # longest side of a packed image in pixels: larger ones are made smaller
size = 192                 # side of the crops that are timed, in pixels
workers = 4                # threads that read images for a pack
# -----------------------------------------------------------------------------

warnings.filterwarnings("ignore", module="PIL")  # one for every odd file: those that cannot be read are named below

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
SMALLEST = 16  # pixels of the shorter side of an image that is used
HELD_OUT = 0.05  # share of a folder that is never trained on
SYNTHETIC_VAL_SEED = 2**32 - 1  # training seeds are smaller: held-out leaves never appear in training


class Images:
    """A folder of images, or the synthetic stream where `folder` is ''. Held-out files are chosen by the CRC of their
    name, so that the split stays when files are added. `val_folder`: its images are held out instead, none of folder's.

    Unreadable files are reported once, then skipped; more of them than readable ones stop the program.
    """
    def __init__(self, folder="", val_folder=""):
        self.bad, self.lock = {}, threading.Lock()  # path: why it cannot be read
        self.bad_held_out = 0
        self.packs = [Pack(each) for each in (folder, val_folder) if is_pack(each)]
        self.train = find_images(folder) if folder else []
        self.val = [val_folder] if os.path.isfile(val_folder) else find_images(val_folder) if val_folder else []
        if self.train and not self.val:
            crc = {path: name_crc(path, folder) for path in self.train}
            threshold = max(HELD_OUT * 2**32, min(crc.values()))  # at least one
            self.val = [path for path in self.train if crc[path] <= threshold]
        held_out = set(map(os.path.abspath, self.val))  # a val_folder may lie inside folder
        self.train = [path for path in self.train if os.path.abspath(path) not in held_out]
        self.val.sort(key=lambda path: name_crc(path, val_folder or folder))  # as good as shuffled, the same everywhere
        if folder and not self.train:
            stop(f"--data_dir={folder}: nothing to train on: at least two images are needed, one of them to be held out")

    def read(self, path, size, rng):
        """A random crop of the file as [size,size,3] uint8 (rng=None: the centre square), or None if it is unreadable."""
        try:
            for pack in self.packs:
                if path in pack.rows:
                    return square_crop(path, size, rng, pack.open)
            return square_crop(path, size, rng)
        except Exception as error:  # Pillow raises a dozen kinds on broken files
            with self.lock:
                if path not in self.bad:
                    self.bad[path] = str(error)
                    print(f"skipped {path}: {error}", file=sys.stderr)

    def crop(self, size, rng):
        """One random training crop, [size,size,3] uint8."""
        if not self.train:
            return dead_leaves(size, rng)
        while True:
            if len(self.bad) - self.bad_held_out > len(self.train) / 2:
                stop(f"more than half of the image files cannot be read, for example {': '.join(next(iter(self.bad.items())))}")
            path, own = self.train[rng.integers(len(self.train))], np.random.default_rng(rng.integers(2**63))  # both, though it be broken
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
        if not self.val:
            with ThreadPoolExecutor() as pool:
                found = list(pool.map(lambda i: dead_leaves(size, np.random.default_rng([SYNTHETIC_VAL_SEED, i])), range(n)))
        for path in self.val:
            if len(found) < n and (square := self.read(path, size, None)) is not None:
                found.append(square)
        self.bad_held_out = len(self.bad)
        if not found:
            stop(f"none of {len(self.val)} held-out images can be read, for example {': '.join(next(iter(self.bad.items())))}; "
                 f"--val_dir= takes a folder of others")
        return to_tensor(found)


def to_tensor(squares):
    """A list of [H,W,3] uint8 arrays -> [N,3,H,W] uint8, channels_last."""
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)


def batches(images, size, n, color_augment, seed, workers, start=0, pin=False):
    """Endless generator of `images.batch` for k = start, start+1, ..., made ahead of time by `workers` threads; pin: in
    pinned memory, from which a GPU copies while it computes.

    Threads, not processes: Pillow, NumPy and torch release the GIL for the heavy part, and nothing is pickled, so it
    works the same under every multiprocessing start method and never re-runs the calling script.
    """
    with ThreadPoolExecutor(workers) as pool:
        def submit(k):
            return pool.submit(make, [seed, k])

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
    """Sorted paths of the jpg, jpeg, png and webp files under `folder`, at any depth and in any case; of a pack, what they were."""
    if is_pack(folder):
        return sorted(Pack(folder).rows)
    if not os.path.isdir(folder):
        stop(f"{folder}: no such folder of images")
    found = sorted(os.path.join(root, name) for root, _, names in os.walk(folder, followlinks=True)
                   for name in names if name.lower().endswith(EXTENSIONS))
    if not found:
        stop(f"{folder}: holds no {', '.join(EXTENSIONS)} files")
    return found


def name_crc(path, folder):
    """A number below 2**32 that depends on the name below `folder` alone."""
    return zlib.crc32(os.path.relpath(path, folder).replace(os.sep, "/").encode(errors="surrogateescape"))


def square_crop(path, size, rng=None, open_image=Image.open):
    """A file's square as [size,size,3] uint8, upright, on a background: random, from `size` pixels to the whole; the centre one for rng=None."""
    with open_image(path) as image:
        width, height = image.size
        if min(width, height) < SMALLEST:
            raise ValueError(f"{width}x{height} pixels: the shorter side must be {SMALLEST} or more")
        if rng is not None and min(width, height) < size:  # mirrored at its edges: enlarged, it would teach blur
            image = mirrored(ImageOps.exif_transpose(eight_bits(image)), size)
            width, height = image.size
        short = min(width, height)
        side, left, top = short, (width - short) / 2, (height - short) / 2
        if rng is not None:
            side = int(rng.integers(min(size, short), short + 1))
            left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        image.draft(None, (math.ceil(width * size / side), math.ceil(height * size / side)))  # lets JPEG decode at 1/2, 1/4 or 1/8
        image.load()
        across, down = image.width / width, image.height / height
        box = left * across, top * down, min((left + side) * across, image.width), min((top + side) * down, image.height)
        square = ImageOps.exif_transpose(eight_bits(image).resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3))
    if square.mode == "RGBA":  # transparent art is trained on many backgrounds and evaluated on white
        color = (255,) * 3 if rng is None else tuple(int(c) for c in rng.integers(256, size=3))
        square = Image.alpha_composite(Image.new("RGBA", square.size, color), square)
    return np.asarray(square.convert("RGB"))


def mirrored(image, size):
    """Reflect an image at its edges until both sides have at least `size` pixels."""
    pixels = np.asarray(image)
    sides = [max(0, size - side) for side in pixels.shape[:2]] + [0] * (pixels.ndim - 2)
    return Image.fromarray(np.pad(pixels, [(side // 2, side - side // 2) for side in sides], "reflect"))


def eight_bits(image):
    """An image of any mode as L, RGB or RGBA."""
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: scale, for convert() would clip
        grey = np.asarray(image, dtype=np.float32)
        return Image.fromarray((grey / (257 if grey.max() > 255 else 1)).astype(np.uint8))
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def color_augmented(crop, rng):
    """Mix the channels by a random matrix, to show colours that photos lack: it cures weak saturated ones (taesd#11).

    [H,W,3] uint8 -> the same; in [0,1] it is lerp(x, clip(x @ (0.5 + randn(3,3)), 0, 1), rand(3)).
    """
    image = crop / np.float32(255)
    mixed = np.clip(image @ (0.5 + rng.standard_normal((3, 3), dtype=np.float32)), 0, 1)
    return np.round(255 * (image + rng.random(3, dtype=np.float32) * (mixed - image))).astype(np.uint8)


# -----------------------------------------------------------------------------
# packs: a folder of three files. pixels.bin: every image, decoded and upright, one after the other; index.npy: a row each of
# offset, height, width and channels (3, or 4 with transparency); names.json: their names below the folder they came from

def is_pack(folder):
    return os.path.isfile(os.path.join(folder, "index.npy"))


class Pack:
    """A pack, mapped into memory: images are read from the disk when they are looked at."""
    def __init__(self, folder):
        try:
            with open(os.path.join(folder, "names.json"), encoding="utf-8") as file:
                self.rows = {os.path.join(folder, name): row for row, name in enumerate(json.load(file))}
            self.index = np.load(os.path.join(folder, "index.npy"))
            self.pixels = np.memmap(os.path.join(folder, "pixels.bin"), np.uint8, "r")
            if len(self.pixels) != self.index[:, 1:].prod(1).sum():
                raise ValueError(f"{len(self.pixels):,} bytes of pixels, {self.index[:, 1:].prod(1).sum():,} expected")
        except (OSError, ValueError) as error:
            stop(f"{folder}: not a whole pack ({error}); make it again by python data.py --data_dir=... --out={folder}")

    def open(self, path):
        offset, height, width, channels = self.index[self.rows[path]]
        return Image.fromarray(self.pixels[offset:offset + height * width * channels].reshape(height, width, channels))


def write_pack():
    """Decode the images of data_dir once, upright, their longest side at most `longest` pixels; skip and name unreadable ones."""
    paths, bad, rows, names, offset, started = find_images(data_dir), [], [], [], 0, time.time()

    def decode(path):
        try:
            with Image.open(path) as image:
                image.draft(None, (longest, longest))
                image = ImageOps.exif_transpose(eight_bits(image))
                image.thumbnail((longest, longest), Image.Resampling.BICUBIC, reducing_gap=3)
                return np.asarray(image if image.mode == "RGBA" else image.convert("RGB"))
        except Exception as error:  # Pillow raises a dozen kinds on broken files
            bad.append(path)
            print(f"skipped {path}: {error}", file=sys.stderr)

    def write(aside):
        nonlocal offset
        os.makedirs(aside)
        with open(os.path.join(aside, "pixels.bin"), "wb") as file, ThreadPoolExecutor(workers) as pool:
            for start in range(0, len(paths), 256):
                some = paths[start:start + 256]
                for path, pixels in zip(some, pool.map(decode, some)):
                    if pixels is not None:
                        file.write(pixels.tobytes())
                        rows.append((offset, *pixels.shape))
                        names.append(os.path.relpath(path, data_dir).replace(os.sep, "/"))
                        offset += pixels.size
                done, seconds = start + len(some), time.time() - started
                print(f"{done:,}/{len(paths):,} images  {offset / 2**20:,.0f} MB  {done / seconds:.0f} images/s  "
                      f"{(len(paths) - done) * seconds / done / 60:.1f} min left", flush=True)
        if len(bad) > len(paths) / 2:
            stop(f"more than half of the image files cannot be read, for example {bad[0]}")
        np.save(os.path.join(aside, "index.npy"), np.array(rows, np.int64))
        with open(os.path.join(aside, "names.json"), "w", encoding="utf-8") as file:
            json.dump(names, file)
    save_file(out, write)
    print(f"{out}: {len(names):,} images, {len(bad):,} skipped; train.py --data_dir={out}")


def time_crops():
    """Print how many random crops a second one thread makes."""
    images, made, started = Images(data_dir), 0, time.time()
    while time.time() < started + 5 or made < 8:
        images.batch(size, 8, 0, [0, made])
        made += 8
    print(f"{data_dir or 'synthetic'}: {made / (time.time() - started):.1f} crops of {size} pixels a second, one thread")


# -----------------------------------------------------------------------------
# synthetic images

def dead_leaves(size, rng):
    """[size,size,3] uint8 picture of overlapping shapes with power-law sizes, which share the edge and scale statistics
    of photographs (Lee, Mumford & Huang 2001). Each leaf has a colour gradient, stripes and noise of its own."""
    n, canvas = 400, 2 * size  # drawn at twice the size, then halved: smooth edges
    # radii with density ~ r^-3, the scale-invariant one; the smallest differs from picture to picture, as if one zoomed
    low, high = (canvas / rng.uniform(8, 40)) ** -2.0, (canvas / 2) ** -2.0
    radius = (high + rng.random(n) * (low - high)) ** -0.5
    corners = rng.choice([3, 4, 4, 5, 6, 30, 30], n)  # 30: an ellipse
    stretch, turn = rng.uniform(0.1, 1, n) ** 0.7, rng.uniform(0, 2 * np.pi, n)
    center = rng.uniform(-0.1, 1.1, (n, 2)) * canvas
    leaf = Image.new("I", (canvas, canvas))  # which leaf lies on top at each pixel
    draw = ImageDraw.Draw(leaf)
    for i in range(n):
        angle = np.arange(corners[i]) * (2 * np.pi / corners[i])
        ragged = 1 + 0.2 * rng.standard_normal(corners[i]) * (corners[i] < 30)
        x, y = radius[i] * ragged * np.cos(angle), radius[i] * stretch[i] * ragged * np.sin(angle)
        c, s = np.cos(turn[i]), np.sin(turn[i])
        draw.polygon(np.stack([center[i, 0] + c * x - s * y, center[i, 1] + s * x + c * y], 1).ravel().tolist(), fill=i)
    leaf = np.asarray(leaf)

    # a scene has its own light and a palette of six colours; one leaf in ten is any colour at all
    palette = rng.random((6, 1)) + rng.uniform(0, 0.35) * rng.standard_normal((6, 3))
    base = palette[rng.integers(6, size=n)] + 0.1 * rng.standard_normal((n, 1)) + 0.04 * rng.standard_normal((n, 3))
    base = np.where(rng.random((n, 1)) < 0.1, rng.random((n, 3)), base)
    slope = rng.standard_normal((n, 2, 3)) * rng.uniform(0, 0.3, (n, 1, 1))  # change of colour across the picture
    wavelength = np.exp(rng.uniform(np.log(6), np.log(canvas / 4), n))
    direction, phase = rng.uniform(0, 2 * np.pi, (2, n))
    wave = np.stack([np.cos(direction), np.sin(direction)], 1) * (2 * np.pi / wavelength)[:, None]
    stripes = rng.uniform(0, 0.2, n) * (rng.random(n) < 0.3)
    noise = rng.uniform(0, 0.2, n) ** 1.5

    tables = [base - slope.sum(1) / 2, slope.reshape(n, 6), wave, phase[:, None], stripes[:, None], noise[:, None]]
    pixel = np.concatenate(tables, 1).astype(np.float32)[leaf]  # [canvas,canvas,14]: every pixel looks up its leaf
    y, x = np.mgrid[:canvas, :canvas].astype(np.float32)
    texture = pixel[..., 12] * np.sin(pixel[..., 9] * x + pixel[..., 10] * y + pixel[..., 11])
    texture += pixel[..., 13] * clouds(canvas, rng)
    color = pixel[..., 0:3] + pixel[..., 3:6] * (x / canvas)[..., None] + pixel[..., 6:9] * (y / canvas)[..., None]
    image = Image.fromarray((255 * np.clip(color + texture[..., None], 0, 1)).astype(np.uint8))
    if rng.random() < 0.2:  # out of focus
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.015) * canvas))
    return np.asarray(image.reduce(2))


def clouds(size, rng):
    """[size,size] noise with equal energy in every octave, unit standard deviation."""
    total, cells = np.zeros((size, size), np.float32), 4
    while cells <= size:
        octave = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
        total += np.asarray(octave.resize((size, size), Image.Resampling.BICUBIC))
        cells *= 2
    return total / total.std()


if __name__ == "__main__":
    configure(globals())
    require_positive(globals(), "longest", "size", "workers")
    if out and not data_dir:
        stop("--out needs --data_dir, the folder of images to pack")
    if not out and not bench:
        stop("nothing to do: --data_dir=folder --out=pack packs a folder, --bench times crops")
    write_pack() if out else time_crops()
