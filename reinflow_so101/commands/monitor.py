"""reinflow-monitor: a live table of all trainings and stages below a directory.

    reinflow-monitor runs/sweep
    reinflow-monitor runs --once

A training is a directory with a run.lock of train_reinflow.py, a stage one with a stage.json. Only files are read, so
it works beside runs of any process, and on those that ended long ago.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from reinflow import ConfigError, UserError, run_command
from reinflow.doctor import FINDINGS_FILE
from reinflow.lock import LOCK_FILE
from reinflow.metrics import METRICS_FILE, read_rows
from reinflow.settings import CONFIG_FILE, Range, check_ranges
from reinflow.stage import STAGE_FILE

if TYPE_CHECKING:
    from rich.console import Console, Group

NOT_RUNS = {"checkpoints", "progress", "set_aside", "wandb", "pretrained_model"}  # folders of a run, or no runs at all
SWEEP_FILE = "sweep.json"  # a sweep's own folder is no run, what is below it is
ATTEMPTS_FILE = "attempts.jsonl"  # that a sweep writes beside its trainings
PROCESS_FILE = "process.json"  # and while one of them is at work: who, in the words of a lock
STAGE_FILES = (STAGE_FILE, "sft.json")  # the second is reinflow-sft's
MARKS = {LOCK_FILE, *STAGE_FILES, METRICS_FILE, ATTEMPTS_FILE, PROCESS_FILE}  # of a run's directory
LEAST = ("what", "loss", "return", "last line", "done", "KL", "findings")  # columns that a narrow terminal goes without
WIDE = 160  # columns where there is no terminal
PACE_ROWS = 10  # lines of metrics.jsonl that the time left is judged by
COLOURS = {"running": "green", "finished": "cyan", "stopped": "yellow", "starting": "green", "failed": "red"}

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class MonitorConfig:
    """Watch all runs below a directory; Ctrl-C ends the watching, not the runs."""

    directory: tyro.conf.Positional[str]
    """Where the runs are, at any depth."""
    interval: Annotated[float, Range(0.1, 86_400)] = 10.0
    """Seconds between two readings."""
    once: bool = False
    """Print one table and end."""


@dataclass(frozen=True)
class RunState:
    """What the files of one training or stage say."""

    name: str
    kind: str  # the training's preset, or the stage's command
    state: str
    done: float = 0.0  # episodes, control steps, or optimiser steps
    total: float = 0.0  # 0: not known
    seconds_left: float | None = None
    figures: Mapping[str, float | None] = field(default_factory=dict)
    findings: int = 0
    age: float | None = None  # seconds since the last line
    trouble: str = ""  # what could not be read

    @property
    def share(self) -> float | None:
        """Done of all."""
        return min(self.done / self.total, 1.0) if self.total else None


def owner(run_dir: Path) -> dict[str, Any] | None:
    """Who is at work in a run's directory: host, pid and since; None where nobody is.

    Told by the lock file's words (while its libraries load, by the launcher's) and the process of that number, not by
    trying the lock, which could keep a run that starts at that moment out. Of another host only the words are known.
    """
    return _alive(run_dir / LOCK_FILE) or _alive(run_dir / PROCESS_FILE)


def _alive(path: Path) -> dict[str, Any] | None:
    import psutil

    try:
        words = json.loads(path.read_text(encoding="utf-8") or "null")
    except (OSError, ValueError):
        return None
    if not isinstance(words, dict) or words.get("host") != socket.gethostname():
        return words if isinstance(words, dict) else None
    try:
        process = psutil.Process(int(words["pid"]))
        born, since = process.create_time(), datetime.fromisoformat(words["since"]).timestamp()
        alive = process.status() != psutil.STATUS_ZOMBIE and born <= since + 1  # else the number is another's by now
    except (psutil.Error, KeyError, TypeError, ValueError):
        return None
    return words if alive else None


def find_runs(root: Path) -> Iterator[Path]:
    """Directories of trainings and stages at or below ``root``, in the order of their names."""
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if name not in NOT_RUNS and not name.startswith("."))
        if SWEEP_FILE not in files and not MARKS.isdisjoint(files):
            yield Path(folder)


def failed(run_dir: Path) -> bool:
    """Whether a sweep saw the run's last process end by itself with an error."""
    attempts = read_rows(run_dir / ATTEMPTS_FILE)
    return bool(attempts) and attempts[-1]["exit_code"] > 0


def last(rows: Rows, name: str) -> float | None:
    """The newest value of a metric."""
    return next((row[name] for row in reversed(rows) if isinstance(row.get(name), int | float)), None)


def iteration_seconds(rows: Rows) -> float:
    """Seconds of all iterations in ``rows``; a line that stands for several holds their mean."""
    before, seconds = 0.0, 0.0
    for row in rows:
        seconds += (row.get("time/iteration") or 0.0) * max(row["progress/iteration"] - before, 0.0)
        before = row["progress/iteration"]
    return seconds


def budget(config: Mapping[str, Any]) -> tuple[str, float]:
    """The metric that a training's length is counted by, and how far it goes."""
    if config.get("total_timesteps"):
        return "progress/timesteps", float(config["total_timesteps"])
    return "progress/episodes", float(config["num_episodes"])


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} cannot be read") from error
    if not isinstance(content, dict):
        raise UserError(f"{path.name} holds no settings")
    return content


def look_at(run_dir: Path, name: str, now: float) -> RunState:
    """One row of the table; what cannot be read is said in it."""
    metrics, is_stage = run_dir / METRICS_FILE, any((run_dir / name).exists() for name in STAGE_FILES)
    age = max(now - metrics.stat().st_mtime, 0.0) if metrics.exists() else None
    holder = owner(run_dir)
    try:
        rows = read_rows(metrics)
        return (_stage if is_stage else _training)(run_dir, name, rows, holder, age)
    except (UserError, KeyError, TypeError) as error:
        state = "running" if holder else "stopped"
        return RunState(name, "stage" if is_stage else "training", state, age=age, trouble=str(error))


def _training(run_dir: Path, name: str, rows: Rows, holder: Mapping[str, Any] | None, age: float | None) -> RunState:
    if not (run_dir / CONFIG_FILE).exists():
        state = "starting" if holder else "failed" if failed(run_dir) else "stopped"
        return RunState(name, "training", state, age=age)
    config = _json(run_dir / CONFIG_FILE)
    counted, total = budget(config)
    done = last(rows, counted) or 0.0
    state = "running" if holder else "finished" if done >= total else "failed" if failed(run_dir) else "stopped"
    recent = rows[-PACE_ROWS - 1 :]
    left = None
    if state == "running" and len(recent) > 1:
        gained = done - recent[0][counted]
        seconds = iteration_seconds(recent) - iteration_seconds(recent[:1])
        left = seconds / gained * max(total - done, 0.0) if gained > 0 else None
    names = {
        "rollout": "rollout/success_rate", "return": "rollout/return_mean", "tuning": "eval/success_rate",
        "kl": "ppo/approx_kl",
    }  # fmt: skip
    figures = {short: last(rows, full) for short, full in names.items()}
    findings = {row.get("rule") for row in read_rows(run_dir / FINDINGS_FILE)}
    return RunState(name, str(config.get("preset", "training")), state, done, total, left, figures, len(findings), age)


def _stage(run_dir: Path, name: str, rows: Rows, holder: Mapping[str, Any] | None, age: float | None) -> RunState:
    file = next(run_dir / name for name in STAGE_FILES if (run_dir / name).exists())
    stage = _json(file)
    kind, parts = str(stage.get("command", "stage")), [stage.get("steps"), stage.get("critic_steps", 0)]
    state = "finished" if "record" in stage else "running" if holder else "stopped"
    known = all(isinstance(part, int | float) for part in parts)
    done, total = last(rows, "step") or 0.0, float(sum(parts)) if known else 0.0
    left = None
    if state == "running" and total and done and holder and age is not None:
        since = datetime.fromisoformat(str(holder["since"])).timestamp()
        first_start = file.stat().st_mtime  # written then, and again at the end
        if since <= first_start + 60:  # else it was resumed, at a step that no file tells
            left = ((run_dir / METRICS_FILE).stat().st_mtime - since) / done * max(total - done, 0.0)
    tuning = next((row[key] for row in reversed(rows) for key in row if key.startswith("success")), None)
    return RunState(name, kind, state, done, total, left, {"loss": last(rows, "loss"), "tuning": tuning}, 0, age)


def _cells(run: RunState) -> dict[str, str]:
    """A row of the table by its columns; "" where there is nothing to say."""

    def figure(name: str, template: str) -> str:
        value = run.figures.get(name)
        return "" if value is None else template.format(value)

    size = f"{run.done:,.0f}/{run.total:,.0f}" if run.total else f"{run.done:,.0f}"
    return {
        "run": run.name,
        "what": run.kind,
        "state": run.state,
        "done": size,
        "%": "" if run.share is None else f"{100 * run.share:.0f}",
        "ETA": duration(run.seconds_left),
        "success": figure("rollout", "{:.1%}"),
        "tuning": figure("tuning", "{:.1%}"),
        "return": figure("return", "{:.4g}"),
        "KL": figure("kl", "{:.4f}"),
        "loss": figure("loss", "{:.4g}"),
        "findings": run.trouble or (str(run.findings) if run.findings else ""),
        "last line": duration(run.age),
    }


def duration(seconds: float | None) -> str:
    """``0:12:05``; "" without one."""
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))


def _fitting(rows: Sequence[Mapping[str, str]], width: int) -> list[str]:
    """Columns that say something of any run, as many as stand beside each other in ``width``."""
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    needed = {name: 3 + max(len(name), *(len(row[name]) for row in rows)) for name in columns}
    needed["run"] = min(needed["run"], width // 3)  # it wraps
    for name in LEAST:
        if name in columns and 1 + sum(needed[column] for column in columns) > width:
            columns.remove(name)
    return columns


def table(root: Path, now: float | None = None, width: int = WIDE) -> Group:
    """All runs below ``root``: a line and a rich table, without what says nothing or has no room."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    now = time.time() if now is None else now
    found = [look_at(path, str(path.relative_to(root)) if path != root else path.name, now) for path in find_runs(root)]
    counts = ", ".join(f"{n} {state}" for state in COLOURS if (n := sum(run.state == state for run in found)))
    heading = Text(f"{datetime.now():%H:%M:%S}  {root}: {counts or 'no runs yet'}", overflow="fold")
    if not found:
        return Group(heading)
    shown = Table()
    rows = [_cells(run) for run in found]
    columns = _fitting(rows, width)
    for name in columns:
        shown.add_column(name, no_wrap=name not in ("run", "findings"), overflow="fold")
    for run, row in zip(found, rows, strict=True):
        styles = {"state": COLOURS[run.state], "findings": "red"}
        shown.add_row(*(Text(row[name], style=styles.get(name, "")) for name in columns))
    return Group(heading, shown)


def wide_console() -> Console:
    """The console; a pipe's lines are as long as the table needs."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def watch(config: MonitorConfig) -> None:
    """Print the table, once or again and again until Ctrl-C."""
    from rich.live import Live

    console, root = wide_console(), Path(config.directory)
    if config.once:
        console.print(table(root, width=console.width))
        return
    try:
        if not console.is_terminal:  # a pipe has no screen to draw over
            while True:
                console.print(table(root, width=console.width))
                time.sleep(config.interval)
        with Live(table(root, width=console.width), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(config.interval)
                live.update(table(root, width=console.width), refresh=True)
    except KeyboardInterrupt:
        return


def parse_args(argv: Sequence[str]) -> MonitorConfig:
    """The directory and how often; raises ConfigError."""
    config = tyro.cli(MonitorConfig, args=list(argv), description=__doc__, prog="reinflow-monitor")
    check_ranges(config)
    if not Path(config.directory).is_dir():
        raise ConfigError(f"directory={config.directory} is not there: name a folder with runs in it")
    return config


def main() -> None:
    """Console entry point."""
    run_command("reinflow-monitor", lambda: watch(parse_args(sys.argv[1:])))


if __name__ == "__main__":
    main()
