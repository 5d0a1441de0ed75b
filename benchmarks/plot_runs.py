"""Runs of one setting with several seeds -> a CSV per run and the learning curve with the seeds as a band.

python benchmarks/plot_runs.py runs/tiny-1 runs/tiny-2 runs/tiny-3 --png docs/learning_curve.png --csv-dir notes/results
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

COLUMNS = {
    "iteration": "progress/iteration",
    "episodes": "progress/episodes",
    "sampled_success": "rollout/success_rate",
    "tuning_success": "eval/success_rate",
    "tuning_ci_low": "eval/ci_low",
    "tuning_ci_high": "eval/ci_high",
    "return_mean": "rollout/return_mean",
    "approx_kl": "ppo/approx_kl",
    "clip_fraction": "training/clip_fraction",
    "explained_variance": "ppo/explained_variance",
    "noise_std": "noise/std_mean",
    "seconds_rollout": "time/rollout",
    "seconds_update": "time/update",
    "seconds_iteration": "time/iteration",
}


def read_rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl as rows of COLUMNS and the wall clock since the first iteration began, seconds."""
    rows, clock = [], 0.0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        clock += metrics["time/iteration"]
        row = {name: metrics.get(key, "") for name, key in COLUMNS.items()} | {"wall_clock_s": clock}
        rows.append({name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()})
    return rows


def reported(run: Path, when: str) -> tuple[float, list[float]] | None:
    """Success in percent on the reporting seeds and its interval, or None."""
    path = run / f"eval_{when}.json"
    if not path.exists():
        return None
    overall = json.loads(path.read_text())["overall"]
    return overall["pc_success"], overall["pc_success_ci95"]


def series(rows: list[dict[str, Any]], column: str) -> tuple[np.ndarray, np.ndarray]:
    """Minutes and percent where the column has a value."""
    points = [(float(r["wall_clock_s"]) / 60, 100 * float(r[column])) for r in rows if r[column] != ""]
    return np.array([p[0] for p in points]), np.array([p[1] for p in points])


def plot(runs: dict[str, list[dict[str, Any]]], png: Path) -> None:
    """Mean over seeds, band from the lowest to the highest; noise-free on tuning seeds and sampled with noise."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for column, label, colour in (
        ("tuning_success", "noise-free, tuning seeds", "tab:blue"),
        ("sampled_success", "with exploration noise", "tab:orange"),
    ):
        curves = [series(rows, column) for rows in runs.values()]
        length = min(len(y) for _, y in curves)
        minutes = np.mean([x[:length] for x, _ in curves], axis=0)
        values = np.array([y[:length] for _, y in curves])
        axes.plot(minutes, values.mean(0), color=colour, label=label, marker="o" if length < 12 else None)
        axes.fill_between(minutes, values.min(0), values.max(0), color=colour, alpha=0.2)
    axes.set(xlabel="minutes on 2 CPU cores", ylabel="success, %", ylim=(0, 100), title=f"{len(runs)} training seeds")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(png, dpi=110)


def main() -> None:
    """Write the CSVs and the plot, print a line per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--csv-dir", type=Path)
    parser.add_argument("--prefix", default="")
    args = parser.parse_args()
    runs = {run.name: read_rows(run) for run in args.runs}
    for run in args.runs:
        rows = runs[run.name]
        before, after = reported(run, "before"), reported(run, "after")
        print(f"{run.name}: before {before}, after {after}, {rows[-1]['wall_clock_s']} s")
        if args.csv_dir:
            args.csv_dir.mkdir(parents=True, exist_ok=True)
            with (args.csv_dir / f"{args.prefix}{run.name}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    if args.png:
        plot(runs, args.png)


if __name__ == "__main__":
    main()
