"""Synthetic pictures to try things out with: "dead leaves", which share the statistics of photographs."""
import numpy as np
from PIL import Image, ImageDraw, ImageFilter


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
