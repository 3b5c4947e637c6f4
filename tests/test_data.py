"""Images: kinds of files, folders, batches, colour augmentation and embedded colour profiles."""
import io
import os
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import data
from test_smoke import TINY, records, train


def test_color_augmentation_is_a_blend_with_randomly_mixed_channels():
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    crops = [data.color_augmented(red, np.random.default_rng(seed)) for seed in range(200)]
    rng = np.random.default_rng(3)
    matrix, blend = 0.5 + rng.standard_normal((3, 3), dtype=np.float32), rng.random(3, dtype=np.float32)
    mixed = np.clip(matrix[0], 0, 1)  # red selects the first row of the matrix
    assert np.allclose(crops[3][0, 0], 255 * ([1, 0, 0] + blend * (mixed - [1, 0, 0])), atol=1)
    assert len({tuple(crop[0, 0]) for crop in crops}) > 100


def test_batches_depend_only_on_the_seed_and_their_number(tiny_run, monkeypatch):
    images = data.Images(str(tiny_run.folder))

    def first(n, workers=1, seed=1):
        loader = data.batches(images, 32, 3, 0.1, seed, workers)
        return torch.stack([next(loader) for _ in range(n)])
    once = first(4)
    assert once.shape == (4, 3, 3, 32, 32) and once.dtype == torch.uint8
    assert images.broken  # it was found in the first batches, and the same ones come without it
    assert torch.equal(first(4, workers=3), once)
    assert torch.equal(first(4, workers=0), once)  # as many as there are cores
    assert not torch.equal(once[0], once[1])
    assert not torch.equal(once[0], first(1, seed=2)[0])
    monkeypatch.setattr(data, "RANK", 1), monkeypatch.setattr(data, "RANKS", 2)
    assert torch.equal(first(2), once[1::2])  # each of two processes gets every second batch


def names(paths):
    return {os.path.basename(path) for path in paths}


def test_held_out_files_stay_held_out_when_others_are_added(tiny_run, tmp_path):
    images = data.Images(str(tiny_run.folder))
    assert len(images.train) + len(images.val) == 25 and images.val and not set(images.train) & set(images.val)
    shutil.copytree(tiny_run.folder, tmp_path / "more")
    for i in range(50):
        shutil.copy(tiny_run.folder / "0.jpg", tmp_path / "more" / f"new{i}.jpg")
    more = data.Images(str(tmp_path / "more"))
    assert names(images.val) <= names(more.val) and len(more.train) > 60
    inside = data.Images(str(tiny_run.folder), str(tiny_run.folder / "deeper"))
    assert len(inside.train) == 13 and len(inside.val) == 12 and not set(inside.train) & set(inside.val)


def test_links_are_followed_once_and_no_held_out_file_is_trained_on_through_a_link(tiny_run, tmp_path):
    photos = shutil.copytree(tiny_run.folder / "deeper", tmp_path / "photos")
    for link in (photos / "again", photos / "and again", tmp_path / "link"):
        link.symlink_to(photos)
    paths = data.find_images(str(tmp_path / "link"))
    assert len(paths) == 12
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "linked.png").symlink_to(paths[0])
    images = data.Images(str(tmp_path / "link"), str(tmp_path / "val"))
    assert len(images.val) == 1 and images.train == paths[1:]


def test_held_out_images_that_are_too_small_are_not_used(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for width, height in ((40, 40), (65, 64), (100, 90)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{height}.png")
    images = data.Images("", str(tmp_path))
    assert len(images.held_out(3, 64, 8)) == 2 and "2 images of 64 pixels; 1 smaller ones" in capsys.readouterr().out
    assert images.held_out(3, 200, 8).shape == (1, 3, 88, 88)  # the largest size that fits
    exact = data.square_crop(tmp_path / "64.png", 64)  # begins at a whole pixel
    assert np.array_equal(exact, np.asarray(Image.open(tmp_path / "64.png"))[:, :64])


# kinds of files

def saved(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def even(mode, color, format="PNG", size=(64, 64), **options):
    return saved(Image.new(mode, size, color), format, **options)


def on_its_side(orientation):
    """A JPEG whose upper half is red. The EXIF orientation 6 shows it on the right, 8 on the left."""
    image, exif = Image.new("RGB", (96, 48), "white"), Image.Exif()
    image.paste("red", (0, 0, 96, 24))
    exif[0x0112] = orientation
    return saved(image, "JPEG", exif=exif, quality=95)


def decompression_bomb():
    """The header of a PNG of 60,000 x 60,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


RED, BLUE = (Image.new("RGB", (64, 64), color) for color in ("red", "blue"))
NOISE, CLEAR = Image.effect_noise((99, 99), 50), Image.new("RGBA", (64, 64), (255, 0, 0, 0))
FILES = {  # name: (its bytes, the mean colour of its right half, or None if it should be skipped)
    "rotated by EXIF.jpg": (on_its_side(6), (255, 0, 0)),
    "rotated by EXIF the other way.jpg": (on_its_side(8), (255, 255, 255)),
    "cmyk.jpg": (even("CMYK", (0, 255, 255, 0), "JPEG"), (255, 0, 0)),
    "grey.JPEG": (even("L", 100, "JPEG"), (100,) * 3),
    "palette.png": (saved(RED.quantize(4)), (255, 0, 0)),
    "palette with a clear colour.png": (saved(CLEAR.quantize(4)), (255,) * 3),
    "16 bits.png": (saved(Image.fromarray(np.full((64, 64), 25_700, np.uint16))), (100,) * 3),
    "dark 16 bits.png": (saved(Image.fromarray(np.full((64, 64), 200, np.uint16))), (0,) * 3),
    "one bit.png": (even("1", 1), (255,) * 3), "small.png": (even("RGB", "lime", size=(20, 30)), (0, 255, 0)),
    "transparent.webp": (saved(CLEAR, "WEBP", lossless=True), (255,) * 3),
    "half transparent.png": (even("LA", (0, 128)), (127,) * 3),
    "animation.webp": (saved(RED, "WEBP", lossless=True, save_all=True, append_images=[BLUE]), (255, 0, 0)),
    "large.jpg": (even("RGB", "blue", "JPEG", size=(3000, 2000)), (0, 0, 254)),
    "cut off.jpg": (saved(NOISE, "JPEG")[:2000], None), "cut off.png": (saved(NOISE)[:2000], None),
    "empty.jpg": (b"", None), "text.jpg": (b"not an image", None), "bomb.png": (decompression_bomb(), None),
    "pixel.png": (even("RGB", 0, size=(1, 1)), None), "thin.png": (even("RGB", 0, size=(900, 2)), None)}


@pytest.mark.parametrize("name", FILES)
def test_a_kind_of_file_is_read_or_reported_once(name, tmp_path, capsys):
    content, color = FILES[name]
    (tmp_path / name).write_bytes(content)
    images = data.Images()
    square = images.attempt(data.square_crop, str(tmp_path / name), 48)
    crop = images.attempt(data.square_crop, str(tmp_path / name), 48, np.random.default_rng(0))
    if color is None:
        assert square is None and crop is None
    else:
        assert square.shape == crop.shape == (48, 48, 3)
        assert np.abs(square[:, 24:].mean((0, 1)) - color).max() < 3
    assert capsys.readouterr().err.count("skipped") == (color is None)


def test_a_folder_of_all_kinds_of_files_can_be_trained_on(tiny_run, tmp_path, capsys):
    folder = shutil.copytree(tiny_run.folder, tmp_path / "all")
    for name, (content, _) in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "folder.jpg").mkdir()
    (folder / "dangling.png").symlink_to(tmp_path / "gone.png")
    train(*TINY, f"--data_dir={folder}", f"--val_dir={tiny_run.folder / 'deeper'}", "--max_iters=16", "--window=32",
          "--width=8", "--train_decoder=false", "--color_augment=0.5", f"--out_dir={tmp_path / 'out'}")
    output, errors = capsys.readouterr()
    broken = {name for name, (_, color) in FILES.items() if color is None} | {"dangling.png", "broken.jpg"}
    reported = re.findall("^skipped (.*?):", errors, re.MULTILINE)
    assert len(reported) == len(set(reported)) > 5 and names(reported) <= broken
    assert "folder.jpg" not in output + errors and records(tmp_path / "out")[-1]["step"] == 16


def test_small_images_are_mirrored_at_their_edges():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    taller = np.asarray(data.mirrored(Image.fromarray(pixels), 32))
    assert taller.shape == (32, 40, 3)
    assert np.array_equal(taller[6:26], pixels) and np.array_equal(taller[:7], pixels[6::-1])


def test_crops_lie_anywhere_and_are_not_enlarged(tmp_path):
    """Red is the number of the column and green that of the row, so the pixels tell where a crop was."""
    y, x = np.mgrid[:100, :200].astype(np.uint8)
    Image.fromarray(np.stack([x, y, y], 2)).save(tmp_path / "ramp.png")
    crops = [data.square_crop(tmp_path / "ramp.png", 50, np.random.default_rng(i)).astype(int) for i in range(200)]
    sides = np.array([crop[25, 49, 0] - crop[25, 0, 0] for crop in crops]) * 50 / 49
    left, top = (np.array([crop[0, 0, channel] for crop in crops]) for channel in (0, 1))
    assert sides.min() > 47 and 95 < sides.max() < 103
    assert left.min() < 5 and left.max() > 130 and top.max() > 35
    centre = data.square_crop(tmp_path / "ramp.png", 50).astype(int)
    assert abs(centre[0, 0, 0] - 50) < 3 and abs(centre[49, 49, 0] - 149) < 3 and centre[0, 0, 1] < 3


# colour profiles

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")  # its red is sRGB's blue


@pytest.mark.parametrize("alpha", [None, 128])
@pytest.mark.parametrize("profile, expected", [
    (SRGB, (200, 100, 50)), (SWAPPED, (50, 100, 200)), (b"damaged", (200, 100, 50)), (None, (200, 100, 50))])
def test_embedded_colour_profiles_are_converted_to_srgb(alpha, profile, expected, tmp_path):
    image = Image.new("RGB", (64, 64), (200, 100, 50))
    if alpha:
        image.putalpha(alpha)
        expected = (np.array(expected) + 255) / 2  # on white
    image.save(tmp_path / "image.png", icc_profile=profile)
    assert np.abs(data.square_crop(str(tmp_path / "image.png"), 32).astype(int) - expected).max() < 3
