"""Errors name the argument that the user gave, and what to write instead; numbers of every kind are taken."""

from fractions import Fraction

import numpy as np
import PIL.Image
import pytest
import torch
from builders import CHANNELS, TEXT_DIM, TEXT_LENGTH, embeds, full_pipeline, latent_pipeline, noise, randn

from tokentrim.tokentrim_frames.mp4 import VideoWriter


PROMPT, OTHER = "a red circle", "a green square"
LATENTS = {"num_frames": 33, "height": 32, "width": 48, "output_type": "latent"}


def plan(prompt=PROMPT, **call):
    return full_pipeline().plan(prompt, **{**LATENTS, **call})


# Frames to continue that do not fit the prompts


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("image", [PIL.Image.new("RGB", (48, 32))] * 2),
        ("image", np.zeros((2, 32, 48, 3), np.uint8)),
        ("image", torch.zeros(2, 3, 32, 48)),
        ("video", torch.zeros(2, 9, 3, 32, 48)),
        ("video_latents", torch.zeros(2, 3, CHANNELS, 4, 6)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_batch_of_frames_that_does_not_divide_the_prompts_raises(name, given):
    with pytest.raises(ValueError, match=f"^`{name}` must be a batch that divides the 3 videos"):
        plan([PROMPT] * 3, **{name: given})


def test_an_image_that_fills_the_whole_video_is_named():
    with pytest.raises(ValueError, match="^`image` must be as many latent frames as .*leave one to generate"):
        plan(image=PIL.Image.new("RGB", (48, 32)), num_frames=1)


# Texts beside embeddings of another length


def test_a_text_in_the_schedule_beside_embeddings_of_another_length_is_named_before_it_is_encoded():
    for length in (TEXT_LENGTH + 1, TEXT_LENGTH - 1):
        longer = randn(1, length, TEXT_DIM)
        for schedule in ({1: OTHER}, {1: [OTHER]}, [{1: OTHER}]):
            with pytest.raises(
                ValueError, match=f"^`prompt_schedule` must be .*`max_sequence_length={length}`.*green"
            ):
                plan(None, prompt_embeds=longer, prompt_schedule=schedule)
        assert plan(None, prompt_embeds=longer, prompt_schedule={1: OTHER}, max_sequence_length=length)


def test_embeddings_in_the_schedule_of_another_length_or_dimension_are_named():
    for wrong in (randn(1, TEXT_LENGTH + 1, TEXT_DIM), randn(1, TEXT_LENGTH, TEXT_DIM + 1)):
        for first in ({"prompt": PROMPT}, {"prompt": None, "prompt_embeds": embeds()}):
            with pytest.raises(ValueError, match=rf"^`prompt_schedule` must be .*\({TEXT_LENGTH}, {TEXT_DIM}\)"):
                plan(**first, prompt_schedule={1: wrong})


def test_a_prompt_of_a_stream_of_another_length_is_named():
    with full_pipeline().stream(PROMPT, **LATENTS) as stream:
        with pytest.raises(ValueError, match="^`prompt` must be texts, or embeddings"):
            stream.set_prompt(randn(1, TEXT_LENGTH + 1, TEXT_DIM))
        stream.set_prompt(embeds())
    with full_pipeline().stream(prompt_embeds=randn(1, TEXT_LENGTH + 1, TEXT_DIM), **LATENTS) as stream:
        with pytest.raises(ValueError, match=f"^`prompt` must be .*`max_sequence_length={TEXT_LENGTH + 1}`"):
            stream.set_prompt(OTHER)


# Schedules


@pytest.mark.parametrize("none", [{}, None])
def test_a_prompt_of_a_batch_may_have_no_change(none):
    call = {**LATENTS, "num_inference_steps": 1}
    pipe, seeds = full_pipeline(), lambda: [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    some = pipe([PROMPT, OTHER], prompt_schedule=[{1: OTHER}, none], generator=seeds(), **call)
    kept = pipe([PROMPT, OTHER], prompt_schedule={1: [OTHER, None]}, generator=seeds(), **call)
    assert torch.equal(some.frames, kept.frames)
    nothing = pipe([PROMPT, OTHER], prompt_schedule=[none, none], generator=seeds(), **call)
    assert torch.equal(nothing.frames[1], some.frames[1]) and not torch.equal(nothing.frames[0], some.frames[0])


@pytest.mark.parametrize("schedule", [{}, [{1: OTHER}, {}, 3], [{1: OTHER}, {-1: OTHER}], [{1: OTHER}, "x"], "x", 3])
def test_invalid_schedule_says_what_to_write(schedule):
    with pytest.raises((TypeError, ValueError), match="^`prompt_schedule` must be .*(None|dicts)"):
        plan([PROMPT, OTHER], prompt_schedule=schedule)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"prompt_transition": "cut"},
            ValueError,
            "^`prompt_transition` must be None without `prompt_schedule`.*'cut'",
        ),
        ({"prompt_transition": {1: "cut"}}, ValueError, "^`prompt_transition` must be None without `prompt_schedule`"),
        ({"prompt_transition": "jump"}, ValueError, "^`prompt_transition` must be"),
        ({"prompt_transition": 3}, ValueError, "^`prompt_transition` must be"),
        ({"blend_chunks": 2}, ValueError, "^`blend_chunks` must be 0 without `prompt_schedule`"),
        ({"blend_chunks": "2"}, TypeError, "^`blend_chunks` must be an int"),
    ],
    ids=str,
)
def test_settings_of_changes_without_a_schedule_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        plan(**settings)
    with pytest.raises(error, match=message):
        full_pipeline()(PROMPT, **LATENTS, **settings)


def test_a_stream_and_a_checkpoint_may_name_a_transition_without_a_schedule():
    with full_pipeline().stream(PROMPT, prompt_transition="cut", **LATENTS) as stream:
        assert stream.run.plan.inputs.prompt_transition == "cut"
    assert full_pipeline(prompt_transition="recache").plan(PROMPT, **LATENTS)
    for transition in ("jump", {1: "cut"}):
        with pytest.raises(ValueError, match="^`prompt_transition` must be"):
            full_pipeline().stream(PROMPT, prompt_transition=transition, **LATENTS)


# Methods


@pytest.mark.parametrize("name", ["tokentrim_plus", "paper", "plain"])
@pytest.mark.parametrize("beside", [{}, {"quarantine": {}}])
def test_settings_of_a_method_that_stands_for_several_say_which(name, beside):
    with pytest.raises(
        ValueError, match=f"^`method` must be '{name}' without settings, or a dict of what it stands for"
    ):
        plan(method={**beside, name: {}})


def test_an_unknown_part_of_a_method_is_named():
    with pytest.raises(ValueError, match="^`method` must be a dict of .*'reanchor'.*but is .'trimtoken'"):
        plan(method={"trimtoken": {}})


# Sizes that no machine has


@pytest.mark.parametrize("name", ["num_frames", "num_frames_per_chunk", "num_inference_steps", "max_sequence_length"])
@pytest.mark.parametrize("value", [10**10, 10**18, 2**63])
def test_absurd_sizes_raise_at_once(name, value):
    with pytest.raises(ValueError, match=f"^`{name}` must be an int from 1 to .*, but is {value}"):
        plan(**{name: value})


# Numbers of NumPy, and fractions


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, np.int64, np.uint8, Fraction, int, float])
def test_rates_of_every_kind_write_the_same_video(kind, tmp_path):
    frames = (randn(3, 32, 48, 3).sigmoid() * 255).to(torch.uint8).numpy()
    for name, fps in (("expected", 12), ("x", kind(12))):
        writer = VideoWriter(tmp_path / f"{name}.mp4", fps=fps, crf=kind(16))
        writer.write(frames)
    assert (tmp_path / "x.mp4").read_bytes() == (tmp_path / "expected.mp4").read_bytes()


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_fraction_is_the_rate_of_its_float_also_after_resuming(tmp_path):
    call = {"num_frames": 33, "num_inference_steps": 1, "generator": torch.Generator().manual_seed(0)}
    rate = Fraction(30000, 1001)
    with full_pipeline().stream(PROMPT, state_dir=tmp_path / "state", save_every=1, **call) as stream:
        with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
            patch.setattr(VideoWriter, "write", interrupted)
            stream.save_video(tmp_path / "x.mp4", fps=rate, progress=False)
    with full_pipeline().resume(tmp_path / "state") as stream:
        stream.save_video(tmp_path / "x.mp4", fps=rate, progress=False)
    assert (tmp_path / "x.mp4").stat().st_size > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": Fraction(3, 2), "negative_prompt_embeds": embeds(seed=8)},
        {"guidance_scale": np.float32(1.5), "negative_prompt_embeds": embeds(seed=8)},
        {"drift_sensitivity": Fraction(1, 2), "prune_fraction": Fraction(1, 4)},
        {"method": {"reanchor": {"tolerance": Fraction(1, 10), "patience": np.int64(2)}}},
        {"sigmas": [Fraction(1), Fraction(1, 2)]},
        {"layout": {"memrope": {"slow": Fraction(1, 100), "window_size": np.int32(12)}}},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_numpy_numbers_and_fractions_are_accepted_and_saved(settings, tmp_path):
    call = {"latents": noise(5), "prompt_embeds": embeds(), "num_inference_steps": 2, "output_type": "latent"}
    whole = latent_pipeline()(**call, **settings)
    with latent_pipeline().stream(**call, **settings, state_dir=tmp_path) as stream:
        for _ in range(2):
            next(stream)
        stream.save_state()
    with latent_pipeline().resume(tmp_path) as stream:
        rest = torch.cat([chunk.latents for chunk in stream], dim=2)
    assert torch.equal(rest, whole.frames[:, :, 6:])
