"""How many random crops a second does one thread make of a folder's images, or of a pack's?

    python -m tools.time_crops --data_dir=photos
"""
import time

from data import Images
from support.configure import configure, require_positive

# -----------------------------------------------------------------------------
# settings
data_dir = ""              # folder of images, searched recursively, or a pack; '' = the bundled photographs
crop = 192                 # side of the crops in pixels
seconds = 5.0              # for so long
# -----------------------------------------------------------------------------

if __name__ == "__main__":
    configure(globals())
    require_positive(globals(), "crop", "seconds")
    images, made, started = Images(data_dir), 0, time.time()
    while time.time() < started + seconds or made < 8:
        images.batch(crop, 8, 0, [0, made])
        made += 8
    rate = made / (time.time() - started)
    print(f"{data_dir or 'bundled photographs'}: {rate:.1f} crops of {crop} pixels a second, one thread")
