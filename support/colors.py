"""Images of any mode and colour profile as eight bits of sRGB."""
import functools
import io

import numpy as np
from PIL import Image, ImageCms


def resizable(image):
    """An image of any mode as L, RGB, RGBA or CMYK, of eight bits."""
    if image.mode.startswith("I"):  # 16-bit grey: scale, for convert() would clip
        return Image.fromarray((np.asarray(image, dtype=np.float32) / 257).astype(np.uint8))
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def in_srgb(image, profile):
    """An image from the colours of its embedded ICC profile, if it has one, to those of sRGB: L, RGB or RGBA."""
    if profile and (convert := to_srgb(profile, image.mode.removesuffix("A"))):
        alpha = image.getchannel("A") if image.mode == "RGBA" else None
        image = ImageCms.applyTransform(image.convert(image.mode.removesuffix("A")), convert)
        if alpha:
            image.putalpha(alpha)
    return image.convert("RGB") if image.mode == "CMYK" else image


@functools.lru_cache(64)  # most folders hold a handful of profiles
def to_srgb(profile, mode):
    """The transform of a profile's colours to sRGB; None where it is sRGB's, damaged, or of other channels than the
    image."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        convert = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
        steps = np.linspace(0, 255, 9, dtype=np.uint8)
        colors = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3)
        same = mode == "RGB" and np.abs(np.asarray(ImageCms.applyTransform(Image.fromarray(colors), convert))
                                        - colors.astype(int)).max() <= 3
        return None if same else convert
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):  # as damaged files go, each in its own way
        return None
