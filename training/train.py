"""Trains the tiny world from nothing: autoencoder, latents, transformer, checkpoint.

    python -m training.train --out checkpoints/tiny-world --work runs/tiny-world

Stop it at any time and run it again: every stage continues where it stood. With an empty `--work` and a checkpoint in
`--out`, that checkpoint is trained further; `--out` an empty folder trains from nothing.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.utils import logging
from transformers import UMT5EncoderModel

from tokentrim import TokenTrimPipeline

from .autoencoder import (
    as_frames,
    encode,
    make_autoencoder,
    measure_psnr,
    measure_statistics,
    save_reconstructions,
    save_strip,
    train_autoencoder,
)
from .loop import write_atomically
from .transformer import (
    FRAMES_PER_CHUNK,
    MAX_SEQUENCE_LENGTH,
    NUM_FRAMES,
    SHIFT,
    FlowMatching,
    LatentClips,
    WorldModel,
    make_tokenizer,
    make_transformer,
    train_world_model,
)
from .world import SIZE, Appearance, Scene, render


NUM_INFERENCE_STEPS = 8
CLIPS_PER_SHARD = 50
STEADY_FRAMES, CHANGING_FRAMES = 31, 55  # of a video that is encoded: a change ends by frame 40
EARLY_MINUTES = 25.0  # of training, after which a weaker model is kept


@torch.no_grad()
def encode_shard(vae: torch.nn.Module, seed: int) -> dict:
    """The prompts of `CLIPS_PER_SHARD` random videos and their latents, each (4, T, 16, 16), float16."""
    generator, shard = torch.Generator().manual_seed(seed), {"prompts": [], "latents": []}
    for _ in range(CLIPS_PER_SHARD):
        scene = Scene.sample(generator)
        num_frames = CHANGING_FRAMES if scene.change else STEADY_FRAMES
        video = render(scene, Appearance.sample(scene, generator), num_frames)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents = encode(vae, video[:, :, None] * 2 - 1)[0]  # (T, 4, 1, 16, 16)
        shard["prompts"].append(scene.prompt)
        shard["latents"].append(latents[:, :, 0].transpose(0, 1).half())
    return shard


def encode_videos(vae: torch.nn.Module, folder: Path, num_clips: int, seed: int) -> None:
    """Writes the latents of `num_clips` videos as shards; those that exist already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    start, num_shards, num_encoded = time.perf_counter(), -(-num_clips // CLIPS_PER_SHARD), 0
    for index in range(num_shards):
        path = folder / f"shard-{index:04}.pt"
        if path.exists():
            continue
        shard = encode_shard(vae, 1_000_000 * (seed + 1) + index)
        write_atomically(path, lambda temporary: torch.save(shard, temporary))
        num_encoded += 1
        if num_encoded % 5 == 0 or index == num_shards - 1:
            pace = num_encoded * CLIPS_PER_SHARD / (time.perf_counter() - start)
            print(f"latents: {index + 1} of {num_shards} shards, {pace:.1f} clips per second", flush=True)


def finished_autoencoder(work: Path, minutes: float, num_clips: int, seed: int) -> AutoencoderKLWan:
    """The trained autoencoder with the statistics of its latents, from disk where it is there already."""
    folder, latents = work / "vae", work / "latents"
    if not folder.exists():
        frame_vae = train_autoencoder(work / "autoencoder", minutes, seed).eval()
        encode_videos(frame_vae, latents, 200, seed)
        encoded = LatentClips(latents, mean=[0.0] * 4, std=[1.0] * 4).latents
        mean, std = measure_statistics(torch.stack([each[:, :STEADY_FRAMES].float() for each in encoded]))
        save_reconstructions(frame_vae, work / "autoencoder" / "samples.png")
        print(f"autoencoder: PSNR {measure_psnr(frame_vae):.2f} dB over 128 held-out frames", flush=True)
        print(f"autoencoder: latents mean {mean}, standard deviation {std}", flush=True)
        vae = make_autoencoder()
        vae.load_state_dict(frame_vae.state_dict())
        vae.register_to_config(latents_mean=mean, latents_std=std)
        write_atomically(folder, vae.save_pretrained)
    encode_videos(as_frames(AutoencoderKLWan.from_pretrained(folder).eval()), latents, num_clips, seed)
    return AutoencoderKLWan.from_pretrained(folder).eval()


def make_pipeline(
    model: WorldModel, vae: AutoencoderKLWan, num_frames_per_chunk: int = FRAMES_PER_CHUNK
) -> TokenTrimPipeline:
    """The pipeline around a trained model; the transformer is a copy with the stock attention processors."""
    transformer = make_transformer()
    transformer.load_state_dict(model.transformer.state_dict())
    return TokenTrimPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=model.text_encoder.eval(),
        transformer=transformer.eval(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        rollout="self_forcing",
        num_frames_per_chunk=num_frames_per_chunk,
        window_size=NUM_FRAMES,
        relative_positions=True,
        num_inference_steps=NUM_INFERENCE_STEPS,
        height=SIZE,
        width=SIZE,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
    )


def export(model: WorldModel, vae: AutoencoderKLWan, out: Path) -> None:
    """Writes the checkpoint folder; every file is renamed into its place, so that readers see whole files only."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        make_pipeline(model, vae).save_pretrained(temporary)
        for path in sorted(Path(temporary).rglob("*")):
            if path.is_file():
                target = out / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)


def save_samples(
    pipe: TokenTrimPipeline, path: Path, num_videos: int = 8, num_frames: int = 30, seed: int = 7
) -> None:
    """A film strip of `num_videos` untrimmed videos of prompts that are always the same, with the prompts beside it."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [Scene.sample(generator).prompt for _ in range(num_videos)]
    pipe.set_progress_bar_config(disable=True)
    video = pipe(
        prompts,
        num_frames=num_frames,
        generator=[torch.Generator().manual_seed(index) for index in range(num_videos)],
        method="plain",
        output_type="pt",
    ).frames  # (B, T, 3, H, W)
    save_strip([each.transpose(0, 1).float() for each in video], path, stride=3)
    path.with_suffix(".txt").write_text("\n".join(prompts) + "\n")


def load_world_model(checkpoint: Path) -> WorldModel | None:
    """The weights of an exported checkpoint, to train further; None where there are none."""
    if not (checkpoint / "transformer").exists():
        return None
    model = WorldModel(make_tokenizer())
    transformer = WanTransformer3DModel.from_pretrained(checkpoint / "transformer")
    text_encoder = UMT5EncoderModel.from_pretrained(checkpoint / "text_encoder")
    model.transformer.load_state_dict(transformer.state_dict())
    model.text_encoder.load_state_dict(text_encoder.state_dict())
    return model


def train(
    out: Path,
    work: Path,
    minutes_vae: float,
    minutes_images: float,
    minutes_transformer: float,
    num_clips: int,
    seed: int,
) -> None:
    if (out / "vae").exists() and not (work / "vae").exists():  # no states, but a checkpoint: train that further
        write_atomically(work / "vae", lambda temporary: shutil.copytree(out / "vae", temporary))
    vae = finished_autoencoder(work, minutes_vae, num_clips, seed)
    clips = LatentClips(work / "latents", vae.config.latents_mean, vae.config.latents_std)
    print(f"latents: {len(clips.prompts)} clips", flush=True)

    def on_images(ema: WorldModel, step: int, minutes: float) -> None:
        save_samples(make_pipeline(ema, vae, 1), work / "images" / f"samples-{step:06}.png", num_frames=1)

    def on_videos(ema: WorldModel, step: int, minutes: float) -> None:
        export(ema, vae, out)
        if minutes >= EARLY_MINUTES and not (work / "early").exists():
            export(ema, vae, work / "early")
            print(f"transformer: step {step}, {minutes:.1f} minutes: kept as {work / 'early'}", flush=True)
        save_samples(make_pipeline(ema, vae), work / "transformer" / f"samples-{step:06}.png")

    torch.manual_seed(seed)
    model = load_world_model(out)
    if model is None:
        model = WorldModel(make_tokenizer())
        model = train_world_model(model, FlowMatching(clips).images, work / "images", minutes_images, seed, on_images)
    model.requires_grad_(True)
    train_world_model(model, FlowMatching(clips).videos, work / "transformer", minutes_transformer, seed, on_videos)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"checkpoint: {out}, {size / 2**20:.2f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/tiny-world"), help="the checkpoint's folder")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny-world"), help="states, latents, logs, samples")
    parser.add_argument("--minutes-vae", type=float, default=10.0, help="training time of the autoencoder")
    parser.add_argument("--minutes-images", type=float, default=25.0, help="of the transformer, on single frames")
    parser.add_argument("--minutes-transformer", type=float, default=50.0, help="of the transformer, on videos")
    parser.add_argument("--clips", type=int, default=5000, help="videos to encode for the transformer")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    train(
        arguments.out,
        arguments.work,
        arguments.minutes_vae,
        arguments.minutes_images,
        arguments.minutes_transformer,
        arguments.clips,
        arguments.seed,
    )


if __name__ == "__main__":
    main()
