"""Noise-free evaluation on fixed seeds: success rate with a confidence interval, a row per episode.

Knows neither policy nor simulator: ``act`` turns observations into action chunks, a ChunkVectorEnv executes them.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reinflow import UserError
from reinflow.distributed import gather, share, size
from reinflow.env import ChunkVectorEnv, EpisodeStats, Extra, Observation
from reinflow.eval_result import EpisodeRow, EvalResult, wilson_interval
from reinflow.progress import Advance, progress_bar

__all__ = [
    "Act", "EpisodeRow", "EvalInfoError", "EvalResult", "EvaluationError", "EvaluationStopped", "FrameHook",
    "evaluate", "evaluate_seeds", "even_batch", "read_eval_info", "wilson_interval", "write_eval_info", "write_rows",
]  # fmt: skip

Act = Callable[[Observation, Sequence[int], int], np.ndarray]
"""Observation, the episodes' seeds (N,) and how many decisions they have made -> actions (N, n, A), deterministic."""
FrameHook = Callable[[Sequence[int], Observation], None]


class EvaluationStopped(Exception):
    """Somebody asked to stop; what was played so far is dropped."""


class EvaluationError(UserError, RuntimeError):
    """The environments do not behave as an evaluation needs."""


class EvalInfoError(UserError, ValueError):
    """A file that holds no whole evaluation."""


def write_eval_info(path: Path | str, info: Mapping[str, Any]) -> Path:
    """Write eval_info.json."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return path


def read_eval_info(path: Path | str) -> EvalResult:
    """What ``write_eval_info`` wrote of an EvalResult.

    Where the file explains no terms, extras come back under the names that they have in it, unit included.

    Raises:
        EvalInfoError: no file, or it is damaged or not of ours; one line.
    """
    try:
        info = json.loads(Path(path).read_text(encoding="utf-8"))
        return _result(info)
    except OSError as error:
        raise EvalInfoError(f"{path} cannot be read ({error.strerror}): evaluate again") from error
    except KeyError as error:
        raise EvalInfoError(f"{path} holds no whole evaluation ({error.args[0]} is missing): evaluate again") from error
    except (ValueError, TypeError, AttributeError) as error:
        what = " ".join(str(error).split())
        raise EvalInfoError(f"{path} holds no evaluation ({what}): evaluate again") from error


def _result(info: dict[str, Any]) -> EvalResult:
    terms, rows, overall = info.get("terms", {}), info["per_episode"], info["overall"]
    objective = info.get("objective", "success")
    if objective not in ("success", "return"):
        raise ValueError(f"objective is {objective!r}")
    if not rows:
        raise ValueError("per_episode is empty")
    own = {"episode_ix", "sum_reward", *(f.name for f in fields(EpisodeRow))}
    extras = {name: Extra(**extra) for name, extra in terms.get("extras", {}).items()} or {
        key: Extra("", f"{key.replace('_', ' ')} {{:.3g}}") for key in rows[0] if key not in own
    }
    return EvalResult(
        tuple(_stored_row(row, extras) for row in rows),
        float(overall["eval_s"]),
        extras,
        list(overall["video_paths"]),
        tuple(info.get("broken_seeds", ())),
        objective,
        terms.get("outcomes", {}),
        {name: Extra(f["explanation"], f.get("template", ""), f["unit"]) for name, f in terms.get("facts", {}).items()},
        tuple(terms.get("start_facts", ())),
    )


def _stored_row(row: dict[str, Any], extras: Mapping[str, Extra]) -> EpisodeRow:
    if not isinstance(row["success"], bool) or not isinstance(row["seed"], int):
        raise ValueError(f"an episode has seed {row['seed']!r} and success {row['success']!r}")
    return EpisodeRow(
        row["seed"],
        row["success"],
        float(row["sum_reward"]),
        int(row["length"]),
        float(row["max_reward"]),
        {name: float(row[extra.key(name)]) for name, extra in extras.items()},
        str(row.get("outcome", "")),
        {str(name): float(value) for name, value in row.get("facts", {}).items()},
    )


def write_rows(path: Path | str, result: EvalResult) -> Path:
    """Write a CSV with a row per episode: those of eval_info.json, facts by their names."""
    path = Path(path)
    rows: list[dict[str, Any]] = [result.lerobot_row(i, row) for i, row in enumerate(result.episodes)]
    rows = [row | row.pop("facts", {}) for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


def even_batch(num_episodes: int, num_envs: int) -> int:
    """Environments, at most ``num_envs``, that play ``num_episodes`` in as few batches with the least padding.

    200 episodes take 4 batches of 50 environments, not 3 of 64 and a fourth that is padded with 56 for nothing.
    """
    return math.ceil(num_episodes / math.ceil(num_episodes / num_envs))


def evaluate(
    act: Act,
    vector_env: ChunkVectorEnv,
    seeds: Sequence[int],
    frame_hook: FrameHook | None = None,
    frame_interval: int = 0,
    label: str = "evaluation, episodes",
) -> EvalResult:
    """Play one episode per seed, and show how far that is.

    Args:
        act: decides; see Act.
        vector_env: N environments.
        seeds: one per episode, any number of them; a last batch that is not full is padded with its own first
            seed, and the padding's episodes are dropped.
        frame_hook: called with the batch's seeds and the observation after every reset and every executed piece
            of a chunk; rows beyond the seeds are padding.
        frame_interval: control steps per piece, for videos smoother than one frame per chunk; 0 executes whole
            chunks. Trajectories do not depend on it.
        label: of the bar.

    Raises:
        ValueError: no seeds.
        EvaluationError: an environment restarts by itself, reports a foreign episode, or never ends one.
    """
    if not seeds:
        raise ValueError("evaluation needs at least one seed")
    start = time.perf_counter()
    rows: list[EpisodeRow] = []
    broken: list[int] = []
    with progress_bar(label, len(seeds)) as advance:
        for first in range(0, len(seeds), vector_env.num_envs):
            batch = list(seeds[first : first + vector_env.num_envs])
            rows += _play_batch(act, vector_env, batch, broken, frame_hook, frame_interval, advance)
    elapsed = time.perf_counter() - start
    return EvalResult(
        tuple(rows),
        elapsed,
        extras=vector_env.extras,
        broken_seeds=tuple(broken),
        objective=getattr(vector_env, "objective", "success"),
        outcomes=getattr(vector_env, "outcomes", {}),
        facts=getattr(vector_env, "facts", {}),
        start_facts=getattr(vector_env, "start_facts", ()),
    )


def _play_batch(
    act: Act,
    vector_env: ChunkVectorEnv,
    seeds: list[int],
    broken: list[int],
    frame_hook: FrameHook | None,
    frame_interval: int,
    advance: Advance,
) -> list[EpisodeRow]:
    """One episode in each of the first len(seeds) environments; ``broken`` gets the seeds of those that broke down."""
    padded = seeds + [seeds[0]] * (vector_env.num_envs - len(seeds))
    pending = set(range(len(seeds)))
    rows: dict[int, EpisodeRow] = {}
    max_rewards = np.full(len(padded), -np.inf)
    observation = vector_env.reset(padded)
    if frame_hook:
        frame_hook(seeds, observation)
    for decision in itertools.count():
        for piece in _pieces(act(observation, padded, decision), frame_interval):
            result = vector_env.step_chunk(piece)
            if not result.active[sorted(pending)].any():
                raise EvaluationError(f"environments {sorted(pending)} neither run nor report the end of an episode")
            if rows and result.active[sorted(rows)].any():
                raise EvaluationError("an ended environment goes on although it was given no seed for another episode")
            max_rewards = np.maximum(max_rewards, np.where(result.active, result.rewards, -np.inf).max(axis=1))
            observation = result.observation
            if frame_hook:
                frame_hook(seeds, observation)
            for stats in result.episodes:
                if stats.seed != padded[stats.env]:
                    raise EvaluationError(
                        f"environment {stats.env} played seed {stats.seed} instead of {padded[stats.env]}"
                    )
                rows[stats.env] = _row(stats, max_rewards[stats.env])
                if getattr(stats, "broken", False) and stats.env < len(seeds):
                    broken.append(int(stats.seed))
            advance(len(pending & rows.keys()))
            pending -= rows.keys()
            if not pending:
                return [rows[env] for env in range(len(seeds))]
    raise AssertionError("unreachable")


def _pieces(actions: np.ndarray, interval: int) -> list[np.ndarray]:
    """(N, n, A) cut along its control steps."""
    interval = interval or actions.shape[1]
    return [actions[:, start : start + interval] for start in range(0, actions.shape[1], interval)]


def _row(stats: EpisodeStats, max_reward: float) -> EpisodeRow:
    return EpisodeRow(
        seed=int(stats.seed),
        success=bool(stats.success),
        return_=float(stats.return_),
        length=int(stats.length),
        max_reward=float(max_reward),
        extras=stats.extras,
        outcome=getattr(stats, "outcome", ""),
        facts=getattr(stats, "facts", {}),
    )


def evaluate_seeds(
    act: Act,
    make_env: Callable[[int], ChunkVectorEnv],
    first_seed: int,
    episodes: int,
    num_envs: int,
    label: str = "evaluation, episodes",
) -> EvalResult:
    """Evaluate on the ``episodes`` seeds from ``first_seed`` on, with at most ``num_envs`` environments at once.

    Several ranks play a part of the seeds each, and all get the whole result.

    Args:
        act: decides; see Act.
        make_env: so many environments; they are closed again.
        first_seed: episode i plays first_seed + i.
        episodes: at least 1.
        num_envs: at least 1, of all ranks.
        label: of the bar.

    Raises:
        EvaluationStopped: ``act`` did, on any rank.
    """
    mine, most = share(episodes), math.ceil(num_envs / size())
    result, stopped = None, False
    if mine:
        with make_env(even_batch(len(mine), most)) as env, torch.no_grad():
            try:
                result = evaluate(act, env, range(first_seed + mine.start, first_seed + mine.stop), label=label)
            except EvaluationStopped:
                stopped = True
    parts = gather((result, stopped))
    if any(stopped for _, stopped in parts):
        raise EvaluationStopped
    return _joined([result for result, _ in parts if result])


def _joined(results: Sequence[EvalResult]) -> EvalResult:
    """Those of several ranks, in their order, as one."""
    return replace(
        results[0],
        episodes=tuple(row for result in results for row in result.episodes),
        elapsed_s=max(result.elapsed_s for result in results),
        broken_seeds=tuple(seed for result in results for seed in result.broken_seeds),
    )
