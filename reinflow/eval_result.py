"""What an evaluation found: a row per episode, and what follows from them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import NormalDist, fmean, stdev
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reinflow.env import Extra

CONFIDENCE = 0.95
MOST_ROWS_SHOWN = 20  # more episodes than this go into files alone


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


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _mean(values: Iterable[float]) -> float:
    """Of the finite ones; NaN where none is."""
    finite = _finite(values)
    return fmean(finite) if finite else math.nan


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
        returns = _finite(row.return_ for row in self.episodes)
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
        """Of the episodes whose return is finite; that of a simulation that broke down may be none. NaN without one."""
        return _mean(row.return_ for row in self.episodes)

    @property
    def left_out(self) -> int:
        """Episodes without a finite return, which its mean and error leave out."""
        return sum(not math.isfinite(row.return_) for row in self.episodes)

    @property
    def length_mean(self) -> float:
        return fmean(row.length for row in self.episodes)

    def extra_mean(self, name: str) -> float:
        """Mean of one of the environment's extras."""
        return _mean(row.extras[name] for row in self.episodes)

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
        broken += f", {self.left_out} without a finite return, left out of its mean" if self.left_out else ""
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
            "avg_max_reward": _mean(max_rewards),
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
            "per_episode": [self.lerobot_row(i, row) for i, row in enumerate(self.episodes)],
        } | self._terms()

    def _terms(self) -> dict[str, Any]:
        """What explains the outcomes, facts and extras of the rows, where the environment tells them; broken episodes
        and another objective than success, where there are any."""
        terms = {
            "outcomes": dict(self.outcomes),
            "facts": {name: asdict(fact) for name, fact in self.facts.items()},
            "start_facts": list(self.start_facts),
            "extras": {name: asdict(extra) for name, extra in self.extras.items()},
        }
        return (
            ({"terms": terms} if self.outcomes or self.facts else {})
            | ({"broken_seeds": list(self.broken_seeds)} if self.broken_seeds else {})
            | ({"objective": self.objective} if self.objective != "success" else {})
        )

    def lerobot_row(self, index: int, row: EpisodeRow) -> dict[str, Any]:
        """A row of per_episode in eval_info.json."""
        values = asdict(row)
        for name in ("outcome", "facts"):
            if not values[name]:  # the environment tells none
                del values[name]
        extras = {self.extras[name].key(name): value for name, value in values.pop("extras").items()}
        return {"episode_ix": index, "sum_reward": values.pop("return_"), **values, **extras}

    def table(self) -> Table:
        """A rich table with a row per episode."""
        names = [extra.key(name).replace("_", " ") for name, extra in self.extras.items()]
        table = Table("seed", "success", "return", "length", *map(escape, names), title="episodes")
        for row in self.episodes:
            mark = "[green]yes[/]" if row.success else "no"
            extras = (f"{row.extras[name]:.3g}" for name in self.extras)
            table.add_row(str(row.seed), mark, f"{row.return_:.2f}", str(row.length), *extras)
        return table

    def outcome_counts(self, failures_only: bool = False) -> dict[str, int]:
        """How many of the episodes ended with which outcome, in the environment's order; {} where it tells none."""
        counts = Counter(row.outcome for row in self.episodes if row.outcome and not (failures_only and row.success))
        return {name: counts[name] for name in dict.fromkeys([*self.outcomes, *counts]) if counts[name]}

    def failures(self) -> dict[str, int]:
        """The outcomes of the failed episodes alone."""
        return self.outcome_counts(failures_only=True)

    def failure_table(self) -> Table:
        """A rich table of how the failed episodes ended: count, share of all episodes, explanation."""
        counts = self.failures()
        failed = len(self.episodes) - self.num_successes
        table = Table("failure", "episodes", "share", "what it is", title=f"{failed} of {len(self.episodes)} failed")
        for name, count in counts.items():
            share = f"{100 * count / len(self.episodes):.1f} %"
            table.add_row(escape(name.replace("_", " ")), str(count), share, escape(self.outcomes.get(name, "")))
        return table

    def pace(self, control_hz: float) -> str:
        """One line on how fast it succeeds, or "" where nothing did or success is not what counts.

        Args:
            control_hz: control steps a second.
        """
        lengths = sorted(row.length for row in self.episodes if row.success)
        if not lengths or self.objective == "return":
            return ""
        minutes = sum(row.length for row in self.episodes) / control_hz / 60
        slow = lengths[math.ceil(0.9 * len(lengths)) - 1]
        return (
            f"time to success: {fmean(lengths) / control_hz:.2f} s on average, 9 of 10 within {slow / control_hz:.2f} s"
            f"; {len(lengths) / minutes:.1f} successes a minute of simulated time, resets not counted"
        )

    def print(self, console: Console) -> None:
        """The summary and how the failures ended; a row per episode where they are few."""
        if len(self.episodes) <= MOST_ROWS_SHOWN:
            console.print(self.table())
        console.print(self.summary(), highlight=False, markup=False, soft_wrap=True)
        if self.failures():
            console.print(self.failure_table())
