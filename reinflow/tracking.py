"""Metrics to the console, to metrics.jsonl and to Weights & Biases; each can be off.

Every sink has the methods of ``Sink``, which do nothing: what is off is a plain Sink, not an ``if``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, SupportsFloat

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from reinflow.env import Extra
from reinflow.metrics import METRICS_FILE, TrackingError, check_names, finite_or_none, known_metrics, truncate_metrics

Metrics = Mapping[str, SupportsFloat]
WandbMode = Literal["auto", "online", "offline", "off"]
WANDB_START_S, WANDB_REACH_S = 60, 10  # limits on its start and its end, and on finding its server


Counted = Literal["episodes", "timesteps"]


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
        """Time left at this session's pace."""
        done = episodes - self.first_episode
        if done <= 0 or self.start is None:
            return "?"
        seconds = (time.monotonic() - self.start) / done * max(self.num_episodes - episodes, 0)
        return str(timedelta(seconds=round(seconds)))


class LiveConsole(PlainConsole):
    """The same lines above a live bar: episodes, success, KL, elapsed and remaining time."""

    def __init__(self, console: Console, num_episodes: int, episodes_done: int, counted: Counted = "episodes") -> None:
        super().__init__(console, num_episodes, episodes_done, counted)
        self.bar = Progress(
            TextColumn(counted), MofNCompleteColumn(), BarColumn(bar_width=None),
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
        self.progress(int(metrics.get(f"progress/{self.counted}", self.bar.tasks[0].completed)))

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


class WandbSink(Sink):
    """A Weights & Biases run, over ``progress/iteration`` so that a resumed run draws over what it repeats.

    What goes wrong after its start is said once and never ends a training: metrics.jsonl has everything.
    """

    def __init__(
        self,
        run_dir: Path,
        mode: Literal["online", "offline"],
        project: str,
        config: Mapping[str, Any],
        run_id: str | None,
        say: Callable[[str], None],
    ) -> None:
        import wandb  # here: its import takes a second and no other sink needs it

        self.say, self.works = say, True
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
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    init_timeout=WANDB_START_S,
                    login_timeout=WANDB_REACH_S,
                    finish_timeout=WANDB_START_S,
                    finish_timeout_raises=False,
                ),
            )
        except wandb.Error as error:
            raise TrackingError(
                f"Weights & Biases did not start ({error}): log in with `wandb login`, write to disk with "
                "--wandb-mode offline (then `wandb sync`), or turn it off with --no-wandb"
            ) from error
        self.run.define_metric("progress/iteration")
        self.run.define_metric("*", step_metric="progress/iteration")

    def _try(self, send: Callable[[], object]) -> None:
        if self.works:
            try:
                send()
            except Exception as error:  # of any kind: it is a copy of what metrics.jsonl holds
                self.works = False
                self.say(f"Weights & Biases stopped ({error}): the training goes on, metrics.jsonl has everything")

    def log(self, metrics: Mapping[str, float]) -> None:
        self._try(lambda: self.run.log(dict(metrics)))

    def alert(self, title: str, text: str, error: bool) -> None:
        self._try(lambda: self.run.alert(title=title, text=text, level="ERROR" if error else "WARN"))

    def close(self, failed: bool) -> None:
        self._try(lambda: self.run.finish(exit_code=int(failed)))


def resolve_wandb_mode(mode: WandbMode) -> tuple[Literal["online", "offline", "off"], str]:
    """What "auto" comes to here, and a line that says why; never a prompt, and an answer within seconds.

    WANDB_MODE decides if it is set. Otherwise "online" needs a key (WANDB_API_KEY or `wandb login`) and a server that
    answers; without them it is "offline".

    Raises:
        TrackingError: "online" was asked for and cannot be.
    """
    if mode == "auto" and (named := os.environ.get("WANDB_MODE")):
        meanings = {"online": "online", "offline": "offline", "dryrun": "offline", "disabled": "off"}
        if named not in meanings:
            raise TrackingError(f"WANDB_MODE={named} is not known: set one of {', '.join(meanings)}")
        mode = meanings[named]  # type: ignore[assignment]
    if mode in ("offline", "off"):
        return mode, ""
    why = _why_not_online()
    if not why:
        return "online", ""
    if mode == "online":
        raise TrackingError(f"Weights & Biases: {why}. Go on without it by --wandb-mode offline or --no-wandb")
    return "offline", f"Weights & Biases: {why}, so the run is kept on disk; `wandb sync` sends it later"


def _why_not_online() -> str:
    import requests
    import wandb

    settings = wandb.Settings()
    settings.update_from_system_settings()  # what `wandb login --host` stored
    settings.update_from_env_vars(dict(os.environ))
    server = str(settings.base_url)
    if not os.environ.get("WANDB_API_KEY") and requests.utils.get_netrc_auth(server) is None:
        return "no key is known (`wandb login` stores one)"
    try:
        requests.head(server, timeout=WANDB_REACH_S)
    except requests.RequestException as error:
        return f"{server} does not answer ({type(error).__name__})"
    return ""


class Tracker:
    """Sends checked metrics to every sink. A context manager: leaving it closes the sinks."""

    def __init__(
        self, sinks: Sequence[Sink], wandb_run_id: str | None = None, extras: Mapping[str, Extra] | None = None
    ) -> None:
        self.sinks = list(sinks)
        self.wandb_run_id = wandb_run_id
        self.known = known_metrics(extras or {})

    def log(self, iteration: int, metrics: Metrics) -> None:
        """Log an iteration's metrics.

        Args:
            iteration: iterations completed; logged as ``progress/iteration``.
            metrics: numbers or 0-dim tensors by the names of METRICS or of the environment's extras.

        Raises:
            TrackingError: a name has no explanation.
        """
        check_names(metrics, self.known)
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
    counted: Counted = "episodes",
    wandb_mode: WandbMode,
    wandb_project: str,
    wandb_run_id: str | None,
    resumed_iteration: int | None,
    extras: Mapping[str, Extra] | None = None,
    console: Console | None = None,
) -> Tracker:
    """A tracker with console, metrics.jsonl and, unless ``wandb_mode`` is "off", Weights & Biases.

    Args:
        run_dir: run directory; made if missing.
        config: JSON-able settings, shown by Weights & Biases.
        num_episodes: training episodes (or control steps, by ``counted``) in all.
        episodes_done: of these, done before this session.
        counted: what the run's length is counted in.
        wandb_mode: "online", "offline" (kept in run_dir, for `wandb sync`), "off" (wandb is not imported) or "auto".
        wandb_project: its project.
        wandb_run_id: run to go on with; None starts one. Save ``Tracker.wandb_run_id`` in checkpoints.
        resumed_iteration: iterations completed at the checkpoint that the run resumes from; later lines of
            metrics.jsonl are dropped, as the run will write them again. None for a new run.
        extras: of the environment, whose metrics are logged too.
        console: where to print; stdout by default. A terminal gets a live bar, anything else plain lines.

    Raises:
        TrackingError: Weights & Biases cannot be started.
    """
    run_dir, console = Path(run_dir), console or Console()
    run_dir.mkdir(parents=True, exist_ok=True)
    wandb_sink = Sink()
    mode, why = resolve_wandb_mode(wandb_mode)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    if why:
        say(why)
    if mode != "off":
        wandb_sink = run = WandbSink(run_dir, mode, wandb_project, config, wandb_run_id, say)
        wandb_run_id = str(run.run.id)
    jsonl = JsonlSink(run_dir, resumed_iteration)
    # The live bar last: it must not be drawn when another sink fails to start.
    style = LiveConsole if console.is_terminal else PlainConsole
    return Tracker([wandb_sink, jsonl, style(console, num_episodes, episodes_done, counted)], wandb_run_id, extras)
