"""The world model: a chunk-causal video transformer, its text encoder, and teacher forcing.

Every clip goes through the transformer once as clean chunks at t = 0 (the context, as a rollout's context pass writes
it) and once as noised chunks. Noised chunk i attends to clean chunks 0 .. i - 1 and to itself: exactly what a rollout
attends to. The stock transformer does this with another attention processor and other positions, nothing else.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from .loop import fit, make_optimizers
from .world import CHANGES, COLORS, DIRECTIONS, SHAPES


NUM_CHUNKS = 5
FRAMES_PER_CHUNK = 3
NUM_FRAMES = NUM_CHUNKS * FRAMES_PER_CHUNK
TOKENS_PER_FRAME = 64
TOKENS_PER_CHUNK = FRAMES_PER_CHUNK * TOKENS_PER_FRAME
MAX_SEQUENCE_LENGTH = 16
TEXT_DIM = 64
SHIFT = 3.0  # of the noise levels, in training and in the exported scheduler
BATCH_SIZE = 2  # clips
NUM_FIRST_CHUNKS = 12  # of other videos, besides: there the prompt is all that there is to read
FIRST_CHUNK_SHARE = 0.5  # of the loss
FIRST_CHUNK_SHIFT = 6.0  # of their noise levels: the prompt decides where there is much noise
PROMPT_DROPOUT = 0.1  # for classifier-free guidance


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the prompt grammar; every prompt ends with </s>.

    Words, but where a word means something else by its place ("blue background", "turns blue") the two are one token:
    a text encoder this small, trained this briefly, otherwise reads a prompt as a bag of words and swaps colours.
    """
    sentence = "a an moving over background while the turns light fades camera pans"
    words = {*sentence.split(), *COLORS, *SHAPES, *DIRECTIONS, *" ".join(CHANGES).split()} - {"turn", "fade", "pan"}
    pairs = [f"{color} background" for color in COLORS] + [f"turns {color}" for color in COLORS]
    pairs += ["pans left", "pans right", "light fades"]
    vocabulary = {
        token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *sorted(words), *sorted(pairs)])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*pairs, r"\w+"])), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_SEQUENCE_LENGTH,
    )


def make_text_encoder(tokenizer: PreTrainedTokenizerFast) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_DIM,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return UMT5EncoderModel(config)


def make_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=512,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Wan's rotary embedding: x is (B, seq, heads, head_dim), cos and sin are (1, seq, 1, head_dim)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class TeacherForcingProcessor:
    """Self-attention over [clean chunks 0 .. n - 2, noised chunks 0 .. n - 1], chunk-causal."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        size = TOKENS_PER_CHUNK
        num_chunks = (hidden_states.shape[1] // size + 1) // 2
        num_clean = (num_chunks - 1) * size
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        # A noised chunk stands at the same place in time as its clean copy.
        cos, sin = (torch.cat([each[:, :num_clean], each[:, : num_chunks * size]], dim=1) for each in rotary_emb)
        query = _rotate(query, cos, sin).type_as(value).transpose(1, 2)  # (B, heads, seq, head_dim)
        key = _rotate(key, cos, sin).type_as(value).transpose(1, 2)

        outputs = []
        for chunk in range(num_chunks - 1):
            start, end = chunk * size, (chunk + 1) * size
            outputs.append(F.scaled_dot_product_attention(query[:, :, start:end], key[:, :, :end], value[:, :, :end]))
        for chunk in range(num_chunks):
            past, start = chunk * size, num_clean + chunk * size
            keys = torch.cat([key[:, :, :past], key[:, :, start : start + size]], dim=2)
            values = torch.cat([value[:, :, :past], value[:, :, start : start + size]], dim=2)
            outputs.append(F.scaled_dot_product_attention(query[:, :, start : start + size], keys, values))
        hidden_states = torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)
        return attn.to_out[0](hidden_states)


class WorldModel(nn.Module):
    """Text encoder and transformer, trained together."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        self.text_encoder = make_text_encoder(tokenizer)
        self.transformer = make_transformer()
        for block in self.transformer.blocks:
            block.attn1.set_processor(TeacherForcingProcessor())

    def forward(self, clean: Tensor, noised: Tensor, timestep: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """The flow of every noised chunk, (B, 4, T, H, W).

        `clean` and `noised` are normalised latents (B, 4, T, H, W), `timestep` (B, chunks) in [0, 1000], `input_ids`
        and `mask` (B, words).
        """
        text = self.text_encoder(input_ids, mask).last_hidden_state * mask[..., None]
        context = clean[:, :, :-FRAMES_PER_CHUNK]
        timestep = torch.cat([torch.zeros_like(timestep[:, 1:]), timestep], dim=1)
        timestep = timestep.repeat_interleave(TOKENS_PER_CHUNK, dim=1)  # (B, tokens), frame-major
        flow = self.transformer(torch.cat([context, noised], dim=2), timestep, text, return_dict=False)[0]
        return flow[:, :, context.shape[2] :]


class LatentClips:
    """Videos as normalised latents, cropped at random: half of the clips start where their video starts."""

    def __init__(self, folder: Path, mean: list[float], std: list[float]):
        shards = [torch.load(path, weights_only=True) for path in sorted(folder.glob("shard-*.pt"))]
        self.prompts = [prompt for shard in shards for prompt in shard["prompts"]]
        self.latents = [latents for shard in shards for latents in shard["latents"]]
        self.mean = torch.tensor(mean)[:, None, None, None]
        self.std = torch.tensor(std)[:, None, None, None]

    def draw(self, num_clips: int, num_frames: int, first: Tensor, generator: torch.Generator) -> tuple[list, Tensor]:
        """Prompts and clips (B, 4, T, H, W); where `first` (B,) the clip starts where its video starts, else later."""
        prompts, clips = [], []
        for index, at_start in zip(torch.randint(len(self.prompts), (num_clips,), generator=generator), first):
            latents = self.latents[index]
            start = torch.randint(1, latents.shape[1] - num_frames + 1, (), generator=generator) * (not at_start)
            clips.append(latents[:, start : start + num_frames].float())
            prompts.append(self.prompts[index])
        return prompts, (torch.stack(clips) - self.mean) / self.std


def sample_sigmas(shape: tuple[int, ...], shift: float, generator: torch.Generator) -> Tensor:
    """Noise levels in (0, 1): uniform, then shifted as a scheduler shifts its schedule."""
    uniform = torch.rand(shape, generator=generator)
    return shift * uniform / (1 + (shift - 1) * uniform)


def make_loss(clips: LatentClips, tokenizer: PreTrainedTokenizerFast):
    """The flow-matching loss of a random batch. A chunk without context counts only where a video starts."""
    compiled = []

    def chunk_errors(prompts: list[str], clean: Tensor, shift: float, generator: torch.Generator) -> Tensor:
        batch_size, num_chunks = len(prompts), clean.shape[2] // FRAMES_PER_CHUNK
        dropped = torch.rand(batch_size, generator=generator) < PROMPT_DROPOUT
        tokens = tokenizer(
            ["" if drop else prompt for prompt, drop in zip(prompts, dropped)],
            padding="max_length",
            max_length=MAX_SEQUENCE_LENGTH,
            return_tensors="pt",
        )
        noise = torch.randn(clean.shape, generator=generator)
        sigmas = sample_sigmas((batch_size, num_chunks), shift, generator)
        levels = sigmas.repeat_interleave(FRAMES_PER_CHUNK, dim=1)[:, None, :, None, None]
        noised = (1 - levels) * clean + levels * noise
        with torch.autocast("cpu", dtype=torch.bfloat16):
            flow = compiled[0](clean, noised, 1000 * sigmas, tokens.input_ids, tokens.attention_mask)
        error = (flow.float() - (noise - clean)).square().mean(dim=(1, 3, 4))  # (B, frames)
        return error.unflatten(1, (num_chunks, FRAMES_PER_CHUNK)).mean(dim=2)  # (B, chunks)

    def loss(model: WorldModel, generator: torch.Generator) -> Tensor:
        if not compiled:
            compiled.append(torch.compile(model, dynamic=False))
        first = torch.rand(BATCH_SIZE, generator=generator) < 0.5
        errors = chunk_errors(*clips.draw(BATCH_SIZE, NUM_FRAMES, first, generator), SHIFT, generator)
        first = torch.ones(NUM_FIRST_CHUNKS, dtype=torch.bool)
        first_chunks = clips.draw(NUM_FIRST_CHUNKS, FRAMES_PER_CHUNK, first, generator)
        first_error = chunk_errors(*first_chunks, FIRST_CHUNK_SHIFT, generator).mean()
        return FIRST_CHUNK_SHARE * first_error + (1 - FIRST_CHUNK_SHARE) * errors[:, 1:].mean()

    return loss


def train_world_model(
    model: WorldModel, clips: LatentClips, folder: Path, minutes: float, seed: int, on_save
) -> WorldModel:
    """Trains for `minutes` (less what earlier runs already trained) and returns the moving average of the weights."""
    optimizers = make_optimizers(model, lambda name, param: "transformer.blocks" in name and param.ndim == 2, lr=2e-3)
    loss = make_loss(clips, make_tokenizer())
    return fit(model, loss, optimizers, folder, minutes, seed, on_save, ema_decay=0.9985)
