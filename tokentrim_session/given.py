# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Frames to continue, in each form that `video=` and `image=` take."""

from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.video_processor import VideoProcessor

from ..tokentrim_checks import check
from ..tokentrim_frames.pictures import as_rgb


WHITE = {"uint8": 255, "uint16": 65535}  # of integer levels


def read_video(video: Any) -> torch.Tensor:
    """Frames to continue in any of the forms that Diffusers' video processor takes: images of PIL, arrays (.., H, W,
    3) or
    tensors (.., 3, H, W), of one video or several; (B, T, 3, H, W) in [0, 1]."""
    video = as_levels("video", video)
    if not (isinstance(video, torch.Tensor) and video.ndim == 5):
        valid = "frames as a tensor, an array, or a list of images, of one video or several"
        processor = VideoProcessor(do_resize=False, do_normalize=False)
        try:
            frames = processor.preprocess_video(video).transpose(1, 2)
        except (TypeError, ValueError, IndexError, RuntimeError, AttributeError):
            frames = None
        check(frames is not None, "video", video, valid, TypeError)
        video = frames
    return video


def as_levels(name: str, given: Any) -> Any:
    """
    Images of PIL as 8-bit RGB, and arrays and tensors of uint8 or uint16 as floats in [0, 1], in lists as they came.

    Raises:
        `ValueError`: an image's mode does not say which level is white; `name` is the argument.
    """
    if isinstance(given, PIL.Image.Image):
        try:
            return as_rgb(given)
        except ValueError as error:
            raise ValueError(f"`{name}` has an image that cannot be read: {error}") from error
    if isinstance(given, (list, tuple)):
        return [as_levels(name, each) for each in given]
    white = WHITE.get(str(getattr(given, "dtype", "")).removeprefix("torch."))
    if white is None or not isinstance(given, (np.ndarray, torch.Tensor)):
        return given
    return (given.float() if isinstance(given, torch.Tensor) else given.astype(np.float32)) / white


def image_as_video(image: Any, processor: VideoProcessor, height: int, width: int) -> torch.Tensor:
    """An image, or images, resized and center-cropped to the video's aspect: frames to continue, (B, 1, 3, height, width)
    in [0, 1]."""
    image = as_levels("image", image)
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    valid = "a PIL image, an array (height, width, 3), a tensor (3, height, width), a batch or a list of these"
    of_type = len({type(each) for each in images}) == 1 and isinstance(
        images[0], (PIL.Image.Image, np.ndarray, torch.Tensor)
    )
    check(of_type, "image", image, valid, TypeError)
    for each in images:
        if not isinstance(each, PIL.Image.Image):
            is_float = each.is_floating_point() if isinstance(each, torch.Tensor) else each.dtype.kind == "f"
            check(is_float, "image", each.dtype, "of floats in [0, 1], uint8 or uint16", TypeError)
            color = each.ndim in (3, 4) and each.shape[-3 if isinstance(each, torch.Tensor) else -1] == 3
            check(color, "image", each.shape, valid)
            check(
                0 <= each.min() and each.max() <= 1, "image", f"in [{each.min():.3g}, {each.max():.3g}]", "in [0, 1]"
            )
    images = [cropped(each, height, width) for each in images]
    images = images if isinstance(image, (list, tuple)) else images[0]
    frames = processor.preprocess(images, height, width)  # in [-1, 1]
    return (frames.float() / 2 + 0.5).clamp(0, 1)[:, None]


def cropped(image: Any, height: int, width: int) -> Any:
    """The largest part of an image in the middle that has the aspect of (height, width)."""
    if isinstance(image, PIL.Image.Image):
        size = image.height, image.width
    else:
        size = tuple(image.shape[-2:] if isinstance(image, torch.Tensor) else image.shape[-3:-1])
    scale = min(size[0] / height, size[1] / width)
    kept = [min(max(round(scale * side), 1), whole) for side, whole in zip((height, width), size)]
    top, left = ((whole - side) // 2 for whole, side in zip(size, kept))
    bottom, right = top + kept[0], left + kept[1]
    if isinstance(image, PIL.Image.Image):
        return image.crop((left, top, right, bottom))
    rows, columns = slice(top, bottom), slice(left, right)
    return image[..., rows, columns] if isinstance(image, torch.Tensor) else image[..., rows, columns, :]
