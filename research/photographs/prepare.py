# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Makes the downscaled copies of the photographs from the Debian packages that ship them.

apt-get download lomiri-wallpapers-16.04
dpkg -x lomiri-wallpapers-16.04_*.deb wallpapers
python -m research.photographs.prepare wallpapers/usr/share/backgrounds
"""

import argparse
from pathlib import Path

from PIL import Image, UnidentifiedImageError


FOLDER = Path(__file__).parent
HEIGHT, WIDTH = 256, 384  # of every copy, in pixels
SOURCES = {  # file in the package, by name of the copy
    "meadow": "aitzgorri_by_Aitzol_Berasategi.jpg",
    "peaks": "picosdeeuropa_by_Aitzol_Berasategi.jpg",
    "stream": "life_by_Aitzol_Berasategi.jpg",
    "dandelions": "seeding_by_Clements_Engelhardt.jpg",
    "sunset": "sunset_by_Aitzol_Berasategi.jpg",
    "brushes": "Picture_1A_by_freespace.jpg",
    "fig": "Picture_0B_by_freespace.jpg",
    "leaves": "Dragonfly_by_Bolly.jpg",
}


def downscale(source: Path, target: Path) -> None:
    """Writes the middle of a photograph, cropped to 3:2, as a JPEG of `HEIGHT` by `WIDTH` pixels."""
    try:
        image = Image.open(source).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"the photograph {source} cannot be read: {error}") from error
    width = min(image.width, image.height * WIDTH // HEIGHT)
    height = min(image.height, image.width * HEIGHT // WIDTH)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.resize((WIDTH, HEIGHT), Image.LANCZOS, (left, top, left + width, top + height))
    image.save(target, quality=90, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the package's folder usr/share/backgrounds")
    folder = parser.parse_args().folder
    for name, source in SOURCES.items():
        downscale(folder / source, FOLDER / f"{name}.jpg")


if __name__ == "__main__":
    main()
