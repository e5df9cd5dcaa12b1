"""Switches of Diffusers work exactly, or raise before anything runs: the rows of docs/performance.md."""

import pytest
import torch
from builders import (
    embeds,
    full_pipeline,
    generators,
    latent_pipeline,
    processors,
    roll,
    steady_noise,
    tiny_transformer,
    triggers,
)
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.hooks import (
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
    apply_first_block_cache,
    apply_layer_skip,
)
from originals import RANK, lora_matrices, original


CALL = {"window_size": 9, "method": {"tokentrim": {"drift_sensitivity": 1.0}}}
LATENTS = steady_noise(7, [4])


def rolled(transformer=None, **kwargs) -> torch.Tensor:
    """Latents of a rollout with evictions."""
    output = roll(latent_pipeline(transformer), LATENTS, **CALL, **kwargs)
    assert triggers(output.decisions[0])
    return output.frames


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    return rolled()


# Caches of Diffusers, and other hooks


CACHES = {
    "first block": FirstBlockCacheConfig(threshold=0.1),
    "mag": MagCacheConfig(num_inference_steps=2, mag_ratios=torch.ones(2)),
    "pyramid": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "faster": FasterCacheConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500),
    "taylor": TaylorSeerCacheConfig(),
    "sea": SeaCacheConfig(),
    "text": TextKVCacheConfig(),
}


@pytest.mark.parametrize("cache", CACHES)
def test_enabled_cache_raises_before_anything_runs(cache, plain):
    pipe, called = latent_pipeline(), []
    pipe.transformer.register_forward_pre_hook(lambda *_: called.append(1))
    before = processors(pipe.transformer)
    pipe.transformer.enable_cache(CACHES[cache])
    name = type(CACHES[cache]).__name__
    with pytest.raises(ValueError, match=f"`transformer` must be .*disable_cache.*but is '{name}'"):
        roll(pipe, LATENTS, **CALL)
    assert not called and processors(pipe.transformer) == before
    pipe.transformer.disable_cache()
    assert torch.equal(roll(pipe, LATENTS, **CALL).frames, plain)


HOOKS = {
    "FBC": lambda transformer: apply_first_block_cache(transformer, FirstBlockCacheConfig()),
    "FeedForwardSkip": lambda transformer: apply_layer_skip(transformer, LayerSkipConfig([1])),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_layer_skipping_hook_raises_however_it_was_added(hook):
    pipe = latent_pipeline()
    HOOKS[hook](pipe.transformer)
    with pytest.raises(ValueError, match=f"`transformer` must be .*but is '{hook}"):
        pipe.plan(latents=LATENTS, output_type="latent", prompt_embeds=embeds())


def test_enabled_cache_raises_between_two_chunks():
    pipe = latent_pipeline()
    before = processors(pipe.transformer)
    with streamed(pipe) as stream:
        next(stream)
        pipe.transformer.enable_cache(FirstBlockCacheConfig())
        with pytest.raises(ValueError, match="`transformer` must be .*'FirstBlockCacheConfig'"):
            next(stream)
    assert processors(pipe.transformer) == before


def streamed(pipe, **kwargs):
    call = {"latents": LATENTS, "prompt_embeds": embeds(), "num_inference_steps": 2, **CALL}
    return pipe.stream(output_type="latent", **call, **kwargs)


# LoRA


def adapter_file(folder, seed: int):
    """A LoRA of every linear layer of the blocks, saved as a Diffusers pipeline saves it."""
    layers = {}
    for key in tiny_transformer().state_dict():
        if (module := original(key).removesuffix(".weight")) in lora_matrices():
            down, up = (torch.roll(each, seed, dims=0) for each in lora_matrices()[module])
            name = key.removesuffix(".weight")
            layers |= {f"{name}.lora_A.weight": 0.3 * down, f"{name}.lora_B.weight": 0.3 * up}
    WanPipeline.save_lora_weights(folder, layers, weight_name=f"{seed}.safetensors")
    return folder / f"{seed}.safetensors", layers


def merged(*adapters: tuple[dict, float]) -> WanTransformer3DModel:
    """W + sum of scale B A; alpha is the rank if a file has none."""
    transformer = tiny_transformer()
    state = transformer.state_dict()
    for layers, scale in adapters:
        for name, down in layers.items():
            if "lora_A" in name:
                up = layers[name.replace("lora_A", "lora_B")]
                assert down.shape[0] == RANK
                state[name.replace(".lora_A", "")] += scale * up @ down
    return transformer


def test_lora(tmp_path, plain):
    """Loaded, scaled, two together, fused and unloaded: always the rollout of the merged weights."""
    (first, layers), (second, others) = (adapter_file(tmp_path, seed) for seed in (0, 1))
    pipe = latent_pipeline()

    def same_as(*adapters):
        torch.testing.assert_close(roll(pipe, LATENTS, **CALL).frames, rolled(merged(*adapters)), atol=1e-4, rtol=0)

    pipe.load_lora_weights(first, adapter_name="first")
    same_as((layers, 1.0))
    pipe.set_adapters("first", 0.5)
    same_as((layers, 0.5))
    pipe.load_lora_weights(second, adapter_name="second")
    pipe.set_adapters(["first", "second"], [0.5, -0.7])
    same_as((layers, 0.5), (others, -0.7))
    pipe.fuse_lora()
    same_as((layers, 0.5), (others, -0.7))
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert (roll(pipe, LATENTS, **CALL).frames - plain).abs().max() < 1e-5


def test_lora_between_two_chunks(tmp_path):
    """The weights change at once, also those that project the prompt; the context stays as it was written."""
    file, layers = adapter_file(tmp_path, 0)
    weak, strong, stock = merged((layers, 0.4)), merged((layers, 1.0)), tiny_transformer()
    pipe, swapped = latent_pipeline(), latent_pipeline()
    changes = {
        1: (lambda: pipe.load_lora_weights(file, adapter_name="first"), strong),
        3: (lambda: pipe.set_adapters("first", 0.4), weak),
        4: (pipe.unload_lora_weights, stock),
    }
    with streamed(pipe) as ours, streamed(swapped) as reference:
        for index in range(6):
            if index in changes:
                change, transformer = changes[index]
                change()
                swapped.transformer.load_state_dict(transformer.state_dict())
                reference.set_prompt(embeds())  # projects it again
            torch.testing.assert_close(next(ours).latents, next(reference).latents, atol=1e-4, rtol=0)


# Memory


@pytest.mark.parametrize(
    "level", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]
)
def test_group_offload(level, plain):
    pipe, cpu = latent_pipeline(), torch.device("cpu")
    pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, **level)
    assert torch.equal(roll(pipe, LATENTS, **CALL).frames, plain)


def test_model_offload_changes_no_bit():
    """On a CPU, the test can show that Accelerate's hooks are present and the video is the same."""
    call = {"prompt": "red circle", "num_frames": 21, "generator": generators(0)}
    expected = full_pipeline()(**call | {"generator": generators(0)}).frames
    pipe = full_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    assert (pipe(**call).frames == expected).all()


def test_sequential_offload_hooks_change_nothing(plain):
    """Only the transformer: without a GPU, Accelerate fails on the buffers of a text encoder."""
    accelerate = pytest.importorskip("accelerate")
    transformer = accelerate.cpu_offload(tiny_transformer(), "cpu", offload_buffers=True)
    assert {parameter.device.type for parameter in transformer.parameters()} == {"meta"}
    assert torch.equal(rolled(transformer), plain)


def test_layerwise_casting():
    """Weights stored in fp8 act as their rounded values."""
    transformer, expected = tiny_transformer(), tiny_transformer()
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    rounded = [name for name, weight in transformer.named_parameters() if weight.dtype == torch.float8_e4m3fn]
    assert len(rounded) > 20
    for name in rounded:
        weight = expected.get_parameter(name)
        weight.data = weight.to(torch.float8_e4m3fn).to(torch.float32)
    torch.testing.assert_close(rolled(transformer), rolled(expected), atol=1e-5, rtol=0)


def test_int8_weights(tmp_path, plain):
    """torchao through Diffusers' quantization config: as far from the exact rollout as rounded weights."""
    torchao = pytest.importorskip("torchao.quantization")
    from diffusers import TorchAoConfig

    tiny_transformer().save_pretrained(tmp_path)
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    transformer = WanTransformer3DModel.from_pretrained(
        tmp_path, quantization_config=config, torch_dtype=torch.float32
    )
    assert "int8" in repr(transformer.blocks[0].attn1.to_q.weight)
    expected = WanTransformer3DModel.from_pretrained(tmp_path)
    for name, weight in transformer.state_dict().items():
        if hasattr(weight, "dequantize"):
            expected.get_parameter(name).data = weight.dequantize()
    torch.testing.assert_close(rolled(transformer.eval()), rolled(expected.eval()), atol=1e-4, rtol=0)


# Attention backends


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash"])
def test_attention_backends(backend, plain):
    transformer = tiny_transformer()
    transformer.set_attention_backend(backend)
    try:
        torch.testing.assert_close(rolled(transformer), plain, atol=1e-5, rtol=0)
    finally:
        transformer.set_attention_backend("native")  # Diffusers makes it the active one
