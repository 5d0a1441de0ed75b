"""Metrics to the console, to metrics.jsonl and to Weights & Biases; each can be off.

Every sink has the methods of ``Sink``, which do nothing: what is off is a plain Sink, not an ``if``. METRICS is the
one table of names: logging an unknown one is an error, so that every number has an explanation.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, SupportsFloat

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from reinflow import UserError

Metrics = Mapping[str, SupportsFloat]
WandbMode = Literal["online", "offline", "off"]
REWARD_FAMILY = "reward/"
METRICS_FILE = "metrics.jsonl"

METRICS: dict[str, str] = {
    "progress/iteration": "Iterations completed; the x axis of every other metric.",
    "progress/episodes": "Training episodes completed.",
    "rollout/success_rate": "Share of the iteration's training episodes that succeeded, with exploration noise.",
    "rollout/return_mean": "Mean undiscounted return of the iteration's episodes.",
    "rollout/return_std": "Standard deviation of the undiscounted returns of the iteration's episodes.",
    "rollout/episode_length": "Mean control steps per episode.",
    "rollout/max_height": "Mean over episodes of the block's greatest height, metres.",
    "rollout/clipped_targets": "Joint targets per episode that lay beyond a joint limit and were clipped.",
    "reward/<term>": "Mean over episodes of one reward term, summed over the episode; the terms add up to the return.",
    "logprob/new_mean": "Mean log-prob of a ratio group under the weights being trained. Positive for small noise.",
    "logprob/per_dimension": "Log-prob per noise coordinate; about -log(sigma) - 1.42 while the policy is unchanged.",
    "logprob/groups": "Ratio groups per decision (G), set by the log-prob reduction.",
    "logprob/coordinates": "Noise coordinates that one ratio group sums (D of a ratio).",
    "training/clip_fraction": "Share of ratios outside 1 +- clip_epsilon. Healthy: 0.05 to 0.3.",
    "ppo/ratio_min": "Smallest ratio of new to old probability seen in the iteration's updates.",
    "ppo/ratio_max": "Largest such ratio.",
    "ppo/ratio_mean": "Mean ratio; far from 1 means the old data no longer tells about the new policy.",
    "ppo/approx_kl": "KL from the old to the new policy per ratio group after the last policy step (k3 estimator).",
    "ppo/ratio_error_before_update": "Largest distance of a ratio from 1 before the first step; the guard allows 1e-4.",
    "ppo/explained_variance": "1 - Var[return - value] / Var[return] before the update: 1 is a perfect critic.",
    "ppo/epochs_done": "Passes over the rollout that the policy made before it stopped.",
    "ppo/optimizer_steps": "Optimiser steps of the policy.",
    "ppo/early_stopped": "1 if the KL limit ended the policy's updates early.",
    "ppo/steps_undone": "Policy steps taken back because their KL overshot the limit.",
    "loss/policy": "Clipped surrogate loss, mean over the iteration's updates.",
    "loss/value": "Half mean squared error of the value in normalised returns.",
    "loss/entropy": "Mean entropy of one noise coordinate.",
    "gradients/policy_norm": "Policy gradient norm before clipping.",
    "gradients/policy_norm_first": "The same at the iteration's first optimiser step.",
    "gradients/policy_norm_last": "And at its last; growth means that later steps work against the first.",
    "gradients/critic_norm": "Critic gradient norm before clipping.",
    "gradients/policy_clipped": "Share of policy steps whose gradient was clipped.",
    "gradients/critic_clipped": "Share of critic steps whose gradient was clipped.",
    "critic/return_mean": "Mean GAE target, in reward units.",
    "critic/return_std": "Standard deviation of the GAE targets, in reward units.",
    "critic/reward_to_go_mean": "Mean discounted sum of rewards to the episode's end: what rewards alone explain.",
    "critic/bootstrap_mean": "Mean V(final observation) that targets add where the time limit struck.",
    "critic/target_shift": "Mean normalised target minus the critic's mean output at sampling.",
    "critic/advantage_std": "Standard deviation of the advantages before normalisation, in reward units.",
    "noise/std_mean": "Mean exploration std, in normalised action units.",
    "noise/sigma_min": "Lower bound of the exploration std.",
    "noise/sigma_max": "Upper bound of the exploration std, as scheduled.",
    "lr/policy": "Learning rate of the policy; 0 during critic warm-up. Natural steps do not use it.",
    "lr/critic": "Learning rate of the critic.",
    "eval/success_rate": "Share of noise-free episodes on fixed seeds that succeeded: the result.",
    "eval/ci_low": "Lower end of its 95 % Wilson interval.",
    "eval/ci_high": "Upper end of its 95 % Wilson interval.",
    "eval/return_mean": "Mean undiscounted return of the evaluation episodes.",
    "eval/episode_length": "Mean control steps per evaluation episode.",
    "eval/max_height": "Mean over evaluation episodes of the block's greatest height, metres.",
    "eval/episodes": "Number of evaluation episodes.",
    "time/rollout": "Seconds of the iteration's rollout.",
    "time/rollout_env": "Seconds of it in the environments.",
    "time/rollout_policy": "Seconds of it in the policy.",
    "time/update": "Seconds of the iteration's update.",
    "time/eval": "Seconds of the evaluation.",
    "time/iteration": "Seconds of the whole iteration.",
}


class TrackingError(UserError, RuntimeError):
    """A metric is unknown, or a tracker cannot be started; the message says what to do."""


def metrics_markdown() -> str:
    """METRICS as a markdown table."""
    rows = [f"| `{name}` | {explanation} |" for name, explanation in METRICS.items()]
    return "\n".join(["| metric | meaning |", "|---|---|", *rows]) + "\n"


def check_names(names: Sequence[str]) -> None:
    """Raise a TrackingError that names every metric METRICS does not explain."""
    unknown = [name for name in names if name not in METRICS and not name.startswith(REWARD_FAMILY)]
    if unknown:
        raise TrackingError(f"unknown metrics {unknown}: add them to reinflow.tracking.METRICS with an explanation")


class Sink:
    """Where metrics go; this one drops them."""

    def log(self, metrics: Mapping[str, float]) -> None:
        """Take one iteration's metrics, ``progress/iteration`` among them."""

    def progress(self, episodes: int) -> None:
        """Take the number of episodes done within an iteration."""

    def message(self, text: str) -> None:
        """Take a line for the user."""

    def alert(self, title: str, text: str, error: bool) -> None:
        """Take something that the user should look at now."""

    def close(self, failed: bool) -> None:
        """Flush and release everything; ``failed`` if an error ended the run."""


class PlainConsole(Sink):
    """One readable line per iteration, for logs and pipes."""

    def __init__(self, console: Console, num_episodes: int, episodes_done: int) -> None:
        self.console, self.num_episodes, self.first_episode = console, num_episodes, episodes_done
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
            ("progress/episodes", f"episodes {{:,.0f}}/{self.num_episodes:,}"),
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
        if "progress/episodes" in metrics:
            parts.append(f"ETA {self._eta(metrics['progress/episodes'])}")
        if {"eval/success_rate", "eval/ci_low", "eval/ci_high"} <= metrics.keys():
            rate, low, high = (metrics[f"eval/{name}"] for name in ("success_rate", "ci_low", "ci_high"))
            parts.append(f"eval {rate:.1%} [{low:.1%}, {high:.1%}]")
        return "  ".join(parts)

    def _eta(self, episodes: float) -> str:
        """Time left at this session's pace."""
        done = episodes - self.first_episode
        if done <= 0 or self.start is None:
            return "?"
        seconds = (time.monotonic() - self.start) / done * max(self.num_episodes - episodes, 0)
        return str(timedelta(seconds=round(seconds)))


class LiveConsole(PlainConsole):
    """The same lines above a live bar: episodes, success, KL, elapsed and remaining time."""

    def __init__(self, console: Console, num_episodes: int, episodes_done: int) -> None:
        super().__init__(console, num_episodes, episodes_done)
        self.bar = Progress(
            TextColumn("episodes"), MofNCompleteColumn(), BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
            console=console, speed_estimate_period=300,
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
        self.progress(int(metrics.get("progress/episodes", self.bar.tasks[0].completed)))

    def progress(self, episodes: int) -> None:
        self.bar.update(self.task, completed=episodes, status=self._status())

    def close(self, failed: bool) -> None:
        self.bar.stop()


def finite_or_none(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """``metrics`` as metrics.jsonl holds them: None for what is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


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


def read_metrics(path: Path | str) -> list[dict[str, float | None]]:
    """The lines of a metrics.jsonl; a last line cut short by a crash is left out."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def truncate_metrics(path: Path, iteration: int) -> None:
    """Drop the lines after ``iteration``, which the resumed run will write again; atomically."""
    kept = [line for line in read_metrics(path) if (line["progress/iteration"] or 0) <= iteration]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


class WandbSink(Sink):
    """A Weights & Biases run, over ``progress/iteration`` so that a resumed run draws over what it repeats."""

    def __init__(
        self,
        run_dir: Path,
        mode: Literal["online", "offline"],
        project: str,
        config: Mapping[str, Any],
        run_id: str | None,
    ) -> None:
        import wandb  # here: its import takes a second and no other sink needs it

        try:
            self.run = wandb.init(
                project=project,
                name=run_dir.resolve().name,
                dir=str(run_dir),
                config=dict(config),
                mode=mode,
                id=run_id,
                # "must" would refuse to go on with a run that was offline so far; offline, the id alone is enough.
                resume="allow" if run_id and mode == "online" else None,
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise TrackingError(
                f"Weights & Biases did not start ({error}): log in with `wandb login`, write to disk with "
                "--wandb-mode offline (then `wandb sync`), or turn it off with --no-wandb"
            ) from error
        self.run.define_metric("progress/iteration")
        self.run.define_metric("*", step_metric="progress/iteration")

    def log(self, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics))

    def alert(self, title: str, text: str, error: bool) -> None:
        self.run.alert(title=title, text=text, level="ERROR" if error else "WARN")

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Tracker:
    """Sends checked metrics to every sink. A context manager: leaving it closes the sinks."""

    def __init__(self, sinks: Sequence[Sink], wandb_run_id: str | None = None) -> None:
        self.sinks = list(sinks)
        self.wandb_run_id = wandb_run_id

    def log(self, iteration: int, metrics: Metrics) -> None:
        """Log an iteration's metrics.

        Args:
            iteration: iterations completed; logged as ``progress/iteration``.
            metrics: numbers or 0-dim tensors by the names of METRICS.

        Raises:
            TrackingError: a name has no explanation.
        """
        check_names(list(metrics))
        numbers = {name: float(value) for name, value in metrics.items()} | {"progress/iteration": float(iteration)}
        for sink in self.sinks:
            sink.log(numbers)

    def progress(self, episodes: int) -> None:
        """Move the live bar within an iteration."""
        for sink in self.sinks:
            sink.progress(episodes)

    def message(self, text: str) -> None:
        """Print a line without tearing the live bar."""
        for sink in self.sinks:
            sink.message(text)

    def alert(self, title: str, text: str, error: bool = False) -> None:
        """Show ``text`` now; Weights & Biases notifies its user under ``title``."""
        for sink in self.sinks:
            sink.alert(title, text, error)

    def close(self, failed: bool = False) -> None:
        """Close every sink, also those after one that fails to close."""
        with ExitStack() as stack:
            for sink in self.sinks:
                stack.callback(sink.close, failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


def open_tracker(
    run_dir: Path | str,
    *,
    config: Mapping[str, Any],
    num_episodes: int,
    episodes_done: int,
    wandb_mode: WandbMode,
    wandb_project: str,
    wandb_run_id: str | None,
    resumed_iteration: int | None,
    console: Console | None = None,
) -> Tracker:
    """A tracker with console, metrics.jsonl and, unless ``wandb_mode`` is "off", Weights & Biases.

    Args:
        run_dir: run directory; made if missing.
        config: JSON-able settings, shown by Weights & Biases.
        num_episodes: training episodes in all.
        episodes_done: of these, done before this session.
        wandb_mode: "online", "offline" (kept in run_dir, for `wandb sync`) or "off" (wandb is not imported).
        wandb_project: its project.
        wandb_run_id: run to go on with; None starts one. Save ``Tracker.wandb_run_id`` in checkpoints.
        resumed_iteration: iterations completed at the checkpoint that the run resumes from; later lines of
            metrics.jsonl are dropped, as the run will write them again. None for a new run.
        console: where to print; stdout by default. A terminal gets a live bar, anything else plain lines.

    Raises:
        TrackingError: Weights & Biases cannot be started.
    """
    run_dir, console = Path(run_dir), console or Console()
    run_dir.mkdir(parents=True, exist_ok=True)
    wandb_sink = Sink()
    if wandb_mode != "off":
        wandb_sink = run = WandbSink(run_dir, wandb_mode, wandb_project, config, wandb_run_id)
        wandb_run_id = str(run.run.id)
    jsonl = JsonlSink(run_dir, resumed_iteration)
    # The live bar last: it must not be drawn when another sink fails to start.
    style = LiveConsole if console.is_terminal else PlainConsole
    return Tracker([wandb_sink, jsonl, style(console, num_episodes, episodes_done)], wandb_run_id)
