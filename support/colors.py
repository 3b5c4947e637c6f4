"""Images of any mode and colour profile as eight bits of sRGB."""
import functools
import io

import numpy as np
from PIL import Image, ImageCms


def to_eight_bits(image):
    """An image of any mode as L, RGB, RGBA or CMYK with eight bits per channel."""
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip instead of scaling it
        return Image.fromarray((np.asarray(image, dtype=np.float32) / 257).astype(np.uint8))
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def to_srgb(image, profile):
    """An image of to_eight_bits, from the colours of its ICC profile, if it has one, to sRGB: L, RGB or RGBA."""
    mode = image.mode.removesuffix("A")
    transform = make_transform(profile, mode) if profile else None
    if transform:
        alpha = image.getchannel("A") if image.mode == "RGBA" else None
        image = ImageCms.applyTransform(image.convert(mode), transform)
        if alpha:
            image.putalpha(alpha)
    return image.convert("RGB") if image.mode == "CMYK" else image


@functools.lru_cache(64)  # most folders contain a handful of profiles
def make_transform(profile, mode):
    """From a profile's colours to sRGB; None where the profile is sRGB's, is damaged, or has other channels."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
        levels = np.linspace(0, 255, 9, dtype=np.uint8)
        colors = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3)
        if mode == "RGB":
            converted = np.asarray(ImageCms.applyTransform(Image.fromarray(colors), transform))
            if np.abs(converted - colors.astype(int)).max() <= 3:
                return None
        return transform
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):  # each damaged profile fails in a way of its own
        return None
