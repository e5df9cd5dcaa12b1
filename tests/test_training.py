"""The worlds that training draws, and the two recipes, each a few steps long."""

from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchLCMScheduler

from research.training import photographs, self_forcing, travelling, world
from research.training.autoencoder import make_autoencoder
from research.training.loop import fit
from research.training.self_forcing import NUM_STEPS, SIGMAS, SelfForcing, StudentAndCritic, roll_out, train_student
from research.training.train import generate, make_pipeline
from research.training.transformer import (
    NUM_CHUNKS,
    NUM_FRAMES,
    SHIFT,
    LatentClips,
    WorldModel,
    make_tokenizer,
    tokenize,
)
from research.training.travelling import Landscape, Scene


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    model = WorldModel(make_tokenizer(world))
    model.transformer.proj_out.weight.data.mul_(5)  # a flow that is not near zero
    return model


@pytest.mark.parametrize("each", [world, travelling, photographs])
def test_prompts_are_sentences_of_the_grammar_and_known_words(each):
    generator, tokenizer = torch.Generator().manual_seed(0), make_tokenizer(each)
    for _ in range(100):
        scene = each.Scene.sample(generator)
        assert each.parse(scene.prompt) == scene
        assert tokenizer.unk_token_id not in tokenizer(scene.prompt).input_ids
    with pytest.raises(ValueError, match="a calm journey"):
        each.parse("a calm journey right over plains by noon")


@pytest.mark.parametrize("each", [world, travelling, photographs])
def test_a_clip_is_drawn_from_its_seed(each):
    (prompt, clip), (same_prompt, same_clip) = (each.sample_clip(torch.Generator().manual_seed(4)) for _ in range(2))
    assert prompt == same_prompt and torch.equal(clip, same_clip)
    assert clip.shape[1:] == (3, each.SIZE, each.SIZE) and len(clip) >= NUM_FRAMES
    assert clip.min() >= 0 and clip.max() <= 1


def test_a_landscape_is_drawn_the_same_whole_or_in_parts_and_is_a_ring():
    scene = Scene("fast", "left", "mountains", "dusk")
    landscape = Landscape.sample(scene, torch.Generator().manual_seed(1))
    whole = travelling.render(scene, landscape, 6)
    assert torch.allclose(whole[4:], travelling.render(scene, landscape, 2, first_frame=4), atol=1e-5)
    ring = replace(landscape, speed=landscape.length / 500)
    start, end = (travelling.render(scene, ring, 1, first_frame) for first_frame in (0, 500))
    assert torch.allclose(start, end, atol=1e-2)


def test_the_ground_changes_all_the_time_and_the_sky_does_not():
    scene = Scene("slow", "right", "plains", "noon")
    landscape = Landscape.sample(scene, torch.Generator().manual_seed(2))
    frames = torch.cat([travelling.render(scene, landscape, 1, first_frame) for first_frame in range(0, 450, 45)])
    change = frames.diff(dim=0).abs().mean(dim=(1, 3))  # (pairs, rows)
    assert change[:, 50:].mean(dim=1).min() > 0.03
    assert change[:, :15].max() < 1e-6


def test_a_rollout_equals_one_forward_by_teacher_forcing(teacher):
    words = tokenize(make_tokenizer(world), ["a red circle moving right over a blue background"])
    with torch.no_grad():
        video = roll_out(teacher, words, 1, torch.Generator().manual_seed(1))
        generator, shape = torch.Generator().manual_seed(1), video[:, 0].shape
        noise = torch.stack([torch.randn(shape, generator=generator) for _ in range(NUM_CHUNKS)], dim=1)
        parallel = WorldModel(make_tokenizer(world))
        parallel.load_state_dict(teacher.state_dict())
        flow = parallel(video, noise, torch.full((1, NUM_CHUNKS), 1000.0), *words)
    assert torch.allclose(video, noise - flow, atol=1e-4)


def test_the_pipeline_rolls_a_student_out_as_training_does(teacher):
    prompt = "a red circle moving right over a blue background"
    with torch.no_grad():
        words = tokenize(make_tokenizer(world), [prompt])
        video = roll_out(teacher, words, NUM_STEPS, torch.Generator().manual_seed(1))
    generator, shape = torch.Generator().manual_seed(1), video[:, 0].shape
    draws = [[torch.randn(shape, generator=generator) for _ in range(NUM_STEPS)] for _ in range(NUM_CHUNKS)]
    pipe = make_pipeline(world, teacher, make_autoencoder(), FlowMatchLCMScheduler(shift=SHIFT), NUM_STEPS)
    latents = torch.cat([noise for noise, *_ in draws], dim=2)
    arguments = {"latents": latents, "renoise": lambda chunk, step: draws[chunk][step + 1], "output_type": "latent"}
    piped = generate(pipe, [prompt], NUM_FRAMES, **arguments)
    assert torch.allclose(piped, video.transpose(1, 2).flatten(2, 3), atol=1e-3)


def test_self_forcing_trains_student_and_critic_and_leaves_the_teacher(teacher, monkeypatch):
    monkeypatch.setattr(self_forcing, "NUM_VIDEOS", 1)
    monkeypatch.setattr(self_forcing, "STUDENT_SHARE", 1.0)
    tokenizer = make_tokenizer(world)
    models = StudentAndCritic(teacher, tokenizer)
    loss = SelfForcing(world, teacher, tokenizer)
    torch.nn.init.normal_(models.critic.transformer.proj_out.bias)  # elsewhere than the teacher: a gradient
    loss(models, torch.Generator().manual_seed(0)).backward()
    for model in (models.student, models.critic):
        assert model.transformer.proj_out.weight.grad.abs().sum() > 0
        assert all(param.grad is None for param in model.text_encoder.parameters())
    assert all(param.grad is None for param in teacher.parameters())


def test_self_forcing_resumes(teacher, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(self_forcing, "NUM_VIDEOS", 1)
    loss, saved = SelfForcing(world, teacher, make_tokenizer(world)), []
    with torch.compiler.set_stance("force_eager"):
        for _ in range(2):  # twice as long as the first run took, so that the second has something left
            minutes = 2 * saved[0][2] if saved else 1e-6
            train_student(loss, tmp_path, minutes, 0, lambda student, *when: saved.append((student, *when)))
    (first, first_step, _), (second, second_step, _) = saved
    assert 0 < first_step < second_step and f"resumed at step {first_step}" in capsys.readouterr().out
    weights = [each.transformer.blocks[0].attn1.to_q.weight for each in (first, second)]
    assert not torch.equal(*weights)


def fit_line(folder, minutes=1e-9, width=2):
    """A training of one small layer for `minutes`."""
    model = torch.nn.Linear(width, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    return fit(
        model,
        lambda model, generator: model(torch.randn(4, width, generator=generator)).square().mean(),
        [optimizer],
        folder,
        minutes,
        seed=0,
        on_save=lambda *_: None,
    )


@pytest.mark.parametrize("keep", [0, 100, 1500])
def test_a_state_that_is_cut_short_is_refused_by_name(tmp_path, keep):
    fit_line(tmp_path)
    state = tmp_path / "state.pt"
    assert state.stat().st_size > 1500
    state.write_bytes(state.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"state\.pt cannot be resumed"):
        fit_line(tmp_path)


def test_a_state_of_another_model_or_without_a_part_is_refused_by_name(tmp_path):
    fit_line(tmp_path)
    with pytest.raises(ValueError, match=r"state\.pt cannot be resumed"):
        fit_line(tmp_path, width=3)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save({name: value for name, value in state.items() if name != "ema"}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt cannot be resumed.*ema"):
        fit_line(tmp_path)


def test_damaged_latents_are_refused_by_name(tmp_path):
    torch.save({"prompts": ["a red circle"], "latents": [torch.zeros(4, 3, 16, 16)]}, tmp_path / "shard-0000.pt")
    assert LatentClips(tmp_path, [0.0], [1.0]).prompts == ["a red circle"]
    (tmp_path / "shard-0001.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"shard-0001\.pt cannot be read"):
        LatentClips(tmp_path, [0.0], [1.0])


def test_the_schedule_of_a_student_falls_from_pure_noise():
    assert SIGMAS.tolist() == pytest.approx([1, 0.9, 0.75, 0.5])
