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


@pytest.mark.skipif(not FOLDER, reason="TOKENTRIM_REFERENCE_VECTORS is not set")
@pytest.mark.parametrize("case", ["sf_global", "sf_global_b2", "sf_local9_sink3"])
def test_self_forcing_reference(case):
    """Final latents, and the x0 prediction of every step as it shows in the latents after the step."""
    meta = json.loads((Path(FOLDER) / f"{case}.json").read_text())
    tensors = load_file(Path(FOLDER) / f"{case}.safetensors")
    transformer = WanTransformer3DModel(**meta["diffusers_config"]).eval()
    weights = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    transformer.load_state_dict(weights)
    batch, sigmas = meta["batch_size"], [*meta["denoising_sigmas"], 0.0]
    draws = {
        (draw["block"], draw["after_step"]): tensors[f"renoise.{draw['i']:03d}"].unflatten(0, (batch, -1))
        for draw in meta["renoise_map"]
    }
    steps = []
    output = latent_pipeline(transformer, TokenTrimFlowMatchLCMScheduler(shift=5.0))(
        prompt_embeds=tensors["prompt_embeds"],
        latents=tensors["initial_noise"].transpose(1, 2),
        renoise=lambda chunk, step: draws[chunk, step].transpose(1, 2),
        window_size=None if meta["local_attn_size"] < 0 else meta["local_attn_size"],
        num_sink_frames=meta["sink_size"],
        token_trim=False,
        output_type="latent",
        callback_on_step_end=lambda pipe, step, timestep, tensors: steps.append(tensors["latents"]) or {},
    )
    torch.testing.assert_close(output.frames.transpose(1, 2), tensors["final_latents"], atol=1e-4, rtol=0)
    for count, latents in enumerate(steps):
        chunk, step = divmod(count, len(sigmas) - 1)
        x0, sigma = tensors[f"denoised_pred.b{chunk:02d}.s{step}"], sigmas[step + 1]
        expected = x0 if sigma == 0 else (1 - sigma) * x0 + sigma * draws[chunk, step]
        torch.testing.assert_close(latents.transpose(1, 2), expected, atol=1e-4, rtol=0)
    assert len(steps) == meta["num_blocks"] * (len(sigmas) - 1)
