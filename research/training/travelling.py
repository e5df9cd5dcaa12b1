"""The travelling world: a camera travels along a landscape whose regions and objects enter and leave.

A `Scene` holds what the prompt says: pace, direction, ground and light. A `Landscape` holds the hidden rest: regions with
their colors and objects, so that new content enters in every frame.
"""

import math
import re
from dataclasses import dataclass

import torch

from .sizes import SMALL
from .world import SIZE, Texture, choose, draw_uniform


SIZES = SMALL
PACES = {"slow": (1.4, 1.8), "fast": (2.4, 3.0)}  # pixels per frame
DIRECTIONS = {"left": -1, "right": 1}
GROUNDS = {"plains": 1.0, "hills": 5.0, "mountains": 9.0}  # height of the slopes in pixels
LIGHTS = {  # sky at the top and at the horizon, disc of sun or moon as RGB; light on the ground
    "dawn": ((0.55, 0.60, 0.90), (1.00, 0.80, 0.72), (1.00, 0.96, 0.80), 0.90),
    "noon": ((0.25, 0.55, 0.95), (0.70, 0.88, 1.00), (1.00, 0.98, 0.70), 1.00),
    "dusk": ((0.42, 0.20, 0.50), (1.00, 0.50, 0.20), (1.00, 0.85, 0.35), 0.75),
    "night": ((0.03, 0.04, 0.14), (0.12, 0.14, 0.34), (0.93, 0.93, 0.85), 0.55),
}
REGIONS = {  # objects of a region; color of its ground
    "meadow": ("tree", (0.42, 0.72, 0.22)),
    "desert": ("cactus", (0.93, 0.78, 0.42)),
    "tundra": ("fir", (0.92, 0.95, 0.98)),
    "village": ("house", (0.66, 0.52, 0.40)),
    "lake": ("boat", (0.13, 0.42, 0.75)),
}
NUM_REGIONS = 30
CLIP_FRAMES = 31  # of a training clip
PIXELS_BETWEEN_OBJECTS = (20, 32)
WORDS = {*"a journey over by".split(), *PACES, *DIRECTIONS, *GROUNDS, *LIGHTS}
PAIRS = ()
_GRAMMAR = re.compile(r"a (?P<pace>\w+) journey (?P<direction>\w+) over (?P<ground>\w+) (?:by|at) (?P<light>\w+)")


@dataclass(frozen=True)
class Scene:
    """What the prompt says: keys of `PACES`, `DIRECTIONS`, `GROUNDS` and `LIGHTS`."""

    pace: str
    direction: str
    ground: str
    light: str

    @classmethod
    def sample(cls, generator: torch.Generator) -> "Scene":
        return cls(*(choose(options, generator) for options in (PACES, DIRECTIONS, GROUNDS, LIGHTS)))

    @property
    def prompt(self) -> str:
        return f"a {self.pace} journey {self.direction} over {self.ground} by {self.light}"


def parse(prompt: str) -> Scene:
    """The inverse of `Scene.prompt`; raises ValueError if `prompt` is not a sentence of the grammar."""
    match = _GRAMMAR.fullmatch(" ".join(prompt.lower().split()))
    scene = Scene(**match.groupdict()) if match else None
    if scene is None or not (
        scene.pace in PACES and scene.direction in DIRECTIONS and scene.ground in GROUNDS and scene.light in LIGHTS
    ):
        raise ValueError(f"`prompt` {prompt!r} is not a sentence of this world, such as {_EXAMPLE.prompt!r}")
    return scene


_EXAMPLE = Scene("slow", "right", "hills", "noon")


@dataclass(frozen=True)
class Region:
    """A stretch of land; `start` and `width` in pixels along the way."""

    kind: str
    start: float
    width: float
    color: tuple[float, float, float]
    texture: Texture


@dataclass(frozen=True)
class Thing:
    """An object at `place` pixels along the way; `size` is its height in pixels."""

    kind: str
    place: float
    size: float
    color: tuple[float, float, float]


THING_COLORS = {
    "tree": (0.10, 0.45, 0.12),
    "cactus": (0.15, 0.52, 0.22),
    "fir": (0.04, 0.30, 0.22),
    "house": (0.80, 0.18, 0.14),  # the roof
    "boat": (0.97, 0.97, 0.95),  # the sail
}


def _jitter(color: tuple[float, float, float], amount: float, generator: torch.Generator) -> tuple[float, ...]:
    return tuple(min(max(value + draw_uniform(-amount, amount, generator), 0), 1) for value in color)


@dataclass(frozen=True)
class Landscape:
    """The hidden rest. The way is a ring, `length` pixels round: over 600 frames at a fast pace.

    `slopes` are (waves per round, phase, share); `disc` is the sun's or moon's (x, y, radius) on the screen.
    """

    regions: tuple[Region, ...]
    things: tuple[Thing, ...]
    slopes: tuple[tuple[float, float, float], ...]
    horizon: float
    disc: tuple[float, float, float]
    sky: tuple[tuple[float, float, float], tuple[float, float, float]]
    start: float
    speed: float  # pixels per frame along the way

    @classmethod
    def sample(cls, scene: Scene, generator: torch.Generator) -> "Landscape":
        regions, things, start, kind = [], [], 0.0, None
        for index in range(NUM_REGIONS):
            others = [name for name in REGIONS if name not in (kind, regions[0].kind if index else None)]
            kind, width = choose(others, generator), draw_uniform(44, 84, generator)
            thing, color = REGIONS[kind]
            texture = Texture.sample(generator, period=(9, 14), contrast=(0.08, 0.18))
            regions.append(Region(kind, start, width, _jitter(color, 0.05, generator), texture))
            place = start + draw_uniform(8, 16, generator)
            while place < start + width - 6:
                size = draw_uniform(17, 24, generator)
                things.append(Thing(thing, place, size, _jitter(THING_COLORS[thing], 0.06, generator)))
                place += draw_uniform(*PIXELS_BETWEEN_OBJECTS, generator)
            start += width
        periods = [draw_uniform(*period, generator) for period in ((90, 130), (40, 60))]
        slopes = [
            (max(round(start / period), 1), draw_uniform(0, 2 * math.pi, generator), share)
            for period, share in zip(periods, (0.7, 0.3))
        ]
        top, bottom, _, _ = LIGHTS[scene.light]
        return cls(
            regions=tuple(regions),
            things=tuple(things),
            slopes=tuple(slopes),
            horizon=draw_uniform(40, 44, generator),
            disc=(draw_uniform(8, 56, generator), draw_uniform(7, 14, generator), draw_uniform(4, 6, generator)),
            sky=(_jitter(top, 0.04, generator), _jitter(bottom, 0.04, generator)),
            start=draw_uniform(0, start, generator),
            speed=DIRECTIONS[scene.direction] * draw_uniform(*PACES[scene.pace], generator),
        )

    @property
    def length(self) -> float:
        return self.regions[-1].start + self.regions[-1].width

    def offset(self, x: torch.Tensor, place: float) -> torch.Tensor:
        """Distance of x beyond `place`, the shorter way round the ring."""
        return torch.remainder(x - place + self.length / 2, self.length) - self.length / 2

    def skyline(self, x: torch.Tensor, height: float) -> torch.Tensor:
        """y of the ground at x, in pixels from the top; slopes are `height` high, a lake is level."""
        turns = [2 * math.pi * waves * x / self.length + phase for waves, phase, _ in self.slopes]
        slopes = sum(share * torch.sin(turn) for turn, (_, _, share) in zip(turns, self.slopes))
        lakes = [each for each in self.regions if each.kind == "lake"]
        level = sum((self.share(x, each, 6.0) for each in lakes), torch.zeros_like(x)).clamp(0, 1)
        return self.horizon - height * slopes * (1 - level)

    def share(self, x: torch.Tensor, region: Region, border: float) -> torch.Tensor:
        """Share of `region` at x, in [0, 1]; its borders fade over `border` pixels."""
        distance = region.width / 2 - self.offset(x, region.start + region.width / 2).abs()
        return (0.5 + distance / border).clamp(0, 1)


def _cover(distance: torch.Tensor) -> torch.Tensor:
    """Anti-aliased coverage of a shape from its signed distance in pixels, negative inside."""
    return (0.5 - distance).clamp(0, 1)


def _box(x: torch.Tensor, y: torch.Tensor, left: float, right: float, top: float, bottom: float) -> torch.Tensor:
    return torch.maximum(torch.maximum(left - x, x - right), torch.maximum(top - y, y - bottom))


def _triangle(x: torch.Tensor, y: torch.Tensor, half: float, top: float, bottom: float) -> torch.Tensor:
    """Tip up, `half` as wide to either side at its base."""
    height = bottom - top
    side = (x.abs() * height - half * (y - top)) / math.hypot(height, half)
    return torch.maximum(side, y - bottom)


def _parts(thing: Thing, x: torch.Tensor, y: torch.Tensor) -> list[tuple[tuple[float, float, float], torch.Tensor]]:
    """Color and signed distance of each part of an object, back to front; x, y in pixels from its foot, y down."""
    size, color = thing.size, thing.color
    wood = (0.36, 0.22, 0.12)
    if thing.kind == "tree":
        crown = torch.hypot(x, y + 0.66 * size) - 0.36 * size
        return [(wood, _box(x, y, -1.6, 1.6, -0.5 * size, 2)), (color, crown)]
    if thing.kind == "fir":
        return [(wood, _box(x, y, -1.4, 1.4, -3, 2)), (color, _triangle(x, y, 0.36 * size, -size, -2.5))]
    if thing.kind == "cactus":
        arms = _box(x, y, -0.32 * size, 0.32 * size, -0.52 * size, -0.36 * size)
        left = _box(x, y, -0.32 * size, -0.17 * size, -0.75 * size, -0.36 * size)
        right = _box(x, y, 0.17 * size, 0.32 * size, -0.65 * size, -0.36 * size)
        trunk = _box(x, y, -0.1 * size, 0.1 * size, -0.95 * size, 2)
        return [(color, torch.minimum(torch.minimum(arms, trunk), torch.minimum(left, right)))]
    if thing.kind == "house":
        wall = _box(x, y, -0.38 * size, 0.38 * size, -0.5 * size, 3)
        door = _box(x, y, -0.1 * size, 0.1 * size, -0.3 * size, 1)
        roof = _triangle(x, y, 0.52 * size, -0.95 * size, -0.48 * size)
        return [((0.95, 0.88, 0.70), wall), ((0.25, 0.16, 0.12), door), (color, roof)]
    hull = torch.maximum(_box(x, y, -0.46 * size, 0.46 * size, -0.16 * size, 1.5), x.abs() + y - 0.36 * size)
    return [(wood, hull), (color, _triangle(x, y, 0.36 * size, -size, -0.24 * size))]


def _rgb(color: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(color)[:, None, None]  # (3, 1, 1)


def render(scene: Scene, landscape: Landscape, num_frames: int, first_frame: int = 0) -> torch.Tensor:
    """Draw frames `first_frame` ... of a video, anti-aliased: (T, 3, H, W) in [0, 1], float32."""
    pixel = torch.arange(SIZE) + 0.5
    grid_y, grid_x = pixel[:, None], pixel[None, :]
    time = torch.arange(first_frame, first_frame + num_frames, dtype=torch.float64)
    camera = torch.remainder(landscape.start + landscape.speed * time, landscape.length).float()[:, None, None]
    x = camera + grid_x  # (T, 1, W), along the way
    disc_color, light = LIGHTS[scene.light][2:]

    top, bottom = (_rgb(color) for color in landscape.sky)
    sky = top + (bottom - top) * (grid_y / 48).clamp(0, 1)  # (3, H, 1)
    disc_x, disc_y, radius = landscape.disc
    video = sky + _cover(torch.hypot(grid_x - disc_x, grid_y - disc_y) - radius) * (_rgb(disc_color) - sky)

    skyline = landscape.skyline(x, GROUNDS[scene.ground])  # (T, 1, W)
    ground = torch.zeros(num_frames, 3, SIZE, SIZE)
    for region in landscape.regions:
        share = landscape.share(x, region, 1.0)
        if share.any():
            shade = region.texture.shade(landscape.offset(x, region.start), grid_y)
            ground += (share * shade)[:, None] * _rgb(region.color)
    depth = ((grid_y - skyline) / 24).clamp(0, 1)
    ground = ground * (light * (1.05 - 0.25 * depth)[:, None])
    video = video + _cover(skyline - grid_y)[:, None] * (ground - video)  # (T, 3, H, W)

    for thing in landscape.things:
        off = landscape.offset(x, thing.place)  # (T, 1, W)
        if off.abs().min() < thing.size:
            foot = landscape.skyline(torch.tensor(thing.place), GROUNDS[scene.ground])
            for color, distance in _parts(thing, off, grid_y - foot - 3):
                video = video + _cover(distance)[:, None] * (light * _rgb(color) - video)
    return video.clamp(0, 1)


HIDDEN = Landscape  # the hidden rest, with the same name in every world


def sample_clip(
    generator: torch.Generator, num_frames: int = CLIP_FRAMES, first_frame: int = 0
) -> tuple[str, torch.Tensor]:
    """A random prompt and its video, (T, 3, H, W) in [0, 1]; by default of the length for training."""
    scene = Scene.sample(generator)
    return scene.prompt, render(scene, Landscape.sample(scene, generator), num_frames, first_frame)
