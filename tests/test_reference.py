"""Outputs of the reference code; skipped unless TOKENTRIM_REFERENCE_VECTORS names their folder."""

import json
import os
from pathlib import Path

import pytest
import torch
from builders import latent_pipeline
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from tokentrim import TokenTrimFlowMatchLCMScheduler, View
from tokentrim.tokentrim_views.registry import make_layout


FOLDER = os.environ.get("TOKENTRIM_REFERENCE_VECTORS")
PREFIX = "diffusers_weights."


skip_without_vectors = pytest.mark.skipif(not FOLDER, reason="TOKENTRIM_REFERENCE_VECTORS is not set")


def load_case(case):
    """Metadata, tensors, the transformer with the reference's weights, and the noise of `renoise(chunk, step)`."""
    meta = json.loads((Path(FOLDER) / f"{case}.json").read_text())
    tensors = load_file(Path(FOLDER) / f"{case}.safetensors")
    transformer = WanTransformer3DModel(**meta["diffusers_config"]).eval()
    weights = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    transformer.load_state_dict(weights)
    draws = {}
    for draw in meta["renoise_map"]:
        eps = tensors[f"renoise.{draw['i']:03d}"].unflatten(0, (meta["batch_size"], -1))  # (B, frames, C, H, W)
        eps = eps[:, slice(*draw.get("used_frame_slice_of_draw", (None, None)))]
        draws[draw["block"], draw["after_step"]] = eps.transpose(1, 2)
    return meta, tensors, transformer, lambda chunk, step: draws[chunk, step]


@skip_without_vectors
@pytest.mark.parametrize("case", ["sf_global", "sf_global_b2", "sf_local9_sink3"])
def test_self_forcing_reference(case):
    """Final latents, and the x0 prediction of every step, derived from the latents after the step."""
    meta, tensors, transformer, renoise = load_case(case)
    sigmas, steps = [*meta["denoising_sigmas"], 0.0], []
    output = latent_pipeline(transformer, TokenTrimFlowMatchLCMScheduler(shift=5.0))(
        prompt_embeds=tensors["prompt_embeds"],
        latents=tensors["initial_noise"].transpose(1, 2),
        renoise=renoise,
        window_size=None if meta["local_attn_size"] < 0 else meta["local_attn_size"],
        num_sink_frames=meta["sink_size"],
        method="plain",
        output_type="latent",
        callback_on_step_end=lambda pipe, step, timestep, tensors: steps.append(tensors["latents"]) or {},
    )
    torch.testing.assert_close(output.frames.transpose(1, 2), tensors["final_latents"], atol=1e-4, rtol=0)
    for count, latents in enumerate(steps):
        chunk, step = divmod(count, len(sigmas) - 1)
        x0, sigma = tensors[f"denoised_pred.b{chunk:02d}.s{step}"].transpose(1, 2), sigmas[step + 1]
        expected = x0 if sigma == 0 else (1 - sigma) * x0 + sigma * renoise(chunk, step)
        torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)
    assert len(steps) == meta["num_blocks"] * (len(sigmas) - 1)


TRAINING_FREE = {
    "ir_w6": {"layout": "infinity_rope"},
    "ir_w6_flush": {"layout": "infinity_rope", "prompt_transition": "flush"},
    "ir_w6_cut": {"layout": "infinity_rope", "prompt_transition": "cut"},
    "ir_w12_flush": {"layout": {"infinity_rope": {"window_size": 12}}, "prompt_transition": {8: "flush"}},
    "ll_w12": {"layout": "longlive"},
    "ll_w12_b2": {"layout": "longlive"},
    "ll_switch": {"layout": "longlive", "prompt_transition": "recache"},
    "ll_switch_early": {"layout": "longlive", "prompt_transition": {3: "recache"}},
    "ll_rel_switch": {"layout": {"longlive": {"relative_positions": True}}, "prompt_transition": "recache"},
    "cf_sink3": {"layout": "commit_forcing"},
    "cf_base": {"layout": {"commit_forcing": {"commit_window_size": None}}},
    "cf_ll": {"layout": {"commit_forcing": {"window_size": 12, "move_sink": False, "commit_window_size": 12}}},
    "rec_trb": {"layout": "recency"},
    "rs_w21": {"layout": "rolling_sink"},
    "rs_w12_b2": {"layout": {"rolling_sink": {"window_size": 12}}},
    "df_sink14": {"layout": "deep_sink"},
    "df_pc": {"layout": {"deep_sink": {"budget": 16}}},
    "mr_w12": {"layout": "memrope"},
    "tc_k21": {"layout": "tether"},
    "bias_w9": {"layout": {"attention_bias": {"window_size": 9}}},
    "cn_t200": {"layout": {"window": {"window_size": 9, "num_sink_frames": 3}}, "context_noise": 200},
    "lr_m6": {"layout": "latent_memory"},
    "lr_m3": {
        "layout": {"latent_memory": {"num_sink_frames": 3, "num_memory_frames": 3, "num_excluded_frames": 0}},
    },
    "ta_w12": {"layout": {"triattention": {"budget": 6}}},
    "ta_w12_b9": {"layout": "triattention"},
    "id_sf": {"layout": "id_forcing"},
    "id_ll": {"layout": {"id_forcing": {"re_encode": False, "num_native_chunks": 1}}},
    "ms_shots": {"layout": "shots", "prompt_transition": "shot"},
    "ms_clean": {"layout": {"shots": {"clean_recache": True}}, "prompt_transition": "shot"},
    "pf_mixed": {"layout": {"pyramid": {"labels": [[-1, 1], [2, -1]]}}},
    "pf_anchor_veil": {"layout": {"pyramid": {"labels": [[1, 2], [2, 1]]}}},
}


class Recording:
    """A layout that records its views: query positions, and [frame, position, log weight]."""

    def __init__(self, layout):
        self.layout, self.passes = layout, []

    def __getattr__(self, name):
        return getattr(self.layout, name)

    def after(self, history):
        return self.recording(self.layout.after(history))

    def sized(self, longest):
        return self.recording(self.layout.sized(longest))

    def recording(self, layout):
        recording = Recording(layout)
        recording.passes = self.passes
        return recording

    def view(self, held, new, pass_):
        view = self.layout.view(held, new, pass_)
        if isinstance(view, list):
            self.passes.append((pass_.kind, new, view))
            return view
        weights = [0.0] * len(view.frames) if view.log_weights is None else view.log_weights
        frames = [each[0] if isinstance(each, list) else each for each in view.frames]
        keys = [*zip(frames, view.positions, weights), *((*each, 0.0) for each in zip(new, view.own_positions))]
        queries = view.own_positions if view.query_positions is None else view.query_positions
        self.passes.append((pass_.kind, list(queries), [list(key) for key in keys]))
        return view


def check_traces(passes, traces):
    """A recache of the reference also encodes frames that no pass reads. ID-Forcing encodes the same chunks alone and again,
    in another order."""
    kinds = {"denoise": "denoise", "context": "commit", "recache": "recache"}
    if any(trace["kind"] == "self_cache" for trace in traces):
        passes = [each for each in passes if each[0] == "denoise"]
        traces = [each for each in [*traces, {"kind": "denoise"}] if each["kind"] == "denoise"]
    assert len(passes) == len(traces) - 1  # the last chunk is not committed
    for (kind, queries, keys), trace in zip(passes, traces):
        assert kind == kinds[trace["kind"]]
        assert queries == trace["query_positions"] or kind == "recache"
        if "reads_by_layer_query_frame_head" in trace:
            check_reads(queries, keys, trace["reads_by_layer_query_frame_head"])
        if isinstance(keys[0], View):
            continue
        if "keys" not in trace:  # single tokens
            assert 6 * len(keys) == trace["key_tokens"] and keys[0][1] == trace.get("sink_position", 0)
            continue
        expected = [[*key, 0.0][:3] for key in trace["keys"]]
        if "keys_layer_1" in trace or isinstance(expected[min(3, len(expected) - 1)][0], str):
            keys, expected = ([[0, *key[1:]] for key in each] for each in (keys, expected))  # places have their names
        assert sorted(key[:2] for key in keys) == sorted(key[:2] for key in expected)
        weights = ({tuple(key[:2]): key[2] for key in each} for each in (keys, expected))
        assert next(weights) == pytest.approx(next(weights), abs=1e-4)


def check_reads(new, views, expected):
    """What each head of each layer reads for each frame of queries."""
    for view in views:
        (query,) = view.queries
        names = [f"block {frame // 4}" if stride > 1 else frame for frame, stride in zip(view.frames, view.strides)]
        reads = [*zip(names, view.positions), *zip(new, view.own_positions)]
        for layer, heads in enumerate(view.heads):
            for head in heads:
                found = expected[layer][new.index(query)][head]
                assert sorted(map(str, reads)) == sorted(str(tuple(each)) for each in found)


def with_statistics(settings, tensors, folder):
    """The settings, with a file of the query statistics that a case has."""
    prefix = "q_stats."
    statistics = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
    if settings.get("layout") == "triattention":
        save_file(statistics, folder / "queries.safetensors")
        return {**settings, "layout": {"triattention": {"statistics": str(folder / "queries.safetensors")}}}
    return dict(settings)


@skip_without_vectors
@pytest.mark.parametrize("case", TRAINING_FREE)
def test_training_free_reference(case, tmp_path):
    """Final latents, and the frames, positions and weights of each pass."""
    meta, tensors, transformer, renoise = load_case(case)
    settings = with_statistics(TRAINING_FREE[case], tensors, tmp_path)
    layout = Recording(make_layout(settings.pop("layout")))
    prompts = {each["from_block"]: tensors[each["key"]] for each in meta["prompts"]}
    output = latent_pipeline(transformer, TokenTrimFlowMatchLCMScheduler(shift=5.0))(
        prompt_schedule=prompts,
        latents=tensors["initial_noise"].transpose(1, 2),
        renoise=renoise,
        layout=layout,
        method="plain",
        output_type="latent",
        **settings,
    )
    final = output.frames.transpose(1, 2)
    torch.testing.assert_close(final, tensors["final_latents"], atol=1e-4, rtol=0)
    check_traces(layout.passes, meta["trace"])


def memories(case, hook, found, num_chunks):
    """Results of `found(memory)` after each call of a layout's hook, by chunk, then layer."""
    meta, tensors, transformer, renoise = load_case(case)
    layout, log = make_layout(TRAINING_FREE[case]["layout"]), []
    rewrite = getattr(layout, hook)

    def recorded(memory, new, query):
        rewrite(memory, new, query)
        log.append((new[0] // 3, found(memory)))

    setattr(layout, hook, recorded)
    latent_pipeline(transformer, TokenTrimFlowMatchLCMScheduler(shift=5.0))(
        prompt_embeds=tensors["prompt_embeds"],
        latents=tensors["initial_noise"].transpose(1, 2)[:, :, : 3 * num_chunks],
        renoise=renoise,
        layout=layout,
        method="plain",
        output_type="latent",
    )
    return meta, log


@skip_without_vectors
def test_tether_admits_the_frames_of_the_reference():
    def found(memory):
        return [
            memory.frames[place] + int(memory.tag[place, 0, 0]) for place in range(3, 17) if len(memory.frames) > 17
        ]

    meta, log = memories("tc_k21", "before_commit", found, 18)
    expected = [(each["block"], each["frames"]) for each in meta["memory_after_admission"]]
    assert [each for each in log if each[0] >= 7] == expected[: 2 * 10]  # the last chunk is not committed


@skip_without_vectors
def test_deep_sink_selects_the_tokens_of_the_reference():
    def found(memory):
        places = [(frame, token) for frame in (10, 11) for token in range(6) if len(memory.frames) > 11]
        return sorted([frame + int(memory.tag[frame, token, 1]), token + int(memory.tag[frame, token, 2])]
                      for frame, token in places)  # fmt: skip

    meta, log = memories("df_pc", "before_chunk", found, 18)
    blocks = {each["block"] for each in meta["selected_tokens"]}
    expected = [(each["block"], sorted(each["frame_and_grid_index"])) for each in meta["selected_tokens"]]
    assert [each for each in log if each[0] in blocks] == expected


@skip_without_vectors
@pytest.mark.parametrize("case", ["rf_b5", "rf_b12", "wf_b12"])
def test_rolling_forcing_reference(case):
    """Final latents, and the x0 predictions of every window, derived from the latents after its forward."""
    meta, tensors, transformer, renoise = load_case(case)
    sigmas, windows = [*meta["denoising_sigmas"], 0.0], []
    num_steps = len(sigmas) - 1
    output = latent_pipeline(transformer, TokenTrimFlowMatchLCMScheduler(shift=5.0))(
        prompt_embeds=tensors["prompt_embeds"],
        latents=tensors["initial_noise"].transpose(1, 2),
        renoise=renoise,
        rollout={"wf": "wave_forcing", "rf": "rolling_forcing"}[case[:2]],
        num_inference_steps=num_steps,
        window_size=meta["max_attention_frames"],
        method="plain",
        output_type="latent",
        callback_on_step_end=lambda pipe, step, timestep, tensors: windows.append(tensors["latents"]) or {},
    )
    torch.testing.assert_close(output.frames.transpose(1, 2), tensors["final_latents"], atol=1e-4, rtol=0)
    if "denoised_pred.w00" not in tensors:  # Wave Forcing has final latents alone
        return
    for number, latents in enumerate(windows):
        first = max(0, number - num_steps + 1)
        predictions = tensors[f"denoised_pred.w{number:02d}"].transpose(1, 2).split(3, dim=2)
        for chunk, (x0, after) in enumerate(zip(predictions, latents.split(3, dim=2)), start=first):
            step = number - chunk
            sigma = sigmas[step + 1]
            expected = x0 if sigma == 0 else (1 - sigma) * x0 + sigma * renoise(chunk, step)
            torch.testing.assert_close(after, expected, atol=1e-4, rtol=0)
    assert len(windows) == meta["num_blocks"] + num_steps - 1
