"""`image=`: one frame, in any form, becomes the first of the video."""

import numpy as np
import PIL.Image
import pytest
import torch
from builders import far_components, full_pipeline, generators, quiet, randn

from tokentrim import TokenTrimPipeline


HEIGHT, WIDTH = 32, 48
CALL = {"prompt": "a red circle", "num_frames": 21, "height": HEIGHT, "width": WIDTH, "output_type": "latent"}


def picture(height=HEIGHT, width=WIDTH, seed=0) -> PIL.Image.Image:
    small = (randn(4, 6, 3, seed=seed).sigmoid().numpy() * 255).astype(np.uint8)
    return PIL.Image.fromarray(small).resize((width, height), PIL.Image.BICUBIC)


def as_array(image) -> np.ndarray:
    return np.asarray(image, np.float32) / 255


def as_tensor(image) -> torch.Tensor:
    return torch.from_numpy(as_array(image)).permute(2, 0, 1)


def generate(pipe=None, **arguments):
    pipe = full_pipeline() if pipe is None else pipe
    return pipe(**{**CALL, "generator": generators(0), **arguments})


FORMS = {
    "PIL": lambda image: image,
    "with an alpha channel": lambda image: image.convert("RGBA"),
    "array": as_array,
    "array of uint8": np.asarray,
    "array of uint16": lambda image: np.asarray(image, np.uint16) * 257,
    "tensor of uint8": lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
    "array, batch": lambda image: as_array(image)[None],
    "tensor": as_tensor,
    "tensor, batch": lambda image: as_tensor(image)[None],
    "list": lambda image: [image],
}


@pytest.mark.parametrize("form", FORMS)
def test_an_image_is_a_video_of_one_frame(form):
    expected = generate(video=as_tensor(picture())[None, None])
    output = generate(image=FORMS[form](picture()))
    torch.testing.assert_close(output.frames, expected.frames, atol=1e-4, rtol=0)
    assert output.frames.shape[2] == 6 and len(output.decisions[0]) == 3
    assert full_pipeline().plan(image=picture(), **CALL).sizes.chunk_partition == [1, 3, 3]


GREY = {
    "8 bits": lambda levels: PIL.Image.fromarray(levels),
    "16 bits": lambda levels: PIL.Image.fromarray(levels.astype(np.uint16) * 257),
    "floats": lambda levels: PIL.Image.fromarray(levels.astype(np.float32) / 255),
    "palette": lambda levels: PIL.Image.fromarray(levels).quantize(256),
    "opaque": lambda levels: PIL.Image.fromarray(levels).convert("LA"),
}


@pytest.mark.parametrize("form", GREY)
def test_gray_images_of_every_mode_keep_their_levels(form):
    """In `image=` and in every form of `video=`."""
    levels = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
    image, pipe = GREY[form](levels), full_pipeline()
    expected = torch.from_numpy(levels / 255).float().expand(1, 1, 3, HEIGHT, WIDTH)
    for given in ({"image": image}, {"image": [image]}, {"video": [image]}, {"video": [[image]]}):
        torch.testing.assert_close(pipe.plan(**given, **CALL).inputs.video, expected, atol=1e-5, rtol=0)


def test_uint16_video_is_scaled_by_its_white():
    frames = np.asarray(picture(), np.uint16)[None] * 257
    for video in (frames, torch.from_numpy(frames).permute(0, 3, 1, 2)):
        expected = torch.from_numpy(frames / 65535).float().permute(0, 3, 1, 2)[None]
        torch.testing.assert_close(full_pipeline().plan(video=video, **CALL).inputs.video, expected)


CROPS = {  # size of an image, and the part of it (top, left, bottom, right) that has the aspect of 32 x 48
    (20, 60): (0, 15, 20, 45),
    (64, 48): (16, 0, 48, 48),
    (33, 49): (0, 0, 33, 49),
    (16, 24): (0, 0, 16, 24),
    (1, 1000): (0, 499, 1, 501),
    (1000, 1): (499, 0, 500, 1),
}


@pytest.mark.parametrize("size", CROPS, ids=str)
@pytest.mark.parametrize("form", ["PIL", "array", "tensor", "array, batch", "array of uint8", "list"])
def test_image_is_cropped_to_the_aspect_of_the_video_and_resized_as_in_diffusers(form, size):
    top, left, bottom, right = CROPS[size]
    image, pipe = FORMS[form](picture(*size)), full_pipeline()
    expected = FORMS["list" if form == "list" else "PIL" if form == "PIL" else "array"](
        picture(*size).crop((left, top, right, bottom))
    )
    if form == "tensor":
        expected = FORMS["tensor"](picture(*size).crop((left, top, right, bottom)))
    frame = pipe.video_processor.preprocess(expected, HEIGHT, WIDTH)[:, None] / 2 + 0.5
    torch.testing.assert_close(pipe.plan(image=image, **CALL).inputs.video, frame)


def test_a_circle_stays_a_circle():
    """In a picture that is twice as wide as the video."""
    rows, columns = np.mgrid[:96, :288]
    levels = 255 * ((rows - 48) ** 2 + (columns - 144) ** 2 < 30**2).astype(np.uint8)
    video = full_pipeline().plan(image=PIL.Image.fromarray(levels), **CALL).inputs.video[0, 0, 0] > 0.5
    assert int(video.any(dim=0).sum()) == int(video.any(dim=1).sum()) == 20


def test_images_of_several_sizes_make_a_batch():
    images = [picture(20, 60), picture(64, 48)]
    video = full_pipeline().plan(**{**CALL, "prompt": ["a red circle"] * 2}, image=images).inputs.video
    for image, frames in zip(images, video):
        expected = full_pipeline().plan(image=image, **CALL).inputs.video[0]
        torch.testing.assert_close(frames, expected)


def test_image_is_the_first_frame_of_the_video():
    """Within the accuracy of the VAE: its weights are random, so its output for the frame alone is the standard."""
    pipe = full_pipeline()
    output = generate(pipe, image=picture(), output_type="pt")
    latents = pipe.encode_video(as_tensor(picture())[None, None], HEIGHT, WIDTH).transpose(1, 2)
    torch.testing.assert_close(output.frames[:, :1], pipe.decode_latents(latents.float(), "pt"), atol=1e-4, rtol=0)
    assert output.frames.shape[1] == 21


def test_one_image_serves_all_prompts_or_each_its_own():
    prompts, first, second = ["a red circle", "a blue square"], picture(), picture(seed=1)
    alike = generate(prompt=prompts, image=first, generator=generators(0, 1)).frames
    each = generate(prompt=prompts, image=[first, second], generator=generators(0, 1)).frames
    torch.testing.assert_close(alike[0], each[0], atol=1e-4, rtol=0)
    single = generate(prompt=prompts[1], image=second, generator=generators(1)).frames
    torch.testing.assert_close(each[1:], single, atol=1e-4, rtol=0)
    assert not torch.allclose(alike[1], each[1], atol=1e-2)


def test_stream_with_an_image_resumes(tmp_path):
    call = {**CALL, "num_frames": 33, "generator": generators(0)}
    with full_pipeline().stream(image=picture(), **call, state_dir=tmp_path, save_every=1) as stream:
        chunks = [next(stream).latents for _ in range(3)]
        stream.save_state()
    assert [chunk.shape[2] for chunk in chunks] == [1, 3, 3]
    with pytest.raises(ValueError, match="`image` must be given again"):
        full_pipeline().resume(tmp_path)
    with full_pipeline().resume(tmp_path, image=picture()) as stream:
        rest = [chunk.latents for chunk in stream]
    whole = generate(num_frames=33, image=picture()).frames
    assert torch.equal(torch.cat([*chunks, *rest], dim=2)[:, :, :9], whole)


def test_anyflow_far_begins_with_a_chunk_of_one_frame():
    pipe = quiet(TokenTrimPipeline(**far_components()))
    size = {"height": 64, "width": 96, "num_frames": 17, "num_inference_steps": 1, "max_sequence_length": 8}
    output = generate(pipe, image=picture(), **size)
    expected = generate(pipe, video=pipe.plan(image=picture(), **{**CALL, **size}).inputs.video, **size)
    assert torch.equal(output.frames, expected.frames)


@pytest.mark.parametrize(
    "image, error, message",
    [
        ("fox.png", TypeError, "`image` must be a PIL image, an array .*'fox.png'"),
        ([picture(), as_tensor(picture())], TypeError, "`image` must be a PIL image"),
        ([], TypeError, "`image` must be a PIL image"),
        (
            np.asarray(picture(), np.int32),
            TypeError,
            r"`image` must be of floats in \[0, 1\], uint8 or uint16, but is .*int32",
        ),
        (
            PIL.Image.fromarray(as_array(picture())[..., 0] * 2),
            ValueError,
            r"`image` has an image .* must be in \[0, 1\]",
        ),
        (as_tensor(picture()) * 2 - 1, ValueError, r"`image` must be in \[0, 1\], but is 'in \[-"),
        (as_array(picture())[..., 0], ValueError, "`image` must be a PIL image, an array"),
        (randn(4, 4, 6).sigmoid(), ValueError, "`image` must be a PIL image, an array"),
        ([picture()] * 3, ValueError, "a batch that divides the 1 videos"),
    ],
    ids=["path", "mixed", "empty", "int32", "floats of PIL", "range", "one channel", "four channels", "three for one"],
)
def test_invalid_image_raises(image, error, message):
    with pytest.raises(error, match=message):
        generate(image=image)


@pytest.mark.parametrize("other", ["video", "video_latents"])
def test_image_and_video_together_raise(other):
    with pytest.raises(ValueError, match=f"`{other}` must be None where `image` is given"):
        generate(image=picture(), **{other: as_tensor(picture())[None, None]})
