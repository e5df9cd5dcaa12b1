"""Small real components for the tests, and helpers that use them."""

import re

import torch
from diffusers import (
    AnyFlowFARTransformer3DModel,
    AutoencoderKLWan,
    FlowMapEulerDiscreteScheduler,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from tokentrim import RollingKVCache, TokenTrimFlowMatchEulerDiscreteScheduler, TokenTrimPipeline
from tokentrim.tokentrim_views.layout import Pass


CHANNELS, HEIGHT, WIDTH = 4, 4, 6  # latents
GRID = (2, 3)
NUM_TOKENS = 6
CHUNK = 3  # latent frames
TEXT_DIM, TEXT_LENGTH = 32, 8
WORDS = "a red blue green circle square moving left right over background".split()


def strengthened(transformer):
    """The transformer with attention so strong that every attended token has a visible effect."""
    with torch.no_grad():
        for block in transformer.blocks:
            for attn in (block.attn1, block.attn2):
                attn.norm_q.weight.mul_(1.5)
                attn.to_v.weight.mul_(2)
                attn.to_out[0].weight.mul_(3)
    return transformer.eval().requires_grad_(False)


def tiny_transformer(seed: int = 0, head_dim: int = 12) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=head_dim,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
    )
    return strengthened(transformer)


def tiny_vae(seed: int = 0, temporal_factor: int = 4) -> AutoencoderKLWan:
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, temporal_factor == 4, temporal_factor == 4],
        scale_factor_temporal=temporal_factor,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 1.0, 2.0],
    )
    return vae.eval().requires_grad_(False)


def tiny_text_encoder(seed: int = 0) -> UMT5EncoderModel:
    torch.manual_seed(seed)
    config = UMT5Config(vocab_size=len(WORDS) + 3, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return UMT5EncoderModel(config).eval().requires_grad_(False)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def quiet(pipe: TokenTrimPipeline) -> TokenTrimPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latent_pipeline(transformer=None, scheduler=None, **settings) -> TokenTrimPipeline:
    """A pipeline without tokenizer, text encoder and VAE: embeddings in, latents out."""
    transformer = tiny_transformer() if transformer is None else transformer
    scheduler = TokenTrimFlowMatchEulerDiscreteScheduler(shift=5.0) if scheduler is None else scheduler
    return quiet(TokenTrimPipeline(None, None, transformer, None, scheduler, **settings))


def full_pipeline(scheduler=None, **settings) -> TokenTrimPipeline:
    scheduler = TokenTrimFlowMatchEulerDiscreteScheduler(shift=5.0) if scheduler is None else scheduler
    settings = {"height": 32, "width": 48, "max_sequence_length": TEXT_LENGTH, "num_inference_steps": 2, **settings}
    components = (tiny_tokenizer(), tiny_text_encoder(), tiny_transformer(), tiny_vae(), scheduler)
    return quiet(TokenTrimPipeline(*components, **settings))


def case_id(value) -> str:
    """A value as a test id that is equal in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))[:60]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noise(num_chunks: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return randn(batch, CHANNELS, num_chunks * CHUNK, HEIGHT, WIDTH, seed=seed)


def steady_noise(num_chunks: int, jumps: list[int], seed: int = 0) -> torch.Tensor:
    """Nearly the same noise in every chunk, except for a corner that jumps in video v at chunk `jumps[v]`."""
    steady = noise(1, len(jumps), seed).repeat(1, 1, num_chunks, 1, 1) + 0.05 * noise(num_chunks, len(jumps), seed + 1)
    for video, chunk in enumerate(jumps):
        steady[video, :, chunk * CHUNK : (chunk + 1) * CHUNK, :2, :2] += 6
    return steady


def embeds(batch: int = 1, seed: int = 7) -> torch.Tensor:
    return randn(batch, TEXT_LENGTH, TEXT_DIM, seed=seed)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def roll(pipe: TokenTrimPipeline, latents: torch.Tensor, **kwargs):
    """Latents of a rollout from given noise."""
    kwargs = {"prompt_embeds": embeds(len(latents)), "num_inference_steps": 2, **kwargs}
    return pipe(latents=latents, output_type="latent", **kwargs)


def triggers(decisions: list[dict]) -> list[int]:
    return [decision["chunk"] for decision in decisions if decision["trim"]]


def processors(transformer: WanTransformer3DModel) -> list[int]:
    """Identities of all attention processors."""
    return [id(attn.processor) for block in transformer.blocks for attn in (block.attn1, block.attn2)]


def held_tokens(cache: RollingKVCache, video: int = 0) -> list[tuple[int, int]]:
    """The (latent frame, token) of all that `video` can attend to, in the order of memory."""
    held = cache.book.held[video]
    return list(zip(cache.book.frame[video][held].tolist(), cache.book.token[video][held].tolist()))


def begin_pass(cache: RollingKVCache, num_frames: int, kind: str = "denoise") -> None:
    """Begin a pass as the rollout does before the first forward of a chunk."""
    cache.make_room(num_frames)
    cache.begin_pass(num_frames, Pass(kind))


# AnyFlow-FAR


def tiny_far(seed: int = 0, **config) -> AnyFlowFARTransformer3DModel:
    torch.manual_seed(seed)
    tiny = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "chunk_partition": (1, 2, 2),
    }
    transformer = AnyFlowFARTransformer3DModel(**{**tiny, **config})
    return strengthened(transformer)


def far_components(transformer: AnyFlowFARTransformer3DModel | None = None) -> dict:
    """The components of AnyFlowFARPipeline and ours."""
    return {
        "tokenizer": tiny_tokenizer(),
        "text_encoder": tiny_text_encoder(),
        "transformer": tiny_far() if transformer is None else transformer,
        "vae": tiny_vae(),
        "scheduler": FlowMapEulerDiscreteScheduler(shift=5.0),
    }


def far_pipeline(transformer: AnyFlowFARTransformer3DModel | None = None, **settings) -> TokenTrimPipeline:
    """A pipeline without tokenizer, text encoder and VAE: embeddings in, latents out."""
    transformer = tiny_far() if transformer is None else transformer
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    return quiet(TokenTrimPipeline(None, None, transformer, None, scheduler, **settings))


def far_noise(num_frames: int, batch: int = 1, seed: int = 0, height: int = 8, width: int = 12) -> torch.Tensor:
    return randn(batch, CHANNELS, num_frames, height, width, seed=seed)


def rope(hidden_states, frames):
    """Diffusers' rotary embedding at whole latent frames: (rows, frames * tokens, heads, head_dim)."""
    cos, sin = tiny_transformer().rope(torch.zeros(1, 4, max(frames) + 1, 2 * GRID[0], 2 * GRID[1]))
    places = [frame * NUM_TOKENS + token for frame in frames for token in range(NUM_TOKENS)]
    cos, sin = cos[:, places, :, 0::2], sin[:, places, :, 1::2]
    even, odd = hidden_states[..., 0::2], hidden_states[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
