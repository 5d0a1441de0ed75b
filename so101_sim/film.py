"""Episodes as films for people: the whole scene beside what the policy sees, with what happens written in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import fmean
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from reinflow.env import ChunkResult, ChunkVectorEnv, EpisodeStats, Observation
from so101_mujoco_utils import load_model
from so101_sim.renderer import SceneRenderer
from so101_sim.vector.base import SO101VectorEnv

Frame = NDArray[np.uint8]  # (H, W, 3)

CONTROL_STEPS_PER_FRAME = 2  # 25 frames a second at 50 Hz
HOLD_S = 1.0  # the last frame stays, for its outcome to be read
SIZE = 480  # pixels, height of a film and width of its scene
WIDEST = SIZE + SIZE // 2  # pixels, with what the policy sees
SAMPLES = 4  # per pixel: jagged edges distract from a block of 30 pixels; four times the time of one
# From ahead of the arm's right: it hides the block on no side, blocks of every task are in view, and so is no horizon.
VIEW = {"lookat": (0.045, 0.14, 0.09), "azimuth": 218.0, "elevation": -36.0, "distance": 0.63}

BAND_HEIGHT = 52
BAND, TEXT, MUTED = (22, 26, 30), (240, 242, 244), (170, 178, 186)
GREEN, RED = (84, 214, 124), (255, 104, 94)


@dataclass
class Film:
    """A filmed episode, or several beside or below each other."""

    seed: int
    frames: list[Frame]  # (H, W, 3) each
    fps: int
    success: bool
    outcome: str
    return_: float


@dataclass
class _Take:
    """An episode that is being filmed."""

    seed: int
    frames: list[Frame] = field(default_factory=list)
    length: int = 0
    return_: float = 0.0
    ended: EpisodeStats | None = None


class FilmingEnv(ChunkVectorEnv):
    """Environments whose episodes are filmed: a frame after every reset and every executed piece of a chunk. Pieces of
    `CONTROL_STEPS_PER_FRAME` control steps, as `evaluate` cuts them for its `frame_interval`, play in real time.

    Of episodes with the same seed, such as an evaluation's padding, one is filmed.

    Args:
        env: what is filmed; it is closed with this one.
        title: written into every frame, e.g. "before".
        advance: called with the control steps played after each piece, for a bar.

    Raises:
        RenderError: OpenGL cannot start here.
    """

    def __init__(self, env: SO101VectorEnv, title: str = "", advance: Callable[[float], None] | None = None) -> None:
        self.env, self.num_envs = env, env.num_envs
        self.outcomes, self.facts, self.start_facts = env.outcomes, env.facts, env.start_facts  # type: ignore[misc]
        self.extras = env.extras  # type: ignore[misc]
        self._title, self._advance = title, advance
        self._model = load_model(env.config.model_path, ())
        self._model.vis.quality.offsamples = SAMPLES
        self._renderer = SceneRenderer(self._model, ("scene",), SIZE, {"scene": _view()})
        self._hz = env.config.control_hz or 50.0
        self._takes: dict[int, _Take] = {}  # by environment
        self._films: dict[int, Film] = {}  # by seed

    def reset(self, seeds: Sequence[int]) -> Observation:
        """See `ChunkVectorEnv.reset`."""
        observation = self.env.reset(seeds)
        seen: set[int] = set()
        self._takes = {}
        for env, seed in enumerate(seeds):
            if seed not in seen:
                self._takes[env] = _Take(seed)
                seen.add(seed)
        self._shoot(observation, self._takes)
        return observation

    def step_chunk(self, actions: NDArray[Any], next_seeds: Sequence[int] | None = None) -> ChunkResult:
        """See `ChunkVectorEnv.step_chunk`. Raises ValueError for `next_seeds`: a film ends with its episode."""
        if next_seeds is not None:
            raise ValueError("episodes are filmed one after the other: reset with the next seeds")
        result = self.env.step_chunk(actions)
        ended = {stats.env: stats for stats in result.episodes}
        running = {env: take for env, take in self._takes.items() if result.active[env].any()}
        for env, take in running.items():
            take.length += int(result.active[env].sum())
            take.return_ += float(result.rewards[env].sum())
            take.ended = ended.get(env)
        self._shoot(result.observation, running)
        for take in running.values():
            if take.ended is not None:
                self._films[take.seed] = self._cut(take, take.ended)
        if self._advance is not None:
            self._advance(int(result.active.sum(axis=1).max()))
        return result

    def films(self) -> list[Film]:
        """Those of all episodes that have ended, in the order in which they did; they are handed out once."""
        films, self._films = list(self._films.values()), {}
        return films

    def _shoot(self, observation: Observation, takes: Mapping[int, _Take]) -> None:
        qpos = self.env.get_state()["rows"][:, : self._model.nq]
        for env, take in takes.items():
            scene = self._renderer.render(qpos[env])["scene"]
            views = {name: images[env] for name, images in observation.get("pixels", {}).items()}
            take.frames.append(self._compose(scene, views, take))

    def _compose(self, scene: Frame, views: Mapping[str, Frame], take: _Take) -> Frame:
        picture = Image.fromarray(np.concatenate([scene, column(views, SIZE)], axis=1) if views else scene)
        draw = ImageDraw.Draw(picture)
        draw.rectangle((0, 0, SIZE, BAND_HEIGHT), fill=BAND)
        steps, left = self.env.config.max_steps_per_episode, 10
        what = f"{self._title}   seed {take.seed}" if self._title else f"seed {take.seed}"
        draw.text((left, 4), what, fill=TEXT, font=_font(20))
        seconds = take.length / self._hz
        numbers = f"step {take.length}/{steps}   {seconds:.2f} s   reward {take.return_:+.2f}"
        draw.text((left, 29), numbers, fill=MUTED, font=_font(17))
        if not views:
            draw.text((left, SIZE - 26), "the policy sees no image", fill=BAND, font=_font(17))
        if take.ended is not None:
            said, colour = take.ended.outcome.replace("_", " "), GREEN if take.ended.success else RED
            right = SIZE - left - draw.textlength(said, font=_font(24))
            draw.text((right, 8), said, fill=colour, font=_font(24))
            draw.rectangle((0, BAND_HEIGHT, SIZE - 1, BAND_HEIGHT + 4), fill=colour)
        return np.asarray(picture)

    def _cut(self, take: _Take, stats: EpisodeStats) -> Film:
        fps = max(1, round(self._hz / CONTROL_STEPS_PER_FRAME))
        frames = take.frames + [take.frames[-1]] * round(HOLD_S * fps)
        return Film(take.seed, frames, fps, stats.success, stats.outcome, stats.return_)

    def get_state(self) -> dict[str, Any]:
        """See `ChunkVectorEnv.get_state`; what was filmed is no part of it."""
        return self.env.get_state()

    def set_state(self, state: Mapping[str, Any]) -> Observation:
        """See `ChunkVectorEnv.set_state`; nothing more is filmed until the next reset."""
        self._takes = {}
        return self.env.set_state(state)

    def close(self) -> None:
        """See `ChunkVectorEnv.close`."""
        self._renderer.close()
        self.env.close()


def _view() -> mujoco.MjvCamera:
    camera = mujoco.MjvCamera()
    camera.type = mujoco.mjtCamera.mjCAMERA_FREE
    camera.lookat[:] = VIEW["lookat"]
    camera.azimuth, camera.elevation, camera.distance = VIEW["azimuth"], VIEW["elevation"], VIEW["distance"]
    return camera


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def column(views: Mapping[str, Frame], height: int) -> Frame:
    """Images (h, h, 3) below each other with their names, (height, height // views, 3), at most half as wide as high:
    enlarged by whole pixels where they are small, so that one sees what the policy sees."""
    side = min(height // len(views), height // 2)
    picture = Image.new("RGB", (side, height), BAND)
    draw = ImageDraw.Draw(picture)
    for place, (name, image) in enumerate(views.items()):
        small = image.shape[0] < side
        way = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
        top = place * (height // len(views))
        picture.paste(Image.fromarray(image).resize((side, side), way), (0, top))
        wide = draw.textlength(name, font=_font(15))
        draw.rectangle((0, top, wide + 12, top + 21), fill=BAND)
        draw.text((6, top + 2), name, fill=TEXT, font=_font(15))
    return np.asarray(picture)


def side_by_side(left: Film, right: Film) -> Film:
    """Both at once; the shorter one holds its last frame. Seed, success, outcome and return are the right one's."""
    return replace(right, frames=[np.concatenate(pair, axis=1) for pair in _together([left, right], axis=0)])


def stack(films: Sequence[Film]) -> Film:
    """Several below each other, for one file; shorter ones hold their last frame, narrower ones are padded. It has the
    first one's seed, is a success if all are, and has their mean return.

    Raises:
        ValueError: there is none.
    """
    if not films:
        raise ValueError("no film to stack")
    return replace(
        films[0],
        frames=[np.concatenate(frames, axis=0) for frames in _together(films, axis=1)],
        success=all(film.success for film in films),
        outcome=", ".join(film.outcome for film in films),
        return_=fmean(film.return_ for film in films),
    )


def _together(films: Sequence[Film], axis: int) -> list[list[Frame]]:
    """Frames of the same instant, padded to the largest extent along `axis`."""
    extent = max(film.frames[0].shape[axis] for film in films)
    together = []
    for instant in range(max(len(film.frames) for film in films)):
        frames = [film.frames[min(instant, len(film.frames) - 1)] for film in films]
        together.append([_padded(frame, extent, axis) for frame in frames])
    return together


def _padded(frame: Frame, extent: int, axis: int) -> Frame:
    if frame.shape[axis] == extent:
        return frame
    shape = list(frame.shape)
    shape[axis] = extent - shape[axis]
    return np.concatenate([frame, np.full(shape, BAND[0], dtype=np.uint8)], axis=axis)
