"""Decoding chunk by chunk gives the same bits as one decode of all latents."""

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from builders import CHANNELS, randn, tiny_vae
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from tokentrim.tokentrim_frames.decode import FrameDecoder, PreviewDecoder, join_patches, make_decoder


SPLITS = [[1] * 5, [3, 2], [1, 4]]


def wan22_vae(seed: int = 0) -> AutoencoderKLWan:
    """With residual blocks, patches and a separate decoder width, as the VAE of Wan 2.2 TI2V 5B."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=3,
        decoder_base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 1.0, 2.0],
    )
    return vae.eval().requires_grad_(False)


VAES = {
    "wan21": tiny_vae,
    "two_times": lambda: tiny_vae(temporal_factor=2),
    "wan22": wan22_vae,
}


def decode_at_once(vae, latents):
    """Same as the pipeline's `decode_latents`, written out."""
    mean = torch.tensor(vae.config.latents_mean)[None, :, None, None, None]
    std = torch.tensor(vae.config.latents_std)[None, :, None, None, None]
    return vae.decode((latents * std + mean).to(vae.dtype)).sample


def latents_of(batch=2, frames=5, seed=0):
    return randn(batch, CHANNELS, frames, 3, 4, seed=seed)


def decode_split(decoder, latents, split):
    return torch.cat([decoder.decode(chunk) for chunk in latents.split(split, dim=2)], dim=2)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("kind", VAES)
def test_split_decoding_equals_one_decode(kind, split):
    vae = VAES[kind]()
    frames = decode_split(FrameDecoder(vae), latents_of(), split)
    assert torch.equal(frames, decode_at_once(vae, latents_of()))
    assert frames.std() > 0.01 and frames.min() >= -1 and frames.max() <= 1


def test_frame_counts_are_those_of_a_causal_vae():
    decoder = FrameDecoder(tiny_vae())
    assert [decoder.decode(latents_of(frames=n)).shape[2] for n in (3, 3, 1)] == [9, 12, 4]


def test_a_wide_vae_with_wans_latent_channels_is_bit_identical():
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1).eval().requires_grad_(False)
    latents = randn(1, 16, 4, 5, 7)
    assert torch.equal(decode_split(FrameDecoder(vae), latents, [1, 3]), decode_at_once(vae, latents))


def test_half_precision_casts_like_the_pipeline():
    vae = tiny_vae().to(torch.bfloat16)
    frames = decode_split(FrameDecoder(vae), latents_of(), [3, 2])
    assert frames.dtype == torch.bfloat16
    assert torch.equal(frames, decode_at_once(vae, latents_of()))


def test_patches_join_as_in_diffusers():
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    frames = randn(2, 12, 3, 4, 5)
    assert torch.equal(join_patches(frames, 2), unpatchify(frames, 2))


def test_two_decoders_of_one_vae_are_independent():
    vae = tiny_vae()
    before = dict(vars(vae))
    first, second = latents_of(), latents_of(batch=1, seed=1)
    one, two = FrameDecoder(vae), FrameDecoder(vae)
    parts = [(one.decode(a), two.decode(b)) for a, b in zip(first.split(2, dim=2), second.split(2, dim=2))]
    assert vars(vae) == before  # not even the cache that `vae.decode` makes
    expected = decode_at_once(vae, first), decode_at_once(vae, second)
    for got, whole in zip(zip(*parts), expected):
        assert torch.equal(torch.cat(got, dim=2), whole)


def test_vae_decode_in_between_changes_nothing():
    vae = tiny_vae()
    decoder = FrameDecoder(vae)
    first = decoder.decode(latents_of()[:, :, :3])
    decode_at_once(vae, latents_of(seed=5))
    frames = torch.cat([first, decoder.decode(latents_of()[:, :, 3:])], dim=2)
    assert torch.equal(frames, decode_at_once(vae, latents_of()))


def test_decoder_keeps_no_graph():
    decoder = FrameDecoder(tiny_vae().requires_grad_(True))
    assert not decoder.decode(latents_of()).requires_grad


# State


def leaves(state):
    if isinstance(state, (list, tuple)):
        return [leaf for each in state for leaf in leaves(each)]
    return [state]


@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.parametrize("kind", VAES)
def test_resumed_decode_gives_the_same_bits(kind, cut, tmp_path):
    vae, latents = VAES[kind](), latents_of()
    decoder = FrameDecoder(vae)
    frames = [decoder.decode(latents[:, :, :cut])] if cut else []
    torch.save(decoder.state_dict(), tmp_path / "state")
    decoder.decode(latents[:, :, cut:])  # must not reach into the state

    state = torch.load(tmp_path / "state", weights_only=True)
    assert {type(leaf) for leaf in leaves(list(state.values()))} <= {torch.Tensor, int, float, str, type(None)}
    resumed = FrameDecoder(VAES[kind]())
    resumed.load_state_dict(state)
    frames.append(resumed.decode(latents[:, :, cut:]))
    assert torch.equal(torch.cat(frames, dim=2), decode_at_once(vae, latents))


def test_a_state_is_a_snapshot():
    decoder = FrameDecoder(tiny_vae())
    decoder.decode(latents_of()[:, :, :1])
    state = decoder.state_dict()
    assert "Rep" in leaves(state["features"])  # after one latent frame Wan's cache holds a mark
    once = decoder.decode(latents_of()[:, :, 1:])
    again = FrameDecoder(decoder.vae)
    again.load_state_dict(state)
    assert torch.equal(again.decode(latents_of()[:, :, 1:]), once)


def test_failed_decode_leaves_the_decoder_unchanged(monkeypatch):
    vae, latents = tiny_vae(), latents_of()
    decoder = FrameDecoder(vae)
    first = decoder.decode(latents[:, :, :2])
    with monkeypatch.context() as patch:
        patch.setattr(vae.decoder.conv_out, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder.decode(latents[:, :, 2:])
    frames = torch.cat([first, decoder.decode(latents[:, :, 2:])], dim=2)
    assert torch.equal(frames, decode_at_once(vae, latents))


# Upstream's cache


class WanDecodeCache:
    def __init__(self):
        self.feat_map = None


class CachedVAE(AutoencoderKLWan):
    """With the signature of Diffusers' branch abot-world-modular (5a29766)."""

    caches = 0

    @apply_forward_hook
    def decode(self, z, return_dict=True, cache: WanDecodeCache | None = None):
        if cache is None:
            return super().decode(z, return_dict=return_dict)
        if self.use_slicing or self.use_tiling:
            raise ValueError("Decoding with a `cache` does not support slicing or tiling.")
        type(self).caches += 1
        if cache.feat_map is None:
            cache.feat_map = [None] * self._cached_conv_counts["decoder"]
        first = cache.feat_map[0] is None
        x, out = self.post_quant_conv(z), []
        for i in range(z.shape[2]):
            frame = x[:, :, i : i + 1]
            out.append(self.decoder(frame, feat_cache=cache.feat_map, feat_idx=[0], first_chunk=first and i == 0))
        out = torch.cat(out, 2).clamp(-1, 1)
        return (out,)


def cached_vae():
    plain = tiny_vae()
    vae = CachedVAE.from_config(plain.config).eval().requires_grad_(False)
    vae.load_state_dict(plain.state_dict())
    return vae


def test_upstream_cache_is_used_if_decode_accepts_it():
    vae, latents = cached_vae(), latents_of()
    CachedVAE.caches = 0
    decoder = FrameDecoder(vae)
    frames = [decoder.decode(latents[:, :, :1])]
    state = decoder.state_dict()
    frames.append(decoder.decode(latents[:, :, 1:4]))
    frames.append(decoder.decode(latents[:, :, 4:]))
    assert CachedVAE.caches == 3
    assert torch.equal(torch.cat(frames, dim=2), decode_at_once(vae, latents))
    for make_vae in (cached_vae, tiny_vae):  # a state saved before upstream's cache is read after it, and back
        resumed = FrameDecoder(make_vae())
        resumed.load_state_dict(state)
        assert torch.equal(resumed.decode(latents[:, :, 1:4]), frames[1])


# Offloading


class CountingHook(ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("make_vae", [tiny_vae, cached_vae])
def test_offload_hook_fires_once_per_chunk(make_vae):
    vae = make_vae()
    vae._hf_hook = CountingHook()
    decode_split(FrameDecoder(vae), latents_of(), [3, 1, 1])
    assert vae._hf_hook.calls == 3


def test_model_offload_decodes_the_same_bits():
    vae, latents = tiny_vae(), latents_of()
    expected = decode_at_once(vae, latents)
    _, hook = accelerate.cpu_offload_with_hook(vae, "cpu")
    decoder = FrameDecoder(vae)
    first = decoder.decode(latents[:, :, :3])
    hook.offload()
    frames = torch.cat([first, decoder.decode(latents[:, :, 3:])], dim=2)
    assert torch.equal(frames, expected)


def test_sequential_offload_decodes_the_same_bits():
    vae, latents = tiny_vae(), latents_of()
    expected = decode_at_once(vae, latents)
    accelerate.cpu_offload(vae, "cpu", offload_buffers=True)
    assert next(vae.parameters()).device.type == "meta"
    assert torch.equal(decode_split(FrameDecoder(vae), latents, [3, 2]), expected)


def test_group_offload_modules_keep_their_hooks():
    vae, latents = tiny_vae(), latents_of()
    expected = decode_at_once(vae, latents)
    hooks = [add_hook_to_module(module, CountingHook())._hf_hook for module in (vae.post_quant_conv, vae.decoder)]
    assert torch.equal(decode_split(FrameDecoder(vae), latents, [3, 2]), expected)
    assert [hook.calls for hook in hooks] == [2, 5]


# Slicing and tiling


@pytest.mark.parametrize("make_vae", [tiny_vae, cached_vae])
def test_slicing_decodes_videos_separately(make_vae):
    vae, latents = make_vae(), latents_of(batch=3)
    vae.enable_slicing()
    batches = []
    vae.decoder.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    frames = decode_split(FrameDecoder(vae), latents, [3, 2])
    assert set(batches) == {1}
    assert torch.equal(frames, decode_at_once(vae, latents))


def test_a_sliced_decode_resumes():
    vae, latents = tiny_vae(), latents_of(batch=3)
    vae.enable_slicing()
    decoder, resumed = FrameDecoder(vae), FrameDecoder(vae)
    decoder.decode(latents[:, :, :3])
    resumed.load_state_dict(decoder.state_dict())
    assert torch.equal(resumed.decode(latents[:, :, 3:]), decoder.decode(latents[:, :, 3:]))


def test_tiling_is_refused():
    vae = tiny_vae()
    decoder = FrameDecoder(vae)
    vae.enable_tiling()
    with pytest.raises(ValueError, match="disable_tiling"):
        FrameDecoder(vae)
    with pytest.raises(ValueError, match="disable_tiling"):
        decoder.decode(latents_of())


@pytest.mark.parametrize("shape", [(1, 4, 3, 3, 4), (2, 4, 3, 3, 5), (2, 4, 0, 3, 4), (4, 3, 3, 4)])
def test_chunks_of_another_shape_are_refused(shape):
    decoder = FrameDecoder(tiny_vae())
    decoder.decode(latents_of())
    with pytest.raises(ValueError, match="`latents` must be"):
        decoder.decode(torch.zeros(shape))


# Preview VAEs


class TinyVideo(torch.nn.Module):
    """A small TAEHV: each of three stages remembers one frame; 4 frames per latent frame, the first 3 dropped."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.ModuleList([torch.nn.Conv2d(2 * CHANNELS, CHANNELS, 3, padding=1) for _ in range(3)])
        self.grow = torch.nn.Conv2d(CHANNELS, 12, 1)
        self.requires_grad_(False)

    def run(self, z, memory):  # (B, T, C, H, W) to (B, 4 T, 3, 2 H, 2 W) in [0, 1]
        memory = list(memory or [None] * 3)
        for stage, mix in enumerate(self.mix):
            past = torch.zeros_like(z[:, :1]) if memory[stage] is None else memory[stage]
            memory[stage] = z[:, -1:]
            pairs = torch.cat([z, torch.cat([past, z[:, :-1]], dim=1)], dim=2)
            z = mix(pairs.flatten(0, 1)).tanh().unflatten(0, z.shape[:2])
        frames = self.grow(z.flatten(0, 1)).sigmoid().unflatten(0, z.shape[:2])
        frames = frames.unflatten(2, (4, 3)).flatten(1, 2)
        return frames.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1), memory


class TAEHV(TinyVideo):
    def decode_video(self, x, parallel=True, show_progress_bar=True):
        assert not show_progress_bar
        return self.run(x, None)[0][:, 3:]


class TinyVideoDecodeCache:
    def __init__(self):
        self.memory = None


class AutoencoderTinyVideo(TinyVideo):
    """With the conventions of Diffusers' branch abot-world-modular (206121e)."""

    def decode(self, z, return_dict=True, cache: TinyVideoDecodeCache | None = None):
        first = cache is None or cache.memory is None
        frames, memory = self.run(z.transpose(1, 2), None if first else cache.memory)
        if cache is not None:
            cache.memory = memory
        frames = (frames * 2 - 1).transpose(1, 2)[:, :, 3 if first else 0 :]
        return (frames,) if not return_dict else DecoderOutput(sample=frames)


class PlainVideo(TinyVideo):
    """Diffusers' shapes and range, no cache."""

    wrap = staticmethod(lambda frames: frames)

    def decode(self, z):
        return self.wrap((self.run(z.transpose(1, 2), None)[0] * 2 - 1).transpose(1, 2)[:, :, 3:])


def preview_frames(latents):
    """Raw latents, all at once, (B, 3, frames, H, W) in [-1, 1]."""
    return TAEHV().decode_video(latents.transpose(1, 2), show_progress_bar=False).transpose(1, 2) * 2 - 1


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("make_vae", [TAEHV, AutoencoderTinyVideo, PlainVideo])
def test_split_preview_equals_one_decode(make_vae, split):
    decoder = make_decoder(None, make_vae())
    frames = decode_split(decoder, latents_of(), split)
    assert frames.shape == (2, 3, 17, 6, 8)
    torch.testing.assert_close(frames, preview_frames(latents_of()), rtol=0, atol=1e-6)


def test_previews_beyond_the_overlap_stay_exact_and_hold_no_more_latents():
    decoder = PreviewDecoder(TAEHV(), overlap=3)  # three stages, each with one frame of memory
    latents = latents_of(frames=20)
    frames = decode_split(decoder, latents, [3, 3, 1, 6, 7])
    torch.testing.assert_close(frames, preview_frames(latents), rtol=0, atol=1e-6)
    assert [part.shape[2] for part in decoder.state_dict()["features"][0]] == [3]


@pytest.mark.parametrize(
    "wrap", [lambda frames: frames, lambda frames: (frames,), lambda frames: DecoderOutput(sample=frames)]
)
def test_a_preview_vae_may_return_a_tensor_a_tuple_or_an_output(wrap, monkeypatch):
    monkeypatch.setattr(PlainVideo, "wrap", staticmethod(wrap))
    frames = make_decoder(None, PlainVideo()).decode(latents_of())
    torch.testing.assert_close(frames, preview_frames(latents_of()))


@pytest.mark.parametrize("make_vae", [TAEHV, AutoencoderTinyVideo, PlainVideo])
def test_a_preview_resumes(make_vae, tmp_path):
    decoder, resumed = make_decoder(None, make_vae()), make_decoder(None, make_vae())
    decoder.decode(latents_of()[:, :, :3])
    torch.save(decoder.state_dict(), tmp_path / "state")
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert torch.equal(resumed.decode(latents_of()[:, :, 3:]), decoder.decode(latents_of()[:, :, 3:]))


def test_preview_vae_gets_its_dtype_and_its_hook_fires():
    vae = TAEHV().to(torch.bfloat16)
    vae._hf_hook = CountingHook()
    decoder = make_decoder(None, vae)
    assert decoder.decode(latents_of()).dtype == torch.bfloat16
    assert vae._hf_hook.calls == 1


def test_without_a_preview_vae_the_pipelines_vae_decodes():
    assert type(make_decoder(tiny_vae())) is FrameDecoder
    assert type(make_decoder(tiny_vae(), TAEHV())) is PreviewDecoder


def test_unfit_preview_vae_raises():
    with pytest.raises(TypeError, match="`preview_vae` must be a module with `decode` or `decode_video`"):
        make_decoder(None, torch.nn.Linear(1, 1))
    decoder = make_decoder(None, TAEHV(), temporal_factor=16)
    decoder.decode(latents_of())
    with pytest.raises(ValueError, match="`temporal_factor` is 16"):
        decoder.decode(latents_of())
