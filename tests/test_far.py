"""AnyFlow-FAR: with the gate shut, the rollout equals Diffusers' AnyFlowFARPipeline; and its additions."""

import pytest
import torch
from builders import (
    TEXT_DIM,
    TEXT_LENGTH,
    embeds,
    far_components,
    far_noise,
    far_pipeline,
    generators,
    held_tokens,
    quiet,
    randn,
    tiny_far,
)
from diffusers import AnyFlowFARPipeline
from diffusers.models.attention_dispatch import attention_backend

from tokentrim import TokenTrimPipeline
from tokentrim.tokentrim_backbones.backbone import BackboneOptions
from tokentrim.tokentrim_backbones.far import FARBackbone


PROMPTS = ["a red circle moving right over a blue background", "a green square", "a blue circle moving left"]
SIZE = {"height": 64, "width": 96, "max_sequence_length": TEXT_LENGTH, "num_inference_steps": 2}
PARTITION = [1, 2, 2, 2, 1]


def upstream(transformer):
    return quiet(AnyFlowFARPipeline(**far_components(transformer)))


def ours(transformer):
    return quiet(TokenTrimPipeline(**far_components(transformer)))


def compare(transformer=None, batch=1, atol=1e-5, **arguments):
    """Run both pipelines from the same noise, ours with the gate shut."""
    transformer = tiny_far() if transformer is None else transformer
    partition = arguments.setdefault("chunk_partition", PARTITION)
    arguments = {
        "prompt": PROMPTS[:batch],
        "num_frames": 4 * sum(partition) - 3,
        "output_type": "latent",
        **SIZE,
        **arguments,
    }
    size = [arguments[name] // 8 for name in ("height", "width")]
    arguments["latents"] = far_noise(sum(partition), batch, height=size[0], width=size[1])
    theirs = upstream(transformer)(**arguments).frames
    frames = ours(transformer)(method="plain", **arguments).frames
    torch.testing.assert_close(frames, theirs, atol=atol, rtol=0)
    return frames


CONDITIONS = {
    "text": lambda batch: {},
    "image": lambda batch: {"video": randn(batch, 1, 3, 64, 96).sigmoid()},
    "video": lambda batch: {"video": randn(batch, 9, 3, 64, 96).sigmoid()},
    "latents": lambda batch: {"video_latents": randn(batch, 3, 4, 8, 12)},
}


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 3.0, "negative_prompt": "moving"}], ids=["", "guided"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS)
def test_equals_upstream(condition, batch, guidance):
    if "negative_prompt" in guidance:
        guidance = {**guidance, "negative_prompt": [guidance["negative_prompt"]] * batch}
    compare(batch=batch, **condition(batch), **guidance)


@pytest.mark.parametrize(
    "arguments",
    [
        {"chunk_partition": [3, 1]},  # upstream itself needs two chunks
        {"chunk_partition": [1] * 7},
        {"chunk_partition": [4, 1, 3, 2, 1, 1]},
        {"num_inference_steps": 1},
        {"num_inference_steps": 5},
        {"sigmas": [1.0, 0.7, 0.2]},
        {"use_mean_velocity": False},
        {"output_type": "pt", "num_inference_steps": 3},
        {"chunk_partition": [1, 3, 2], "height": 128, "width": 128},  # 64 tokens a frame: some multiples of 128
        {"height": 80, "width": 112},  # latents of 10 x 14, which compressed patches do not fill
    ],
    ids=str,
)
def test_equals_upstream_for_all_arguments(arguments):
    compare(**arguments)


@pytest.mark.parametrize(
    "config",
    [
        {"full_chunk_limit": 2},
        {"full_chunk_limit": 5},
        {"deltatime_type": "t-r"},
        {"compressed_patch_size": (1, 8, 4)},
        {"compressed_patch_size": (1, 6, 6)},
        {"compressed_patch_size": (1, 2, 2)},
        {"patch_size": (1, 1, 1)},
        {"attention_head_dim": 20},
        {"cross_attn_norm": False, "gate_value": 0.7, "num_layers": 3},
    ],
    ids=str,
)
def test_equals_upstream_for_all_models(config):
    compare(tiny_far(**config), chunk_partition=[1, 1, 2, 1, 1])


def test_several_videos_of_a_prompt_equal_upstream():
    transformer = tiny_far()
    arguments = {**SIZE, "num_frames": 29, "chunk_partition": PARTITION, "num_videos_per_prompt": 2}
    arguments |= {"prompt": PROMPTS[:2], "guidance_scale": 2.0, "output_type": "latent"}
    arguments["latents"] = far_noise(sum(PARTITION), 4, height=SIZE["height"] // 8, width=SIZE["width"] // 8)
    theirs = upstream(transformer)(**arguments).frames
    frames = ours(transformer)(method="plain", **arguments).frames
    torch.testing.assert_close(frames, theirs, atol=1e-5, rtol=0)


# Upstream's key padding


def test_pad_keys_changes_nothing_without_padding():
    padded, bare = (far_pad([1, 1, 2], 16, 32, pad_keys) for pad_keys in (True, False))  # 128 tokens a frame
    assert torch.equal(padded, bare)
    padded, bare = (far_pad([1, 1, 2], 8, 12, pad_keys) for pad_keys in (True, False))
    assert (padded - bare).abs().max() > 0.05


def far_pad(partition, height, width, pad_keys):
    latents = far_noise(sum(partition), height=height, width=width)
    arguments = {"latents": latents, "prompt_embeds": embeds(), "chunk_partition": partition, "output_type": "latent"}
    return far_pipeline()(**arguments, num_inference_steps=2, method="plain", pad_keys=pad_keys).frames


def training_flow(transformer, chunks, noisy, timestep, next_timestep, text):
    """Flow of `noisy` behind clean chunks, by the forward of the training."""
    partition = [each.shape[2] for each in [*chunks, noisy]]
    everything = torch.cat([*chunks, noisy], dim=2)
    num_compressed = sum(partition[: max(len(partition) - transformer.config.full_chunk_limit, 0)])
    times = torch.zeros(2, 1, everything.shape[2])
    times[0, :, -noisy.shape[2] :], times[1, :, -noisy.shape[2] :] = timestep, next_timestep
    clean = everything[:, :, num_compressed:]
    flow = transformer(
        hidden_states=everything.transpose(1, 2),
        timestep=times[0],
        r_timestep=times[1],
        encoder_hidden_states=text,
        chunk_partition=partition,
        clean_hidden_states=clean.transpose(1, 2),
        clean_timestep=torch.zeros(1, clean.shape[2]),
        return_dict=False,
    )[0]
    return flow.transpose(1, 2)[:, :, -noisy.shape[2] :]


def cached_flow(transformer, chunks, noisy, timestep, next_timestep, text, pad_keys):
    backbone = FARBackbone(transformer, (4, 6), num_videos=1, options=BackboneOptions(pad_keys=pad_keys))
    with torch.no_grad(), backbone.attached():
        for chunk in chunks:
            backbone.make_room(chunk.shape[2])
            backbone.commit(chunk, text, [True])
        backbone.make_room(noisy.shape[2])
        times = torch.tensor([[timestep], [next_timestep]])
        return backbone.predict_flow(noisy, [noisy.shape[2]], *times, text)


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 5])
def test_flow_without_padding_equals_training(num_chunks):
    """The mask of the training forward excludes padding."""
    transformer, (*chunks, noisy) = tiny_far(), far_noise(2 * num_chunks).split(2, dim=2)
    arguments = (transformer, chunks, noisy, 800.0, 400.0, randn(1, TEXT_LENGTH, TEXT_DIM))
    trained = training_flow(*arguments)
    torch.testing.assert_close(cached_flow(*arguments, pad_keys=False), trained, atol=1e-5, rtol=0)
    assert (cached_flow(*arguments, pad_keys=True) - trained).abs().max() > 1e-2


# Any length


@pytest.mark.parametrize(
    "arguments, sizes",
    [
        ({"num_frames": 1}, [1]),
        ({"num_frames": 5}, [1, 1]),
        ({"num_frames": 17}, [1, 2, 2]),
        ({"num_frames": 41}, [1, 2, 2, 2, 2, 2]),
        ({"num_frames": 45}, [1, 2, 2, 2, 2, 2, 1]),
        ({"num_frames": 45, "num_frames_per_chunk": 4}, [1, 4, 4, 3]),
        ({"num_frames": 17, "num_frames_per_chunk": 4}, [1, 4]),
        ({"num_frames": 45, "chunk_partition": [3, 9]}, [3, 9]),
    ],
    ids=str,
)
def test_partition_follows_from_the_length(arguments, sizes):
    assert partition_of(far_pipeline(), **arguments) == sizes


def test_partition_of_the_checkpoint_is_kept_at_its_own_length():
    pipe = far_pipeline(tiny_far(chunk_partition=(2, 1, 3, 1)))
    assert partition_of(pipe, num_frames=25) == [2, 1, 3, 1]
    assert partition_of(pipe, num_frames=29) == [2, 1, 1, 1, 1, 1, 1]
    assert partition_of(far_pipeline(tiny_far(chunk_partition=(3,))), num_frames=29) == [3, 3, 2]


def partition_of(pipe, **arguments):
    """Latent frames of the chunks that a call makes."""
    sizes = []
    pipe(
        prompt_embeds=embeds(),
        height=64,
        width=96,
        num_inference_steps=1,
        output_type="latent",
        on_chunk=lambda index, latents, decisions: sizes.append(latents.shape[2]),
        **arguments,
    )
    return sizes


def test_long_video_exceeds_the_models_position_table():
    """Upstream stops at `rope_max_seq_len`."""
    arguments = {"prompt_embeds": embeds(), "chunk_partition": [2] * 6, "num_inference_steps": 1}
    long, short = (
        far_pipeline(tiny_far(rope_max_seq_len=length))(
            latents=far_noise(12), output_type="latent", **arguments
        ).frames
        for length in (1024, 8)
    )
    assert torch.equal(long, short)


# Cost


def tokens_read(num_chunks, **settings):
    """For each chunk: the tokens that its context pass encodes, and the tokens that its first step reads."""
    pipe, encoded, read = far_pipeline(), [], []

    def watch(module, args, kwargs):
        if kwargs["kv_cache_flag"]["is_cache_step"]:
            backbone = pipe.transformer.blocks[0].attn1.processor.backbone
            encoded.append(sum(backbone.cache.reading.segments))
            read.append(len(held_tokens(backbone.cache)))  # full and compressed ones

    pipe.transformer.register_forward_pre_hook(watch, with_kwargs=True)
    arguments = {"prompt_embeds": embeds(), "chunk_partition": [2] * num_chunks, "num_inference_steps": 1}
    pipe(latents=far_noise(2 * num_chunks), output_type="latent", method="plain", **arguments, **settings)
    return encoded, read


def test_cost_of_a_chunk_is_bounded():
    encoded, read = tokens_read(12)
    assert encoded == [2 * 24, 2 * 24] + [2 * 6 + 2 * 2 * 24] * 9  # one compressed chunk and two full ones
    assert read[2:] == [2 * 6 * chunk for chunk in range(9)]  # the compressed part grows; the full ones are rewritten
    encoded, read = tokens_read(12, window_size=12, num_sink_frames=1)
    assert encoded[2:] == [2 * 6 + 2 * 2 * 24] * 9
    assert read[2:] == [0, 12, 24, 36, 6 * (11 - 2 * 3 + 1)] + [6 * (1 + 11 - 6)] * 4


def test_a_wide_window_changes_no_bit():
    arguments = {"prompt_embeds": embeds(), "chunk_partition": [2] * 6, "num_inference_steps": 1}
    wide, none, narrow, relative = (
        far_pipeline()(latents=far_noise(12), output_type="latent", **arguments, **settings).frames
        for settings in (
            {"window_size": 12},
            {},
            {"window_size": 6},
            {"window_size": 6, "relative_positions": True},
        )
    )
    assert torch.equal(wide, none) and not torch.equal(narrow, none)
    torch.testing.assert_close(relative, narrow, atol=1e-4, rtol=0)  # attention depends on distances alone


# What Wan rollouts can do


def test_flowmo_guides_the_first_generated_chunk():
    arguments = {"prompt_embeds": embeds(), "chunk_partition": [3, 3, 3, 3], "num_inference_steps": 2}
    arguments |= {"latents": far_noise(12), "output_type": "latent", "method": "plain"}
    arguments |= {"video_latents": randn(1, 3, 4, 8, 12)}
    plain = far_pipeline()(**arguments).frames
    flowmo = {"flowmo": {"iterations": 1, "learning_rate": 0.05}}
    guided = far_pipeline()(**{**arguments, "method": flowmo}).frames
    assert torch.equal(guided[:, :, :3], plain[:, :, :3])
    assert (guided[:, :, 3:6] - plain[:, :, 3:6]).abs().max() > 1e-3


@pytest.mark.parametrize("stock", ["FlowMatchLCMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_other_schedulers_work(stock):
    import diffusers

    pipe = TokenTrimPipeline(None, None, tiny_far(), None, getattr(diffusers, stock)(shift=5.0))
    arguments = {"prompt_embeds": embeds(), "chunk_partition": [1, 2, 2], "num_inference_steps": 2}
    frames = quiet(pipe)(latents=far_noise(5), output_type="latent", generator=generators(0), **arguments).frames
    flow_map = far_pipeline()(latents=far_noise(5), output_type="latent", **arguments).frames
    same = stock == "FlowMatchEulerDiscreteScheduler"  # the same rule; the other one adds noise again
    assert torch.allclose(frames, flow_map, atol=1e-4) == same and frames.abs().max() < 100


def test_backend_of_the_transformer_is_used():
    """Upstream's flex attention is only the default."""
    arguments = {"prompt_embeds": embeds(), "chunk_partition": [1, 2, 2, 2], "num_inference_steps": 1}
    arguments |= {"latents": far_noise(7), "output_type": "latent", "method": "plain"}
    transformer = tiny_far()
    expected = far_pipeline(transformer)(**arguments).frames
    for backend in ("native", "_native_math", "flex"):
        with attention_backend("native"):  # which Diffusers sets for all models together, and which is put back here
            transformer.set_attention_backend(backend)
            torch.testing.assert_close(far_pipeline(transformer)(**arguments).frames, expected, atol=1e-5, rtol=0)
        assert {block.attn1.processor._attention_backend for block in transformer.blocks} == {backend}
