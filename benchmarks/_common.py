"""What the benchmarks share: flags, interleaved timing, tables and CSV files that say where they were measured.

Import this before the project's modules: it makes the checkout importable, installed or not.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")  # what SceneRenderer takes, for contexts that a benchmark makes itself

if TYPE_CHECKING:
    from reinflow.run import Run
    from train_reinflow import TrainingConfig

Row = dict[str, Any]
Times = dict[str, list[float]]  # seconds of every round, by variant


# --- Timing ---------------------------------------------------------------------------------------------------------


def timed(function: Callable[[], object], device: str = "cpu") -> float:
    """Seconds that one call takes, the work it queued on a CUDA device included."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(variants: Mapping[str, Callable[[], float]], repeats: int, warmups: int = 1) -> Times:
    """Every variant once per round, so that a slow moment of the machine hits all alike.

    Args:
        variants: name -> a function that does the work and returns the seconds that count (`timed`, or a part of it).
        repeats: rounds that are kept; every other one runs in the opposite order.
        warmups: rounds before them.
    """
    names, times = list(variants), {name: [] for name in variants}  # type: tuple[list[str], Times]
    for index in range(-warmups, repeats):
        for name in names if index % 2 == 0 else reversed(names):
            seconds = variants[name]()
            if index >= 0:
                times[name].append(seconds)
    return times


def median(times: Times, name: str) -> float:
    """Median seconds of a variant."""
    return statistics.median(times[name])


def speed_ratio(times: Times, name: str, reference: str) -> float:
    """How many times as fast as `reference` a variant is: the median of the ratios within each round."""
    return statistics.median(there / here for here, there in zip(times[name], times[reference], strict=True))


# --- The machine ----------------------------------------------------------------------------------------------------


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def hardware_line() -> str:
    """Processor, cores, the load it is under, and the GPU if torch is loaded and sees one."""
    parts = [cpu_name(), f"{os.cpu_count()} cores"]
    if hasattr(os, "getloadavg"):
        parts.append(f"load {os.getloadavg()[0]:.1f}")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def commit() -> str:
    """Short hash of the checkout, with a + if files differ from it; "unknown" outside git."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    head = git("rev-parse", "--short", "HEAD") or "unknown"
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


# --- Flags and results ----------------------------------------------------------------------------------------------


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """--quick, --csv and --repeats; the module's docstring is the help text."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs: the figures mean nothing")
    parser.add_argument("--csv", type=Path, help="write the table there too")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; medians are shown")
    return parser


def cell(value: object) -> str:
    """A table's cell: three or four digits that count."""
    if value is None:
        return "-"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        size = abs(value)
        return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown(rows: Sequence[Row]) -> str:
    """A markdown table; columns are the keys in order of appearance, aligned for the terminal."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, *([cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    padded = ["| " + " | ".join(text.rjust(w) for text, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([padded[0], "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|", *padded[1:]])


def report(rows: Sequence[Row], args: argparse.Namespace, note: str, name: str = "") -> None:
    """Print a table under a line that says where, when and how it was measured; write it to --csv.

    Args:
        rows: one dict per line.
        args: of `make_parser`.
        note: threads and whatever else the figures depend on.
        name: of a second table; its file is STEM_name.csv.
    """
    where = f"{hardware_line()}; {note}; {'one quick pass' if args.quick else f'median of {args.repeats}'}"
    print(f"\n{where}; commit {commit()}, {date.today()}\n\n{markdown(rows)}", flush=True)
    if args.csv:
        write_csv(args.csv.with_stem(f"{args.csv.stem}_{name}") if name else args.csv, rows, where)


def write_csv(path: Path, rows: Sequence[Row], where: str) -> None:
    """All rows, with commit, date and hardware in the last columns."""
    columns = [*dict.fromkeys(name for row in rows for name in row), "commit", "date", "where"]
    stamp = {"commit": commit(), "date": str(date.today()), "where": where}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(row | stamp for row in rows)


def print_bar(what: str, value: float, limit: float, at_least: bool = True) -> None:
    """Say whether a bar is reached."""
    reached = value >= limit if at_least else value <= limit
    sign = ">=" if at_least else "<="
    print(f"bar: {what} {cell(value)}, wanted {sign} {limit:g}: {'reached' if reached else 'MISSED'}", flush=True)


# --- A training run without its files -------------------------------------------------------------------------------


def open_run(config: TrainingConfig) -> tuple[TrainingConfig, Run]:
    """Policy, environments and learner of `config`, standing at the first observations: `train_reinflow.rollout` and
    `run.learner.update(buffer)` then do what a training does. Close `run.env` afterwards."""
    from reinflow.rollout import RolloutState
    from reinflow_so101.opening import make_run

    config, run = make_run(config, Path("unused"))  # nothing is written unless the run is started or asked to save
    run.current = RolloutState.start(run.policy, run.env, run.seeds)
    return config, run
