"""One video on two processes: Diffusers' Ulysses context parallelism with the rolling cache."""

import os
import socket
from unittest import mock

import pytest
import torch
from builders import (
    embeds,
    far_noise,
    far_pipeline,
    generators,
    latent_pipeline,
    noise,
    processors,
    roll,
    steady_noise,
    tiny_transformer,
    triggers,
)
from diffusers import ContextParallelConfig, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from diffusers.models._modeling_parallel import ParallelConfig


TRIM = {"tokentrim": {"drift_sensitivity": 0.5}}
CASES = {
    "trim": {"method": TRIM, "window_size": 9},
    "plus": {"method": "tokentrim_plus", "window_size": 15},
    "sink at another position": {"layout": {"commit_forcing": {"window_size": 9, "num_sink_frames": 3}}},
    "guidance": {"method": TRIM, "window_size": 9, "guidance_scale": 2.0, "negative_prompt_embeds": embeds(2, seed=8)},
    "rolling": {"method": TRIM, "window_size": 15, "rollout": "rolling_forcing"},
}


def roll_all(transformer, directory: str, name: str) -> None:
    """Write latents and decisions of every case, two videos that lose different tokens, to a file."""
    results = {}
    for case, settings in CASES.items():
        scheduler = (FlowMatchLCMScheduler if case == "plus" else FlowMatchEulerDiscreteScheduler)(shift=5.0)
        pipe = latent_pipeline(transformer, scheduler)
        output = roll(pipe, steady_noise(7, [4, 5]), generator=generators(0, 1), **settings)
        results[case] = (output.frames, output.decisions)
    torch.save(results, f"{directory}/{name}.pt")


def roll_on_process(rank: int, directory: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    transformer, heads = tiny_transformer(), []
    with mock.patch("torch.accelerator.device_count", return_value=1):  # Diffusers divides by it: 0 without one
        transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    norm = transformer.blocks[0].attn1.norm_k
    norm.register_forward_hook(lambda module, args, output: heads.append(output.shape[1]))
    roll_all(transformer, directory, str(rank))
    torch.distributed.destroy_process_group()
    assert {*heads} <= {3 * 6 // 2 * chunks for chunks in (1, 2)}  # half the tokens of the chunks in flight


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """On one process, and on each of two."""
    folder = str(tmp_path_factory.mktemp("parallel"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.start_processes(
        roll_on_process, (folder, port), nprocs=2, join=False, start_method="fork"
    )
    roll_all(tiny_transformer(), folder, "one")
    while not context.join():
        pass
    return [torch.load(f"{folder}/{name}.pt") for name in ("one", "0", "1")]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, results):
    (expected, decisions), *shared = (result[case] for result in results)
    if CASES[case].get("method") is TRIM:
        assert all(map(triggers, decisions))
    for latents, theirs in shared:
        torch.testing.assert_close(latents, expected, atol=1e-5, rtol=0)
        assert [[one["trim"] for one in video] for video in theirs] == [
            [one["trim"] for one in video] for video in decisions
        ]
    assert torch.equal(shared[0][0], shared[1][0]) and shared[0][1] == shared[1][1]


# Refusals, before anything runs


REFUSED = {
    "ring": ({"ring_degree": 2}, {}, "`ring_degree` must be 1, .*`ulysses_degree` instead"),
    "heads": (
        {"ulysses_degree": 4},
        {},
        "`ulysses_degree` must be a divisor of the transformer's 2 heads, but is 4",
    ),
    "tokens": (
        {"ulysses_degree": 2},
        {"latents": noise(2)[:, :, :5, :2], "chunk_partition": [4, 1]},
        "`ulysses_degree` must be a divisor of the 3 tokens of a chunk, but is 2",
    ),
    "layout": ({"ulysses_degree": 2}, {"layout": "memrope"}, "`layout` must be one that rewrites no keys"),
    "layout by head": (
        {"ulysses_degree": 2},
        {"layout": {"by_head": {"labels": [[0, 0]] * 2, "layouts": ["window"]}}},
        "`layout` must be one .* the same for all heads",
    ),
    "gradients": ({"ulysses_degree": 2}, {"method": "paper"}, "`method` must be one without guidance by gradients"),
    "noise": ({"ulysses_degree": 2}, {"generator": None}, "`generator` must be given .*same seed on every process"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_parallelism_raises(case):
    degrees, call, message = REFUSED[case]
    pipe = latent_pipeline()
    before = processors(pipe.transformer)
    pipe.transformer._parallel_config = ParallelConfig(
        ContextParallelConfig(**degrees)
    )  # as `enable_parallelism` does
    call = {"latents": noise(2), "prompt_embeds": embeds(), "generator": generators(0)[0], **call}
    with pytest.raises(ValueError, match=message):
        pipe(output_type="latent", **call)
    assert processors(pipe.transformer) == before


def test_parallel_far_raises():
    pipe = far_pipeline()
    pipe.transformer._parallel_config = ParallelConfig(ContextParallelConfig(ulysses_degree=2))
    with pytest.raises(ValueError, match="`transformer` must be a WanTransformer3DModel under context parallelism"):
        roll(pipe, far_noise(5), generator=generators(0)[0])


def test_saving_a_parallel_run_raises(tmp_path):
    pipe = latent_pipeline()
    pipe.transformer._parallel_config = ParallelConfig(ContextParallelConfig(ulysses_degree=2))
    call = {"latents": noise(2), "prompt_embeds": embeds(), "generator": generators(0)[0], "output_type": "latent"}
    with pytest.raises(ValueError, match="`state_dir` must be None under context parallelism"):
        pipe.stream(state_dir=tmp_path, **call)
    with pipe.stream(**call) as stream, pytest.raises(ValueError, match="`folder` must be .*context parallelism"):
        stream.save_state(tmp_path)
