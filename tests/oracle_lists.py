"""A rollout with explicit lists of keys and values: what each head of each layer reads for each frame of queries is
written out by a test, and attention is a softmax over it."""

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor


def angles_of(position, places, dims):
    """Rotary angles (tokens, head_dim / 2) of tokens at a temporal position and (row, column)."""
    columns = []
    for axis, dim in zip((torch.full((len(places),), float(position)), places[:, 0], places[:, 1]), dims):
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        columns.append(axis.double()[:, None] * frequencies)
    return torch.cat(columns, dim=1)


def turned(vectors, angles):
    """(tokens, head_dim) rotated by (tokens, head_dim / 2)."""
    pairs = torch.view_as_complex(vectors.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).float()


class ListedAttnProcessor(WanAttnProcessor):
    def __init__(self, story, layer):
        super().__init__()
        self.story, self.layer = story, layer

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        story, dims = self.story, self.story.dims
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key, value = (each.unflatten(2, (attn.heads, -1))[0] for each in (query, key, attn.to_v(hidden_states)))
        size, new = len(story.places), story.new
        own = {frame: slice(at * size, at * size + size) for at, frame in enumerate(new)}
        for frame in new:
            story.entered[self.layer][frame] = (key[own[frame]], value[own[frame]], story.places)
        output = torch.zeros_like(query)
        for frame in new:
            for head in range(attn.heads):
                queries = turned(query[own[frame], head], angles_of(story.query_position(frame), story.places, dims))
                keys, values = [], []
                for name, position, *tokens in story.reads(self.layer, head, frame):
                    memory = story.entered if name in new else story.memory
                    k, v, places = memory[self.layer][name]
                    tokens = tokens[0] if tokens else list(range(len(places)))
                    keys.append(turned(k[tokens, head], angles_of(position, places[tokens], dims)))
                    values.append(v[tokens, head])
                scores = queries @ torch.cat(keys).T / queries.shape[-1] ** 0.5
                output[own[frame], head] = scores.softmax(dim=-1) @ torch.cat(values)
        return attn.to_out[1](attn.to_out[0](output.flatten(1)[None]))


def as_timestep(timestep):
    """(1,) of a number, or (1, tokens) of one for each token."""
    return torch.tensor([timestep], dtype=torch.float32)


class Story:
    """One video: keys (not rotated), values and places by layer and name of what was committed."""

    def __init__(self, transformer, grid, text):
        self.transformer, self.text = transformer, text
        self.places = torch.cartesian_prod(*(torch.arange(size) for size in grid))
        self.dims = transformer.rope.t_dim, transformer.rope.h_dim, transformer.rope.w_dim
        self.memory = [{} for _ in transformer.blocks]
        self.entered = [{} for _ in transformer.blocks]

    def flow(self, latents, timestep, new, reads, query_position=None, writes=False):
        """A forward over the frames `new`; `reads(layer, head, query frame)` lists [frame, position, tokens]."""
        self.new, self.reads = new, reads
        self.query_position = query_position or (lambda frame: frame)
        self.entered = [{} for _ in self.memory]
        stock = [block.attn1.processor for block in self.transformer.blocks]
        for layer, block in enumerate(self.transformer.blocks):
            block.attn1.set_processor(ListedAttnProcessor(self, layer))
        try:
            flow = self.transformer(latents, as_timestep(timestep), self.text, return_dict=False)[0]
        finally:
            for block, processor in zip(self.transformer.blocks, stock):
                block.attn1.set_processor(processor)
        if writes:
            for known, entered in zip(self.memory, self.entered):
                known.update(entered)
        return flow

    def denoised(self, noise, sigmas, new, reads, query_position=None):
        """Euler steps from noise to a clean chunk."""
        sample = noise
        for sigma, following in zip(sigmas, [*sigmas[1:], 0.0]):
            sample = sample + (following - sigma) * self.flow(sample, 1000 * sigma, new, reads, query_position)
        return sample
