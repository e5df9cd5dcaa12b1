"""Each tensor of a saved state in other shapes: one sentence that names the state, before a model runs."""

import re

import pytest
import torch
from builders import embeds, far_pipeline, full_pipeline, generators
from diffusers import FlowMatchLCMScheduler

from tokentrim.tokentrim_files.run_state import load_state, save_state


PROMPT = "a red circle"
CALL = {"num_frames": 61, "num_inference_steps": 2}
RUNS = {
    "a batch with guidance and weights": lambda: (
        full_pipeline(),
        {
            "prompt": [PROMPT, "blue"],
            "guidance_scale": 2.0,
            "method": [
                {"tokentrim": {"drift_sensitivity": 0.0, "warmup_chunks": 0, "prune_weight": 0.5}},
                "quarantine",
                "reanchor",
            ],
            "output_type": "np",
            "prompt_schedule": {4: "green"},
        },
    ),
    "chunks in flight": lambda: (
        full_pipeline(FlowMatchLCMScheduler(shift=5.0)),
        {"prompt": PROMPT, "rollout": "rolling_forcing", "num_inference_steps": 3, "output_type": "latent"},
    ),
    "tags and notes": lambda: (
        full_pipeline(),
        {"prompt": PROMPT, "layout": {"deep_sink": {"budget": 15}}, "output_type": "latent", "method": "plain"},
    ),
    "AnyFlow-FAR": lambda: (
        far_pipeline(height=64, width=96),
        {"prompt_embeds": embeds(), "output_type": "latent", "method": {"tokentrim": {"drift_sensitivity": 0.0}}},
    ),
}


def tensors_of(value, path=()):
    """All tensors of nested dicts and lists, and where they are."""
    if isinstance(value, torch.Tensor):
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from tensors_of(each, (*path, key))


def replaced(value, path, tensor):
    """A copy in which another tensor stands at a path."""
    if not path:
        return tensor
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], tensor)
    return copy


def distorted(tensor, number):
    """A tensor of another size, of more dimensions, or of another kind of values; which, depends on `number`."""
    if number % 4 == 0 or tensor.ndim == 0:
        return tensor[None]
    if number % 4 == 1:
        return torch.zeros(tensor.shape, dtype=torch.complex64)
    dimension = number // 4 % tensor.ndim
    if number % 4 == 2:
        return tensor.narrow(dimension, 0, tensor.shape[dimension] - 1)
    return torch.cat([tensor, tensor.narrow(dimension, 0, 1)], dimension)


def is_free(path):
    """Whether a state may hold another size: PyTorch flattens generators, and only a policy, a layout and a VAE know how much
    of the past they keep."""
    is_note, is_older = path[-3] == "layers_at_home" and path[-1] == 3, path[-2:] == ("recent", 0)
    return path[:2] in (("run", "policies"), ("run", "generators")) or path[0] == "decoder" or is_note or is_older


@pytest.mark.parametrize("run", RUNS)
def test_tensors_of_other_shapes_are_refused_in_a_sentence(run, tmp_path):
    pipe, call = RUNS[run]()
    with pipe.stream(**{**CALL, **call}, generator=generators(0)[0], state_dir=tmp_path / "run") as stream:
        for _ in range(3):
            next(stream)
        stream.save_state()
    state = load_state(tmp_path / "run")
    tensors = [(path, tensor) for path, tensor in tensors_of(state) if path[0] != "decoder" or path[-1] % 8 == 0]
    assert len(tensors) > 10
    for number, (path, tensor) in enumerate(tensors):
        wrong = distorted(tensor, number)
        save_state(tmp_path / "wrong", 3, replaced(state, path, wrong))
        try:
            with pipe.resume(tmp_path / "wrong") as stream:
                next(stream)
            assert is_free(path), (path, tensor.shape, wrong.shape)
        except ValueError as error:
            told = str(error)
            valid = "`state_dir` must be a folder with a state that this pipeline can continue"
            assert re.match(f"{valid}, but .*state-00000003.* is none: ", told), told
            assert "\n" not in told and len(told) < 500
    with pipe.resume(tmp_path / "run") as stream:
        assert next(stream).index == 3
