"""Films of a policy's episodes: played again by the seeds that were counted, encoded for files and pages."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from reinflow.evaluate import Act, evaluate, even_batch
from reinflow.progress import progress_bar
from reinflow.video import encode_mp4
from so101_sim.config import EnvConfig
from so101_sim.film import CONTROL_STEPS_PER_FRAME, Film, FilmingEnv, side_by_side, stack
from so101_sim.vector.make import make_vector_env

__all__ = ["Film", "film_episodes", "mp4_bytes", "side_by_side", "stack"]

MOST_AT_ONCE = 8  # environments; frames take the time, not physics


def film_episodes(act: Act, config: EnvConfig, seeds: Sequence[int], title: str = "") -> list[Film]:
    """Film the episodes of these seeds, in their order, as an evaluation plays them.

    Args:
        act: decides; see reinflow.evaluate.Act.
        config: the environment, with the images that the policy sees or none.
        seeds: one for each film.
        title: written into the films, e.g. "before".

    Raises:
        ValueError: no seeds.
        RenderError: OpenGL cannot start here.
    """
    if not seeds:
        raise ValueError("a film needs at least one seed")
    num_envs = even_batch(len(seeds), MOST_AT_ONCE)
    steps = math.ceil(len(seeds) / num_envs) * config.max_steps_per_episode
    with (
        progress_bar(f"film {title}, control steps".replace(" ,", ","), steps) as advance,
        FilmingEnv(make_vector_env(config, num_envs), title, advance) as env,
        torch.no_grad(),
    ):
        evaluate(act, env, list(seeds), frame_interval=CONTROL_STEPS_PER_FRAME)
        films = {film.seed: film for film in env.films()}
    return [films[seed] for seed in seeds]


def mp4_bytes(film: Film) -> bytes:
    """The film as H.264 in an mp4 that a page can embed."""
    return encode_mp4(film.frames, film.fps)
