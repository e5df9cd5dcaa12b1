"""The world of photographs: a camera that pans and zooms over real pictures.

A `Scene` holds what the prompt says: pace, direction and place. A `Camera` holds the rest: where the pan starts and how
the camera wobbles. A pan never ends, because every photograph continues as its mirror image at its edges. Authors and
licenses of the photographs: `research/photographs/README.md`.
"""

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .sizes import Sizes
from .world import choose, draw_uniform


SIZE = 96  # pixels, height and width
SIZES = Sizes(
    patch=4,
    base_dims=(48, 64),
    num_frames=8,
    latent_channels=16,
    latent_size=12,
    token=2,
    num_heads=6,
    num_layers=6,
    num_images=32,
    num_clips=2,
    num_first_chunks=8,
    half_files=True,
)
FOLDER = Path(__file__).parents[1] / "photographs"
PHOTOGRAPH_HEIGHT = 120  # of a whole photograph, in pixels of the frame, at zoom 1
PLACES = {  # in a prompt: file
    "a mountain meadow": "meadow.jpg",
    "rocky peaks": "peaks.jpg",
    "a dandelion field": "dandelions.jpg",
    "a sunset": "sunset.jpg",
    "paint brushes": "brushes.jpg",
}
PACES = {"slow": (0.8, 1.0), "fast": (2.0, 2.4)}  # pixels per frame at zoom 1
DIRECTIONS = {"left": -1, "right": 1}
ZOOMS = (1.0, 1.3)  # between which a camera wobbles
CLIP_FRAMES = 31  # of a training clip
WORDS = {*"a pan over".split(), *PACES, *DIRECTIONS, *" ".join(PLACES).split()}
PAIRS = tuple(place.removeprefix("a ") for place in PLACES if place.removeprefix("a ").count(" "))
_GRAMMAR = re.compile(r"a (?P<pace>\w+) pan (?P<direction>\w+) over (?P<place>[\w ]+)")


@dataclass(frozen=True)
class Scene:
    """What the prompt says: keys of `PACES`, `DIRECTIONS` and `PLACES`."""

    pace: str
    direction: str
    place: str

    @classmethod
    def sample(cls, generator: torch.Generator) -> "Scene":
        return cls(*(choose(options, generator) for options in (PACES, DIRECTIONS, PLACES)))

    @property
    def prompt(self) -> str:
        return f"a {self.pace} pan {self.direction} over {self.place}"


def parse(prompt: str) -> Scene:
    """The inverse of `Scene.prompt`; raises ValueError if `prompt` is not a sentence of the grammar."""
    match = _GRAMMAR.fullmatch(" ".join(prompt.lower().split()))
    scene = Scene(**match.groupdict()) if match else None
    if scene is None or not (scene.pace in PACES and scene.direction in DIRECTIONS and scene.place in PLACES):
        raise ValueError(f"`prompt` {prompt!r} is not a sentence of this world, such as {_EXAMPLE.prompt!r}")
    return scene


_EXAMPLE = Scene("slow", "right", "a mountain meadow")


def load_photograph(path: Path) -> torch.Tensor:
    """A photograph, (3, H, W) in [0, 1]; raises ValueError naming a file that cannot be read."""
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"the photograph {path} cannot be read: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


@functools.cache
def load_places(folder: Path = FOLDER) -> dict[str, torch.Tensor]:
    """The photograph of every place. All are read at the first use: training starts with all of them or not at all."""
    return {place: load_photograph(folder / name) for place, name in PLACES.items()}


@dataclass(frozen=True)
class Camera:
    """What the prompt does not say. The center of the view at frame t is at (start + speed t, middle) plus a wobble;
    lengths are in pixels of the frame at zoom 1, waves are (amplitude, frames per period, phase)."""

    start: float
    speed: float  # per frame; negative to the left
    sway: tuple[float, float, float]  # along the pan, pixels
    lift: tuple[float, float, float]  # up and down, as a share of the margin that the zoom leaves
    breath: tuple[float, float, float]  # of the zoom, as a share of `ZOOMS`

    @classmethod
    def sample(cls, scene: Scene, generator: torch.Generator) -> "Camera":
        def draw_wave(low: float, high: float, *periods: float) -> tuple[float, float, float]:
            phase = draw_uniform(0, 2 * math.pi, generator)
            return draw_uniform(low, high, generator), draw_uniform(*periods, generator), phase

        return cls(
            start=draw_uniform(0, 3 * PHOTOGRAPH_HEIGHT, generator),  # somewhere in the picture or its mirror image
            speed=DIRECTIONS[scene.direction] * draw_uniform(*PACES[scene.pace], generator),
            sway=draw_wave(0.0, 2.0, 50, 100),
            lift=draw_wave(0.3, 1.0, 100, 200),
            breath=draw_wave(0.3, 1.0, 100, 200),
        )

    def path(self, num_frames: int, first_frame: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Zoom and center (x, y) of frames `first_frame` ..., (T,) each; y is 0 at the middle of the photograph."""
        time = torch.arange(first_frame, first_frame + num_frames, dtype=torch.float64)

        def wave(amplitude: float, period: float, phase: float) -> torch.Tensor:
            return amplitude * torch.sin(2 * math.pi * time / period + phase)

        zoom = ZOOMS[0] + (ZOOMS[1] - ZOOMS[0]) * (0.5 + 0.5 * wave(*self.breath))
        margin = (PHOTOGRAPH_HEIGHT - SIZE / zoom) / 2
        return zoom, self.start + self.speed * time + wave(*self.sway), margin * wave(*self.lift)


def view(photograph: torch.Tensor, zoom: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What cameras see of a photograph, (T, 3, H, W) in [0, 1]; `zoom` and the centers `x`, `y` as `Camera.path`."""
    height, width = photograph.shape[1:]
    scale = height / PHOTOGRAPH_HEIGHT
    x = torch.remainder(x * scale, 2 * width)  # the photograph and its mirror image
    points = (torch.arange(2 * SIZE, dtype=torch.float64) + 0.5) / 2 - SIZE / 2  # two to a pixel, against aliasing
    offsets = points * scale / zoom[:, None]  # (T, 2 SIZE)
    columns = (x[:, None] + offsets) * 2 / width - 1
    rows = (y[:, None] * scale + offsets) * 2 / height
    grid = torch.stack(
        [columns[:, None].expand(-1, 2 * SIZE, -1), rows[:, :, None].expand(-1, -1, 2 * SIZE)], dim=-1
    ).float()
    frames = F.grid_sample(
        photograph.expand(len(zoom), -1, -1, -1), grid, padding_mode="reflection", align_corners=False
    )
    return F.avg_pool2d(frames, 2)


def render(scene: Scene, camera: Camera, num_frames: int, first_frame: int = 0) -> torch.Tensor:
    """Draws frames `first_frame` ... of a video: (T, 3, H, W) in [0, 1], float32."""
    return view(load_places()[scene.place], *camera.path(num_frames, first_frame))


HIDDEN = Camera  # what a prompt does not say, by one name in every world


def sample_clip(
    generator: torch.Generator, num_frames: int = CLIP_FRAMES, first_frame: int = 0
) -> tuple[str, torch.Tensor]:
    """A random prompt and its video, (T, 3, H, W) in [0, 1]; by default as long as training needs it."""
    scene = Scene.sample(generator)
    return scene.prompt, render(scene, Camera.sample(scene, generator), num_frames, first_frame)
