"""Diffusers' checks of every pipeline, rewritten for ours on an AnyFlow-FAR transformer.

Of its common pipeline tests, those for DDUF files, xFormers, IP adapters, the Hub and U-Nets do not apply here, nor
upstream. Those marked `needs_accelerator` run if there is one.
"""

import inspect
import os
import subprocess
import sys

import pytest
import torch
from builders import far_components, far_noise, generators, processors, quiet, randn, tiny_far
from conftest import ROOT
from diffusers import AnyFlowFARPipeline, DiffusionPipeline

from tokentrim import TokenTrimPipeline


CALL = {
    "prompt": "a red circle",
    "negative_prompt": "green",
    "num_inference_steps": 2,
    "guidance_scale": 6.0,
    "height": 16,  # a latent frame is one token, and smaller than a compressed patch
    "width": 16,
    "num_frames": 9,
    "max_sequence_length": 16,
    "chunk_partition": [1, 1, 1],
    "output_type": "pt",
}
NOISE = far_noise(3, height=2, width=2)  # where ours, which draws it chunk by chunk, is held to upstream
needs_accelerator = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")


def build(**components):
    return quiet(TokenTrimPipeline(**{**far_components(), **components}))


def call(pipe, **arguments):
    return pipe(**{**CALL, "generator": torch.Generator().manual_seed(0), **arguments})[0]


def close(one, other, atol=1e-4):
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


# The call


def test_inference():
    frames = call(build())
    assert frames.shape == (1, 9, 3, 16, 16) and torch.isfinite(frames).all()
    upstream = quiet(AnyFlowFARPipeline(**far_components()))
    theirs = call(upstream, output_type="latent", latents=NOISE)
    close(call(build(), method="plain", output_type="latent", latents=NOISE), theirs, 1e-5)


def test_signature_accepts_all_upstream_arguments():
    """With the same names, in the same order, all optional."""
    names = list(inspect.signature(AnyFlowFARPipeline.__call__).parameters)
    parameters = inspect.signature(TokenTrimPipeline.__call__).parameters
    assert list(parameters)[: len(names)] == names
    assert all(parameter.default is not parameter.empty for name, parameter in parameters.items() if name != "self")


def test_dict_and_tuple_outputs_are_the_same():
    assert torch.equal(call(build()), call(build(), return_dict=False))


def test_components():
    components = far_components()
    pipe = TokenTrimPipeline(**components)
    assert set(pipe.components) == set(components)
    assert all(pipe.components[name] is components[name] for name in components if name != "scheduler")


def test_prompts_of_unequal_length_make_a_batch():
    prompts = ["a red circle", "a red", 100 * "very long"]
    frames = call(build(), prompt=prompts, negative_prompt=["green"] * 3, generator=generators(0, 1, 2))
    assert len(frames) == 3


def test_a_batch_equals_single_runs():
    prompts = ["a red circle", 100 * "very long", "a"]
    batch = call(build(), prompt=prompts, negative_prompt=["green"] * 3, generator=generators(0, 1, 2))
    for seed, prompt in enumerate(prompts):
        close(call(build(), prompt=prompt, generator=generators(seed)), batch[seed : seed + 1])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("number", [1, 2])
def test_num_videos_per_prompt(batch, number):
    texts = {"prompt": batch * ["a red circle"], "negative_prompt": batch * ["green"]}
    assert len(call(build(), **texts, num_videos_per_prompt=number)) == batch * number


def test_guidance_keeps_the_shape_and_changes_the_video():
    pipe = build()
    plain, guided = (call(pipe, guidance_scale=scale) for scale in (1.0, 7.5))
    assert plain.shape == guided.shape and not torch.equal(plain, guided)


def test_prompt_is_encoded_in_isolation():
    components = far_components()
    text_only = TokenTrimPipeline(**{**components, "transformer": None, "vae": None, "scheduler": None})
    embeds, negative = text_only.encode_prompt("a red circle", "green", max_sequence_length=16)
    rest = build(**{**components, "tokenizer": None, "text_encoder": None})
    texts = {"prompt": None, "negative_prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert torch.equal(call(rest, **texts), call(build()))


# Callbacks


def test_callback_gets_the_requested_tensors():
    pipe, seen = build(), []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, sorted(tensors)))
        return tensors

    names = pipe._callback_tensor_inputs
    for inputs in (["latents"], names):
        seen.clear()
        frames = call(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=inputs)
        assert seen == [(0, sorted(inputs)), (1, sorted(inputs))] * 3 and pipe.num_timesteps == 6
        assert torch.equal(frames, call(pipe))
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        call(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["noise"])


def test_callback_changes_the_latents_of_its_chunk():
    """Diffusers' check zeroes the last step of the call; here, every chunk has a last step."""

    def callback(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * (step == 0)}

    assert call(build(), callback_on_step_end=callback, output_type="latent").abs().sum() == 0


def test_callback_changes_guidance():
    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    pipe = build()
    call(pipe, callback_on_step_end=callback, guidance_scale=2.0)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps


@pytest.mark.parametrize("at", [1, 2, 3])
def test_interrupt(at):
    """Finished chunks are returned, and the transformer is restored."""
    steps, pipe = [], build()
    before = processors(pipe.transformer)

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = len(steps) == at
        return {}

    frames, decisions = pipe(
        **CALL | {"output_type": "latent"},
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=callback,
        return_dict=False,
    )
    num_chunks = (at - 1) // 2
    assert len(steps) == at and frames.shape[2] == len(decisions[0]) == num_chunks
    assert torch.equal(frames, call(build(), output_type="latent")[:, :, :num_chunks])
    assert processors(pipe.transformer) == before


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_interrupt_in_the_first_chunk_gives_no_frames(output_type):
    def callback(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return {}

    output = build()(**CALL | {"output_type": output_type}, callback_on_step_end=callback)
    assert len(output.frames) == 1 and len(output.frames[0]) == 0
    assert output.decisions == [[]] and output.chunk_frames == []


def test_call_after_an_error_equals_a_first_call():
    pipe, forwards = build(), []
    before = processors(pipe.transformer)

    def fail(module, args, kwargs):
        forwards.append(kwargs["kv_cache_flag"]["is_cache_step"])
        if len(forwards) == 6:  # the second context pass
            raise ZeroDivisionError

    handle = pipe.transformer.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(ZeroDivisionError):
        call(pipe)
    handle.remove()
    assert forwards == [False, False, True] * 2
    assert processors(pipe.transformer) == before and not pipe.transformer.is_gradient_checkpointing
    assert torch.equal(call(pipe), call(build()))


@pytest.mark.parametrize("forward, place", [(0, "chunk 0, step 0"), (2, "chunk 0, .*context"), (4, "chunk 1, step 1")])
def test_model_output_that_is_not_finite_raises(forward, place):
    pipe, forwards = build(), []

    def poison(module, args, output):
        forwards.append(1)
        return output + torch.nan if len(forwards) == forward + 1 else output

    handle = pipe.transformer.blocks[0].register_forward_hook(poison)
    with pytest.raises(RuntimeError, match=place):
        call(pipe)
    handle.remove()
    assert torch.equal(call(pipe), call(build()))


# Saving and loading


def test_save_and_load(tmp_path):
    pipe = build()
    pipe.save_pretrained(tmp_path)
    loaded = quiet(TokenTrimPipeline.from_pretrained(tmp_path))
    close(call(loaded), call(pipe))
    stock = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(stock) is AnyFlowFARPipeline
    ours = call(pipe, method="plain", output_type="latent", latents=NOISE)
    close(call(stock, output_type="latent", latents=NOISE), ours, 1e-5)


def test_stock_folder_loads_with_custom_pipeline(tmp_path):
    """In a fresh process, as users of a published checkpoint do."""
    stock = quiet(AnyFlowFARPipeline(**far_components()))
    stock.save_pretrained(tmp_path / "checkpoint")
    script = f"""
import sys, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline=sys.argv[2], trust_remote_code=True)
call = {CALL | {"output_type": "latent"}!r}
noise = torch.randn({tuple(NOISE.shape)}, generator=torch.Generator().manual_seed(0))
output = pipe(**call, latents=noise, method="plain")
assert len(output.decisions[0]) == 3
torch.save(output.frames, sys.argv[3])
"""
    process = subprocess.run(
        [sys.executable, "-c", script, "checkpoint", str(ROOT / "pipeline_tokentrim.py"), "frames.pt"],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    close(torch.load(tmp_path / "frames.pt"), call(stock, output_type="latent", latents=NOISE), 1e-5)


def test_save_and_load_without_optional_components(tmp_path):
    embeds, negative = build().encode_prompt("a red circle", "green", max_sequence_length=16)
    texts = {"prompt": None, "negative_prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    pipe = build(tokenizer=None, text_encoder=None, vae=None)
    pipe.save_pretrained(tmp_path)
    loaded = quiet(TokenTrimPipeline.from_pretrained(tmp_path))
    assert [getattr(loaded, name) for name in loaded._optional_components] == [None] * 3
    close(call(loaded, **texts, output_type="latent"), call(pipe, **texts, output_type="latent"))


def test_variants(tmp_path):
    build().save_pretrained(tmp_path, variant="fp16")
    loaded = quiet(TokenTrimPipeline.from_pretrained(tmp_path, variant="fp16"))
    close(call(loaded), call(build()))
    with pytest.raises((ValueError, OSError)):
        TokenTrimPipeline.from_pretrained(tmp_path, variant="bf16")


def test_a_dtype_for_each_component(tmp_path):
    build().save_pretrained(tmp_path)
    dtypes = {"transformer": torch.bfloat16, "default": torch.float16}
    loaded = TokenTrimPipeline.from_pretrained(tmp_path, torch_dtype=dtypes)
    assert loaded.transformer.dtype == torch.bfloat16
    assert loaded.text_encoder.dtype == loaded.vae.dtype == torch.float16


def test_from_pipe_keeps_the_components():
    stock = quiet(AnyFlowFARPipeline(**far_components()))
    pipe = quiet(TokenTrimPipeline.from_pipe(stock))
    assert pipe.transformer is stock.transformer and pipe.vae is stock.vae
    ours = call(pipe, method="plain", output_type="latent", latents=NOISE)
    close(ours, call(stock, output_type="latent", latents=NOISE), 1e-5)


# Precision and devices


def test_to_dtype():
    pipe = build()
    models = [component for component in pipe.components.values() if hasattr(component, "dtype")]
    assert [model.dtype for model in models] == [torch.float32] * 3
    pipe.to(dtype=torch.float16)
    assert [model.dtype for model in models] == [torch.float16] * 3


def test_bf16_stays_close_to_fp32():
    """And no farther from it than upstream."""
    size = {"height": 64, "width": 96, "chunk_partition": [1, 2, 2, 2, 2], "num_frames": 33, "output_type": "latent"}
    exact = call(build(), method="plain", **size)
    rough = call(build(transformer=tiny_far().bfloat16()), method="plain", **size)
    stock = quiet(AnyFlowFARPipeline(**far_components(tiny_far().bfloat16())))
    ours, theirs = ((frames.float() - exact).square().mean().sqrt() for frames in (rough, call(stock, **size)))
    assert rough.dtype == torch.float32 and ours < 0.2 * exact.square().mean().sqrt()
    assert ours < 1.1 * theirs


def test_layerwise_casting():
    pipe = build()
    exact = call(pipe, output_type="latent")
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    rough = call(pipe, output_type="latent")
    assert 0 < (rough - exact).square().mean() < 0.1 * exact.square().mean()


def test_attention_slicing_changes_nothing():
    pipe = build()
    expected = call(pipe)
    for slices in (1, 2):
        pipe.enable_attention_slicing(slice_size=slices)
        close(call(pipe), expected)


def test_gradient_checkpointing_and_training_mode_change_nothing():
    pipe = build()
    expected = call(pipe)
    pipe.transformer.enable_gradient_checkpointing()
    pipe.transformer.train()
    close(call(pipe), expected)


@needs_accelerator
def test_device():
    pipe = build()
    expected = call(pipe)
    frames = call(pipe.to("cuda"))
    assert frames.device.type == "cuda" and {each.device.type for each in pipe.transformer.parameters()} == {"cuda"}
    close(frames.cpu(), expected, 1e-3)


@needs_accelerator
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload(offload):
    pipe, expected = build(), call(build().to("cuda"))
    for _ in range(2):
        getattr(pipe, offload)()
        close(call(pipe).cpu(), expected.cpu(), 2e-4)
    assert "cuda" not in {each.device.type for each in pipe.transformer.parameters()}


@needs_accelerator
def test_float16():
    close(call(build().to("cuda", torch.float16)).float().cpu(), call(build().to("cuda")).cpu(), 5e-2)


# Image and video to video, as users pass them


def test_image_to_video_keeps_the_image():
    pipe, image = build(), randn(1, 1, 3, 64, 96).sigmoid()
    size = {"height": 64, "width": 96, "output_type": "latent", "chunk_partition": [1, 1, 1]}
    frames = call(pipe, video=image, **size)
    assert torch.equal(frames[:, :, :1].transpose(1, 2), pipe.encode_video(image, height=64, width=96))
    assert not torch.equal(frames[:, :, 1:], call(pipe, video=1 - image, **size)[:, :, 1:])


def test_latents_are_the_initial_noise():
    noise = far_noise(3, height=2, width=2, seed=4)
    generator = torch.Generator().manual_seed(4)
    drawn = [torch.randn(1, 4, 1, 2, 2, generator=generator) for _ in range(3)]  # chunk by chunk
    given = call(build(), latents=torch.cat(drawn, dim=2))
    assert torch.equal(given, call(build(), generator=torch.Generator().manual_seed(4)))
    assert not torch.equal(given, call(build(), latents=noise))
