"""Train a world from nothing: autoencoder, latents, transformer, checkpoint. Or distill one on its own rollouts.

    python -m research.training.train --world tiny
    python -m research.training.train --world travelling
    python -m research.training.train --world tiny --recipe self-forcing

You can stop it at any time and run it again: every stage resumes. If `--work` is empty and `--out` holds a checkpoint, that
checkpoint is trained further. If `--out` is empty too, training starts from nothing, or from `--start`.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from types import ModuleType

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    SchedulerMixin,
    WanTransformer3DModel,
)
from diffusers.utils import logging
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5EncoderModel

from tokentrim import TokenTrimPipeline

from . import photographs, travelling, world
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
from .loop import mixed_precision, write_atomically
from .self_forcing import NUM_STEPS, SelfForcing, train_student
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


WORLDS = {"tiny": world, "travelling": travelling, "photographs": photographs}
MEASURED = (world, travelling)  # worlds on which `tokentrim_plus` was measured
NUM_INFERENCE_STEPS = 8
CLIPS_PER_SHARD = 50
STATISTICS_FRAMES = 31  # of each clip
EARLY_MINUTES = 25.0  # minutes of training after which a weaker model is kept


@torch.no_grad()
def encode_shard(world: ModuleType, vae: torch.nn.Module, seed: int) -> dict:
    """The prompts of `CLIPS_PER_SHARD` random videos and their latents, each (C, T, H, W), float16."""
    generator, shard = torch.Generator().manual_seed(seed), {"prompts": [], "latents": []}
    for _ in range(CLIPS_PER_SHARD):
        prompt, video = world.sample_clip(generator)
        with mixed_precision():
            latents = encode(vae, video[:, :, None] * 2 - 1)[0]  # (T, C, 1, H, W)
        shard["prompts"].append(prompt)
        shard["latents"].append(latents[:, :, 0].transpose(0, 1).half())
    return shard


def encode_videos(world: ModuleType, vae: torch.nn.Module, folder: Path, num_clips: int, seed: int) -> None:
    """Write the latents of `num_clips` videos as shards; existing shards are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    start, num_shards, num_encoded = time.perf_counter(), -(-num_clips // CLIPS_PER_SHARD), 0
    for index in range(num_shards):
        path = folder / f"shard-{index:04}.pt"
        if path.exists():
            continue
        shard = encode_shard(world, vae, 1_000_000 * (seed + 1) + index)
        write_atomically(path, lambda temporary: torch.save(shard, temporary))
        num_encoded += 1
        if num_encoded % 5 == 0 or index == num_shards - 1:
            pace = num_encoded * CLIPS_PER_SHARD / (time.perf_counter() - start)
            print(f"latents: {index + 1} of {num_shards} shards, {pace:.1f} clips per second", flush=True)


def finished_autoencoder(
    world: ModuleType, work: Path, start: Path | None, minutes: float, num_clips: int, seed: int
) -> AutoencoderKLWan:
    """The trained autoencoder with the statistics of its latents, loaded from disk if it exists."""
    folder, latents = work / "vae", work / "latents"
    if not folder.exists():
        first = AutoencoderKLWan.from_pretrained(start / "vae") if start else None
        frame_vae = train_autoencoder(world, work / "autoencoder", minutes, seed, first).eval()
        encode_videos(world, frame_vae, latents, 200, seed)
        encoded = LatentClips(latents, mean=[0.0], std=[1.0]).latents
        mean, std = measure_statistics(torch.stack([each[:, :STATISTICS_FRAMES].float() for each in encoded]))
        save_reconstructions(world, frame_vae, work / "autoencoder" / "samples.png")
        print(f"autoencoder: PSNR {measure_psnr(world, frame_vae):.2f} dB over 128 held-out frames", flush=True)
        print(f"autoencoder: latents mean {mean}, standard deviation {std}", flush=True)
        vae = make_autoencoder(world.SIZES)
        vae.load_state_dict(frame_vae.state_dict())
        vae.register_to_config(latents_mean=mean, latents_std=std)
        write_atomically(folder, vae.save_pretrained)
    encode_videos(world, as_frames(AutoencoderKLWan.from_pretrained(folder).eval()), latents, num_clips, seed)
    return AutoencoderKLWan.from_pretrained(folder).eval()


def make_pipeline(
    world: ModuleType,
    model: WorldModel,
    vae: AutoencoderKLWan,
    scheduler: SchedulerMixin,
    num_inference_steps: int = NUM_INFERENCE_STEPS,
    num_frames_per_chunk: int = FRAMES_PER_CHUNK,
) -> TokenTrimPipeline:
    """The pipeline of a trained model, with a copy of the transformer that has the stock attention processors."""
    transformer = make_transformer(world.SIZES)
    transformer.load_state_dict(model.transformer.state_dict())
    return TokenTrimPipeline(
        tokenizer=make_tokenizer(world),
        text_encoder=model.text_encoder.eval(),
        transformer=transformer.eval(),
        vae=vae,
        scheduler=scheduler,
        rollout="self_forcing",
        num_frames_per_chunk=num_frames_per_chunk,
        window_size=NUM_FRAMES,
        relative_positions=True,
        num_inference_steps=num_inference_steps,
        height=world.SIZE,
        width=world.SIZE,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        method="tokentrim_plus" if world in MEASURED else "plain",
        fps=12,
    )


def halve_files(folder: Path) -> None:
    """Store the weights of a saved pipeline in float16: half the bytes. `from_pretrained` loads them in float32."""
    for path in folder.rglob("*.safetensors"):
        weights = {name: weight.half() for name, weight in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})


def export(pipe: TokenTrimPipeline, out: Path, half_files: bool = False) -> None:
    """Write the checkpoint folder. Each file is renamed at the end, so that readers see whole files only."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        pipe.save_pretrained(temporary)
        if half_files:
            halve_files(Path(temporary))
        for path in sorted(Path(temporary).rglob("*")):
            if path.is_file():
                target = out / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)


def generate(pipe: TokenTrimPipeline, prompts: list[str], num_frames: int, **arguments) -> torch.Tensor:
    """Plain rollouts, (B, T, 3, H, W) in [0, 1]; video i has the seed i."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    arguments = {"generator": generators, "output_type": "pt", "method": "plain", **arguments}
    return pipe(prompts, num_frames=num_frames, **arguments).frames.float()


def save_samples(
    world: ModuleType, pipe: TokenTrimPipeline, path: Path, num_videos: int = 8, num_frames: int = 30, seed: int = 7
) -> None:
    """A film strip of `num_videos` plain rollouts of fixed prompts, with the prompts beside it."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [world.Scene.sample(generator).prompt for _ in range(num_videos)]
    save_strip(list(generate(pipe, prompts, num_frames).transpose(1, 2)), path, stride=max(num_frames // 10, 1))
    path.with_suffix(".txt").write_text("\n".join(prompts) + "\n")


def load_world_model(world: ModuleType, checkpoint: Path) -> WorldModel:
    """Load the weights of an exported checkpoint, without its text encoder if that reads another grammar."""
    model = WorldModel(make_tokenizer(world), world.SIZES)
    transformer = WanTransformer3DModel.from_pretrained(checkpoint / "transformer")
    text_encoder = UMT5EncoderModel.from_pretrained(checkpoint / "text_encoder")
    model.transformer.load_state_dict(transformer.state_dict())
    if AutoTokenizer.from_pretrained(checkpoint / "tokenizer").get_vocab() == model.vocabulary:
        model.text_encoder.load_state_dict(text_encoder.state_dict())
    return model


def teacher_forcing(arguments: argparse.Namespace) -> None:
    """Run all stages: autoencoder, latents, single frames, videos. Every save of the last stage exports `--out`."""
    world, work, out, seed = WORLDS[arguments.world], arguments.work, arguments.out, arguments.seed
    if (out / "vae").exists() and not (work / "vae").exists():  # no states, but a checkpoint: train it further
        write_atomically(work / "vae", lambda temporary: shutil.copytree(out / "vae", temporary))
    vae = finished_autoencoder(world, work, arguments.start, arguments.minutes_vae, arguments.clips, seed)
    clips = LatentClips(work / "latents", vae.config.latents_mean, vae.config.latents_std)
    print(f"latents: {len(clips.prompts)} clips", flush=True)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)

    def on_images(ema: WorldModel, step: int, minutes: float) -> None:
        pipe = make_pipeline(world, ema, vae, scheduler, num_frames_per_chunk=1)
        save_samples(world, pipe, work / "images" / f"samples-{step:06}.png", num_frames=1)

    def on_videos(ema: WorldModel, step: int, minutes: float) -> None:
        pipe = make_pipeline(world, ema, vae, scheduler)
        export(pipe, out, world.SIZES.half_files)
        if minutes >= EARLY_MINUTES and not (work / "early").exists():
            export(pipe, work / "early", world.SIZES.half_files)
            print(f"transformer: step {step}, {minutes:.1f} minutes: kept as {work / 'early'}", flush=True)
        save_samples(world, pipe, work / "transformer" / f"samples-{step:06}.png")

    torch.manual_seed(seed)
    loss = FlowMatching(clips, make_tokenizer(world), world.SIZES)
    if (out / "transformer").exists():
        model = load_world_model(world, out)
    else:
        model = (
            load_world_model(world, arguments.start)
            if arguments.start
            else WorldModel(make_tokenizer(world), world.SIZES)
        )
        model = train_world_model(model, loss.images, work / "images", arguments.minutes_images, seed, on_images)
    model.requires_grad_(True)
    train_world_model(model, loss.videos, work / "transformer", arguments.minutes_transformer, seed, on_videos)


def self_forcing(arguments: argparse.Namespace) -> None:
    """Distill the checkpoint `--start` into one of `NUM_STEPS` steps. Every save exports `--out`."""
    world, work, out, start = WORLDS[arguments.world], arguments.work, arguments.out, arguments.start
    vae = AutoencoderKLWan.from_pretrained(start / "vae").eval()
    scheduler = FlowMatchLCMScheduler(shift=SHIFT)

    def on_save(ema: WorldModel, step: int, minutes: float) -> None:
        pipe = make_pipeline(world, ema, vae, scheduler, NUM_STEPS)
        export(pipe, out, world.SIZES.half_files)
        save_samples(world, pipe, work / "student" / f"samples-{step:06}.png", num_frames=90)

    teacher = load_world_model(world, start)
    loss = SelfForcing(world, teacher, make_tokenizer(world))
    train_student(loss, work / "student", arguments.minutes_student, arguments.seed, on_save)


RECIPES = {"teacher-forcing": teacher_forcing, "self-forcing": self_forcing}
FOLDERS = {
    ("tiny", "teacher-forcing"): "tiny-world",
    ("tiny", "self-forcing"): "tiny-world-self-forced",
    ("travelling", "teacher-forcing"): "travelling-world",
    ("travelling", "self-forcing"): "travelling-world-self-forced",
    ("photographs", "teacher-forcing"): "photographs",
    ("photographs", "self-forcing"): "photographs-self-forced",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, default="tiny")
    parser.add_argument("--recipe", choices=RECIPES, default="teacher-forcing")
    parser.add_argument("--out", type=Path, help="folder of the checkpoint; default: in checkpoints/")
    parser.add_argument("--work", type=Path, help="states, latents, logs, samples; default: in runs/")
    parser.add_argument("--start", type=Path, help="a checkpoint to start from; the teacher of self-forcing")
    parser.add_argument("--minutes-vae", type=float, default=10.0, help="minutes for the autoencoder")
    parser.add_argument(
        "--minutes-images", type=float, default=25.0, help="minutes for the transformer on single frames"
    )
    parser.add_argument(
        "--minutes-transformer", type=float, default=50.0, help="minutes for the transformer on videos"
    )
    parser.add_argument("--minutes-student", type=float, default=60.0, help="of self-forcing")
    parser.add_argument("--clips", type=int, default=5000, help="videos to encode for the transformer")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    name = FOLDERS[arguments.world, arguments.recipe]
    arguments.out = arguments.out or Path("checkpoints") / name
    arguments.work = arguments.work or Path("runs") / name
    if arguments.recipe == "self-forcing":
        arguments.start = arguments.start or Path("checkpoints") / FOLDERS[arguments.world, "teacher-forcing"]
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    RECIPES[arguments.recipe](arguments)
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"checkpoint: {arguments.out}, {size / 2**20:.2f} MiB", flush=True)


if __name__ == "__main__":
    main()
