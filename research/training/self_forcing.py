"""Self Forcing (arXiv 2506.08009): a student of few steps, distilled on its own rollouts.

The student generates a short video chunk by chunk, each on the context of its own earlier chunks (algorithm 1). Its
distribution is matched to the teacher's (DMD, arXiv 2311.18828): a critic learns the flow of the student's videos, and the
student follows the difference between the x0 predictions of critic and teacher. Training uses no video of the world.

The paper's teacher is bidirectional. Here it is the chunk-causal model from which the student starts: teacher and critic
judge each noised chunk behind the student's earlier clean chunks, and by the chain rule the divergences of the chunks add
up to that of the video.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from .loop import fit, make_optimizers
from .transformer import (
    FRAMES_PER_CHUNK,
    NUM_CHUNKS,
    SHIFT,
    WorldModel,
    attend,
    encode_text,
    is_matrix,
    position_table,
    rotate,
    sample_sigmas,
    shift_sigmas,
    tokenize,
)


NUM_STEPS = 4
SIGMAS = shift_sigmas(torch.linspace(1, 0, NUM_STEPS + 1)[:-1], SHIFT)  # 1, 0.9, 0.75, 0.5
GUIDANCE_SCALE = 3.0  # classifier-free guidance of the teacher
NUM_VIDEOS = 2  # videos of a batch
STUDENT_SHARE = 0.5  # share of the steps that train the student; all steps train the critic
STUDENT_LR, CRITIC_LR = 3e-4, 6e-4


class RolloutProcessor:
    """Self-attention of a chunk to [context, chunk]; a context pass appends its keys and values without gradient."""

    def __init__(self, transformer: WanTransformer3DModel, latent_size: int):
        self.cos, self.sin = position_table(transformer, latent_size)
        self.context: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.is_context_pass = False

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(hidden_states)))
        start = self.context[attn][0].shape[2] if attn in self.context else 0
        cos, sin = (x[:, start : start + hidden_states.shape[1]] for x in (self.cos, self.sin))
        query, key, value = (x.transpose(1, 2) for x in (rotate(query, cos, sin), rotate(key, cos, sin), value))
        if attn in self.context:
            key, value = (torch.cat(pair, dim=2) for pair in zip(self.context[attn], (key, value)))
        if self.is_context_pass:
            self.context[attn] = (key.detach(), value.detach())
        return attn.to_out[0](attend(query, key, value).transpose(1, 2).flatten(2))


class StudentAndCritic(nn.Module):
    """Student and critic, which start as the teacher and share its frozen text encoder."""

    def __init__(self, teacher: WorldModel, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        self.student, self.critic = WorldModel(tokenizer, teacher.sizes), WorldModel(tokenizer, teacher.sizes)
        for model in (self.student, self.critic):
            model.load_state_dict(teacher.state_dict())
            model.text_encoder.requires_grad_(False)


def add_noise(clean: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """(1 - sigma) x0 + sigma eps."""
    return (1 - sigma) * clean + sigma * torch.randn(clean.shape, generator=generator)


def roll_out(student: WorldModel, words: tuple[Tensor, Tensor], num_steps: int, generator: torch.Generator) -> Tensor:
    """Algorithm 1: a video of the student, (B, chunks, C, T, H, W), each chunk after `num_steps` steps.

    Gradients flow only through the last of these steps, and not into the context.
    """
    transformer, processor = student.transformer, RolloutProcessor(student.transformer, student.sizes.latent_size)
    for block in transformer.blocks:
        block.attn1.set_processor(processor)
    with torch.no_grad():
        text = encode_text(student.text_encoder, *words)
    trains, chunks = torch.is_grad_enabled(), []

    def predict_flow(latents: Tensor, sigma: float) -> Tensor:
        return transformer(latents, torch.full((len(latents),), 1000 * sigma), text, return_dict=False)[0]

    for _ in range(NUM_CHUNKS):
        shape = (len(text), student.sizes.latent_channels, FRAMES_PER_CHUNK, *[student.sizes.latent_size] * 2)
        latents = torch.randn(shape, generator=generator)
        for step, sigma in enumerate(SIGMAS[:num_steps]):
            with torch.set_grad_enabled(trains and step == num_steps - 1):
                clean = latents - sigma * predict_flow(latents, sigma.item())
            if step < num_steps - 1:
                latents = add_noise(clean, SIGMAS[step + 1], generator)
        chunks.append(clean)
        with torch.no_grad():
            processor.is_context_pass = True
            predict_flow(clean, 0.0)
            processor.is_context_pass = False
    return torch.stack(chunks, dim=1)


class SelfForcing:
    """The loss of student and critic on random prompts."""

    def __init__(self, world: ModuleType, teacher: WorldModel, tokenizer: PreTrainedTokenizerFast):
        self.world, self.tokenizer = world, tokenizer
        self.teacher = teacher.requires_grad_(False)

    def __call__(self, models: StudentAndCritic, generator: torch.Generator) -> Tensor:
        prompts = [self.world.Scene.sample(generator).prompt for _ in range(NUM_VIDEOS)]
        words = tokenize(self.tokenizer, prompts)
        num_steps = torch.randint(1, NUM_STEPS + 1, (), generator=generator).item()
        trains_student = torch.rand((), generator=generator).item() < STUDENT_SHARE
        with torch.set_grad_enabled(trains_student):
            video = roll_out(models.student, words, num_steps, generator)
        loss = self.critic_loss(models.critic, video.detach(), words, generator)
        return loss + self.student_loss(models.critic, video, words, generator) if trains_student else loss

    def critic_loss(self, critic: WorldModel, video: Tensor, words, generator: torch.Generator) -> Tensor:
        """Flow matching on the student's video, by teacher forcing (DMD, eq. 6)."""
        sigma = sample_sigmas(video.shape[:2], SHIFT, generator)
        noise = torch.randn(video.shape, generator=generator)
        level = sigma[:, :, None, None, None, None]
        flow = critic(video, (1 - level) * video + level * noise, 1000 * sigma, *words)
        return (flow - (noise - video)).square().mean()

    def student_loss(self, critic: WorldModel, video: Tensor, words, generator: torch.Generator) -> Tensor:
        """A loss whose gradient with respect to `video` is DMD's (eq. 7 and 8)."""
        with torch.no_grad():
            clean = video.detach()
            sigma = sample_sigmas((len(video), 1), SHIFT, generator).clamp(0.02, 0.98).expand(video.shape[:2])
            level = sigma[:, :, None, None, None, None]
            noised = add_noise(clean, level, generator)

            def predict_clean(model: WorldModel, words) -> Tensor:
                return noised - level * model(clean, noised, 1000 * sigma, *words)

            fake, real = predict_clean(critic, words), predict_clean(self.teacher, words)
            unconditional = predict_clean(self.teacher, tokenize(self.tokenizer, [""] * len(video)))
            real = unconditional + GUIDANCE_SCALE * (real - unconditional)
            normalizer = (clean - real).abs().mean(dim=(1, 2, 3, 4, 5), keepdim=True)  # eq. 8
            gradient = (fake - real) / normalizer  # eq. 7
        return 0.5 * (video - (clean - gradient)).square().mean()


def train_student(
    loss: SelfForcing, folder: Path, minutes: float, seed: int, on_save: Callable[[WorldModel, int, float], None]
) -> WorldModel:
    """Train for `minutes` in total, earlier runs included. Returns the student's moving average."""
    models = StudentAndCritic(loss.teacher, loss.tokenizer)
    optimizers = [
        *make_optimizers(models.student, is_matrix, STUDENT_LR),
        *make_optimizers(models.critic, is_matrix, CRITIC_LR),
    ]
    for model in (models.critic, loss.teacher):
        model.transformer.compile_repeated_blocks(dynamic=False)

    def save(ema: StudentAndCritic, step: int, minutes: float) -> None:
        on_save(ema.student, step, minutes)

    return fit(models, loss, optimizers, folder, minutes, seed, save, ema_decay=0.99, save_minutes=2.0).student
