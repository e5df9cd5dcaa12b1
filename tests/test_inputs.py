"""Bad input raises before any model runs, and the message names the argument."""

import math
import re

import pytest
import torch
from builders import (
    CHUNK,
    case_id,
    embeds,
    full_pipeline,
    generators,
    latent_pipeline,
    noise,
    processors,
    randn,
    roll,
    steady_noise,
)
from diffusers import DDIMScheduler, FlowMatchLCMScheduler, UNet2DModel, UniPCMultistepScheduler, WanTransformer3DModel


NAN = torch.full((1, 4, 6, 4, 6), math.nan)
PROMPT = {"prompt": "a red circle", "num_frames": 21}
EMBEDS = {"prompt_embeds": embeds(), "num_frames": 21}

# (arguments, error, argument that the message names, more of the message)
BAD = [
    # The method
    ({"method": 1}, TypeError, "method", "'plain', 'tokentrim', 'paper', 'tokentrim_reference', 'tokentrim_plus'.*1"),
    ({"method": True}, TypeError, "method", "True"),
    ({"method": "token_trim"}, ValueError, "method", "'tokentrim'.*'token_trim'"),
    ({"method": "plain", "prune_fraction": 0.1}, ValueError, "prune_fraction", "without TokenTrim.*0.1"),
    ({"method": "plain", "drift_sensitivity": 2.0}, ValueError, "drift_sensitivity", "without TokenTrim.*2.0"),
    ({"method": "plain", "warmup_chunks": 2}, ValueError, "warmup_chunks", "without TokenTrim.*2"),
    ({"method": "plain", "max_regenerations": 0}, ValueError, "max_regenerations", "without TokenTrim.*0"),
    ({"method": "plain", "drift_signal": "first_step"}, ValueError, "drift_signal", "without TokenTrim"),
    ({"method": {"tokentrim": {"prune_fraction": 2}}}, ValueError, "prune_fraction", "2"),
    (
        {"method": {"flowmo": {}, "tokentrim": {}}, "chunk_partition": [2, 4]},
        ValueError,
        "flowmo: iterations",
        "3 lat",
    ),
    (
        {"method": {"flowmo": {"chunks": "all"}, "tokentrim": {}}, "drift_signal": "first_step"},
        ValueError,
        "flowmo: chunks",
        "first_step.*'all'",
    ),
    ({"prune_fraction": 0}, ValueError, "prune_fraction", "0"),
    ({"prune_fraction": 1}, ValueError, "prune_fraction", "1"),
    ({"prune_fraction": -0.1}, ValueError, "prune_fraction", "-0.1"),
    ({"prune_fraction": math.nan}, ValueError, "prune_fraction", "nan"),
    ({"prune_fraction": "0.1"}, TypeError, "prune_fraction", "'0.1'"),
    ({"prune_fraction": True}, TypeError, "prune_fraction", "True"),
    ({"drift_sensitivity": -1}, ValueError, "drift_sensitivity", "-1"),
    ({"drift_sensitivity": math.inf}, ValueError, "drift_sensitivity", "inf"),
    ({"drift_sensitivity": "2"}, TypeError, "drift_sensitivity", "'2'"),
    ({"warmup_chunks": -1}, ValueError, "warmup_chunks", "-1"),
    ({"warmup_chunks": 2.0}, TypeError, "warmup_chunks", "2.0"),
    ({"max_regenerations": -1}, ValueError, "max_regenerations", "-1"),
    ({"max_regenerations": True}, TypeError, "max_regenerations", "True"),
    ({"drift_signal": "last"}, ValueError, "drift_signal", "'last'.*|.*'first_step'"),
    ({"drift_signal": 1}, TypeError, "drift_signal", "1"),
    # The rollout
    ({"rollout": "self-forcing"}, ValueError, "rollout", "'self-forcing'"),
    ({"rollout": 1}, TypeError, "rollout", "1"),
    ({"num_frames_per_chunk": 0}, ValueError, "num_frames_per_chunk", "0"),
    ({"num_frames_per_chunk": 1.5}, TypeError, "num_frames_per_chunk", "1.5"),
    ({"window_size": 2}, ValueError, "window_size", "2"),
    ({"window_size": 0}, ValueError, "window_size", "0"),
    ({"window_size": 9.0}, TypeError, "window_size", "9.0"),
    ({"window_size": 6, "num_sink_frames": 4}, ValueError, "window_size", "4 sink frames"),
    ({"window_size": 6, "chunk_partition": [1, 4, 1], "num_sink_frames": 3}, ValueError, "window_size", "6"),
    ({"num_sink_frames": -1}, ValueError, "num_sink_frames", "-1"),
    ({"num_sink_frames": "3"}, TypeError, "num_sink_frames", "'3'"),
    ({"relative_positions": 1}, TypeError, "relative_positions", "1"),
    ({"sink_at_commit": 1}, TypeError, "sink_at_commit", "1"),
    ({"use_kv_cache": False}, ValueError, "use_kv_cache", "False"),
    ({"protect_conditioning": 1}, TypeError, "protect_conditioning", "1"),
    ({"use_mean_velocity": None}, TypeError, "use_mean_velocity", "None"),
    ({"pad_keys": 0}, TypeError, "pad_keys", "0"),
    # Sizes
    ({"num_frames": 0}, ValueError, "num_frames", "0"),
    ({"num_frames": 25, "chunk_partition": [3, 3]}, ValueError, "chunk_partition", "7 latent frames of num_frames=25"),
    ({"num_frames": 21.0}, TypeError, "num_frames", "21.0"),
    ({"chunk_partition": [3, 4]}, ValueError, "chunk_partition", r"\[3, 4\]"),
    ({"chunk_partition": [6, 0]}, ValueError, "chunk_partition", r"\[6, 0\]"),
    ({"chunk_partition": []}, ValueError, "chunk_partition", r"\[\]"),
    ({"height": 40}, ValueError, "height", "40"),
    ({"width": 0}, ValueError, "width", "0"),
    ({"height": "32"}, TypeError, "height", "'32'"),
    ({"max_sequence_length": 0}, ValueError, "max_sequence_length", "0"),
    ({"num_videos_per_prompt": 0}, ValueError, "num_videos_per_prompt", "0"),
    ({"num_videos_per_prompt": 1.0}, TypeError, "num_videos_per_prompt", "1.0"),
    # The schedule
    ({"num_inference_steps": 0}, ValueError, "num_inference_steps", "0"),
    ({"num_inference_steps": 4.0}, TypeError, "num_inference_steps", "4.0"),
    ({"sigmas": [1.0, 0.5], "timesteps": [1000, 500]}, ValueError, "sigmas", "timesteps"),
    ({"sigmas": []}, ValueError, "sigmas", r"\[\]"),
    ({"sigmas": [0.5, 1.0]}, ValueError, "sigmas", r"\[0.5, 1.0\]"),
    ({"sigmas": [1.0, 0.0]}, ValueError, "sigmas", r"\[1.0, 0.0\]"),
    ({"sigmas": [1.5, 0.5]}, ValueError, "sigmas", r"\[1.5, 0.5\]"),
    ({"sigmas": [1.0, math.nan]}, ValueError, "sigmas", "nan"),
    ({"timesteps": [1001, 500]}, ValueError, "timesteps", "1001"),
    ({"renoise": 3}, TypeError, "renoise", "3"),
    ({"renoise": lambda chunk, step: noise(1)}, ValueError, "renoise", "does not re-noise"),
    # Random numbers and latents
    ({"generator": 0}, TypeError, "generator", "0"),
    ({"generator": [0]}, TypeError, "generator", "0"),
    ({"generator": generators(0, 1)}, ValueError, "generator", "1"),
    ({"latents": noise(2, 2)}, ValueError, "latents", r"\(2, 4, 6, 4, 6\)"),
    ({"latents": noise(3)}, ValueError, "latents", r"\(1, 4, 9, 4, 6\)"),
    ({"latents": noise(2)[0]}, ValueError, "latents", r"\(4, 6, 4, 6\)"),
    ({"latents": noise(2).long()}, TypeError, "latents", "int64"),
    ({"latents": "noise"}, TypeError, "latents", "'noise'"),
    ({"latents": NAN}, ValueError, "latents", "finite"),
    ({"latents": NAN.nan_to_num(math.inf)}, ValueError, "latents", "finite"),
    # The prompt
    ({"prompt": None}, ValueError, "prompt", ""),
    ({"prompt": 3}, (TypeError, ValueError), "prompt", ""),
    ({"prompt": []}, ValueError, "prompt", ""),
    ({"prompt": ""}, ValueError, "prompt", ""),
    ({"prompt": ["a red circle", " \n"]}, ValueError, "prompt", ""),
    ({"prompt_schedule": {1: " "}}, ValueError, "prompt", ""),
    ({"prompt": ["a", 3]}, (TypeError, ValueError), "prompt", ""),
    ({"prompt_embeds": embeds()}, ValueError, "prompt_embeds", ""),
    ({"negative_prompt": 3, "guidance_scale": 2.0}, (TypeError, ValueError), "negative_prompt", ""),
    ({"negative_prompt": ["a", "b"], "guidance_scale": 2.0}, (TypeError, ValueError), "negative_prompt", ""),
    ({"negative_prompt": "a", "negative_prompt_embeds": embeds()}, ValueError, "negative_prompt", ""),
    ({"guidance_scale": "3"}, TypeError, "guidance_scale", "'3'"),
    ({"guidance_scale": math.nan}, ValueError, "guidance_scale", "nan"),
    ({"guidance_scale": -1.0}, ValueError, "guidance_scale", "-1.0"),
    # Frames to continue
    ({"video": randn(1, 9, 3, 32, 48), "video_latents": randn(1, 3, 4, 4, 6)}, ValueError, "video", ""),
    ({"video": randn(1, 8, 3, 32, 48)}, ValueError, "video", "8"),
    ({"video": randn(1, 5, 3, 32, 48)}, ValueError, "video", r"\[0, 1\]"),
    (
        {"video": randn(1, 5, 3, 32, 48).sigmoid(), "chunk_partition": [3, 3]},
        ValueError,
        "video",
        r"\[3\], but is 2",
    ),
    ({"video": randn(9, 3, 32, 48)}, ValueError, "video", ""),
    ({"video": randn(1, 9, 3, 32, 48) * math.nan}, ValueError, "video", "finite"),
    ({"video_latents": randn(1, 6, 4, 4, 6)}, ValueError, "video_latents", r"\[3\]"),
    ({"video_latents": randn(1, 4, 3, 4, 6)}, ValueError, "video_latents", r"\(1, 4, 3, 4, 6\)"),
    ({"video_latents": randn(2, 3, 4, 4, 6)}, ValueError, "video_latents", "2"),
    ({"video_latents": randn(1, 3, 4, 4, 6) * math.nan}, ValueError, "video_latents", "finite"),
    # Output and callbacks
    ({"output_type": "mp4"}, ValueError, "output_type", "'mp4'"),
    ({"output_type": None}, TypeError, "output_type", "None"),
    ({"callback_on_step_end": "print"}, TypeError, "callback_on_step_end", "'print'"),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, ValueError, "callback_on_step_end_tensor_inputs", "noise"),
    ({"on_chunk": 1}, TypeError, "on_chunk", "1"),
    # Of a kind that is not looked into
    ({"attention_kwargs": 3}, TypeError, "attention_kwargs", "3"),
    ({"generator": [None]}, TypeError, "generator", "None"),
    (
        {"callback_on_step_end": lambda *_: {}, "callback_on_step_end_tensor_inputs": None},
        TypeError,
        "callback_on_step_end_tensor_inputs",
        "None",
    ),
    ({"video": randn(1, 9, 4, 32, 48).sigmoid()}, ValueError, "video", "4"),
    ({"prompt": None, "prompt_embeds": embeds()[:0]}, ValueError, "prompt_embeds", "0"),
    ({"chunk_partition": 3}, TypeError, "chunk_partition", "3"),
    ({"sigmas": 1.0}, TypeError, "sigmas", "1.0"),
    ({"sigmas": "abc"}, TypeError, "sigmas", "abc"),
    ({"timesteps": ["a"]}, TypeError, "timesteps", "a"),
    ({"video": [1, 2]}, TypeError, "video", ""),
]


def count_forwards(pipe):
    """A list that grows whenever any model runs."""
    forwards = []
    for name in ("text_encoder", "transformer", "vae"):
        for module in getattr(pipe, name).modules() if getattr(pipe, name) is not None else ():
            module.register_forward_pre_hook(lambda *_: forwards.append(1))
    return forwards


def refuse(pipe, arguments, error, name, message):
    forwards, before = count_forwards(pipe), processors(pipe.transformer)
    with pytest.raises(error) as caught:
        pipe(**arguments)
    assert not forwards
    assert f"`{name}`" in str(caught.value), str(caught.value)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert processors(pipe.transformer) == before


def each(cases):
    return pytest.mark.parametrize("arguments, error, name, message", cases, ids=[show(case[0]) for case in cases])


def show(arguments):
    shown = ", ".join(f"{k}={tuple(v.shape) if hasattr(v, 'shape') else v}" for k, v in arguments.items())
    return case_id(shown)


@each(BAD)
def test_bad_argument_raises(arguments, error, name, message):
    refuse(full_pipeline(), {**PROMPT, **arguments}, error, name, message)


@each(
    [
        ({"prompt_embeds": embeds()[0]}, ValueError, "prompt_embeds", r"\(8, 32\)"),
        ({"prompt_embeds": randn(1, 8, 31)}, ValueError, "prompt_embeds", r"\(1, 8, 31\)"),
        ({"prompt_embeds": embeds().long()}, TypeError, "prompt_embeds", "int64"),
        ({"prompt_embeds": embeds() * math.nan}, ValueError, "prompt_embeds", "finite"),
        ({"prompt_embeds": "a red circle"}, TypeError, "prompt_embeds", "'a red circle'"),
        (
            {"negative_prompt_embeds": embeds(2), "guidance_scale": 2.0},
            ValueError,
            "negative_prompt_embeds",
            r"\(2, 8",
        ),
        ({"negative_prompt_embeds": 0, "guidance_scale": 2.0}, TypeError, "negative_prompt_embeds", "0"),
        ({"prompt_embeds": None, "prompt": "a"}, ValueError, "tokenizer", "prompt_embeds"),
        ({"guidance_scale": 2.0}, ValueError, "tokenizer", "prompt_embeds"),
        ({"output_type": "np"}, ValueError, "vae", "latent"),
    ]
)
def test_bad_argument_without_text_encoder_and_vae_raises(arguments, error, name, message):
    size = {"num_frames": 21, "height": 32, "width": 48, "output_type": "latent"}
    refuse(latent_pipeline(), {**EMBEDS, **size, **arguments}, error, name, message)


def test_video_to_continue_needs_a_vae():
    arguments = {**EMBEDS, "video": randn(1, 9, 3, 32, 48).sigmoid(), "height": 32, "width": 48}
    refuse(latent_pipeline(), {**arguments, "output_type": "latent"}, ValueError, "vae", "video")


@pytest.mark.parametrize(
    "settings, error, name",
    [
        ({"rollout": "far"}, ValueError, "rollout"),
        ({"num_frames_per_chunk": 0}, ValueError, "num_frames_per_chunk"),
        ({"window_size": 3, "num_sink_frames": 1}, ValueError, "window_size"),
        ({"num_inference_steps": 0.5}, TypeError, "num_inference_steps"),
    ],
)
def test_bad_setting_of_a_checkpoint_raises(settings, error, name):
    refuse(full_pipeline(**settings), PROMPT, error, name, str(settings[name]))


def image_to_video_transformer():
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32, freq_dim=32,
        ffn_dim=48, num_layers=1, added_kv_proj_dim=24, image_dim=8,
    )  # fmt: skip


def deep_patch_transformer():
    return WanTransformer3DModel(
        patch_size=(3, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32,
        freq_dim=32, ffn_dim=48, num_layers=1,
    )  # fmt: skip


def unet():
    return UNet2DModel(8, 4, 4, block_out_channels=(4, 8), norm_num_groups=1, down_block_types=("DownBlock2D",) * 2,
                       up_block_types=("UpBlock2D",) * 2)  # fmt: skip


@pytest.mark.parametrize("component", [image_to_video_transformer, deep_patch_transformer, unet])
def test_unknown_transformer_raises(component):
    pipe = full_pipeline()
    pipe.transformer = component()
    forwards = count_forwards(pipe)
    with pytest.raises((TypeError, ValueError), match=f"`transformer` .*{type(pipe.transformer).__name__}"):
        pipe(**PROMPT)
    assert not forwards


@pytest.mark.parametrize(
    "scheduler, arguments, name",
    [
        (lambda: DDIMScheduler(), {}, "scheduler"),
        (lambda: UniPCMultistepScheduler(), {}, "scheduler"),
        (
            lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            {"timesteps": [1000, 500]},
            "timesteps",
        ),
    ],
)
def test_unfit_scheduler_raises(scheduler, arguments, name):
    refuse(full_pipeline(scheduler()), {**PROMPT, **arguments}, ValueError, name, "")


BAD_NOISE = [(noise(2), ValueError), (noise(1)[0], ValueError), (noise(1) * math.nan, ValueError), (None, TypeError)]


@pytest.mark.parametrize("value, error", BAD_NOISE, ids=["frames", "ndim", "nan", "None"])
@pytest.mark.parametrize("at, expected_forwards", [((0, 0), 1), ((1, 0), 4)], ids=str)
def test_renoise_with_wrong_noise_raises(at, expected_forwards, value, error):
    """It raises when the noise is drawn, after the forward of that step, and restores the processors."""
    pipe, forwards = latent_pipeline(scheduler=FlowMatchLCMScheduler(shift=5.0)), []
    pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    before = processors(pipe.transformer)
    with pytest.raises(error, match=rf"`renoise\({at[0]}, {at[1]}\)` must be"):
        roll(pipe, noise(3), renoise=lambda chunk, step: value if (chunk, step) == at else noise(1))
    assert processors(pipe.transformer) == before
    assert len(forwards) == expected_forwards


def test_checks_have_no_side_effects():
    """A refused call changes neither generator nor schedule, and calls no user function."""
    pipe, called, generator = full_pipeline(FlowMatchLCMScheduler(shift=5.0)), [], torch.Generator().manual_seed(0)
    before, timesteps = generator.get_state(), pipe.scheduler.timesteps
    functions = {name: lambda *_: called.append(1) for name in ("renoise", "on_chunk", "callback_on_step_end")}
    with pytest.raises(ValueError, match="`window_size`"):
        pipe(**PROMPT, **functions, generator=generator, window_size=2)
    assert not called and torch.equal(generator.get_state(), before)
    assert pipe.scheduler.timesteps is timesteps


def test_default_trim_settings_are_the_papers():
    latents = noise(5)
    paper = {
        "prune_fraction": 0.1,
        "drift_sensitivity": 2.0,
        "warmup_chunks": 2,
        "max_regenerations": 1,
        "drift_signal": "final",
    }
    default, given, in_dict = (
        roll(latent_pipeline(), latents, **settings) for settings in ({}, paper, {"method": {"tokentrim": paper}})
    )
    assert default.decisions == given.decisions == in_dict.decisions
    assert torch.equal(default.frames, given.frames) and torch.equal(default.frames, in_dict.frames)


def test_arguments_at_the_limits_are_accepted():
    edge = {
        "prune_fraction": 0.999,
        "drift_sensitivity": 0,
        "warmup_chunks": 0,
        "window_size": 4,
        "num_sink_frames": 1,
    }
    output = roll(latent_pipeline(), steady_noise(5, [3]), num_inference_steps=1, **edge)
    assert output.frames.shape[2] == 5 * CHUNK
    severity, threshold = ([each[name] for each in output.decisions[0]] for name in ("severity", "threshold"))
    assert threshold[2] == severity[1] and severity[3] > threshold[3]  # the jump, though only the sink is held
