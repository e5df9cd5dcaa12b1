"""Attention through the cache against attention without a cache."""

import pytest
import torch
from builders import (
    GRID,
    NUM_TOKENS,
    begin_pass,
    embeds,
    latent_pipeline,
    noise,
    processors,
    randn,
    roll,
    steady_noise,
    tiny_transformer,
    triggers,
)
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from oracle import masked_flow
from torch.overrides import TorchFunctionMode

from tokentrim import RollingKVCache, WindowLayout
from tokentrim.tokentrim_backbones.attention import cached_attention, takes_mask
from tokentrim.tokentrim_backbones.wan import rotary_dims


TIMES = (900.0, 300.0)


def chunks_of(*sizes, batch=1, seed=1):
    return [randn(batch, 4, size, 4, 6, seed=seed + 10 * i) for i, size in enumerate(sizes)]


def forward(transformer, chunk, timestep, text):
    return transformer(chunk, torch.full((len(chunk),), timestep), text, return_dict=False)[0]


def commit(transformer, cache, chunk, text):
    begin_pass(cache, chunk.shape[2], "commit")
    with cache.writing():
        forward(transformer, chunk, 0.0, text)


class KeyLengths(TorchFunctionMode):
    """Records how many keys every attention reads."""

    def __init__(self):
        super().__init__()
        self.lengths = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            key = kwargs["key"] if "key" in kwargs else args[1]
            self.lengths.append(key.shape[-2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("head_dim", [12, 20])
@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (1, 2, 4, 1)])
def test_cached_rollout_equals_block_causal_forward(sizes, head_dim):
    transformer, text = tiny_transformer(head_dim=head_dim), embeds()
    cache = RollingKVCache(GRID, rotary_dims(transformer), 1)
    past, sees = [], []
    with torch.no_grad():
        for chunk, noisy in zip(chunks_of(*sizes), chunks_of(*sizes, seed=2)):
            seen = torch.ones(sum(each.shape[2] for each in past) * NUM_TOKENS, dtype=torch.bool)
            for timestep in TIMES:
                expected = masked_flow(transformer, past, noisy, timestep, text, [*sees, seen])
                begin_pass(cache, chunk.shape[2])
                with cached_attention(transformer, cache):
                    flow = forward(transformer, noisy, timestep, text)
                torch.testing.assert_close(flow, expected, atol=1e-5, rtol=0)
            with cached_attention(transformer, cache):
                commit(transformer, cache, chunk, text)
            past.append(chunk)
            sees.append(seen)


@pytest.mark.parametrize("num_sink_frames", [0, 2])
@pytest.mark.parametrize("branches", [1, 2])
def test_eviction_equals_attention_at_minus_infinity(branches, num_sink_frames):
    """Videos hold different numbers of tokens, each in all guidance branches; one has lost everything."""
    transformer, batch = tiny_transformer(), 3
    past, noisy, text = chunks_of(3, 3, batch=batch), noise(1, batch), embeds(branches * batch)
    evictions = {0: [1, 4, 5], 2: list(range(NUM_TOKENS))}
    cache = RollingKVCache(GRID, rotary_dims(transformer), batch, layout=WindowLayout(num_sink_frames=num_sink_frames))
    with torch.no_grad(), cached_attention(transformer, cache):
        for chunk in past:
            commit(transformer, cache, chunk.repeat(branches, 1, 1, 1, 1), text)
        cache.evict(evictions)
        begin_pass(cache, 3)
        flow = forward(transformer, noisy.repeat(branches, 1, 1, 1, 1), 700.0, text)

    for row in range(branches * batch):
        video = row % batch
        tokens = torch.arange(6 * NUM_TOKENS)
        evicted = torch.isin(tokens % NUM_TOKENS, torch.tensor(evictions.get(video, [])))
        last = ~evicted | (tokens // NUM_TOKENS < num_sink_frames)
        sees = [torch.ones(0).bool(), torch.ones(3 * NUM_TOKENS).bool(), last]
        single = [chunk[video : video + 1] for chunk in past]
        with torch.no_grad():
            expected = masked_flow(transformer, single, noisy[video : video + 1], 700.0, text[row : row + 1], sees)
        torch.testing.assert_close(flow[row : row + 1], expected, atol=1e-5, rtol=0)


def test_eviction_shrinks_what_attention_reads():
    transformer, text = tiny_transformer(), embeds(2)
    cache = RollingKVCache(GRID, rotary_dims(transformer), 2)
    lengths = []
    with torch.no_grad(), cached_attention(transformer, cache):
        for chunk in chunks_of(3, 3, batch=2):
            commit(transformer, cache, chunk, text)
        begin_pass(cache, 3)
        for evictions in ({}, {0: [0, 2]}, {1: [1, 2, 3]}):
            cache.evict(evictions)
            with KeyLengths() as keys:
                forward(transformer, noise(1, 2), 700.0, text)
            lengths.append(set(keys.lengths) - {text.shape[1]})
    # 6 frames of 6 tokens before 3 of the chunk; the second video holds all until it loses 3 of 6, the first 2 of 6
    assert lengths == [{36 + 18}, {36 + 18}, {24 + 18}]


@pytest.mark.parametrize("settings", [{"window_size": 9}, {"window_size": 7, "num_sink_frames": 1}])
def test_attention_never_reads_beyond_the_window(settings):
    with KeyLengths() as keys:
        roll(latent_pipeline(), noise(8), method="plain", **settings)
    assert max(keys.lengths) == settings["window_size"] * NUM_TOKENS


def test_prompt_is_projected_once_per_change():
    pipe = latent_pipeline()
    projections = []
    for block in pipe.transformer.blocks:
        block.attn2.to_k.register_forward_hook(lambda *_: projections.append(1))

    def change_once(pipe, step, timestep, tensors):
        seen.append(step)
        return {"prompt_embeds": embeds(seed=99)} if len(seen) == 3 else {}

    roll(pipe, noise(4), method="plain")
    assert len(projections) == len(pipe.transformer.blocks)
    seen = []
    roll(pipe, noise(4), method="plain", callback_on_step_end=change_once)
    assert len(projections) == 3 * len(pipe.transformer.blocks)


def test_processors_are_restored_after_an_exception():
    transformer = tiny_transformer()
    before = processors(transformer)
    cache = RollingKVCache(GRID, rotary_dims(transformer), 1)
    with pytest.raises(KeyboardInterrupt):
        with cached_attention(transformer, cache):
            assert not set(before) & set(processors(transformer))
            raise KeyboardInterrupt
    assert processors(transformer) == before


def test_fused_projections_change_nothing():
    transformer = tiny_transformer()
    latents = noise(3)
    plain = roll(latent_pipeline(transformer), latents).frames
    transformer.fuse_qkv_projections()
    torch.testing.assert_close(roll(latent_pipeline(transformer), latents).frames, plain, atol=1e-5, rtol=0)


# Kernels without masks


def rolled_on(backend, *args, **kwargs):
    """Diffusers activates the backend of a transformer; restore the native one afterwards."""
    transformer = tiny_transformer()
    transformer.set_attention_backend(backend)
    try:
        return roll(latent_pipeline(transformer), *args, **kwargs).frames
    finally:
        transformer.set_attention_backend("native")


@pytest.mark.parametrize(
    ("latents", "settings"),
    [
        (steady_noise(7, [4]), {"method": "plain", "layout": {"recency": {"window_size": 15}}}),
        (steady_noise(7, [4]), {"method": "plain", "layout": {"attention_bias": {"window_size": 9}}}),
        (steady_noise(7, [4, 5]), {"drift_sensitivity": 0.5}),  # videos that lose different tokens
        (steady_noise(7, [4, 5]), {"method": {"tokentrim": {"drift_sensitivity": 0.5, "prune_weight": 0.3}}}),
    ],
    ids=["recency", "bias", "batch", "soft prune"],
)
def test_kernel_without_masks_gives_the_same_output(latents, settings):
    """Torch's flash kernel refuses masks, as flash-attn's kernels do."""
    text = embeds(len(latents))
    expected, flash = (
        rolled_on(backend, latents, prompt_embeds=text, **settings) for backend in ("native", "_native_flash")
    )
    torch.testing.assert_close(flash, expected, atol=1e-4, rtol=0)


class Kernel:
    """Stands for a missing backend: torch's attention, and the masks that it received."""

    def __init__(self, monkeypatch, backend: str, takes_masks: bool = False):
        self.masks, self.takes_masks, self.num_calls = [], takes_masks, 0
        self.backend = AttentionBackendName(backend)
        monkeypatch.setitem(_AttentionBackendRegistry._backends, self.backend, self)
        monkeypatch.setitem(
            _AttentionBackendRegistry._supported_arg_names,
            self.backend,
            {"query", "key", "value", "attn_mask", "scale"},
        )

    def __call__(self, query, key, value, attn_mask=None, scale=None):
        self.num_calls += 1
        if attn_mask is not None:
            assert self.takes_masks, "this kernel refuses any mask"
            self.masks.append(attn_mask)
        heads_first = (each.transpose(1, 2) for each in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(
            *heads_first, attn_mask=attn_mask, scale=scale
        ).transpose(1, 2)

    def transformer(self):
        transformer = tiny_transformer()
        for block in transformer.blocks:
            block.attn1.processor._attention_backend = block.attn2.processor._attention_backend = self.backend
        return transformer


BATCH = steady_noise(7, [4, 5, 4])
TRIM = {"method": {"tokentrim": {"drift_sensitivity": 0.5}}, "window_size": 9}


GUIDANCE = {"guidance_scale": 2.0, "negative_prompt_embeds": embeds(3, seed=8)}


@pytest.mark.parametrize(("backend", "guidance"), [("flash", {}), ("sage_varlen", {}), ("flash_varlen", GUIDANCE)])
def test_videos_that_lose_different_tokens_need_no_mask(backend, guidance, monkeypatch):
    """Rows of equal length are attended together, and each video equals its single run."""
    kernel = Kernel(monkeypatch, backend)
    output = roll(latent_pipeline(kernel.transformer()), BATCH, prompt_embeds=embeds(3), **TRIM, **guidance)
    assert kernel.num_calls and not kernel.masks
    assert len({tuple(triggers(decisions)) for decisions in output.decisions}) > 1
    for video in range(3):
        own = {name: value[video : video + 1] if name.startswith("neg") else value for name, value in guidance.items()}
        alone = roll(
            latent_pipeline(), BATCH[video : video + 1], prompt_embeds=embeds(3)[video : video + 1], **TRIM, **own
        )
        torch.testing.assert_close(output.frames[video : video + 1], alone.frames, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["native", "flash_varlen_hub"])
def test_kernels_that_accept_masks_get_them(backend, monkeypatch):
    kernel = Kernel(monkeypatch, backend, takes_masks=True)
    roll(latent_pipeline(kernel.transformer()), BATCH, prompt_embeds=embeds(3), **TRIM)
    assert kernel.masks and all(mask.dtype == torch.bool for mask in kernel.masks)


@pytest.mark.parametrize(
    ("backend", "of_bool", "of_float"),
    [
        (None, True, True),
        ("native", True, True),
        ("_native_efficient", True, True),
        ("flex", True, True),
        ("flash", False, False),
        ("_flash_3_hub", False, False),
        ("flash_4_hub", False, False),
        ("flash_varlen_hub", True, False),
        ("flash_varlen", False, False),
        ("sage_varlen", False, False),
        ("sage", False, False),
        ("aiter_fa2_hub", False, False),
        ("_native_flash", False, False),
    ],
)
def test_backends_are_known_by_the_masks_they_accept(backend, of_bool, of_float):
    assert takes_mask(backend, torch.ones(1, dtype=torch.bool)) == of_bool
    assert takes_mask(backend, torch.zeros(1)) == of_float
