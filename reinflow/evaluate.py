"""Noise-free evaluation on fixed seeds: success rate with a confidence interval, a row per episode.

Knows neither policy nor simulator: ``act`` turns observations into action chunks, a ChunkVectorEnv executes them.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from reinflow import UserError
from reinflow.env import ChunkVectorEnv, EpisodeStats, Extra, Observation

Act = Callable[[Observation, Sequence[int], int], np.ndarray]
"""Observation, the episodes' seeds (N,) and how many decisions they have made -> actions (N, n, A), deterministic."""
FrameHook = Callable[[Sequence[int], Observation], None]
CONFIDENCE = 0.95


class EvaluationStopped(Exception):
    """Somebody asked to stop; what was played so far is dropped."""


class EvaluationError(UserError, RuntimeError):
    """The environments do not behave as an evaluation needs."""


def wilson_interval(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson score interval of a binomial proportion (Wilson 1927); unlike the normal one it stays within [0, 1].

    Raises:
        ValueError: not 0 <= successes <= n, n < 1, or confidence not within (0, 1).
    """
    if n < 1 or not 0 <= successes <= n or not 0 < confidence < 1:
        raise ValueError(f"no interval for {successes} successes in {n} episodes at confidence {confidence}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate, spread = successes / n, z * z / n
    centre = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / n + spread / (4 * n))
    # The ends are exactly 0 and 1 there; rounding must not say otherwise.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


@dataclass(frozen=True)
class EpisodeRow:
    """One evaluation episode."""

    seed: int
    success: bool
    return_: float  # undiscounted
    length: int  # control steps
    max_reward: float  # of one control step
    extras: Mapping[str, float] = field(default_factory=dict)  # what the environment reports besides
    outcome: str = ""  # how it ended, by the environment's outcomes
    facts: Mapping[str, float] = field(default_factory=dict)  # by the environment's facts


@dataclass(frozen=True)
class EvalResult:
    """Episodes in the order of their seeds, and what follows from them."""

    episodes: tuple[EpisodeRow, ...]
    elapsed_s: float
    extras: Mapping[str, Extra] = field(default_factory=dict)  # of the environment
    video_paths: list[str] = field(default_factory=list)
    broken_seeds: tuple[int, ...] = ()  # of episodes in which the simulation broke down; they count as failures
    objective: Literal["success", "return"] = "success"  # of the environment
    outcomes: Mapping[str, str] = field(default_factory=dict)  # of the environment, as the next two
    facts: Mapping[str, Extra] = field(default_factory=dict)
    start_facts: tuple[str, ...] = ()

    @property
    def num_successes(self) -> int:
        return sum(row.success for row in self.episodes)

    @property
    def success_rate(self) -> float:
        return self.num_successes / len(self.episodes)

    @property
    def score(self) -> float:
        """What the best policy is chosen by: the success rate or the mean return, as the environment has it."""
        return self.return_mean if self.objective == "return" else self.success_rate

    @property
    def return_error(self) -> float:
        """Standard error of the mean return; 0 of a single episode."""
        returns = [row.return_ for row in self.episodes]
        return stdev(returns) / math.sqrt(len(returns)) if len(returns) > 1 else 0.0

    @property
    def standard_error(self) -> float:
        """Of the score; for a success rate one success and one failure are added, so that it is not 0 where nothing
        failed."""
        if self.objective == "return":
            return self.return_error
        rate = (self.num_successes + 1) / (len(self.episodes) + 2)
        return math.sqrt(rate * (1 - rate) / len(self.episodes))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the success rate."""
        return wilson_interval(self.num_successes, len(self.episodes))

    @property
    def return_mean(self) -> float:
        return fmean(row.return_ for row in self.episodes)

    @property
    def length_mean(self) -> float:
        return fmean(row.length for row in self.episodes)

    def extra_mean(self, name: str) -> float:
        """Mean of one of the environment's extras."""
        return fmean(row.extras[name] for row in self.episodes)

    def metrics(self) -> dict[str, float]:
        """By the names of reinflow.metrics."""
        low, high = self.interval
        success = {"eval/success_rate": self.success_rate, "eval/ci_low": low, "eval/ci_high": high}
        return (
            ({} if self.objective == "return" else success)
            | {
                "eval/return_mean": self.return_mean,
                "eval/episode_length": self.length_mean,
                "eval/episodes": float(len(self.episodes)),
                "time/eval": self.elapsed_s,
            }
            | {f"eval/{name}": self.extra_mean(name) for name in self.extras}
        )

    def summary(self) -> str:
        """One line: ``success 43.5 % (87/200), 95 % interval 36.8-50.4 %, ...``."""
        low, high = self.interval
        lost = self.broken_seeds
        broken = f", {len(lost)} failed by unstable physics (first seed {lost[0]})" if lost else ""
        extras = "".join(f"{extra.template.format(self.extra_mean(name))}, " for name, extra in self.extras.items())
        if self.objective == "return":
            return (
                f"return {self.return_mean:.1f} +- {1.96 * self.return_error:.1f} (95 % of {len(self.episodes)} "
                f"episodes), length {self.length_mean:.0f}, {100 * self.success_rate:.0f} % to the time limit, "
                f"{extras}{self.elapsed_s:.0f} s{broken}"
            )
        return (
            f"success {100 * self.success_rate:.1f} % ({self.num_successes}/{len(self.episodes)}), 95 % interval "
            f"{100 * low:.1f}-{100 * high:.1f} %, return {self.return_mean:.2f}, "
            f"length {self.length_mean:.0f}, {extras}{self.elapsed_s:.0f} s{broken}"
        )

    def to_lerobot_info(self, task_group: str, task_id: int = 0) -> dict[str, Any]:
        """eval_info.json as lerobot-eval 0.6 writes it (per_task, per_group, overall), with more beside.

        ``task_group`` and ``task_id`` name the task as LeRobot's benchmarks do; we have one. Added to its keys:
        ``per_episode`` rows (those of its ``eval_policy``, plus length, extras, outcome and facts), ``terms``, which
        explain outcomes and facts, and, in ``overall``, the interval of ``pc_success`` and the means of length and
        extras. All percentages are 0-100.
        """
        n = len(self.episodes)
        returns = [row.return_ for row in self.episodes]
        max_rewards = [row.max_reward for row in self.episodes]
        aggregates = {
            "avg_sum_reward": self.return_mean,
            "avg_max_reward": fmean(max_rewards),
            "pc_success": 100 * self.success_rate,
            "n_episodes": n,
            "video_paths": list(self.video_paths),
            "predicted_video_paths": [],
        }
        task_metrics = {
            "sum_rewards": returns,
            "max_rewards": max_rewards,
            "successes": [row.success for row in self.episodes],
            "video_paths": list(self.video_paths),
            "predicted_video_paths": [],
        }
        extra = {
            "pc_success_ci95": [100 * end for end in self.interval],
            "avg_episode_length": self.length_mean,
        } | {f"avg_{extra.key(name)}": self.extra_mean(name) for name, extra in self.extras.items()}
        timing = {"eval_s": self.elapsed_s, "eval_ep_s": self.elapsed_s / n}
        return {
            "per_task": [{"task_group": task_group, "task_id": task_id, "metrics": task_metrics}],
            "per_group": {task_group: dict(aggregates)},
            "overall": aggregates | timing | extra,
            "per_episode": [self._lerobot_row(i, row) for i, row in enumerate(self.episodes)],
        } | self._terms()

    def _terms(self) -> dict[str, Any]:
        """What explains the outcomes and facts of the rows, where the environment tells them."""
        if not self.outcomes and not self.facts:
            return {}
        facts = {n: {"explanation": fact.explanation, "unit": fact.unit} for n, fact in self.facts.items()}
        return {"terms": {"outcomes": dict(self.outcomes), "facts": facts, "start_facts": list(self.start_facts)}}

    def _lerobot_row(self, index: int, row: EpisodeRow) -> dict[str, Any]:
        values = asdict(row)
        for name in ("outcome", "facts"):
            if not values[name]:  # the environment tells none
                del values[name]
        extras = {self.extras[name].key(name): value for name, value in values.pop("extras").items()}
        return {"episode_ix": index, "sum_reward": values.pop("return_"), **values, **extras}

    def table(self) -> Table:
        """A rich table with a row per episode."""
        names = [extra.key(name).replace("_", " ") for name, extra in self.extras.items()]
        table = Table("seed", "success", "return", "length", *names, title="episodes")
        for row in self.episodes:
            mark = "[green]yes[/]" if row.success else "no"
            extras = (f"{row.extras[name]:.3g}" for name in self.extras)
            table.add_row(str(row.seed), mark, f"{row.return_:.2f}", str(row.length), *extras)
        return table

    def print(self, console: Console) -> None:
        """The table and the summary."""
        console.print(self.table())
        console.print(self.summary(), highlight=False, soft_wrap=True)


def write_eval_info(path: Path | str, info: Mapping[str, Any]) -> Path:
    """Write eval_info.json."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
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
) -> EvalResult:
    """Play one episode per seed.

    Args:
        act: decides; see Act.
        vector_env: N environments.
        seeds: one per episode, any number of them; a last batch that is not full is padded with its own first
            seed, and the padding's episodes are dropped.
        frame_hook: called with the batch's seeds and the observation after every reset and every executed piece
            of a chunk; rows beyond the seeds are padding.
        frame_interval: control steps per piece, for videos smoother than one frame per chunk; 0 executes whole
            chunks. Trajectories do not depend on it.

    Raises:
        ValueError: no seeds.
        EvaluationError: an environment restarts by itself, reports a foreign episode, or never ends one.
    """
    if not seeds:
        raise ValueError("evaluation needs at least one seed")
    start = time.perf_counter()
    rows: list[EpisodeRow] = []
    broken: list[int] = []
    for first in range(0, len(seeds), vector_env.num_envs):
        batch = list(seeds[first : first + vector_env.num_envs])
        rows += _play_batch(act, vector_env, batch, broken, frame_hook, frame_interval)
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
    act: Act, make_env: Callable[[int], ChunkVectorEnv], first_seed: int, episodes: int, num_envs: int
) -> EvalResult:
    """Evaluate on the ``episodes`` seeds from ``first_seed`` on, with at most ``num_envs`` environments at once.

    Args:
        act: decides; see Act.
        make_env: so many environments; they are closed again.
        first_seed: episode i plays first_seed + i.
        episodes: at least 1.
        num_envs: at least 1.
    """
    with make_env(even_batch(episodes, num_envs)) as env, torch.no_grad():
        return evaluate(act, env, range(first_seed, first_seed + episodes))
