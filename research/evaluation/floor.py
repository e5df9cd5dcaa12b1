# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""The floor of the measures: their values for rendered clips, in which nothing drifts, directly and through the VAE.

python -m research.evaluation.floor
"""

import argparse

import pandas as pd
import torch
from tqdm import tqdm

from research.training.world import Appearance, parse, render

from .experiment import Experiment, sample_prompts
from .measures import measure_chunks
from .report import video_table
from .rollouts import WORLD, load_pipeline


MEASURES = ("excess_drift", "identity_error", "background_error", "object_error", "motion", "flow", "present")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=32)
    parser.add_argument("--chunks", type=int, default=40)
    args = parser.parse_args()
    pipe, per_chunk = load_pipeline(), WORLD["num_frames_per_chunk"]
    rows = []
    for seed in tqdm(range(args.videos)):
        prompt = sample_prompts([seed])[0]
        scene = parse(prompt)
        appearance = Appearance.sample(scene, torch.Generator().manual_seed(seed))
        clip = render(scene, appearance, args.chunks * per_chunk)  # (T, 3, H, W)
        latents = pipe.encode_whole_video(clip[None], *clip.shape[-2:]).transpose(1, 2)
        decoded = pipe.decode_latents(latents, "np")[0]
        for name, frames in (("rendered", clip.permute(0, 2, 3, 1).numpy()), ("through the VAE", decoded)):
            for chunk, measures in enumerate(measure_chunks(frames, prompt, per_chunk)):
                blank = dict.fromkeys(("trim", "quarantined", "calls", "keys", "seconds"), 0)
                rows.append({"method": name, "seed": seed, "prompt": prompt, "chunk": chunk, **measures, **blank})
    videos = video_table(pd.DataFrame(rows), Experiment("floor", {"rendered": {}, "through the VAE": {}}))
    print(f"{args.videos} rendered clips of {args.chunks} chunks, means")
    print(videos.groupby("method", sort=False)[list(MEASURES)].mean().to_string(float_format="%.4f"))


if __name__ == "__main__":
    main()
