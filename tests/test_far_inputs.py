"""Bad input for AnyFlow-FAR raises before any model runs."""

import math

import pytest
import torch
from builders import far_components, far_noise, quiet, randn, tiny_far
from diffusers import FlowMatchLCMScheduler
from test_inputs import count_forwards, each, refuse

from tokentrim import TokenTrimPipeline


CALL = {
    "prompt": "a red circle",
    "num_frames": 21,
    "height": 64,
    "width": 96,
    "max_sequence_length": 8,
}  # 1 + 2 + 2 + 1
VIDEO = randn(1, 9, 3, 64, 96).sigmoid()  # 3 latent frames: chunks of 1 and 2

BAD = [
    # Partitions
    ({"chunk_partition": [1, 2, 2]}, ValueError, "chunk_partition", r"\[1, 2, 2\].*|.*6 latent frames"),
    ({"chunk_partition": [1, 2, 2, 2]}, ValueError, "chunk_partition", "6 latent frames"),
    ({"chunk_partition": [1, 5, 0]}, ValueError, "chunk_partition", r"\[1, 5, 0\]"),
    ({"chunk_partition": [7, -1]}, ValueError, "chunk_partition", r"\[7, -1\]"),
    ({"chunk_partition": []}, ValueError, "chunk_partition", r"\[\]"),
    ({"chunk_partition": [1.0, 5.0]}, TypeError, "chunk_partition", r"\[1.0, 5.0\]"),
    ({"chunk_partition": 6}, TypeError, "chunk_partition", "6"),
    ({"num_frames": 0}, ValueError, "num_frames", "0"),
    ({"num_frames_per_chunk": 0}, ValueError, "num_frames_per_chunk", "0"),
    ({"num_frames_per_chunk": 2.5}, TypeError, "num_frames_per_chunk", "2.5"),
    # Conditioning
    ({"video": randn(1, 25, 3, 64, 96).sigmoid()}, ValueError, "video", r"25.*|.*\[1, 3, 5\]"),
    ({"video": randn(1, 21, 3, 64, 96).sigmoid()}, ValueError, "video", r"\[1, 3, 5\]"),
    ({"video": randn(1, 5, 3, 64, 96).sigmoid()}, ValueError, "video", r"whole chunks.*\[1, 3, 5\]"),
    ({"video": VIDEO[:, :8]}, ValueError, "video", "8"),
    ({"video": VIDEO.transpose(1, 2)}, ValueError, "video", r"\(1, 3, 9, 64, 96\)"),
    ({"video": VIDEO[..., :48]}, ValueError, "video", r"\(1, 9, 3, 64, 48\)"),
    ({"video": 255 * VIDEO}, ValueError, "video", r"\[0, 1\]"),
    ({"video": 2 * VIDEO - 1}, ValueError, "video", r"\[0, 1\]"),
    ({"video": VIDEO * math.nan}, ValueError, "video", "finite"),
    ({"video": VIDEO.numpy()}, ValueError, "video", r"\(batch, frames, 3, 64, 96\)"),
    ({"video": VIDEO.expand(2, -1, -1, -1, -1)}, ValueError, "video", "2"),
    ({"video_latents": randn(1, 6, 4, 8, 12)}, ValueError, "video_latents", r"\[1, 3, 5\]"),
    ({"video_latents": randn(1, 2, 4, 8, 12)}, ValueError, "video_latents", r"\[1, 3, 5\]"),
    ({"video_latents": randn(1, 4, 3, 8, 12)}, ValueError, "video_latents", r"\(1, 4, 3, 8, 12\)"),
    ({"video": VIDEO, "video_latents": randn(1, 3, 4, 8, 12)}, ValueError, "video_latents", "None"),
    ({"protect_conditioning": 1}, TypeError, "protect_conditioning", "1"),
    # The context
    ({"window_size": 4}, ValueError, "window_size", "3 chunks in one pass of 5"),
    ({"window_size": 6, "num_sink_frames": 2}, ValueError, "window_size", "7.*2 sink frames"),
    ({"use_kv_cache": False}, ValueError, "use_kv_cache", "False"),
    ({"rollout": "rolling_forcing"}, ValueError, "rollout", "self_forcing.*AnyFlow-FAR"),
    ({"use_mean_velocity": None}, TypeError, "use_mean_velocity", "None"),
    ({"pad_keys": 0}, TypeError, "pad_keys", "0"),
    ({"method": "paper"}, ValueError, "flowmo: iterations", "3 latent frames"),
    # Sizes
    ({"height": 72}, ValueError, "height", "16"),
    ({"height": 16}, ValueError, "height", ">= 32.*3 chunks"),
    ({"width": 16, "chunk_partition": [1, 1, 1, 3]}, ValueError, "width", ">= 32"),
    ({"latents": far_noise(7)}, ValueError, "latents", r"\(1, 4, 6, 8, 12\)"),
]


def pipeline(transformer=None):
    return quiet(TokenTrimPipeline(**far_components(transformer)))


@each(BAD)
def test_bad_argument_raises(arguments, error, name, message):
    refuse(pipeline(), {**CALL, **arguments}, error, name, message)


@pytest.mark.parametrize(
    "config, name, message",
    [
        ({"patch_size": (2, 2, 2), "compressed_patch_size": (2, 4, 4)}, "patch_size", r"\(2, 2, 2\)"),
        ({"patch_size": (1, 2, 4)}, "patch_size", r"\(1, 2, 4\)"),
        ({"compressed_patch_size": (2, 4, 4)}, "compressed_patch_size", r"multiples of 2, but is \(2, 4, 4\)"),
        ({"compressed_patch_size": (1, 3, 4)}, "compressed_patch_size", r"\(1, 3, 4\)"),
        ({"full_chunk_limit": 1}, "full_chunk_limit", "an int >= 2.*1"),
    ],
    ids=str,
)
def test_model_that_upstream_cannot_run_raises(config, name, message):
    refuse(pipeline(tiny_far(**config)), CALL, ValueError, f"transformer.config.{name}", message)


def test_arguments_at_the_limits_are_accepted():
    """The shortest window; three chunks of a video smaller than a compressed patch; the longest conditioning."""
    arguments = {**CALL, "num_inference_steps": 1, "output_type": "latent"}
    assert pipeline()(**arguments, window_size=5).frames.shape[2] == 6
    small = {**arguments, "height": 16, "width": 16, "chunk_partition": [1, 4, 1]}
    assert pipeline()(**small).frames.shape == (1, 4, 6, 2, 2)
    given = randn(1, 5, 4, 8, 12)
    frames = pipeline()(**arguments, video_latents=given).frames
    assert torch.equal(frames[:, :, :5], given.transpose(1, 2))


def test_re_noising_schedulers_use_the_given_noise():
    pipe, components = pipeline(), far_components()
    forwards = count_forwards(pipe)
    with pytest.raises(ValueError, match="`renoise`"):
        pipe(**CALL, renoise=lambda chunk, step: None)
    assert not forwards
    pipe = quiet(TokenTrimPipeline(**{**components, "scheduler": FlowMatchLCMScheduler(shift=5.0)}))
    asked = []

    def renoise(chunk, step):
        asked.append((chunk, step))
        return far_noise([1, 2, 2, 1][chunk])

    pipe(**CALL, num_inference_steps=2, output_type="latent", renoise=renoise)
    assert asked == [(chunk, 0) for chunk in range(4)]
