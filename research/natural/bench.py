# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""How matchings of re-anchoring act on natural latents: one table.

    python -m research.natural.bench
    python -m research.natural.bench --checkpoint checkpoints/photographs

Without a checkpoint, latents are principal components of 8 x 8 patches, with unit variance. Every photograph gives a
reference chunk and a chunk of a camera that has moved. Columns, each a mean over the photographs:

- *offset*, *gain*, *gradient*: which share of a drift put on the moved chunk the matching removes. 1 is all of it.
- *change*: how far it moves a chunk in which nothing has drifted, root mean square, in standard deviations.
- *pull*: how far it moves the average of new content, where another photograph fills half of the picture.
- *ms*: milliseconds for one chunk.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from tokentrim.tokentrim_policies.matching import MATCHINGS, MatchNear, MatchShift

from .latents import DRIFTS, Pair, PatchEncoder, WorldEncoder, load_photographs, make_pairs
from .matchings import MatchCoarseToFine, MatchSmoothNear


CANDIDATES = {
    **MATCHINGS,
    "near, width 0.3": partial(MatchNear, width=0.3),
    "near on 7 x 7": MatchSmoothNear,
    "near on 9 x 9": partial(MatchSmoothNear, size=9),
    "coarse to fine": MatchCoarseToFine,
    "shift on 7 x 7": partial(MatchShift, size=7),
    "shift on 9 x 9": partial(MatchShift, size=9),
}


def removed_share(drift: torch.Tensor, matched: torch.Tensor, matched_drifted: torch.Tensor) -> float:
    """Which share of `drift` is gone after matching: 1 minus the projection of what is left on it."""
    left = matched_drifted - matched
    return 1 - ((left * drift).sum() / drift.square().sum()).item()


def root_mean_square(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()


def measure(candidate: Callable, pair: Pair, seed: int) -> dict[str, float]:
    """One photograph's row of the table."""
    matching, start = candidate(pair.reference), time.perf_counter()
    matched, row = matching(pair.moved), {}
    seconds = time.perf_counter() - start
    for name, (make_drift, size) in DRIFTS.items():
        drift = make_drift(pair.moved, seed, size)
        row[name] = removed_share(drift, matched, matching(pair.moved + drift))
    new = slice(pair.moved.shape[-1] // 2 + 1, None)  # a place inside, where no patch mixes both photographs
    moves = matching(pair.half_new) - pair.half_new
    row["change"] = root_mean_square(matched - pair.moved)
    row["pull"] = root_mean_square(moves[..., new].mean(dim=(1, 2, 3)))
    row["ms"] = 1000 * seconds
    return row


def nearest_distance(pair: Pair) -> float:
    """Median distance of a token of the first frame to its nearest neighbor there, root mean square over channels."""
    tokens = pair.reference[:, 0].flatten(1).T
    distances = torch.cdist(tokens, tokens).fill_diagonal_(float("inf")).min(dim=1).values
    return distances.median().item() / tokens.shape[1] ** 0.5


def make_table(candidates: dict[str, Callable], pairs: list[Pair]) -> pd.DataFrame:
    """Means over the pairs, one row for each candidate."""
    rows = {
        name: pd.DataFrame([measure(candidate, pair, seed) for seed, pair in enumerate(pairs)]).mean()
        for name, candidate in candidates.items()
    }
    return pd.DataFrame(rows).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="folder of a checkpoint whose autoencoder encodes the frames")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, metavar="NAME", help="only these matchings")
    args = parser.parse_args()
    photographs = load_photographs()
    encoder = WorldEncoder(args.checkpoint) if args.checkpoint else PatchEncoder(photographs)
    pairs = make_pairs(photographs, encoder)
    print("distance to the nearest neighbor: " + ", ".join(f"{p.name} {nearest_distance(p):.2f}" for p in pairs))
    table = make_table({name: CANDIDATES[name] for name in args.only or CANDIDATES}, pairs)
    print("| matching | " + " | ".join(table) + " |\n" + "| --- " * (1 + len(table.columns)) + "|")
    for name, row in table.iterrows():
        cells = [f"{value:.0f}" if column == "ms" else f"{value:.2f}" for column, value in row.items()]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
