# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""Frames to continue, in whatever form they come: `video=` and `image=` of a call."""

from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.video_processor import VideoProcessor

from ..tokentrim_checks import check


def read_video(video: Any) -> torch.Tensor:
    """Frames to continue in any of the forms that Diffusers' video processor takes: images of PIL, arrays (.., H, W, 3) or
    tensors (.., 3, H, W), of one video or several; (B, T, 3, H, W) in [0, 1]."""
    if not (isinstance(video, torch.Tensor) and video.ndim == 5):
        valid = "frames as a tensor, an array, or a list of images, of one video or several"
        processor = VideoProcessor(do_resize=False, do_normalize=False, do_convert_rgb=True)
        try:
            frames = processor.preprocess_video(video).transpose(1, 2)
        except (TypeError, ValueError, IndexError, RuntimeError, AttributeError):
            frames = None
        check(frames is not None, "video", video, valid, TypeError)
        video = frames
    return video / 255 if video.dtype == torch.uint8 else video


def image_as_video(pipe: Any, call: dict) -> torch.Tensor:
    """The image of a call, or its images, as frames to continue, (B, 1, 3, H, W) in [0, 1]."""
    image = call["image"]
    for name in ("video", "video_latents"):
        check(call[name] is None, name, call[name], "None where `image` is given")
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    valid = "a PIL image, an array (height, width, 3), a tensor (3, height, width), a batch or a list of these"
    of_type = len({type(each) for each in images}) == 1 and isinstance(
        images[0], (PIL.Image.Image, np.ndarray, torch.Tensor)
    )
    check(of_type, "image", image, valid, TypeError)
    for each in images:
        if not isinstance(each, PIL.Image.Image):
            is_float = each.is_floating_point() if isinstance(each, torch.Tensor) else each.dtype.kind == "f"
            check(is_float, "image", each.dtype, "of floats in [0, 1], or a PIL image", TypeError)
            color = each.ndim in (3, 4) and each.shape[-3 if isinstance(each, torch.Tensor) else -1] == 3
            check(color, "image", each.shape, valid)
            check(
                0 <= each.min() and each.max() <= 1, "image", f"in [{each.min():.3g}, {each.max():.3g}]", "in [0, 1]"
            )
    images = [each.convert("RGB") if isinstance(each, PIL.Image.Image) else each for each in images]
    images = images if isinstance(image, (list, tuple)) else images[0]
    frames = pipe.video_processor.preprocess(images, call["height"], call["width"])  # in [-1, 1]
    return (frames.float() / 2 + 0.5).clamp(0, 1)[:, None]
