"""The whole rollout written out the slow way: no cache, one masked forward over the whole past for every flow."""

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
    method="tokentrim",
    prune_fraction=0.1,
    drift_sensitivity=2.0,
    warmup_chunks=2,
    max_regenerations=1,
    drift_signal="final",
    negative_text=None,
    guidance_scale=1.0,
):
    """Algorithm 1 for one video: latents, and for each chunk the (severity, evicted tokens) of its attempts."""
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
            closed = method == "plain" or len(history) < warmup_chunks
            if closed or len(attempts) > max_regenerations or severity <= threshold_of(history, drift_sensitivity):
                break
            unstable = torch.isin(torch.arange(len(held)) % per_frame, torch.tensor(tokens))
            held = held & ~(unstable & (frame >= num_sink_frames))
        history += [severity] if previous is not None else []
        log.append(attempts)
        previous, chunk = draft, denoise(index, len(sigmas))
        sees.append(held)
        past.append(chunk)
        held = torch.cat([held, torch.ones(noise.shape[2] * per_frame, dtype=torch.bool)])
    return torch.cat(past, dim=2), log


class PlacedAttnProcessor(MaskedAttnProcessor):
    def __init__(self, mask, rotary_emb):
        super().__init__(mask)
        self.rotary_emb = rotary_emb

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, self.rotary_emb)


def placed_flow(transformer, parts, text):
    """Flow of the last of `parts`, in one forward over all of them.

    A part is (latents (1, C, T, H, W), position of its first frame, timestep of each frame, bool over all tokens of the
    parts before it: which of them it attends to, beside itself).
    """
    per_frame = parts[0][0].shape[-2] * parts[0][0].shape[-1] // 4
    num_tokens = sum(latents.shape[2] for latents, *_ in parts) * per_frame
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    positions, times, start = [], [], 0
    for latents, first_position, timesteps, seen in parts:
        end = start + latents.shape[2] * per_frame
        mask[start:end, :start] = seen
        mask[start:end, start:end] = True
        for frame, timestep in enumerate(timesteps):
            positions += [(first_position + frame) * per_frame + token for token in range(per_frame)]
            times += [timestep] * per_frame
        start = end
    latents = torch.cat([latents for latents, *_ in parts], dim=2)
    cos, sin = transformer.rope(latents[:, :, :1].expand(-1, -1, max(positions) // per_frame + 1, -1, -1))
    stock = [block.attn1.processor for block in transformer.blocks]
    for block in transformer.blocks:
        block.attn1.set_processor(PlacedAttnProcessor(mask[None, None], (cos[:, positions], sin[:, positions])))
    try:
        flow = transformer(latents, torch.tensor([times]), text, return_dict=False)[0]
    finally:
        for block, processor in zip(transformer.blocks, stock):
            block.attn1.set_processor(processor)
    return flow[:, :, -parts[-1][0].shape[2] :]


def oracle_rolling(
    transformer,
    noise_chunks,
    text,
    sigmas,
    renoise=None,
    window_size=None,
    num_sink_frames=None,
    relative_positions=True,
    given=(),
    method="tokentrim",
    prune_fraction=0.1,
    drift_sensitivity=2.0,
    warmup_chunks=2,
    max_regenerations=1,
    negative_text=None,
    guidance_scale=1.0,
):
    """Rolling Forcing with algorithm 1 for one video: latents, and for each chunk its attempts' (severity, evicted
    tokens). `noise_chunks` of the chunks that are `given` are not looked at.

    Every forward carries all of the past. The sink, which the window sees elsewhere than the context passes saw it,
    is there twice: once in its place, and once as a copy that only the window sees, directly before the recent frames.
    """
    per_frame = noise_chunks[0].shape[-2] * noise_chunks[0].shape[-1] // 4
    starts = [sum(each.shape[2] for each in noise_chunks[:index]) for index in range(len(noise_chunks))]
    num_sink_frames = noise_chunks[0].shape[2] if num_sink_frames is None else num_sink_frames
    window_size = 10**6 if window_size is None else window_size
    held = torch.zeros(0, dtype=torch.bool)  # what eviction left, over all tokens of all frames so far
    past, sees = [], []  # clean chunks, and what the context pass of each saw

    def frames():
        return torch.arange(len(held)) // per_frame

    def commit(chunk):
        nonlocal held
        end = starts[len(past)] + chunk.shape[2]
        sees.append(held & (frames() >= end - window_size))
        past.append(chunk)
        held = torch.cat([held, torch.ones(chunk.shape[2] * per_frame, dtype=torch.bool)])

    def predict(window, steps, text):
        latents, first = torch.cat(window, dim=2), starts[len(past)]
        times = [1000 * sigmas[step] for chunk, step in zip(window, steps) for _ in range(chunk.shape[2])]
        oldest = max(first + latents.shape[2] + num_sink_frames - window_size, 0)
        shift = max(oldest - num_sink_frames, 0) if relative_positions else 0
        clean = [(chunk, start, [0.0] * chunk.shape[2], seen) for chunk, start, seen in zip(past, starts, sees)]
        parts = [(chunk, start + shift, *rest) for chunk, start, *rest in clean if start < num_sink_frames]
        of_copies = torch.arange(sum(chunk.shape[2] for chunk, *_ in parts) * per_frame) // per_frame
        unseen = torch.zeros(len(of_copies), dtype=torch.bool)
        parts += [(chunk, start, zeros, torch.cat([unseen, seen])) for chunk, start, zeros, seen in clean]
        recent = held & (frames() >= max(oldest, num_sink_frames))
        parts.append((latents, first, times, torch.cat([of_copies < num_sink_frames, recent])))
        return placed_flow(transformer, parts, text)

    def forward(window, steps):
        flow = predict(window, steps, text)
        if guidance_scale > 1:
            away = predict(window, steps, negative_text)
            flow = away + guidance_scale * (flow - away)
        after = []
        flows = flow.split([sample.shape[2] for sample in window], dim=2)
        for index, (sample, step, of_chunk) in enumerate(zip(window, steps, flows), start=len(past)):
            following = [*sigmas, 0.0][step + 1]
            x0 = sample - sigmas[step] * of_chunk
            if step + 1 == len(sigmas):
                after.append(x0)
            elif renoise is None:
                after.append(sample + (following - sigmas[step]) * of_chunk)
            else:
                after.append((1 - following) * x0 + following * renoise(index, step))
        return after

    history, log, previous, window = [], [[] for _ in given], None, []
    for previous in given:
        commit(previous)
    for last in range(len(given), len(noise_chunks) + len(sigmas) - 1):
        if last < len(noise_chunks):
            window.append(noise_chunks[last])
        steps = [last - index for index in range(len(past), len(past) + len(window))]
        after = forward(window, steps)
        if steps[0] + 1 < len(sigmas):
            window = after
            continue
        attempts = []
        while previous is not None:
            severity, tokens = severity_of(drift_of(after[0], previous), prune_fraction)
            attempts.append((severity, tokens))
            closed = method == "plain" or len(history) < max(warmup_chunks, 1)
            if closed or len(attempts) > max_regenerations or severity <= threshold_of(history, drift_sensitivity):
                break
            unstable = torch.isin(torch.arange(len(held)) % per_frame, torch.tensor(tokens))
            held = held & ~(unstable & (frames() >= num_sink_frames))
            after = forward(window, steps)
        history += [severity] if previous is not None else []
        log.append(attempts)
        previous, *window = after
        commit(previous)
    return torch.cat(past, dim=2), log
