"""Rollouts as video: a grid of episodes (rows) by views (columns), as mp4 or gif."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image

from reinflow.env import Observation

PALETTE_FRAMES = 8  # that a gif's colours are chosen from


def tile_frames(pixels: Mapping[str, np.ndarray], rows: Sequence[int]) -> np.ndarray:
    """One picture of several episodes and views.

    Args:
        pixels: view -> (N, h, w, 3) uint8, one size for all.
        rows: episodes to show, from top to bottom.

    Returns:
        (len(rows) * h, views * w, 3) uint8.

    Raises:
        ValueError: no view, no row, or views of different sizes.
    """
    if not pixels or not rows:
        raise ValueError("a video needs at least one view and one episode")
    shapes = {name: images.shape[1:] for name, images in pixels.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"views have different image sizes: {shapes}")
    return np.concatenate([np.concatenate([images[row] for images in pixels.values()], axis=1) for row in rows])


class EpisodeRecorder:
    """A frame hook for ``evaluate`` that keeps the first ``num_episodes`` episodes of its first batch."""

    def __init__(self, num_episodes: int) -> None:
        self.num_episodes = num_episodes
        self.frames: list[np.ndarray] = []
        self._seeds: tuple[int, ...] | None = None

    def __call__(self, seeds: Sequence[int], observation: Observation) -> None:
        """Take the observation of the batch of episodes with these seeds."""
        self._seeds = self._seeds or tuple(seeds)
        if tuple(seeds) == self._seeds:
            rows = range(min(self.num_episodes, len(seeds)))
            self.frames.append(tile_frames(observation["pixels"], rows))


def write_mp4(path: Path | str, frames: Iterable[np.ndarray], fps: int) -> Path:
    """Write (H, W, 3) uint8 frames of one size as H.264; odd sizes are padded to the even ones that it needs.

    Raises:
        ValueError: there is no frame.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _encode(str(path), frames, fps, crf=20)
    return path


def encode_mp4(frames: Iterable[np.ndarray], fps: int) -> bytes:
    """What `write_mp4` writes, half as large, for a page to hold. Raises ValueError without a frame."""
    buffer = io.BytesIO()
    _encode(buffer, frames, fps, crf=26)
    return buffer.getvalue()


def _encode(target: str | io.BytesIO, frames: Iterable[np.ndarray], fps: int, crf: int) -> None:
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise ValueError(f"no frames to write to {target}" if isinstance(target, str) else "no frames to encode")
    # In a file the index comes first, so that a browser plays it before all of it is there.
    first_index = {"movflags": "faststart"} if isinstance(target, str) else {}
    with av.open(target, "w", format="mp4", options=first_index) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "preset": "fast"})
        stream.width, stream.height = _even(first).shape[1::-1]
        stream.pix_fmt = "yuv420p"  # the one that every player shows
        for image in (first, *iterator):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_even(image), format="rgb24")))
        container.mux(stream.encode())


def _even(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    return np.ascontiguousarray(np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))


def write_gif(path: Path | str, frames: Iterable[np.ndarray], fps: int) -> Path:
    """Write (H, W, 3) uint8 frames as an endless gif of at most 50 frames a second, which is what viewers show.

    Raises:
        ValueError: there is no frame.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = list(frames)
    if not pictures:
        raise ValueError(f"no frames to write to {path}")
    # One palette and no dithering: what stands still is then the same in every frame, and costs nothing. It covers all
    # there is, as choosing by frequency takes the colour from a small word, and then moves to what is frequent.
    sample = np.concatenate([*pictures[:: max(1, len(pictures) // PALETTE_FRAMES)], pictures[-1]])[::2, ::2]
    colours = Image.fromarray(np.ascontiguousarray(sample))
    palette = colours.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=1)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in pictures]
    duration_ms = max(round(1000 / fps), 20)
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration_ms, loop=0, optimize=True)
    return path
