"""Layouts that look back, read by heads or in shots, context noise and wave forcing, against explicit lists of keys."""

import math

import pytest
import torch
import torch.nn.functional as F
from builders import CHUNK, GRID, NUM_TOKENS, embeds, latent_pipeline, noise, randn, roll, rope, tiny_transformer
from oracle_lists import Story, angles_of, turned
from safetensors.torch import save_file


SIGMAS = [1.0, 2.5 / 3]  # two steps, shifted by 5
OTHER = embeds(seed=9)


def rolled(num_chunks, **settings):
    """Latents of our rollout, by chunk."""
    frames = roll(latent_pipeline(), noise(num_chunks), method="plain", **settings).frames
    return frames.split(CHUNK, dim=2)


def told(num_chunks, denoise, commit=None, query_positions=None, timestep=0.0, texts=None, after=None):
    """Latents by chunk where `denoise(chunk)` and `commit(chunk)` return functions that list what a query reads."""
    story, chunks = Story(tiny_transformer(), GRID, embeds()), []
    for chunk, sample in enumerate(noise(num_chunks).split(CHUNK, dim=2)):
        new = list(range(CHUNK * chunk, CHUNK * chunk + CHUNK))
        story.text = (texts or {}).get(chunk, story.text)
        places = query_positions(chunk) if query_positions else None
        chunks.append(story.denoised(sample, SIGMAS, new, denoise(chunk), places))
        story.flow(chunks[-1], timestep, new, (commit or denoise)(chunk), places, writes=True)
        if after is not None:
            after(story, chunk, chunks)
    return chunks


def check_equal(ours, expected):
    for chunk, pair in enumerate(zip(ours, expected, strict=True)):
        torch.testing.assert_close(*pair, atol=2e-4, rtol=0, msg=lambda text, chunk=chunk: f"chunk {chunk}: {text}")


def lists(frames, positions=None):
    """A function for `told`: every query of every head reads these frames."""
    pairs = list(zip(frames, positions or frames))
    return lambda layer, head, query: pairs


# Context noise


def test_context_noise_is_the_timestep_of_commits():
    expected = told(4, lambda chunk: lists(range(3 * chunk + 3)), timestep=300.0)
    check_equal(rolled(4, context_noise=300), expected)
    clean = rolled(4)
    assert torch.equal(rolled(4, context_noise=0.0)[3], clean[3]) and (expected[1] - clean[1]).abs().max() > 1e-2


def test_context_noise_of_a_checkpoint_is_the_default_and_given_frames_are_clean():
    given = noise(1, seed=5).transpose(1, 2)
    calls = {"context_noise": 300}, {}
    noisy, clean = (
        roll(latent_pipeline(**call), noise(3), method="plain", video_latents=given).frames for call in calls
    )
    assert torch.equal(noisy[:, :, : 2 * CHUNK], clean[:, :, : 2 * CHUNK])  # it reads given frames alone
    assert not torch.allclose(noisy[:, :, 2 * CHUNK :], clean[:, :, 2 * CHUNK :], atol=1e-3)
    again = roll(latent_pipeline(context_noise=300), noise(3), method="plain", context_noise=0, video_latents=given)
    assert torch.equal(again.frames, clean)


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1001, ValueError), ("0.1", TypeError)])
def test_bad_context_noise_raises(value, error):
    with pytest.raises(error, match=f"`context_noise` must be a timestep from 0 to 1000, but is {value!r}"):
        rolled(2, context_noise=value)


# Wave Forcing


def test_wave_forcing_reads_cleaner_chunks_only():
    """All of the past, at its own positions; two chunks are in flight."""

    def cleaner(layer, head, query):
        return [(frame, frame) for frame in range(query // CHUNK * CHUNK + CHUNK)]

    story, window, done = Story(tiny_transformer(), GRID, embeds()), [], []
    samples = list(noise(4).split(CHUNK, dim=2))
    while len(done) < 4:
        first = len(done)
        if samples and len(window) < 2:
            window.append([samples.pop(0), 0])
        new = list(range(CHUNK * first, CHUNK * (first + len(window))))
        times = [1000 * SIGMAS[step] for _, step in window for _ in range(CHUNK * NUM_TOKENS)]
        latents = torch.cat([sample for sample, _ in window], dim=2)
        flows = story.flow(latents, times, new, cleaner)
        for chunk, flow in zip(window, flows.split(CHUNK, dim=2)):
            following = [*SIGMAS, 0.0][chunk[1] + 1]
            chunk[:] = chunk[0] + (following - SIGMAS[chunk[1]]) * flow, chunk[1] + 1
        if window[0][1] == 2:
            done.append(window.pop(0)[0])
            new = list(range(CHUNK * first, CHUNK * first + CHUNK))
            story.flow(done[-1], 0.0, new, lists(range(CHUNK * first + CHUNK)), writes=True)
    check_equal(rolled(4, rollout="wave_forcing"), done)
    both_ways = rolled(4, rollout="rolling_forcing")
    assert (both_ways[1] - done[1]).abs().max() > 1e-2


# LongLive-RAG


def test_latent_memory_reads_the_most_similar_frames():
    settings = {"window_size": 7, "num_sink_frames": 1, "num_memory_frames": 2, "num_excluded_frames": 1}
    means, found = {}, {}

    def after(story, chunk, chunks):
        for at in range(CHUNK):
            means[CHUNK * chunk + at] = chunks[-1][0, :, at].mean(dim=(1, 2))

    def denoise(chunk):
        first = CHUNK * chunk
        candidates = range(1, first - 6 - 1)
        likeness = {frame: F.cosine_similarity(means[frame], means[first - 1], dim=0).item() for frame in candidates}
        best = found[chunk] = sorted(likeness, key=lambda frame: -likeness[frame])[:2]
        left = max(first + CHUNK - 7, 0)
        newest = range(max(first - 1, 1), first + CHUNK)
        return lists([0, *best, *newest], [0, *[0] * len(best), *(frame - left for frame in newest)])

    def query_positions(chunk):
        left = max(CHUNK * chunk + CHUNK - 7, 0)
        return lambda frame: frame - left

    expected = told(7, denoise, query_positions=query_positions, after=after)
    check_equal(rolled(7, layout={"latent_memory": settings}), expected)
    assert any(best != sorted(best)[:2] for best in found.values())  # not the oldest


# TriAttention


def test_triattention_keeps_the_tokens_that_queries_will_ask_for(tmp_path):
    """Each layer and head its own; keys stand where they stood."""
    real, imag = randn(2, 2, 2, 6, seed=3)
    q_abs = torch.complex(real, imag).abs() + randn(2, 2, 6, seed=4).abs()
    tensors = {"q_mean_real": real, "q_mean_imag": imag, "q_abs_mean": q_abs}
    save_file({name: each.contiguous() for name, each in tensors.items()}, tmp_path / "queries.safetensors")
    held = {(layer, head): [] for layer in range(2) for head in range(2)}  # tokens of the past, in order

    def score(story, layer, head, slot, tokens, end):
        frame, token = tokens[slot]
        key = turned(
            story.memory[layer][frame][0][token, head][None], angles_of(frame, story.places[[token]], story.dims)
        )
        assumed, place = divmod(end * NUM_TOKENS - len(tokens) + slot, NUM_TOKENS)
        key = turned(key, -angles_of(assumed, story.places[[place]], story.dims))[0]
        k = torch.complex(key[0::2], key[1::2])
        q, total = torch.complex(real, imag)[layer, head], 0.0
        for pair in range(6):
            w = [1.0, 0.01][pair] if pair < 2 else 0.0
            turn = (q[pair] * k[pair].conj()).angle().item()
            cos = sum(math.cos(w * (end - assumed + 2**d) + turn) for d in range(8)) / 8
            total += (q[pair].abs() * k[pair].abs()).item() * cos
            total += ((q_abs[layer, head, pair] - q[pair].abs()) * k[pair].abs()).item()
        return total

    def after(story, chunk, chunks):
        end = CHUNK * chunk + CHUNK
        for (layer, head), tokens in held.items():
            tokens += [(frame, token) for frame in range(end - CHUNK, end) for token in range(NUM_TOKENS)]
            if len(tokens) > 6 * NUM_TOKENS:
                slots = range(NUM_TOKENS, len(tokens) - 2 * NUM_TOKENS)
                best = sorted(slots, key=lambda slot: -score(story, layer, head, slot, tokens, end))[: 3 * NUM_TOKENS]
                tokens[:] = tokens[:NUM_TOKENS] + [tokens[slot] for slot in sorted(best)] + tokens[-2 * NUM_TOKENS :]

    def denoise(chunk):
        new = range(CHUNK * chunk, CHUNK * chunk + CHUNK)
        return lambda layer, head, query: [
            *((frame, frame, [token]) for frame, token in held[layer, head]),
            *((frame, frame) for frame in new),
        ]

    settings = {"window_size": 9, "num_sink_frames": 1, "num_recent_frames": 2, "budget": 6}
    settings["statistics"] = str(tmp_path / "queries.safetensors")
    check_equal(rolled(7, layout={"triattention": settings}), told(7, denoise, after=after))
    assert held[0, 0] != held[0, 1] and held[0, 0] != held[1, 0]


def test_triattention_scores_can_be_averaged_over_layers():
    settings = {"window_size": 9, "num_sink_frames": 1, "num_recent_frames": 2, "budget": 6}
    one, each = (rolled(6, layout={"triattention": {**settings, "per_layer": way}}) for way in (False, True))
    assert torch.equal(one[2], each[2]) and not torch.allclose(one[4], each[4], atol=1e-4)


# ID-Forcing


@pytest.mark.parametrize("re_encode", [True, False])
def test_id_forcing_reads_chunks_that_read_only_themselves(re_encode):
    """Two native chunks; then the sink, the chunk before last alone, and the last one alone or behind that one."""

    def denoise(chunk):
        if chunk < 2:
            return lists(range(CHUNK * chunk + CHUNK))
        first = CHUNK * chunk
        frames = [0, 1, 2, *range(max(first - 6, 3), first + CHUNK)]
        return lists(frames, list(range(len(frames))))

    def query_positions(chunk):
        return lambda frame: frame if chunk < 2 else min(frame, 9 + frame % CHUNK)

    def commit(chunk):
        """Alone."""
        new = range(CHUNK * chunk, CHUNK * chunk + CHUNK)
        return lists(new, list(map(query_positions(chunk), new)))

    def after(story, chunk, chunks):
        """The next chunk finds the one before last alone, and the last one as it asks for it."""
        new = list(range(CHUNK * chunk, CHUNK * chunk + CHUNK))
        before = [frame - CHUNK for frame in new]
        if chunk >= 2:
            story.flow(chunks[-2], 0.0, before, lists(before), writes=True)
        if re_encode and chunk >= 2:
            story.flow(chunks[-1], 0.0, new, lists(before + new), writes=True)

    expected = told(7, denoise, commit, query_positions, after=after)
    settings = {"window_size": 12, "num_sink_frames": 3, "re_encode": re_encode, "num_native_chunks": 2}
    check_equal(rolled(7, layout={"id_forcing": settings}), expected)


# LongLive 2


@pytest.mark.parametrize("clean", [False, True])
def test_shots_move_positions_and_keep_a_second_sink(clean):
    cuts, cached, pinned = (3, 6), [], []

    def position(frame):
        return frame + 8 * sum(CHUNK * cut <= frame for cut in cuts)

    def room(chunk):
        """The oldest frames after what is protected leave."""
        while len(cached) + CHUNK > 9:
            cached.remove(next(frame for frame in cached if frame >= 2 and frame not in pinned))
        return [*cached, *range(CHUNK * chunk, CHUNK * chunk + CHUNK)]

    def denoise(chunk):
        frames = room(chunk)
        return lists(frames, list(map(position, frames)))

    def commit(chunk):
        frames = room(chunk)
        if clean and chunk in cuts:
            frames = [frame for frame in frames if frame < 2 or frame >= CHUNK * chunk]
        return lists(frames, list(map(position, frames)))

    def after(story, chunk, chunks):
        new = list(range(CHUNK * chunk, CHUNK * chunk + CHUNK))
        if clean and chunk in cuts:
            cached[:] = [frame for frame in cached if frame < 2]
        cached.extend(new)
        pinned[:] = new[:2] if chunk in cuts else pinned

    expected = told(9, denoise, commit, lambda chunk: position, texts={3: OTHER, 6: embeds()}, after=after)
    layout = {"shots": {"window_size": 9, "num_sink_frames": 2, "clean_recache": clean}}
    schedule = {0: embeds(), 3: OTHER, 6: embeds()}
    ours = rolled(9, layout=layout, prompt_embeds=None, prompt_schedule=schedule, prompt_transition="shot")
    check_equal(ours, expected)


def test_a_shot_needs_a_layout_with_shots():
    call = {"prompt_embeds": None, "prompt_schedule": {0: embeds(), 1: OTHER}, "prompt_transition": "shot"}
    with pytest.raises(ValueError, match="`prompt_transition` must be one of .* for LongLive, but is 'shot'"):
        rolled(2, layout="longlive", **call)


# Pyramid Forcing


def test_pyramid_heads_read_different_frames():
    labels, kinds = [[0, 1], [2, -1]], {0: "wave", -1: "wave", 1: "anchor", 2: "veil"}
    settings = {"period": 3, "num_cyclic": 2, "interval": 4, "num_strided": 2, "num_merged": 2}

    def after(story, chunk, chunks):
        """The mean over four frames and patches of 2 x 2: on a grid of 2 x 3, tokens 0, 1, 3, 4 and tokens 2, 5."""
        for layer in story.memory:
            for block in range(1, (CHUNK * chunk + CHUNK) // 4):
                frames = [layer[frame] for frame in range(4 * block, 4 * block + 4)]
                merged = []
                for table in (0, 1):
                    patches = [[each[table][tokens] for each in frames] for tokens in ([0, 1, 3, 4], [2, 5])]
                    merged.append(torch.stack([torch.cat(patch).mean(dim=0) for patch in patches]))
                layer[f"block {block}"] = (*merged, story.places[[0, 2]])

    def reads(kind, first, end):
        """What heads of a kind read where frames before `end` are stored."""

        def of_query(query):
            sink = max(query - min(max(query, 18), 21), 0)
            size = 1 if kind == "wave" else 3
            pairs = [(frame, sink) for frame in range(size)]
            recent = range(max(first + CHUNK - 4, size), first + CHUNK)
            pairs += [(frame, frame) for frame in recent]
            if kind == "anchor" and first > 3 and 3 not in recent:
                pairs.append((3, 3))
            if kind == "veil":
                blocks = list(range(1, end // 4))[-2:]
                return pairs + [(f"block {b}", 4 * b + 1) for b in blocks if 4 * b + 4 <= query - 3]
            step, phase = (3, query % 3) if kind == "wave" else (4, 0)
            stored = [frame for frame in range(1, end) if frame % step == phase][-2:]
            return pairs + [(frame, sink) for frame in stored if frame < query - 3]

        return of_query

    def passes(chunk, end):
        by_kind = {kind: reads(kind, CHUNK * chunk, end) for kind in ("wave", "anchor", "veil")}
        return lambda layer, head, query: by_kind[kinds[labels[layer][head]]](query)

    expected = told(
        9, lambda chunk: passes(chunk, CHUNK * chunk), lambda chunk: passes(chunk, CHUNK * chunk + CHUNK), after=after
    )
    check_equal(rolled(9, layout={"pyramid": {"labels": labels, **settings}}), expected)


# Heads


def test_each_head_reads_what_its_layout_reads():
    layouts = [{"window": {"window_size": 6}}, {"window": {"window_size": 9, "num_sink_frames": 3}}]
    labels = [[0, 1], [1, 0]]

    def denoise(chunk):
        end = CHUNK * chunk + CHUNK
        frames = list(range(max(end - 6, 0), end)), sorted({*range(3), *range(max(end - 6, 0), end)})
        return lambda layer, head, query: [(frame, frame) for frame in frames[labels[layer][head]]]

    check_equal(rolled(6, layout={"by_head": {"labels": labels, "layouts": layouts}}), told(6, denoise))


def test_heads_with_one_layout_equal_the_layout():
    layouts = [{"window": {"window_size": 9, "num_sink_frames": 3}}, {"infinity_rope": {"window_size": 9}}]
    for label, layout in enumerate(layouts):
        alone = rolled(7, layout=layout)
        ours = rolled(7, layout={"by_head": {"labels": [[label] * 2] * 2, "layouts": layouts}})
        torch.testing.assert_close(torch.cat(ours, dim=2), torch.cat(alone, dim=2), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("layout", "error", "message"),
    [
        ({"by_head": {}}, TypeError, "`layouts` must be a list of layouts"),
        ({"by_head": {"labels": [[0]], "layouts": ["window"]}}, ValueError, "`labels` .*2 layers and 2 heads"),
        ({"by_head": {"labels": [[0, 1]] * 2, "layouts": ["window"]}}, ValueError, r"`labels` .*lists of \[0\]"),
        ({"by_head": {"labels": [[0, 0]] * 2, "layouts": ["memrope"]}}, ValueError, "`layouts` .*MemRoPE"),
        ({"by_head": {"labels": "none.json", "layouts": ["window"]}}, ValueError, "`labels` .*'none.json'"),
        ("pyramid", TypeError, "`labels` must be lists of"),
        ({"pyramid": {"labels": [[0, 3]] * 2}}, ValueError, "`labels` .*0, 3"),
        ({"pyramid": {"labels": [[0, 1]] * 2, "num_recent_frames": 2}}, ValueError, "`num_recent_frames` .*>= 3"),
        ({"latent_memory": {"window_size": 9}}, ValueError, "`window_size` .*>= 10"),
        ({"id_forcing": {"window_size": 8}}, ValueError, "`window_size` .*from 9 to 12"),
        ({"shots": {"window_size": 8}}, ValueError, "`window_size` .*>= 9"),
        ({"triattention": {"window_size": 11}}, ValueError, "`window_size` .*>= 12"),
        ({"triattention": {"budget": 5}}, ValueError, "`budget` .*>= 6"),
        ({"triattention": {"statistics": "none"}}, ValueError, "`statistics` .*'none'"),
        ({"strided": {"window_size": 11}}, ValueError, "`window_size` .*>= 12"),
        ({"pinned": {"frames": [-1]}}, ValueError, "`frames` .*>= 0"),
        ({"pinned": {"frames": list(range(30)), "window_size": 21}}, ValueError, "`window_size` .*>= 33"),
    ],
    ids=str,
)
def test_bad_settings_raise_before_any_model_runs(layout, error, message):
    pipe, forwards = latent_pipeline(), []
    pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(error, match=message):
        roll(pipe, noise(3), layout=layout)
    assert not forwards


def test_statistics_of_another_model_raise(tmp_path):
    tensors = {name: torch.ones(3, 2, 6) for name in ("q_mean_real", "q_mean_imag", "q_abs_mean")}
    save_file(tensors, tmp_path / "queries.safetensors")
    with pytest.raises(ValueError, match=r"`statistics` must be of shape \(2, 2, 6\).*\(3, 2, 6\)"):
        rolled(2, layout={"triattention": {"statistics": str(tmp_path / "queries.safetensors")}})


# In the cache


def test_views_that_do_not_serve_every_query_once_raise():
    pipe = latent_pipeline()

    class Mine(pipe.Layout):
        one_chunk_a_pass = True

        def view(self, held, new, pass_):
            return [pipe.View(held, held, new, queries=new[:2]), pipe.View(held, held, new, queries=self.last(new))]

    for last in (lambda new: new[1:], lambda new: []):
        Mine.last = staticmethod(last)
        with pytest.raises(
            ValueError, match="`Mine.view` must be views that together have every query and every head once"
        ):
            roll(pipe, noise(2), layout=Mine())


def test_queries_may_read_different_frames():
    pipe = latent_pipeline()

    class Mine(pipe.Layout):
        one_chunk_a_pass = True

        def view(self, held, new, pass_):
            return [pipe.View(held[-at:], held[-at:], new, queries=[frame]) for at, frame in enumerate(new, start=1)]

    def denoise(chunk):
        first = CHUNK * chunk
        return lambda layer, head, query: [
            (frame, frame) for frame in range(max(first - (query - first + 1), 0), first + CHUNK)
        ]

    check_equal(rolled(4, layout=Mine()), told(4, denoise))


def test_rotation_of_the_lists_is_the_one_of_diffusers():
    vectors = randn(2 * NUM_TOKENS, 1, 12)
    expected = rope(vectors[None], [3, 5])[0]
    places = torch.cartesian_prod(torch.arange(GRID[0]), torch.arange(GRID[1]))
    ours = [
        turned(vectors[at * 6 : at * 6 + 6, 0], angles_of(time, places, (4, 4, 4))) for at, time in enumerate((3, 5))
    ]
    torch.testing.assert_close(torch.cat(ours)[:, None], expected, atol=1e-5, rtol=0)
