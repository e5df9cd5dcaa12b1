"""`tokentrim modular`: Modular Diffusers loads the folder and makes the pipeline's latents."""

import json
import re

import numpy as np
import pytest
import torch
from builders import full_pipeline, quiet, tiny_text_encoder, tiny_tokenizer, tiny_transformer, tiny_vae
from diffusers import FlowMatchLCMScheduler, UniPCMultistepScheduler, WanPipeline
from fresh import Nursery

from tokentrim import TokenTrimPipeline
from tokentrim.tools.cli import main


PROMPT = "a red circle moving right over a blue background"
SETTINGS = {"window_size": 9, "num_frames_per_chunk": 2, "method": "tokentrim"}
EAGER = {"drift_sensitivity": 0.0, "warmup_chunks": 1, "prune_fraction": 0.4}


@pytest.fixture
def checkpoint(tmp_path):
    full_pipeline(FlowMatchLCMScheduler(shift=5.0), **SETTINGS).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_the_block_makes_the_latents_of_the_pipeline(checkpoint, tmp_path):
    """In a fresh process, without this package; a change of prompt is encoded by the block, too."""
    assert main(["modular", str(tmp_path / "blocks"), "--checkpoint", str(checkpoint)]) == 0
    assert sorted(path.name for path in (tmp_path / "blocks").iterdir()) == [
        "block.py",
        "modular_config.json",
        "modular_model_index.json",
        "scheduler",
    ]
    call = {"num_frames": 33, "prompt_schedule": {2: "a green square"}, **EAGER}
    script = f"""
import torch
from diffusers import ModularPipeline
pipe = ModularPipeline.from_pretrained("blocks", trust_remote_code=True)
pipe.load_components()
state = pipe(prompt={PROMPT!r}, generator=torch.Generator().manual_seed(0), **{call})
torch.save([state.get("latents"), torch.from_numpy(state.get("videos")), state.get("decisions")], "made.pt")
print(type(pipe).__name__, pipe.config.window_size, list(pipe.blocks.sub_blocks))
"""
    with Nursery() as nursery:
        printed, warned = nursery.run(script, tmp_path)
    assert printed == "WanModularPipeline 9 ['text_encoder', 'denoise', 'decode']\n", warned
    latents, videos, decisions = torch.load(tmp_path / "made.pt")
    pipe = quiet(TokenTrimPipeline.from_pretrained(checkpoint))
    given = {"generator": torch.Generator().manual_seed(0), **call}
    expected = pipe(PROMPT, output_type="latent", **given)
    assert latents.equal(expected.frames) and decisions == expected.decisions
    without = pipe(
        PROMPT, output_type="latent", **{**given, "prompt_schedule": None, "generator": torch.manual_seed(0)}
    )
    assert not latents[:, :, 6:9].equal(without.frames[:, :, 6:9])  # the change shows
    frames = pipe.decode_latents(latents, "np")
    np.testing.assert_allclose(videos.numpy(), frames, atol=1e-5)  # stock decoding multiplies in another order


def test_the_index_names_where_the_weights_lie(checkpoint, tmp_path):
    main(["modular", str(tmp_path / "blocks"), "--checkpoint", str(checkpoint)])
    index = json.loads((tmp_path / "blocks" / "modular_model_index.json").read_text())
    assert {name: index[name] for name in SETTINGS} == SETTINGS
    assert index["transformer"][2]["pretrained_model_name_or_path"] == str(checkpoint)
    assert index["scheduler"][2]["type_hint"] == ["diffusers", "FlowMatchLCMScheduler"]


@pytest.mark.parametrize("case", ["taken", "nothing", "bidirectional"])
def test_wrong_folders_raise(case, checkpoint, tmp_path, capsys):
    out, given = tmp_path / "blocks", checkpoint
    if case == "taken":
        out, message = checkpoint, "must be a new or an empty folder"
    elif case == "nothing":
        given, message = tmp_path / "none", "does not exist"
    else:
        given, message = tmp_path / "wan", "must be that of a causal model, but .* is a folder of a Wan pipeline"
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        parts = (tiny_tokenizer(), tiny_text_encoder(), tiny_vae(), scheduler, tiny_transformer())
        WanPipeline(*parts).save_pretrained(given)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert main(["modular", str(out), "--checkpoint", str(given)]) == 1
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
