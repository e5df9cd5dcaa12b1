"""Published outputs of the reference code; skipped unless TOKENTRIM_REFERENCE_VECTORS names their folder."""

import json
import os
from pathlib import Path

import pytest
import torch
from builders import latent_pipeline
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from tokentrim import TokenTrimFlowMatchLCMScheduler


FOLDER = os.environ.get("TOKENTRIM_REFERENCE_VECTORS")
PREFIX = "diffusers_weights."


skip_without_vectors = pytest.mark.skipif(not FOLDER, reason="TOKENTRIM_REFERENCE_VECTORS is not set")


def load_case(case):
    """Meta data, tensors, the transformer with the reference's weights, and what `renoise(chunk, step)` has to give."""
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
    """Final latents, and the x0 prediction of every step as it shows in the latents after the step."""
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


@skip_without_vectors
@pytest.mark.parametrize("case", ["rf_b5", "rf_b12"])
def test_rolling_forcing_reference(case):
    """Final latents, and the x0 predictions of every window as they show in the latents after its forward."""
    meta, tensors, transformer, renoise = load_case(case)
    sigmas, windows = [*meta["denoising_sigmas"], 0.0], []
    num_steps = len(sigmas) - 1
    output = latent_pipeline(transformer, TokenTrimFlowMatchLCMScheduler(shift=5.0))(
        prompt_embeds=tensors["prompt_embeds"],
        latents=tensors["initial_noise"].transpose(1, 2),
        renoise=renoise,
        rollout="rolling_forcing",
        num_inference_steps=num_steps,
        window_size=meta["max_attention_frames"],
        method="plain",
        output_type="latent",
        callback_on_step_end=lambda pipe, step, timestep, tensors: windows.append(tensors["latents"]) or {},
    )
    torch.testing.assert_close(output.frames.transpose(1, 2), tensors["final_latents"], atol=1e-4, rtol=0)
    for number, latents in enumerate(windows):
        first = max(0, number - num_steps + 1)
        predictions = tensors[f"denoised_pred.w{number:02d}"].transpose(1, 2).split(3, dim=2)
        for chunk, (x0, after) in enumerate(zip(predictions, latents.split(3, dim=2)), start=first):
            step = number - chunk
            sigma = sigmas[step + 1]
            expected = x0 if sigma == 0 else (1 - sigma) * x0 + sigma * renoise(chunk, step)
            torch.testing.assert_close(after, expected, atol=1e-4, rtol=0)
    assert len(windows) == meta["num_blocks"] + num_steps - 1
