"""Embedded colour profiles."""
import struct

import numpy as np
import pytest
from PIL import Image

import data

WHITE = np.array([0.9642, 1.0, 0.8249])  # D50, to which the primaries below are adapted
ADOBE, SRGB = (((0.6484, 0.3309), green, (0.1559, 0.0661)) for green in ((0.2302, 0.7016), (0.3212, 0.5979)))


def matrix_of(primaries):
    """Linear RGB -> XYZ, of the primaries' (x, y)."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    return columns * np.linalg.solve(columns, WHITE)


def profile_of(primaries, gamma=2.2):
    """An ICC profile, version 2, of an RGB display."""
    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"wtpt": xyz(WHITE), b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + bytes(79)}
    tags |= {name + b"XYZ": xyz(column) for name, column in zip((b"r", b"g", b"b"), matrix_of(primaries).T)}
    tags |= {name + b"TRC": curve for name in (b"r", b"g", b"b")}
    table, body, offset = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", offset + len(body), len(content))
        body += content
    header = struct.pack(">I", offset + len(body)) + b"\0\0\0\0\2\x10\0\0mntrRGB XYZ " + bytes(12) + b"acsp"
    return header + bytes(28) + xyz(WHITE)[8:] + bytes(48) + table + body


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colour_profiles_become_srgb(mode, tmp_path):
    """Adobe RGB's green is greener than sRGB's, where its (100, 200, 100) has less red."""
    read, color = {}, (100, 200, 100)
    profiles = {"adobe": profile_of(ADOBE), "srgb": profile_of(SRGB), "none": None, "damaged": b"junk"}
    for name, profile in profiles.items():
        image = Image.new("RGB", (64, 64), color).convert(mode)
        image.save(tmp_path / f"{name}.png", icc_profile=profile)
        read[name] = data.square_crop(str(tmp_path / f"{name}.png"), 32)[16, 16].astype(int)
    by_hand = np.linalg.solve(matrix_of(SRGB), matrix_of(ADOBE) @ (np.array(color) / 255) ** 2.2).clip(0, 1)
    by_hand = 255 * np.where(by_hand > 0.0031308, 1.055 * by_hand ** (1 / 2.4) - 0.055, 12.92 * by_hand)
    assert np.abs(read["adobe"] - by_hand).max() < 4 and read["adobe"][0] < 60
    assert np.abs(read["srgb"] - (100, 200, 100)).max() < 4
    assert read["none"].tolist() == read["damaged"].tolist() == [100, 200, 100]
    assert np.abs(data.decode(str(tmp_path / "adobe.png"))[16, 16, :3] - by_hand).max() < 4  # in a pack, too
