"""The world model: a chunk-causal video transformer, its text encoder, and teacher forcing.

Every clip passes through the transformer once as clean chunks at t = 0 (the context, as a rollout's context pass writes it)
and once as noised chunks. Noised chunk i attends to clean chunks 0 .. i - 1 and to itself, exactly as in a rollout. The
stock transformer needs only another attention processor and other positions for this.
"""

import math
from pathlib import Path
from types import ModuleType

import torch
from diffusers import WanTransformer3DModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from .loop import DAMAGES, fit, make_optimizers, mixed_precision
from .sizes import SMALL, Sizes


NUM_CHUNKS = 5
FRAMES_PER_CHUNK = 3
NUM_FRAMES = NUM_CHUNKS * FRAMES_PER_CHUNK
MAX_SEQUENCE_LENGTH = 16
TEXT_DIM = 64
SHIFT = 3.0  # shift of the noise levels, in training and in the exported scheduler
FIRST_CHUNK_SHARE = 0.5  # share of the loss
FIRST_CHUNK_SHIFT = 6.0  # shift of their noise levels: the prompt decides at high noise
PROMPT_DROPOUT = 0.1  # share of dropped prompts, for classifier-free guidance


def make_tokenizer(world: ModuleType) -> PreTrainedTokenizerFast:
    """A tokenizer of a world's prompt grammar; every prompt ends with </s>.

    Tokens are words, but a color with its place ("blue background", "turns blue") is one token: a text encoder this
    small, trained this briefly, otherwise reads a prompt as a bag of words and swaps colors.
    """
    tokens = ["<pad>", "</s>", "<unk>", *sorted(world.WORDS), *sorted(world.PAIRS)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*world.PAIRS, r"\w+"])), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_SEQUENCE_LENGTH,
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Words and mask of the prompts, (B, words) each."""
    tokens = tokenizer(prompts, padding="max_length", max_length=MAX_SEQUENCE_LENGTH, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


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


def make_transformer(sizes: Sizes = SMALL) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, sizes.token, sizes.token),
        num_attention_heads=sizes.num_heads,
        attention_head_dim=32,
        in_channels=sizes.latent_channels,
        out_channels=sizes.latent_channels,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=4 * 32 * sizes.num_heads,
        num_layers=sizes.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )


def position_table(transformer: WanTransformer3DModel, size: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the positions of `NUM_FRAMES` latent frames of `size` by `size`, (1, seq, 1, head_dim) each."""
    return transformer.rope(torch.empty(1, transformer.config.in_channels, NUM_FRAMES, size, size))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Wan's rotary embedding: x is (B, seq, heads, head_dim), cos and sin are (1, seq, 1, head_dim)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention as plain matrix products: on a processor, the backward pass of PyTorch's fused kernel is slower.

    The softmax is written out, because the compiler would otherwise replace the pattern with that kernel.
    """
    scores = (query @ key.mT).float() / math.sqrt(query.shape[-1])
    return (scores - scores.logsumexp(dim=-1, keepdim=True)).exp().type_as(value) @ value


class CrossAttentionProcessor:
    """The stock cross-attention, with `attend`."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        query = attn.norm_q(attn.to_q(hidden_states))
        key, value = attn.norm_k(attn.to_k(encoder_hidden_states)), attn.to_v(encoder_hidden_states)
        query, key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        hidden_states = attend(query.type_as(value), key.type_as(value), value)
        return attn.to_out[0](hidden_states.transpose(1, 2).flatten(2))


class TeacherForcingProcessor:
    """Self-attention over [clean chunks 0 .. n - 2, noised chunks 0 .. n - 1], chunk-causal.

    Every chunk is a row of the batch and has one timestep; the 2 n - 1 rows of a clip are consecutive.
    """

    def __init__(self, transformer: WanTransformer3DModel, latent_size: int):
        self.cos, self.sin = position_table(transformer, latent_size)
        self.num_chunks = 1

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        num_chunks, size = self.num_chunks, hidden_states.shape[1]
        num_clean, shape = (
            (num_chunks - 1) * size,
            (-1, (2 * num_chunks - 1) * size, attn.heads, attn.inner_dim // attn.heads),
        )
        query = attn.norm_q(attn.to_q(hidden_states)).reshape(shape)
        key = attn.norm_k(attn.to_k(hidden_states)).reshape(shape)
        value = attn.to_v(hidden_states).reshape(shape).transpose(1, 2)
        # A noised chunk has the same position in time as its clean copy.
        cos, sin = (torch.cat([x[:, :num_clean], x[:, : num_chunks * size]], dim=1) for x in (self.cos, self.sin))
        query = rotate(query, cos, sin).type_as(value).transpose(1, 2)  # (B, heads, seq, head_dim)
        key = rotate(key, cos, sin).type_as(value).transpose(1, 2)

        outputs = []
        for chunk in range(num_chunks - 1):
            start, end = chunk * size, (chunk + 1) * size
            outputs.append(attend(query[:, :, start:end], key[:, :, :end], value[:, :, :end]))
        for chunk in range(num_chunks):
            past, start = chunk * size, num_clean + chunk * size
            keys = torch.cat([key[:, :, :past], key[:, :, start : start + size]], dim=2)
            values = torch.cat([value[:, :, :past], value[:, :, start : start + size]], dim=2)
            outputs.append(attend(query[:, :, start : start + size], keys, values))
        hidden_states = torch.cat(outputs, dim=2).transpose(1, 2).reshape(hidden_states.shape)
        return attn.to_out[0](hidden_states)


def encode_text(text_encoder: UMT5EncoderModel, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Embeddings of the prompts, (B, words, dim), padding set to zero."""
    return text_encoder(input_ids, mask).last_hidden_state * mask[..., None]


class WorldModel(nn.Module):
    """Text encoder and transformer, trained together."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, sizes: Sizes = SMALL):
        super().__init__()
        self.sizes = sizes
        self.vocabulary = tokenizer.get_vocab()
        self.text_encoder = make_text_encoder(tokenizer)
        self.transformer = make_transformer(sizes)
        self.attention = TeacherForcingProcessor(self.transformer, sizes.latent_size)
        for block in self.transformer.blocks:
            block.attn1.set_processor(self.attention)
            block.attn2.set_processor(CrossAttentionProcessor())

    def forward(self, clean: Tensor, noised: Tensor, timestep: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """The flow of every noised chunk, (B, chunks, C, T, H, W).

        `clean` and `noised` are normalized latents (B, chunks, C, T, H, W), `timestep` (B, chunks) in [0, 1000],
        `input_ids` and `mask` (B, words). Chunk i reads the clean chunks before it.
        """
        num_chunks = self.attention.num_chunks = clean.shape[1]
        text = encode_text(self.text_encoder, input_ids, mask)
        text = text.repeat_interleave(2 * num_chunks - 1, dim=0)
        timestep = torch.cat([torch.zeros_like(timestep[:, 1:]), timestep], dim=1)
        latents = torch.cat([clean[:, :-1], noised], dim=1)
        flow = self.transformer(latents.flatten(0, 1), timestep.flatten(), text, return_dict=False)[0]
        return flow.view(latents.shape)[:, num_chunks - 1 :]


def load_shard(path: Path) -> dict:
    """Encoded videos; raises `ValueError` naming the file if it is damaged."""
    try:
        shard = torch.load(path, weights_only=True)
        return {name: shard[name] for name in ("prompts", "latents")}
    except DAMAGES as error:
        raise ValueError(f"the latents {path} cannot be read; move them away to encode them again: {error}") from error


class LatentClips:
    """Videos as normalized latents, cropped at random: half of the clips start at the start of their video."""

    def __init__(self, folder: Path, mean: list[float], std: list[float]):
        shards = [load_shard(path) for path in sorted(folder.glob("shard-*.pt"))]
        self.prompts = [prompt for shard in shards for prompt in shard["prompts"]]
        self.latents = [latents for shard in shards for latents in shard["latents"]]
        self.mean = torch.tensor(mean)[:, None, None, None]
        self.std = torch.tensor(std)[:, None, None, None]

    def draw(
        self, num_clips: int, num_chunks: int, num_frames: int, first_share: float, generator: torch.Generator
    ) -> tuple[list[str], Tensor]:
        """Prompts and clips (B, chunks, C, frames, H, W); `first_share` of them start at the start of their video."""
        first = torch.rand(num_clips, generator=generator) < first_share
        length, prompts, clips = num_chunks * num_frames, [], []
        for index, at_start in zip(torch.randint(len(self.prompts), (num_clips,), generator=generator), first):
            latents = self.latents[index]
            start = torch.randint(1, latents.shape[1] - length + 1, (), generator=generator) * (not at_start)
            clips.append(latents[:, start : start + length].float())
            prompts.append(self.prompts[index])
        clips = (torch.stack(clips) - self.mean) / self.std
        return prompts, clips.unflatten(2, (num_chunks, num_frames)).transpose(1, 2).contiguous()


def sample_sigmas(shape: tuple[int, ...], shift: float, generator: torch.Generator) -> Tensor:
    """Noise levels in (0, 1): uniform, then shifted as a scheduler shifts its schedule."""
    return shift_sigmas(torch.rand(shape, generator=generator), shift)


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move noise levels in [0, 1] towards 1, as a scheduler shifts its schedule."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


class FlowMatching:
    """The flow-matching loss of random batches, chunk by chunk."""

    def __init__(self, clips: LatentClips, tokenizer: PreTrainedTokenizerFast, sizes: Sizes = SMALL):
        self.clips, self.tokenizer, self.sizes = clips, tokenizer, sizes

    def images(self, model: WorldModel, generator: torch.Generator) -> Tensor:
        """Single frames: they teach shapes, colors and textures at a third of the cost."""
        prompts, images = self.clips.draw(self.sizes.num_images, 1, 1, 0.5, generator)
        return self.errors(model, prompts, images, SHIFT, generator).mean()

    def videos(self, model: WorldModel, generator: torch.Generator) -> Tensor:
        """First chunks of many videos, and a few long clips whose first chunks do not count."""
        prompts, clips = self.clips.draw(self.sizes.num_clips, NUM_CHUNKS, FRAMES_PER_CHUNK, 0.5, generator)
        later = self.errors(model, prompts, clips, SHIFT, generator)[:, 1:].mean()
        prompts, chunks = self.clips.draw(self.sizes.num_first_chunks, 1, FRAMES_PER_CHUNK, 1.0, generator)
        first = self.errors(model, prompts, chunks, FIRST_CHUNK_SHIFT, generator).mean()
        return FIRST_CHUNK_SHARE * first + (1 - FIRST_CHUNK_SHARE) * later

    def errors(
        self, model: WorldModel, prompts: list[str], clean: Tensor, shift: float, generator: torch.Generator
    ) -> Tensor:
        """Mean squared error of the flow of every chunk, (B, chunks), at random noise levels."""
        dropped = torch.rand(len(prompts), generator=generator) < PROMPT_DROPOUT
        words = tokenize(self.tokenizer, ["" if drop else prompt for prompt, drop in zip(prompts, dropped)])
        noise = torch.randn(clean.shape, generator=generator)
        sigmas = sample_sigmas(clean.shape[:2], shift, generator)
        levels = sigmas[:, :, None, None, None, None]
        noised = (1 - levels) * clean + levels * noise
        with mixed_precision():
            flow = model(clean, noised, 1000 * sigmas, *words)
        return (flow.float() - (noise - clean)).square().mean(dim=(2, 3, 4, 5))


def is_matrix(name: str, param: Tensor) -> bool:
    """Whether Muon trains a parameter: true for the matrices of the transformer's blocks."""
    return "transformer.blocks" in name and param.ndim == 2


def train_world_model(model: WorldModel, loss, folder: Path, minutes: float, seed: int, on_save) -> WorldModel:
    """Train for `minutes` in total, earlier runs included. Returns the moving average of the weights."""
    optimizers = make_optimizers(model, is_matrix, lr=2e-3)
    model.transformer.compile_repeated_blocks(dynamic=False)
    return fit(model, loss, optimizers, folder, minutes, seed, on_save, ema_decay=0.9985)
