"""Packs: every image of a folder, decoded and upright, in one memory-mapped file.

A folder of three files. pixels.bin: the images, one after the other; index.npy: a row each of offset, height, width and
channels (3, or 4 with transparency); names.json: their names below the folder they came from.
"""
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from support.configure import stop
from support.files import check_ours, save_file


FILES = ("index.npy", "names.json", "pixels.bin")


def is_pack(folder):
    return folder != "" and os.path.isfile(os.path.join(folder, "index.npy"))  # '' is no folder, not the current one


class Pack:
    """A pack, mapped into memory: images are read from the disk when they are looked at."""
    def __init__(self, folder):
        try:
            with open(os.path.join(folder, "names.json"), encoding="utf-8") as file:
                self.rows = {os.path.join(folder, name): row for row, name in enumerate(json.load(file))}
            self.index = np.load(os.path.join(folder, "index.npy"))
            self.pixels = np.memmap(os.path.join(folder, "pixels.bin"), np.uint8, "r")
            if len(self.pixels) != (expected := self.index[:, 1:].prod(1).sum()):
                raise ValueError(f"{len(self.pixels):,} bytes of pixels, {expected:,} expected")
        except (OSError, ValueError) as error:
            stop(f"{folder}: not a whole pack ({error}); make it again by python data.py --data_dir=... --out={folder}")

    def open(self, path):
        offset, height, width, channels = self.index[self.rows[path]]
        return Image.fromarray(self.pixels[offset:offset + height * width * channels].reshape(height, width, channels))


def write_pack(out, folder, paths, decode, workers):
    """Write a pack of the images at `paths` below `folder`; decode: path -> [H,W,C] uint8, or None to skip it."""
    check_ours(out, FILES)  # before the work
    rows, names, offset, started = [], [], 0, time.time()

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
                        names.append(os.path.relpath(path, folder).replace(os.sep, "/"))
                        offset += pixels.size
                done, seconds = start + len(some), time.time() - started
                print(f"{done:,}/{len(paths):,} images  {offset / 2**20:,.0f} MB  {done / seconds:.0f} images/s  "
                      f"{(len(paths) - done) * seconds / done / 60:.1f} min left", flush=True)
        if len(names) < len(paths) / 2:
            stop(f"{folder}: more than half of the image files cannot be read; no pack was written")
        np.save(os.path.join(aside, "index.npy"), np.array(rows, np.int64))
        with open(os.path.join(aside, "names.json"), "w", encoding="utf-8") as file:
            json.dump(names, file)
    save_file(out, write, names=FILES)
    print(f"{out}: {len(names):,} images, {len(paths) - len(names):,} skipped; train.py --data_dir={out}")
