"""How much of a latent is decided outside of a crop: by the teacher itself, shown tiles of pictures one by one, against
what it makes of them whole. A student that learns from such crops learns about that much noise.

    python -m tools.context --teacher=sdxl --images=pictures --size=256
"""
import torch

from data import Images
from sample import chunked, latent_errors, measure
from support.compare import print_table
from support.configure import configure, pick_device, require_positive, stop
from teacher import Teacher

# -----------------------------------------------------------------------------
# settings
teacher = "toy"            # named as for train.py
images = ""                # an image or a folder; '' = bundled ones
count = 29                 # how many images, at most
size = 256                 # they are centre squares of this side in pixels
device = "auto"            # auto, cuda, mps or cpu
# -----------------------------------------------------------------------------


def by_tiles(encode, squares, n):
    """Latents [N,C,h,w] of images [N,3,H,W] whose n x n tiles are encoded alone."""
    rows = [[chunked(encode, tile) for tile in row.chunk(n, 3)] for row in squares.chunk(n, 2)]
    return torch.cat([torch.cat(row, 3) for row in rows], 2)


@torch.no_grad()
def main():
    require_positive(globals(), "count", "size")
    vae = Teacher(teacher, pick_device(device))
    if size < 32 or size % (2 * vae.multiple):
        stop(f"--size={size}: must be 32 or more and a multiple of {2 * vae.multiple} for this teacher")
    squares = Images("", images).held_out(count, size).to(vae.device) / 255
    whole, rows, n = chunked(vae.encode, squares), {}, 1
    while size // n >= 32 and size // n % vae.multiple == 0:
        latents = by_tiles(vae.encode, squares, n)
        figures = measure(chunked(vae.decode, latents), squares) | latent_errors(latents, whole)
        rows[f"tiles of {size // n} pixels"] = figures
        n *= 2
    print(f"{len(squares)} images of {size}x{size}; latents of tiles, against those of whole images, by {vae}")
    print_table(rows)


if __name__ == "__main__":
    configure(globals())
    main()
