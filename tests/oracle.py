"""The whole rollout written out the slow way: no cache, one masked forward over all of the past for every flow."""

import math

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor


class MaskedAttnProcessor(WanAttnProcessor):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


def masked_flow(transformer, past, chunk, timestep, text, sees):
    """Flow of `chunk` at `timestep` behind the clean chunks `past` at 0; chunk i attends to sees[i] and to itself.

    past: list of (1, C, T, H, W); sees: for each chunk, the last one included, bool over all tokens before it.
    """
    chunks = [*past, chunk]
    per_frame = chunk.shape[-2] * chunk.shape[-1] // 4
    lengths = [each.shape[2] * per_frame for each in chunks]
    mask = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    start = 0
    for length, seen in zip(lengths, sees):
        mask[start : start + length, :start] = seen
        mask[start : start + length, start : start + length] = True
        start += length
    times = torch.zeros(1, start)
    times[:, start - lengths[-1] :] = timestep
    stock = [block.attn1.processor for block in transformer.blocks]
    for block in transformer.blocks:
        block.attn1.set_processor(MaskedAttnProcessor(mask[None, None]))
    try:
        flow = transformer(torch.cat(chunks, dim=2), times, text, return_dict=False)[0]
    finally:
        for block, processor in zip(transformer.blocks, stock):
            block.attn1.set_processor(processor)
    return flow[:, :, -chunk.shape[2] :]


def drift_of(chunk, previous):
    """Equations 4 and 5 as loops over 2x2 patches: list of d_i."""
    chunk, previous = chunk[0].mean(dim=1), previous[0].mean(dim=1)  # (C, H, W)
    drift = []
    for top in range(0, chunk.shape[1], 2):
        for left in range(0, chunk.shape[2], 2):
            square = 0.0
            for channel in range(chunk.shape[0]):
                for y in (top, top + 1):
                    for x in (left, left + 1):
                        square += (chunk[channel, y, x] - previous[channel, y, x]).item() ** 2
            drift.append(math.sqrt(square))
    return drift


def severity_of(drift, prune_fraction):
    """Equation 6: the ceil(p N) tokens of largest drift, and their mean."""
    worst = sorted(range(len(drift)), key=lambda i: -drift[i])[: math.ceil(round(prune_fraction * len(drift), 6))]
    return sum(drift[i] for i in worst) / len(worst), sorted(worst)


def threshold_of(history, drift_sensitivity):
    """Equations 7 and 8."""
    mean = sum(history) / len(history)
    return mean + drift_sensitivity * math.sqrt(sum((x - mean) ** 2 for x in history) / len(history))


def oracle_rollout(
    transformer,
    noise_chunks,
    text,
    sigmas,
    renoise=None,
    window_size=None,
    num_sink_frames=0,
    token_trim=True,
    prune_fraction=0.1,
    drift_sensitivity=2.0,
    warmup_chunks=2,
    max_regenerations=1,
    drift_signal="final",
    negative_text=None,
    guidance_scale=1.0,
):
    """Algorithm 1 for one video: latents, and for each chunk its attempts' (severity, evicted tokens)."""
    per_frame = noise_chunks[0].shape[-2] * noise_chunks[0].shape[-1] // 4
    held = torch.zeros(0, dtype=torch.bool)  # over all tokens of all frames so far
    past, sees, history, log, previous = [], [], [], [], None

    def denoise(index, num_steps):
        sample = noise_chunks[index]
        for step, (sigma, following) in enumerate(zip(sigmas, [*sigmas[1:], 0.0])):
            flow = masked_flow(transformer, past, sample, 1000 * sigma, text, [*sees, held])
            if guidance_scale > 1:
                away = masked_flow(transformer, past, sample, 1000 * sigma, negative_text, [*sees, held])
                flow = away + guidance_scale * (flow - away)
            x0 = sample - sigma * flow
            if step + 1 == num_steps:
                return x0
            if renoise is None:
                sample = sample + (following - sigma) * flow
            else:
                sample = (1 - following) * x0 + following * renoise(index, step)

    signal_steps = len(sigmas) if drift_signal == "final" else 1
    for index, noise in enumerate(noise_chunks):
        frame = torch.arange(len(held)) // per_frame
        if window_size is not None:
            num_recent = window_size - num_sink_frames - noise.shape[2]
            held = held & ((frame < num_sink_frames) | (frame >= len(held) // per_frame - num_recent))
        attempts = []
        while True:
            draft = denoise(index, signal_steps)
            if previous is None:
                break
            severity, tokens = severity_of(drift_of(draft, previous), prune_fraction)
            attempts.append((severity, tokens))
            closed = not token_trim or len(history) < warmup_chunks
            if closed or len(attempts) > max_regenerations or severity <= threshold_of(history, drift_sensitivity):
                break
            condemned = torch.isin(torch.arange(len(held)) % per_frame, torch.tensor(tokens))
            held = held & ~(condemned & (frame >= num_sink_frames))
        history += [severity] if previous is not None else []
        log.append(attempts)
        previous, chunk = draft, denoise(index, len(sigmas))
        sees.append(held)
        past.append(chunk)
        held = torch.cat([held, torch.ones(noise.shape[2] * per_frame, dtype=torch.bool)])
    return torch.cat(past, dim=2), log
