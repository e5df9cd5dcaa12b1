"""No overhead beside the denoiser: waiting, graphs, kernels."""

from collections.abc import Callable

import pytest
import torch
from builders import embeds, latent_pipeline, noise, roll, steady_noise, tiny_transformer
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode


class Reads(TorchDispatchMode):
    """Counts operations that wait for a device: a tensor that becomes a number or a bool."""

    WAITING = (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal, torch.ops.aten.nonzero)

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in self.WAITING
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make_scheduler", [FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler])
@pytest.mark.parametrize("settings", [{}, {"rollout": "rolling_forcing"}], ids=["chunks", "rolling"])
def test_no_denoising_step_waits_for_the_device(make_scheduler, settings):
    """The reads of a chunk do not grow with its steps. With Rolling Forcing, where each pass finishes a chunk, four
    chunks in flight need no more reads than two."""
    counts = []
    for num_steps in (2, 4):
        pipe = latent_pipeline(scheduler=make_scheduler(shift=5.0))
        call = {"num_inference_steps": num_steps, "window_size": 15, "prompt_embeds": embeds(), **settings}
        latents, counted = noise(8), []
        with pipe.stream(latents=latents, output_type="latent", method="plain", **call) as stream:
            for _ in range(7):
                with Reads() as reads:
                    next(stream)
                counted.append(reads.count)
        counts.append(counted[5:])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("at", [2, 4], ids=["denoising", "context pass"])
def test_output_that_is_not_finite_raises_and_is_not_saved(at, tmp_path):
    pipe, calls = latent_pipeline(), []

    def spoil(module, args, output):
        calls.append(None)
        return (output[0] * float("nan"),) if len(calls) == at else output

    pipe.transformer.register_forward_hook(spoil)
    where = {2: "chunk 0, step 1", 4: "chunk 0, the context pass"}[at]
    stream = pipe.stream(
        latents=noise(3), prompt_embeds=embeds(), num_inference_steps=3, output_type="latent", method="plain"
    )
    with stream, pytest.raises(RuntimeError, match=f"not finite .* in {where}"):
        next(stream)
        stream.save_state(tmp_path)
    assert not list(tmp_path.iterdir())


TRIM = {"window_size": 9, "method": {"tokentrim": {"drift_sensitivity": 1.0}}, "num_inference_steps": 2}
COMPILED = {  # traced and run as it is, since a compiler takes minutes
    "blocks": lambda model: model.compile_repeated_blocks(fullgraph=True, backend="eager"),
    "all of it": lambda model: torch.compile(model, fullgraph=True, backend="eager"),
}


def shallow(num_layers: int = 1):
    transformer = tiny_transformer()
    transformer.blocks = transformer.blocks[:num_layers]
    return transformer


def compiled(compile_: Callable, latents: torch.Tensor, num_layers: int = 1, **call):
    """A rollout on a compiled transformer, and the number of graphs after each chunk."""
    torch._dynamo.reset()
    counters.clear()
    transformer, graphs = shallow(num_layers), []
    other = compile_(transformer)
    pipe = latent_pipeline(transformer if other is None else other)
    output = roll(pipe, latents, on_chunk=lambda *_: graphs.append(counters["stats"]["unique_graphs"]), **call)
    torch._dynamo.reset()
    return output, graphs


@pytest.mark.slow
@pytest.mark.parametrize("num_chunks, way, num_layers", [(40, "blocks", 2), (12, "all of it", 1)])
def test_compiled_model_is_equal_and_makes_no_late_graphs(num_chunks, way, num_layers):
    """One graph each, with evictions after the window is full."""
    latents = steady_noise(num_chunks, [num_chunks // 2 + 2])
    expected = roll(latent_pipeline(shallow(num_layers)), latents, **TRIM)
    output, graphs = compiled(COMPILED[way], latents, num_layers, **TRIM)
    triggered = [decision["chunk"] for decision in output.decisions[0] if decision["trim"]]
    assert any(chunk > 6 for chunk in triggered)
    assert graphs[-1] == graphs[6] <= 5  # two before there is a past and one that writes it; of one length, and of any
    torch.testing.assert_close(output.frames, expected.frames, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_compiled_blocks_break_where_a_layout_rewrites_keys():
    """The same without `fullgraph=True`, which PyTorch refuses with the method's name."""
    call = {"layout": "memrope", "method": "plain", "num_inference_steps": 2}
    output, graphs = compiled(lambda model: model.compile_repeated_blocks(backend="eager"), noise(9), **call)
    assert graphs[-1] == graphs[6]
    torch.testing.assert_close(
        output.frames, roll(latent_pipeline(shallow()), noise(9), **call).frames, atol=1e-5, rtol=0
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RollingKVCache._rewrite"):
        compiled(COMPILED["blocks"], noise(3), **call)


@pytest.mark.slow
def test_compiled_blocks_are_equal_where_heads_read_different_frames():
    layouts = [{"window": {"window_size": 6}}, {"window": {"window_size": 9, "num_sink_frames": 3}}]
    call = {"layout": {"by_head": {"labels": [[0, 1]] * 2, "layouts": layouts}}, "method": "plain"}
    output, graphs = compiled(COMPILED["blocks"], noise(9), num_inference_steps=2, **call)
    assert graphs[-1] == graphs[6]
    expected = roll(latent_pipeline(shallow()), noise(9), num_inference_steps=2, **call)
    torch.testing.assert_close(output.frames, expected.frames, atol=1e-5, rtol=0)
