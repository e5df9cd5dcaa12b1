# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""TokenTrim as a block of Modular Diffusers: stock text encoding, one leaf block that rolls out, stock decoding."""

import inspect
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchLCMScheduler, WanTransformer3DModel
from diffusers.modular_pipelines import (
    ComponentSpec,
    ConfigSpec,
    InputParam,
    ModularPipelineBlocks,
    OutputParam,
    PipelineState,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.wan.decoders import WanVaeDecoderStep
from diffusers.modular_pipelines.wan.encoders import WanTextEncoderStep
from transformers import AutoTokenizer, UMT5EncoderModel

from ..pipeline_tokentrim import TokenTrimPipeline
from ..tokentrim_files.checkpoint import SETTINGS


PARTS = {
    "tokenizer": AutoTokenizer,
    "text_encoder": UMT5EncoderModel,
    "transformer": WanTransformer3DModel,
    "vae": AutoencoderKLWan,
    "scheduler": FlowMatchLCMScheduler,
}
OF_OTHER_BLOCKS = ("self", "prompt", "negative_prompt", "output_type", "return_dict")
ROLLOUT_ARGUMENTS = {  # of the leaf block: those of the pipeline's call
    name: each.default
    for name, each in inspect.signature(TokenTrimPipeline.__call__).parameters.items()
    if name not in OF_OTHER_BLOCKS
}


class TokenTrimTextStep(WanTextEncoderStep):
    """Stock text encoding; prompts are padded to the checkpoint's length, or to 512 tokens."""

    @property
    def inputs(self) -> list[InputParam]:
        others = [each for each in super().inputs if each.name != "max_sequence_length"]
        return [*others, InputParam("max_sequence_length", description="tokens that a prompt is padded to")]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [ConfigSpec("max_sequence_length", None)]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        if state.get("max_sequence_length") is None:
            state.set("max_sequence_length", components.config.get("max_sequence_length") or 512)
        return super().__call__(components, state)


class TokenTrimRolloutStep(ModularPipelineBlocks):
    """All chunks, by [`TokenTrimPipeline`] with the components and the settings of the modular pipeline. Inputs are the
    arguments of its call; later prompts and images are encoded here, too."""

    model_name = "wan"

    @property
    def description(self) -> str:
        return "Autoregressive rollout of a causal Wan model, chunk by chunk, with a rolling KV cache (TokenTrim)"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec(name, kind) for name, kind in PARTS.items()]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [ConfigSpec(name, None) for name in SETTINGS]

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam(name, default=default) for name, default in ROLLOUT_ARGUMENTS.items()]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        decided = OutputParam("decisions", type_hint=list, description="decisions of each video, one a chunk")
        return [OutputParam.template("latents"), decided]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block = self.get_block_state(state)
        call = {name: getattr(block, name, default) for name, default in ROLLOUT_ARGUMENTS.items()}
        if call["guidance_scale"] <= 1:
            call["negative_prompt_embeds"] = None  # stock text encoding makes them in any case
        pipe = TokenTrimPipeline(
            **{name: getattr(components, name, None) for name in PARTS},
            **{name: components.config.get(name) for name in SETTINGS},
        )
        output = pipe(**call, output_type="latent")
        block.latents, block.decisions = output.frames, output.decisions
        self.set_block_state(state, block)
        return components, state


class TokenTrimBlocks(SequentialPipelineBlocks):
    """A causal Wan model as a modular pipeline."""

    model_name = "wan"
    block_classes = [TokenTrimTextStep, TokenTrimRolloutStep, WanVaeDecoderStep]
    block_names = ["text_encoder", "denoise", "decode"]

    @property
    def description(self) -> str:
        return "Long videos from a causal Wan model, chunk by chunk (TokenTrim)"

    @property
    def outputs(self) -> list[OutputParam]:
        return [OutputParam.template("videos")]
