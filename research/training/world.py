"""The tiny world: a prompt grammar, and a renderer of prompts and their hidden rest.

A `Scene` holds the attributes that its prompt names; an `Appearance` holds the hidden ones (exact colors, gradient,
texture, size, speed, place), which a video model can only learn from earlier frames.
"""

import math
import re
from dataclasses import dataclass

import torch

from .sizes import SMALL


SIZE = 64  # pixels, height and width
SIZES = SMALL
COLORS = {
    "red": (0.85, 0.10, 0.12),
    "orange": (1.00, 0.52, 0.05),
    "yellow": (0.96, 0.90, 0.15),
    "green": (0.10, 0.62, 0.18),
    "cyan": (0.15, 0.82, 0.88),
    "blue": (0.10, 0.22, 0.82),
    "purple": (0.58, 0.16, 0.74),
    "white": (0.95, 0.95, 0.95),
}
SHAPES = ("circle", "square", "triangle", "ring")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "diagonally": (1, 1)}
CHANGES = ("turn", "fade", "pan left", "pan right")
TEXTURES = ("stripes", "checks", "dots")
CHANGE_SHARE = 0.3  # share of scenes that change on purpose
STEADY_FRAMES, CHANGING_FRAMES = 31, 55  # frames of a training clip: a change ends by frame 40
SENTENCE = "a an moving over background while the turns light fades camera pans left right".split()
WORDS = {*SENTENCE, *COLORS, *SHAPES, *DIRECTIONS}
PAIRS = (  # pairs that form one token: words whose meaning depends on their place
    *(f"{color} background" for color in COLORS),
    *(f"turns {color}" for color in COLORS),
    "pans left",
    "pans right",
    "light fades",
)
_GRAMMAR = re.compile(
    r"an? (?P<color>\w+) (?P<shape>\w+) moving (?P<direction>\w+) over an? (?P<background>\w+) background"
    r"(?: while (?:the background turns (?P<turned>\w+)|the (?P<fade>light fades)|the camera (?P<pan>pans \w+)))?"
)


def choose(options, generator: torch.Generator):
    options = tuple(options)
    return options[torch.randint(len(options), (), generator=generator).item()]


def draw_uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


@dataclass(frozen=True)
class Scene:
    """What the prompt says. `change` is None or one of `CHANGES`; `turned` is the new background of a "turn"."""

    color: str
    shape: str
    direction: str
    background: str
    change: str | None = None
    turned: str | None = None

    @classmethod
    def sample(cls, generator: torch.Generator) -> "Scene":
        """Draw a scene; object and backgrounds have three different colors, and 30% of the scenes change."""
        color = choose(COLORS, generator)
        background = choose([name for name in COLORS if name != color], generator)
        turned = choose([name for name in COLORS if name not in (color, background)], generator)
        shape, direction = choose(SHAPES, generator), choose(DIRECTIONS, generator)
        change = choose(("turn", "fade", "pan"), generator) if draw_uniform(0, 1, generator) < CHANGE_SHARE else None
        if change == "pan":
            change = choose(("pan left", "pan right"), generator)
        return cls(color, shape, direction, background, change, turned if change == "turn" else None)

    @property
    def prompt(self) -> str:
        article = "an" if self.color[0] in "aeiou" else "a"
        background = ("an " if self.background[0] in "aeiou" else "a ") + self.background
        text = f"{article} {self.color} {self.shape} moving {self.direction} over {background} background"
        if self.change == "turn":
            return f"{text} while the background turns {self.turned}"
        if self.change == "fade":
            return f"{text} while the light fades"
        return f"{text} while the camera pans {self.change.split()[1]}" if self.change else text


def parse(prompt: str) -> Scene:
    """The inverse of `Scene.prompt`; raises ValueError if `prompt` is not a sentence of the grammar."""
    match = _GRAMMAR.fullmatch(" ".join(prompt.lower().split()))
    words = match.groupdict() if match else {}
    if not match or not (
        {words["color"], words["background"], words["turned"] or words["color"]} <= COLORS.keys()
        and words["shape"] in SHAPES
        and words["direction"] in DIRECTIONS
        and words["pan"] in (None, "pans left", "pans right")
    ):
        raise ValueError(f"`prompt` {prompt!r} is not a sentence of this world, such as {_EXAMPLE.prompt!r}")
    change = "turn" if words["turned"] else "fade" if words["fade"] else None
    if words["pan"]:
        change = "pan " + words["pan"].split()[1]
    return Scene(words["color"], words["shape"], words["direction"], words["background"], change, words["turned"])


_EXAMPLE = Scene("red", "circle", "right", "blue")


@dataclass(frozen=True)
class Texture:
    """A periodic pattern that darkens the surface below it; `period` and `phase` in pixels, `angle` in radians."""

    kind: str
    angle: float
    period: float
    phase: tuple[float, float]
    contrast: float

    @classmethod
    def sample(
        cls, generator: torch.Generator, period: tuple[float, float], contrast: tuple[float, float]
    ) -> "Texture":
        phase = (draw_uniform(0, period[1], generator), draw_uniform(0, period[1], generator))
        kind, angle = choose(TEXTURES, generator), draw_uniform(0, math.pi, generator)
        return cls(kind, angle, draw_uniform(*period, generator), phase, draw_uniform(*contrast, generator))

    def shade(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The factor, in [1 - contrast, 1], at the points (x, y) given in pixels."""
        cos, sin, scale = math.cos(self.angle), math.sin(self.angle), 2 * math.pi / self.period
        u = torch.sin(scale * (cos * x + sin * y + self.phase[0]))
        v = torch.sin(scale * (cos * y - sin * x + self.phase[1]))
        wave = {"stripes": u, "checks": u * v * 1.6, "dots": u + v - 0.7}[self.kind]
        return 1 - self.contrast * (0.5 + 1.5 * wave).clamp(0, 1)


@dataclass(frozen=True)
class Appearance:
    """The hidden rest: colors as RGB in [0, 1], lengths in pixels, angles in radians, time in frames."""

    object_color: tuple[float, float, float]
    background_color: tuple[float, float, float]
    turned_color: tuple[float, float, float]
    object_texture: Texture
    background_texture: Texture  # drawn if the camera pans
    gradient_angle: float
    gradient_strength: float
    radius: float
    velocity: tuple[float, float]  # at frame 0, pixels per frame
    position: tuple[float, float]  # center at frame 0
    change_start: float
    change_frames: float
    change_amount: float  # share of light left by a fade; largest pan in pixels per frame

    @classmethod
    def sample(cls, scene: Scene, generator: torch.Generator) -> "Appearance":
        def jitter(name: str) -> tuple[float, float, float]:
            return tuple(min(max(value + draw_uniform(-0.06, 0.06, generator), 0), 1) for value in COLORS[name])

        radius, speed = draw_uniform(12, 16, generator), draw_uniform(1.0, 2.2, generator)
        heading = DIRECTIONS[scene.direction]
        if scene.direction == "diagonally":
            heading = (choose((-0.8, 0.8), generator), choose((-0.8, 0.8), generator))
        return cls(
            object_color=jitter(scene.color),
            background_color=jitter(scene.background),
            turned_color=jitter(scene.turned or scene.background),
            object_texture=Texture.sample(generator, period=(10, 15), contrast=(0.1, 0.2)),
            background_texture=Texture.sample(generator, period=(14, 20), contrast=(0.15, 0.25)),
            gradient_angle=draw_uniform(0, 2 * math.pi, generator),
            gradient_strength=draw_uniform(0.1, 0.35, generator),
            radius=radius,
            velocity=(speed * heading[0], speed * heading[1]),
            position=(draw_uniform(radius, SIZE - radius, generator), draw_uniform(radius, SIZE - radius, generator)),
            change_start=draw_uniform(0, 4, generator),
            change_frames=draw_uniform(20, 36, generator),
            change_amount=draw_uniform(0.4, 0.55, generator)
            if scene.change == "fade"
            else draw_uniform(1.0, 2.0, generator),
        )


def _bounce(start: float, velocity: float, radius: float, time: torch.Tensor) -> torch.Tensor:
    """The coordinate at `time` of a ball of `radius` between two walls at 0 and `SIZE` (a triangle wave)."""
    span = SIZE - 2 * radius
    phase = torch.remainder(start - radius + velocity * time, 2 * span)
    return radius + torch.where(phase > span, 2 * span - phase, phase)


def centers(appearance: Appearance, num_frames: int, first_frame: int = 0) -> torch.Tensor:
    """The object's center in pixels, (T, 2) as (x, y)."""
    time = torch.arange(first_frame, first_frame + num_frames, dtype=torch.float32)
    axes = zip(appearance.position, appearance.velocity)
    return torch.stack([_bounce(start, velocity, appearance.radius, time) for start, velocity in axes], dim=1)


def _distance(shape: str, x: torch.Tensor, y: torch.Tensor, radius: float) -> torch.Tensor:
    """Signed distance in pixels (negative inside) to the outline of a shape centered at the origin; y points down."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "ring":
        return (torch.hypot(x, y) - 0.72 * radius).abs() - 0.28 * radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.86 * radius
    y = y - 0.2 * radius  # triangle: equilateral, tip up, tip and base equally far from the walls
    return torch.maximum(y, math.cos(math.pi / 6) * x.abs() - 0.5 * y) - 0.6 * radius


def progress(appearance: Appearance, num_frames: int, first_frame: int = 0) -> torch.Tensor:
    """Progress of the change, (T,) in [0, 1], eased at both ends."""
    time = torch.arange(first_frame, first_frame + num_frames, dtype=torch.float32)
    fraction = ((time - appearance.change_start) / appearance.change_frames).clamp(0, 1)
    return fraction**2 * (3 - 2 * fraction)


def render(scene: Scene, appearance: Appearance, num_frames: int, first_frame: int = 0) -> torch.Tensor:
    """Draw frames `first_frame` ... of a video, anti-aliased: (T, 3, H, W) in [0, 1], float32."""
    pixel = torch.arange(SIZE) + 0.5
    grid_y, grid_x = pixel[:, None], pixel[None, :]
    done = progress(appearance, num_frames, first_frame)[:, None, None]  # (T, 1, 1)
    center = centers(appearance, num_frames, first_frame)
    x, y = grid_x - center[:, 0, None, None], grid_y - center[:, 1, None, None]  # (T, 1, W), (T, H, 1)

    background = torch.tensor(appearance.background_color)[:, None, None]  # (3, 1, 1)
    if scene.change == "turn":
        turned = torch.tensor(appearance.turned_color)[:, None, None]
        background = background + done[:, None] * (turned - background)  # (T, 3, 1, 1)
    across = math.cos(appearance.gradient_angle) * grid_x + math.sin(appearance.gradient_angle) * grid_y
    across = (across - across.mean()) / (SIZE / math.sqrt(2))  # (H, W), in [-1, 1]
    shade = (1 - appearance.gradient_strength * (0.5 + 0.5 * across))[None]  # (1, H, W)
    if scene.change in ("pan left", "pan right"):
        sign = 1 if scene.change == "pan right" else -1
        moved = sign * appearance.change_amount * appearance.change_frames * done
        shade = shade * appearance.background_texture.shade(grid_x + moved, grid_y)
    background = background * shade[:, None]  # (T or 1, 3, H, W)

    shape = torch.tensor(appearance.object_color)[:, None, None] * appearance.object_texture.shade(x, y)[:, None]
    coverage = (0.5 - _distance(scene.shape, x, y, appearance.radius)).clamp(0, 1)[:, None]  # (T, 1, H, W)
    video = background + coverage * (shape - background)
    if scene.change == "fade":
        video = video * (1 - (1 - appearance.change_amount) * done[:, None])
    return video


HIDDEN = Appearance  # the hidden rest, with the same name in every world


def sample_clip(
    generator: torch.Generator, num_frames: int | None = None, first_frame: int = 0
) -> tuple[str, torch.Tensor]:
    """A random prompt and its video, (T, 3, H, W) in [0, 1]; by default of the length for training."""
    scene = Scene.sample(generator)
    if num_frames is None:
        num_frames = CHANGING_FRAMES if scene.change else STEADY_FRAMES
    return scene.prompt, render(scene, Appearance.sample(scene, generator), num_frames, first_frame)
