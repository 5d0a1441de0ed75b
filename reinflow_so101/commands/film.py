"""Policies side by side on the same seeds, as one film.

    python -m reinflow_so101.commands.film --policies tiny RUN --titles before after --seeds 10005 10019 10000 \
        --output docs/rollout.gif

A column for each policy, a row for each seed. The README's film is made by these words; RUN is a training of --preset
tiny.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from reinflow import ConfigError, run_command
from reinflow.seeds import FIRST_REPORTING_SEED
from reinflow.settings import Range, check_ranges
from so101_sim.film import SIZE, WIDEST, Film, side_by_side, stack

FORMATS = (".mp4", ".gif")
GIF_FRAMES = 2  # of the film's, every second one
MOST_PIXELS = 16_384  # of an mp4's height and width, libx264's limit


@dataclass(frozen=True)
class FilmConfig:
    """Film policies side by side."""

    policies: tuple[str, ...]
    """Runs, checkpoints or policy directories, from left to right; "tiny" and "flow_mlp" name embedded ones."""
    output: str
    """The file, .mp4 or .gif."""
    seeds: tuple[int, ...] = (FIRST_REPORTING_SEED,)
    """A row each, from top to bottom."""
    titles: tuple[str, ...] = ()
    """A word for each policy; none writes its path."""
    width: Annotated[int, Range(0, 7_680)] = 960
    """Pixels that a gif is reduced to; 0 leaves it. A film is as wide as it comes."""


def check_config(config: FilmConfig) -> None:
    """Raise a ConfigError for what cannot work."""
    check_ranges(config)
    if not config.policies or not config.seeds:
        raise ConfigError("policies, seeds: name one of each at least")
    if config.titles and len(config.titles) != len(config.policies):
        raise ConfigError(
            f"titles={config.titles} are {len(config.titles)} of {len(config.policies)}: one each, or none"
        )
    if min(config.seeds) < 0:
        raise ConfigError(f"seeds={config.seeds}: give numbers of at least 0")
    if Path(config.output).suffix not in FORMATS:
        raise ConfigError(f"output={config.output} is no film: end it in {' or '.join(FORMATS)}")
    if Path(config.output).suffix == ".mp4":
        for name, given, pixels in (("seeds", config.seeds, SIZE), ("policies", config.policies, WIDEST)):
            if len(given) > (most := MOST_PIXELS // pixels):
                raise ConfigError(
                    f"{name}: {len(given)} of {pixels} pixels each are more than an mp4 holds ({MOST_PIXELS:,}): name "
                    f"at most {most}, or write a .gif"
                )


def make_film(config: FilmConfig) -> Path:
    """Play, join and write; the file's path."""
    from reinflow.video import write_gif, write_mp4

    check_config(config)
    titles = config.titles or config.policies
    columns = [films_of(policy, config.seeds, title) for policy, title in zip(config.policies, titles, strict=True)]
    film = stack([reduce(side_by_side, row) for row in zip(*columns, strict=True)])
    path = Path(config.output)
    if path.suffix == ".gif":
        frames = [reduced(frame, config.width) for frame in film.frames[::GIF_FRAMES]]
        write_gif(path, frames, fps=max(1, film.fps // GIF_FRAMES))
    else:
        write_mp4(path, film.frames, film.fps)
    outcomes = ["; ".join(f"seed {one.seed} {one.outcome}" for one in column) for column in columns]
    print("\n".join(f"{title}: {outcome}" for title, outcome in zip(titles, outcomes, strict=True)))
    print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")
    return path


def films_of(policy: str, seeds: Sequence[int], title: str) -> list[Film]:
    """A policy's films, as reinflow-eval plays it."""
    from reinflow_so101.commands.evaluate import find_policy, make_actor, parse_args
    from reinflow_so101.films import film_episodes
    from reinflow_so101.worlds import gym_world

    directory = find_policy(policy)
    if gym_world(directory):
        raise ConfigError(f"policies={policy} acts in a Gymnasium environment: films show the arm alone")
    config = parse_args(["--policy-path", policy, "--output-dir", ""])
    return film_episodes(make_actor(config, directory), config.env, seeds, title)


def reduced(frame: np.ndarray, width: int) -> np.ndarray:
    """(H, W, 3) as wide as `width` if it is wider, unless that is 0."""
    from PIL import Image

    if not width or frame.shape[1] <= width:
        return frame
    size = (width, round(frame.shape[0] * width / frame.shape[1]))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


def main() -> None:
    """Entry point."""

    def film() -> Path:
        return make_film(tyro.cli(FilmConfig, args=sys.argv[1:], description=__doc__, prog="film"))

    run_command("film", film)


if __name__ == "__main__":
    main()
