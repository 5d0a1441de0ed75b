"""Sinks of metrics that need nothing but a terminal and a file: what a sink is, the console, metrics.jsonl."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import ClassVar, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from reinflow.metrics import METRICS_FILE, finite_or_none, truncate_metrics

Counted = Literal["episodes", "timesteps"]


class Sink:
    """Where metrics go; this one drops them."""

    takes_media: ClassVar[bool] = False
    """Whether films and tables go anywhere, so that nobody makes them for nothing."""

    def log(self, metrics: Mapping[str, float]) -> None:
        """Take one iteration's metrics, ``progress/iteration`` among them."""

    def progress(self, episodes: int) -> None:
        """Take the number of episodes (or control steps) done within an iteration."""

    def summary(self, figures: Mapping[str, float]) -> None:
        """Take figures of the whole run."""

    def film(self, name: str, path: Path, caption: str) -> None:
        """Take an mp4."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Take a table."""

    def artifact(self, path: Path, name: str, kind: str) -> None:
        """Take a file or a folder to keep with the run."""

    def message(self, text: str) -> None:
        """Take a line for the user."""

    def alert(self, title: str, text: str, error: bool) -> None:
        """Take something that the user should look at now."""

    def close(self, failed: bool) -> None:
        """Flush and release everything; ``failed`` if an error ended the run."""


class PlainConsole(Sink):
    """One readable line per iteration, for logs and pipes."""

    def __init__(self, console: Console, num_episodes: int, episodes_done: int, counted: Counted = "episodes") -> None:
        self.console, self.num_episodes, self.first_episode = console, num_episodes, episodes_done
        self.counted = counted
        self.start: float | None = None

    def log(self, metrics: Mapping[str, float]) -> None:
        if self.start is None:  # not when the run was opened: a report on the starting policy is not training
            self.start = time.monotonic() - metrics.get("time/iteration", 0.0)
        self.console.print(self._line(metrics), highlight=False, markup=False, soft_wrap=True)

    def message(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def alert(self, title: str, text: str, error: bool) -> None:
        self.message(text)

    def _line(self, metrics: Mapping[str, float]) -> str:
        parts = [f"iteration {metrics['progress/iteration']:.0f}"]
        for name, template in (
            (f"progress/{self.counted}", f"{self.counted} {{:,.0f}}/{self.num_episodes:,}"),
            ("rollout/success_rate", "success {:.1%}"),
            ("rollout/return_mean", "return {:.2f}"),
            ("ppo/approx_kl", "KL {:.4f}"),
            ("training/clip_fraction", "clipped {:.0%}"),
            ("ppo/explained_variance", "EV {:.2f}"),
            ("noise/std_mean", "noise {:.3f}"),
            ("time/iteration", "{:.1f} s"),
        ):
            if name in metrics:
                parts.append(template.format(metrics[name]))
        if "loss/value" in metrics and "loss/policy" not in metrics:
            parts.append("critic warm-up")
        if (done := metrics.get(f"progress/{self.counted}")) is not None:
            parts.append(f"ETA {self._eta(done)}")
        if {"eval/success_rate", "eval/ci_low", "eval/ci_high"} <= metrics.keys():
            rate, low, high = (metrics[f"eval/{name}"] for name in ("success_rate", "ci_low", "ci_high"))
            parts.append(f"eval {rate:.1%} [{low:.1%}, {high:.1%}]")
        elif "eval/return_mean" in metrics:
            parts.append(f"eval return {metrics['eval/return_mean']:.1f}")
        return "  ".join(parts)

    def _eta(self, episodes: float) -> str:
        seconds = self._seconds_left(episodes)
        return "?" if seconds is None else str(timedelta(seconds=round(seconds)))

    def _seconds_left(self, episodes: float) -> float | None:
        """At this session's pace, updates and evaluations included; None before anything is done."""
        done = episodes - self.first_episode
        if done <= 0 or self.start is None:
            return None
        return (time.monotonic() - self.start) / done * max(self.num_episodes - episodes, 0)


class TimeLeft(ProgressColumn):
    """Counts down to when the run will have ended, as judged after each iteration: within one, rollout and update have
    different paces."""

    ends: float | None = None  # on the monotonic clock

    def render(self, task: Task) -> Text:
        left = "?" if self.ends is None else str(timedelta(seconds=round(max(self.ends - time.monotonic(), 0))))
        return Text(f"ETA {left}", style="progress.remaining")


class LiveConsole(PlainConsole):
    """The same lines above a live bar: episodes, success, KL, elapsed and remaining time."""

    def __init__(self, console: Console, num_episodes: int, episodes_done: int, counted: Counted = "episodes") -> None:
        super().__init__(console, num_episodes, episodes_done, counted)
        self.left = TimeLeft()
        self.bar = Progress(
            TextColumn(counted), MofNCompleteColumn(), BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"), TimeElapsedColumn(), self.left, console=console,
        )  # fmt: skip
        self.status = {"success": "-", "KL": "-"}
        self.task = self.bar.add_task("", total=num_episodes, completed=episodes_done, status=self._status())
        self.bar.start()

    def _status(self) -> str:
        return "  ".join(f"{name} {value}" for name, value in self.status.items())

    def log(self, metrics: Mapping[str, float]) -> None:
        super().log(metrics)
        for name, label, template in (
            ("rollout/success_rate", "success", "{:.1%}"),
            ("ppo/approx_kl", "KL", "{:.4f}"),
            ("eval/success_rate", "eval", "{:.1%}"),
        ):
            if name in metrics:
                self.status[label] = template.format(metrics[name])
        done = metrics.get(f"progress/{self.counted}", self.bar.tasks[0].completed)
        if (seconds := self._seconds_left(done)) is not None:
            self.left.ends = time.monotonic() + seconds
        self.progress(int(done))

    def progress(self, episodes: int) -> None:
        self.bar.update(self.task, completed=episodes, status=self._status())

    def close(self, failed: bool) -> None:
        self.bar.stop()


class JsonlSink(Sink):
    """metrics.jsonl: one JSON object per log call, flushed at once. A value that is not finite becomes null."""

    def __init__(self, run_dir: Path, resumed_iteration: int | None) -> None:
        path = run_dir / METRICS_FILE
        if resumed_iteration is not None and path.exists():
            truncate_metrics(path, resumed_iteration)
        self.file = path.open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, float]) -> None:
        self.file.write(json.dumps(finite_or_none(metrics), allow_nan=False) + "\n")
        self.file.flush()

    def close(self, failed: bool) -> None:
        self.file.close()
