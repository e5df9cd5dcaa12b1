"""A preview is the beginning of the long video of the same seed; the exceptions of `docs/promises.md` are no larger."""

import pytest
import torch
from builders import CHUNK, embeds, far_pipeline, latent_pipeline, tiny_far


def latents(pipe, num_latent_frames, **call):
    """Latents of a video of so many latent frames."""
    call = {"prompt_embeds": embeds(), "height": 32, "width": 48, "output_type": "latent", "method": "plain", **call}
    generator = torch.Generator().manual_seed(5)
    return pipe(num_frames=4 * num_latent_frames - 3, generator=generator, **call).frames


@pytest.mark.parametrize("num_latent_frames", [1, 2, 3, 4, 7, 9])
@pytest.mark.parametrize("method", ["plain", "tokentrim", "tokentrim_plus", "paper"])
def test_preview_of_any_length_is_the_beginning_of_the_video(method, num_latent_frames):
    pipe, call = latent_pipeline(), {"method": method, "num_inference_steps": 2}
    preview, video = (latents(pipe, length, **call) for length in (num_latent_frames, 30))
    assert preview.shape[2] == num_latent_frames
    assert torch.equal(preview, video[:, :, :num_latent_frames])


@pytest.mark.parametrize("num_chunks", [1, 2, 5])
@pytest.mark.parametrize("num_steps", [2, 3, 4])
def test_last_chunks_of_a_preview_with_rolling_forcing_are_the_exception(num_steps, num_chunks):
    """The chunks behind them in flight are missing: as many as there are steps, less one."""
    pipe, call = latent_pipeline(), {"rollout": "rolling_forcing", "num_inference_steps": num_steps}
    preview, video = (latents(pipe, CHUNK * length, **call).split(CHUNK, dim=2) for length in (num_chunks, 9))
    same = [torch.equal(one, other) for one, other in zip(preview, video)]
    num_same = max(num_chunks - (num_steps - 1), 0)
    assert same == [True] * num_same + [False] * (num_chunks - num_same)


@pytest.mark.parametrize("length", [1, 3, 5, 9, 2, 4, 6])
def test_partial_last_chunk_of_a_preview_with_anyflow_far_is_the_exception(length):
    pipe = far_pipeline(tiny_far(chunk_partition=(1, 2)))
    preview, video = (latents(pipe, each, num_inference_steps=2, height=64, width=96) for each in (length, 13))
    whole = length - (length - 1) % 2  # latent frames of whole chunks: 1, then 2 each
    assert torch.equal(preview[:, :, :whole], video[:, :, :whole])
    assert length == whole or not torch.equal(preview[:, :, whole:], video[:, :, whole:length])
