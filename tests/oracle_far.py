"""AnyFlow-FAR with algorithm 1, written out the slow way: it encodes the whole history again for every chunk, as
upstream does, and every attention is a matrix product with a mask over all earlier tokens."""

import torch
from diffusers.models.transformers.transformer_anyflow_far import apply_rotary_emb
from oracle import drift_of, severity_of, threshold_of


class WrittenOutAttnProcessor:
    """In a context pass, `seen` is (queries, keys) and all keys are kept; otherwise it is (kept keys)."""

    def __init__(self, pad_keys):
        self.pad_keys = pad_keys
        self.seen = None
        self.is_context_pass = False
        self.kept = {}

    def __call__(self, attn, hidden_states, attention_mask=None, rotary_emb=None):
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        heads = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, attn.to_v(hidden_states)))
        query, key, value = heads  # (1, heads, seq, head_dim)
        num_queries, num_zeros, seen = query.shape[2], 0, self.seen
        if self.is_context_pass:
            self.kept[attn] = key, value
        else:
            if attn in self.kept:
                key, value = (torch.cat(pair, dim=2) for pair in zip(self.kept[attn], (key, value)))
            seen = torch.cat([self.seen, torch.ones(num_queries, dtype=torch.bool)])
            num_zeros = -num_queries % 128 if self.pad_keys else 0
        query, key = apply_rotary_emb(query, rotary_emb["query"]), apply_rotary_emb(key, rotary_emb["key"])
        scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
        weights = scores.masked_fill(~seen, -torch.inf).exp()
        weights = weights / (weights.sum(dim=-1, keepdim=True) + num_zeros)  # exp(0) for each zero key
        return attn.to_out[0]((weights @ value).transpose(1, 2).flatten(2, 3))


def oracle_far(
    transformer,
    noise_chunks,
    text,
    sigmas,
    given=(),
    num_protected_frames=0,
    window_size=None,
    num_sink_frames=0,
    pad_keys=True,
    trims=True,
    prune_fraction=0.1,
    drift_sensitivity=2.0,
    warmup_chunks=2,
    max_regenerations=1,
    change=lambda index, chunk: chunk,
):
    """For one video: latents; for each chunk its attempts' (severity, tokens); and after each chunk the (frame, token) of
    the full and of the compressed tokens that are left. `change(index, chunk)` may alter a finished chunk.
    """
    config, (_, _, _, height, width) = transformer.config, noise_chunks[0].shape
    num_full = config.full_chunk_limit - 1
    columns, wide = width // config.patch_size[2], width // config.compressed_patch_size[2]
    num_tokens = height // config.patch_size[1] * columns
    scale = [large // small for large, small in zip(config.compressed_patch_size[1:], config.patch_size[1:])]
    num_compressed = height // config.compressed_patch_size[1] * wide
    sizes = [chunk.shape[2] for chunk in noise_chunks]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    evicted = set()  # (frame, full token)
    chunks, first_seen = [], {}  # clean chunks; what a compressed chunk saw when it was compressed
    attention = WrittenOutAttnProcessor(pad_keys)

    def stands_for(token):
        row, column = divmod(token, wide)
        return [
            (row * scale[0] + y) * columns + column * scale[1] + x for y in range(scale[0]) for x in range(scale[1])
        ]

    def in_window(frame, index):
        """Whether a chunk is in the window of chunk `index`, the last one."""
        end = starts[index] + sizes[index]
        return window_size is None or frame < num_sink_frames or frame >= end - (window_size - num_sink_frames)

    def tokens_of(index, in_full):
        frames = range(starts[index], starts[index] + sizes[index])
        return [
            (frame, token, in_full) for frame in frames for token in range(num_tokens if in_full else num_compressed)
        ]

    def is_there(frame, token, in_full):
        if in_full:
            return (frame, token) not in evicted
        parts = stands_for(token)
        return 2 * sum((frame, part) in evicted for part in parts) < len(parts)

    def sequence(num_chunks):
        """All tokens of the first chunks, as (chunk, frame, token, in full)."""
        first_full = max(num_chunks - num_full, 0)
        return [(index, *token) for index in range(num_chunks) for token in tokens_of(index, index >= first_full)]

    def forward(latents, partition, timesteps, is_context_pass):
        num_frames = latents.shape[2]
        attention.is_context_pass = is_context_pass
        times, next_times = (torch.full((1, num_frames), float(t), dtype=torch.float64) for t in timesteps)
        flow = transformer(
            hidden_states=latents.transpose(1, 2),
            timestep=times,
            r_timestep=next_times,
            encoder_hidden_states=text,
            chunk_partition=partition,
            kv_cache=[None] * config.num_layers,
            kv_cache_flag={"is_cache_step": is_context_pass, "num_cached_chunks": len(partition) - 1},
            attention_mask=False,
            return_dict=False,
        )[0]
        return None if is_context_pass else flow.transpose(1, 2)

    def visible(index):
        """The visible past of chunk `index`."""
        return [is_there(*token) and in_window(token[0], index) for _, *token in sequence(index)]

    def denoise(index):
        sample = noise_chunks[index]
        attention.seen = torch.tensor(visible(index), dtype=torch.bool)
        for sigma, following in zip(sigmas, [*sigmas[1:], 0.0]):
            flow = forward(sample, sizes[: index + 1], (1000 * sigma, 1000 * following), False)
            sample = sample + (following - sigma) * flow
        return change(index, sample)

    def commit(chunk):
        chunks.append(chunk)
        last = len(chunks) - 1
        tokens = sequence(len(chunks))
        there = [is_there(*token) and in_window(token[0], last) for _, *token in tokens]
        seen = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
        for query, (of_query, *_, in_full) in enumerate(tokens):
            row = torch.tensor([of_key <= of_query and ok for (of_key, *_), ok in zip(tokens, there)])
            if not in_full:
                row = first_seen.setdefault(of_query, [each for (_, *each), ok in zip(tokens, row) if ok])
                row = torch.tensor([list(each) in row for _, *each in tokens])
            seen[query] = row
        attention.seen = seen | torch.eye(len(tokens), dtype=torch.bool)  # so that nothing is NaN that nobody sees
        forward(torch.cat(chunks, dim=2), sizes[: len(chunks)], (0, 0), True)

    stock = [block.attn1.processor for block in transformer.blocks]
    try:
        for block in transformer.blocks:
            block.attn1.set_processor(attention)
        history, log, held, previous = [], [], [], None
        for index in range(len(noise_chunks)):
            attempts = []
            if index < len(given):
                chunk = given[index]
            else:
                while True:
                    chunk = denoise(index)
                    if previous is None:
                        break
                    severity, unstable = severity_of(drift_of(chunk, previous), prune_fraction)
                    attempts.append((severity, unstable))
                    closed = not trims or len(history) < max(warmup_chunks, 1)
                    if closed or len(attempts) > max_regenerations:
                        break
                    if severity <= threshold_of(history, drift_sensitivity):
                        break
                    frames = range(num_protected_frames, starts[index])
                    evicted |= {(frame, token) for frame in frames for token in unstable}
                history += [severity] if previous is not None else []
            log.append(attempts)
            previous = chunk
            commit(chunk)
            left = [token for _, *token in sequence(index + 1) if is_there(*token) and in_window(token[0], index)]
            held.append([[(f, token) for f, token, full in left if full is part] for part in (True, False)])
    finally:
        for block, processor in zip(transformer.blocks, stock):
            block.attn1.set_processor(processor)
    return torch.cat(chunks, dim=2), log, held
