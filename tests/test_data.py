"""Images: every kind of file, folders, packs, batches, colours."""
import io
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
from conftest import DATA, needs_data, script
from support import packs
from test_smoke import TINY, records, train


def test_color_augmentation():
    pure = np.zeros((4, 4, 3), np.uint8)
    pure[..., 0] = 255
    crops = [data.color_augmented(pure, np.random.default_rng(i)) for i in range(200)]
    rng = np.random.default_rng(3)
    matrix, blend = 0.5 + rng.standard_normal((3, 3), dtype=np.float32), rng.random(3, dtype=np.float32)
    red = np.array([1.0, 0, 0])  # red picks out the matrix's first row
    assert np.allclose(crops[3][0, 0], 255 * (red + blend * (np.clip(matrix[0], 0, 1) - red)), atol=1)
    assert len({tuple(crop[0, 0]) for crop in crops}) > 100  # uint8 keeps them in [0,1]; they differ


def test_color_augmentation_takes_its_share(tmp_path):
    for i in range(2):
        Image.new("RGB", (16, 16), "red").save(tmp_path / f"{i}.png")
    batch = data.Images(str(tmp_path)).batch(16, 400, 0.25, [0, 0])
    plain = (batch.flatten(1) == batch[:, :, :1, :1].expand_as(batch).flatten(1)).all()
    mixed = (batch[:, :, 0, 0] != torch.tensor([255, 0, 0])).any(1).float().mean()
    assert plain and mixed.item() == pytest.approx(0.25, abs=0.07)


def test_batches_depend_on_seed_and_number_alone(tiny_run):
    def first(n, workers, at=0, seed=1):
        loader = data.batches(data.Images(str(tiny_run.folder)), 32, 3, 0.1, seed, workers, at)
        return [next(loader) for _ in range(n)]
    once, again = first(4, workers=1), first(4, workers=3)
    assert all(torch.equal(a, b) for a, b in zip(once, again)) and torch.equal(first(1, 2, at=2)[0], once[2])
    assert not torch.equal(once[0], once[1]) and not torch.equal(once[0], first(1, 1, seed=2)[0])
    assert once[0].shape == (3, 3, 32, 32) and once[0].dtype == torch.uint8


def names(paths):
    return {os.path.basename(path) for path in paths}


def test_held_out_files_stay_held_out(tiny_run, tmp_path):
    images = data.Images(str(tiny_run.folder))
    assert len(images.train) + len(images.val) == 25 and images.val and not set(images.train) & set(images.val)
    shutil.copytree(tiny_run.folder, tmp_path / "more")
    for i in range(50):
        shutil.copy(tiny_run.folder / "0.jpg", tmp_path / "more" / f"new{i}.jpg")
    more = data.Images(str(tmp_path / "more"))
    assert names(images.val) <= names(more.val) and len(more.train) > 60
    inside = data.Images(str(tiny_run.folder), str(tiny_run.folder / "deeper"))
    assert len(inside.train) == 13 and len(inside.val) == 12 and not set(inside.train) & set(inside.val)


def test_of_the_bundled_photographs_some_are_held_out():
    images = data.Images()
    assert len(images.train) == 24 and len(images.val) == 6 and not set(images.train) & set(images.val)
    assert images.held_out(8, 32).shape == (6, 3, 32, 32)
    notice = Path(data.PHOTOS, "NOTICE").read_text(encoding="utf-8")
    assert "Unsplash License" in notice and sum(map(os.path.getsize, data.find_images(data.PHOTOS))) < 1.5e6


# kinds of files

def bytes_of(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def flat(mode, color, size=(64, 64), format="PNG", **options):
    return lambda: bytes_of(Image.new(mode, size, color), format=format, **options)


def on_its_side(left):
    """A JPEG whose upper half is red: orientation 6 shows it on the right, 8 on the left."""
    image, exif = Image.new("RGB", (96, 48), "white"), Image.Exif()
    image.paste("red", (0, 0, 96, 24))
    exif[0x0112] = 8 if left else 6
    return bytes_of(image, format="JPEG", exif=exif, quality=95)


def animation():
    return bytes_of(Image.new("RGB", (64, 64), "red"), format="WEBP", lossless=True, save_all=True,
                    append_images=[Image.new("RGB", (64, 64), "blue")])


def bomb():
    """A PNG of 60,000 x 60,000 pixels, by its header."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def green_palette():
    image = Image.new("RGB", (64, 64), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    return bytes_of(image, format="PNG")


FILES = {  # kind: (its bytes, the mean colour of its right half when it is read, or None if it is skipped)
    "rotated by EXIF.jpg": (lambda: on_its_side(left=False), (255, 0, 0)),
    "rotated by EXIF the other way.jpg": (lambda: on_its_side(left=True), (255, 255, 255)),
    "cmyk.jpg": (flat("CMYK", (0, 255, 255, 0), format="JPEG"), (255, 0, 0)),
    "grey.JPEG": (flat("L", 100, format="JPEG"), (100,) * 3),
    "palette.png": (green_palette, (10, 200, 30)),
    "palette with a clear colour.png": (
        lambda: bytes_of(Image.new("RGBA", (64, 64), (255, 0, 0, 0)).quantize(4), format="PNG"), (255,) * 3),
    "16 bits.png": (lambda: bytes_of(Image.fromarray(np.full((64, 64), 25700, np.uint16)), format="PNG"), (100,) * 3),
    "two bits.png": (flat("1", 1), (255,) * 3),
    "transparent.webp": (flat("RGBA", (255, 0, 0, 0), format="WEBP", lossless=True), (255,) * 3),
    "half transparent.png": (flat("LA", (0, 128)), (127,) * 3),
    "animation.webp": (animation, (255, 0, 0)),
    "small.png": (flat("RGB", "lime", (20, 30)), (0, 255, 0)),
    "40 megapixels.jpg": (flat("RGB", "blue", (8000, 5000), "JPEG"), (0, 0, 254)),
    "truncated.jpg": (lambda: bytes_of(Image.effect_noise((99, 99), 50), format="JPEG")[:2000], None),
    "truncated.png": (lambda: bytes_of(Image.effect_noise((99, 99), 50), format="PNG")[:2000], None),
    "empty.jpg": (lambda: b"", None), "text.jpg": (lambda: b"not an image", None), "bomb.png": (bomb, None),
    "pixel.png": (flat("RGB", 0, (1, 1)), None), "thin.png": (flat("RGB", 0, (900, 2)), None)}


@pytest.mark.parametrize("kind", FILES)
def test_a_kind_of_file(kind, tmp_path, capsys):
    content, color = FILES[kind]
    (tmp_path / kind).write_bytes(content())
    images = data.Images()
    for _ in range(2):
        square = images.read(str(tmp_path / kind), 48, None)
        crop = images.read(str(tmp_path / kind), 48, np.random.default_rng(0))
        if color is None:
            assert square is None and crop is None
        else:
            assert square.shape == crop.shape == (48, 48, 3)
            assert np.abs(square[:, 24:].mean((0, 1)) - color).max() < 3
    assert capsys.readouterr().err.count("skipped") == (color is None)


def test_a_folder_of_all_kinds(tiny_run, tmp_path, capsys):
    folder = shutil.copytree(tiny_run.folder, tmp_path / "all")
    for kind, (content, _) in FILES.items():
        (folder / kind).write_bytes(content())
    (folder / "folder.jpg").mkdir()
    (folder / "dangling.png").symlink_to(tmp_path / "gone.png")
    train(*TINY, f"--data_dir={folder}", f"--val_dir={tiny_run.folder / 'deeper'}", "--max_iters=60",
          "--train_decoder=false", "--color_augment=0.5", f"--out_dir={tmp_path / 'out'}")
    output, errors = capsys.readouterr()
    bad = {kind for kind, (_, color) in FILES.items() if color is None} | {"dangling.png", "broken.jpg"}
    named = re.findall("^skipped (.*?):", errors, re.MULTILINE)  # those that chance has come upon, once each
    assert set(named) <= {str(folder / name) for name in bad} and 5 < len(named) == len(set(named))
    assert "folder.jpg" not in output + errors and records(tmp_path / "out")[-1]["step"] == 60


@needs_data
def test_awkward_files(capsys):
    images = data.Images(str(DATA / "awkward"), str(DATA / "val"))
    for i in range(20):
        assert images.batch(64, 4, 0, [0, i]).shape == (4, 3, 64, 64)
    assert names(images.bad) == {"one_pixel.png", "text_file.jpg", "thin_1x512.png", "truncated_small.jpg",
                                 "zero_bytes.jpg"}
    assert capsys.readouterr().err.count("skipped") == 5


def test_small_images_are_mirrored():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    wide = np.asarray(data.mirrored(Image.fromarray(pixels), 32))
    assert wide.shape == (32, 40, 3) and np.array_equal(wide[6:26], pixels) and np.array_equal(wide[:7], pixels[6::-1])


def test_crops_lie_anywhere_and_are_not_enlarged(tmp_path):
    """Red tells the column, green the row: a crop's first pixel and its last tell where it was and how large."""
    y, x = np.mgrid[:100, :200].astype(np.uint8)
    Image.fromarray(np.stack([x, y, y], 2)).save(tmp_path / "ramp.png")
    crops = [data.square_crop(tmp_path / "ramp.png", 50, np.random.default_rng(i)).astype(int) for i in range(200)]
    sides = np.array([crop[25, 49, 0] - crop[25, 0, 0] for crop in crops]) * 50 / 49
    left, top = (np.array([crop[0, 0, channel] for crop in crops]) for channel in (0, 1))
    assert sides.min() > 47 and 95 < sides.max() < 103 and left.min() < 5 and left.max() > 130 and top.max() > 35
    centre = data.square_crop(tmp_path / "ramp.png", 50).astype(int)
    assert abs(centre[0, 0, 0] - 50) < 3 and abs(centre[49, 49, 0] - 149) < 3 and centre[0, 0, 1] < 3


# packs

def test_pack(tiny_run, tmp_path, capsys):
    folder, pack_folder = shutil.copytree(tiny_run.folder, tmp_path / "folder"), tmp_path / "pack"
    Image.new("RGBA", (90, 100), (255, 0, 0, 0)).save(folder / "deeper" / "glass.png")
    script("data.py", f"--data_dir={folder}", f"--out={pack_folder}", "--longest=64")
    assert "25 images, 1 skipped" in capsys.readouterr().out
    pack, images = data.Images(str(pack_folder)), data.Images(str(folder))
    assert names(pack.train + pack.val) == names(images.train + images.val) - {"broken.jpg"}
    assert names(pack.val) == names(images.val) - {"broken.jpg"}  # the split stays
    again = pack.read(str(pack_folder / "0.jpg"), 64, None).astype(int)
    assert np.abs(again - images.read(str(folder / "0.jpg"), 64, None)).mean() < 2  # 80 pixels became 64
    assert packs.Pack(str(pack_folder)).open(str(pack_folder / "0.jpg")).size == (64, 64)
    assert pack.read(str(pack_folder / "deeper" / "glass.png"), 32, None).min() == 255  # transparent, on white
    scope = train(*TINY, "--window=32", f"--data_dir={pack_folder}", "--max_iters=1", f"--out_dir={tmp_path / 'out'}")
    assert len(scope.images.train) + len(scope.images.val) == 25
    with open(pack_folder / "pixels.bin", "ab") as file:
        file.truncate(1000)
    with pytest.raises(SystemExit, match="not a whole pack .1,000 bytes"):
        train(*TINY, f"--data_dir={pack_folder}", f"--out_dir={tmp_path / 'out2'}")


def test_a_pack_of_an_upright_picture(tmp_path):
    (tmp_path / "side.jpg").write_bytes(on_its_side(left=False))
    assert data.decode(str(tmp_path / "side.jpg")).shape == (96, 48, 3)


def test_a_pack_is_not_written_of_broken_files(tmp_path, capsys):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_text("not an image")
    with pytest.raises(SystemExit, match="more than half .* no pack was written"):
        script("data.py", f"--data_dir={tmp_path}", f"--out={tmp_path / 'pack'}")
    assert not (tmp_path / "pack").exists() and capsys.readouterr().err.count("skipped") == 3


# the measures on images

def test_measures_by_hand():
    real, fake = torch.full((1, 3, 32, 32), 0.5), torch.full((1, 3, 32, 32), 0.6)
    assert sample.psnr(fake, real).item() == pytest.approx(20, abs=1e-3)
    assert sample.ssim(fake, real).item() == pytest.approx((2 * 0.5 * 0.6 + 1e-4) / (0.25 + 0.36 + 1e-4), abs=1e-3)
    assert sample.lowres_mse(fake, real).item() == pytest.approx(0.01)
    noise = torch.rand(2, 3, 32, 32)
    assert sample.sharpness(noise * 0.5, noise).item() == pytest.approx(0.25)
