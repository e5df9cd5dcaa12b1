# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Pictures of any mode, as 8-bit RGB: one function for `image=`, `video=` and `tokentrim drift`."""

import os

import numpy as np
from PIL import Image, ImageOps


MAX_PIXELS = 8192 * 4320  # of a picture or a frame; DCI 8K
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
PICTURE_ERRORS = (  # of Pillow, for a file that is damaged, in another format, or huge
    OSError,
    SyntaxError,
    EOFError,
    IndexError,
    TypeError,
    OverflowError,
    Image.DecompressionBombError,
)
WHITE_16_BIT = 65535


def open_picture(path: str | os.PathLike, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """
    Read a PNG, JPEG or WebP file, whatever its name, as an upright picture in mode "RGB".

    Raises:
        `ValueError`: the file is in another format, damaged, or has more than `max_pixels` pixels.
    """
    try:
        with Image.open(path, formats=PICTURE_FORMATS) as picture:
            check_size(path, picture, max_pixels)
            return as_rgb(picture)
    except PICTURE_ERRORS as error:
        raise ValueError(f"{path} is no complete picture in {', '.join(PICTURE_FORMATS)} format: {error}") from error


def check_size(path: str | os.PathLike, picture: Image.Image, max_pixels: int) -> None:
    if picture.width * picture.height > max_pixels:
        size = f"{picture.width} x {picture.height}"
        raise ValueError(f"{path} must have at most {max_pixels / 1e6:.1f} million pixels, but is {size}.")


def as_rgb(picture: Image.Image) -> Image.Image:
    """
    Convert a picture of any mode to mode "RGB", turned as its EXIF orientation says.

    16 bits are reduced to 8, floats are levels from 0 (black) to 1 (white), and transparent pixels show white behind them.

    Raises:
        `ValueError`: the mode does not say which level is white, or floats are outside [0, 1].
    """
    original = picture.format
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return Image.fromarray(grey_levels(picture, original)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def grey_levels(picture: Image.Image, original: str | None) -> np.ndarray:
    """The levels of a grey picture of 16 bits, 32 bits or floats as uint8 (H, W)."""
    levels = np.asarray(picture)
    if picture.mode == "F":
        if not (levels.size and 0 <= levels.min() and levels.max() <= 1):  # NaN is refused as well
            found = f"[{levels.min():.3g}, {levels.max():.3g}]"
            raise ValueError(f"A picture of floats (mode 'F') must be in [0, 1], but is in {found}.")
        return (levels * 255).round().astype(np.uint8)
    if picture.mode == "I" and original != "PNG":  # older Pillow reads PNG files of 16 bits as "I"
        raise ValueError(
            "A picture of 32-bit integers (mode 'I') does not say which level is white: convert it to mode 'I;16' or 'L'."
        )
    return ((levels.clip(0, WHITE_16_BIT).astype(np.uint32) + 128) // 257).astype(np.uint8)
