"""What a sweep's trainings came to: results.csv, a table, results.png, and which differences mean anything.

A difference from the baseline is *beyond the spread* where both hold:

* the experiment's mean lies outside the 95 % prediction interval of the baseline's seeds, that is further from their
  mean than t s sqrt(1/k + 1/n) (s: standard deviation of the n baseline seeds, k: seeds of the experiment, t: Student's
  quantile for n - 1), so it is not what another seed of the baseline would show;
* the 95 % Wilson intervals of all their evaluation episodes are disjoint, so it is not what other episodes would show.

Of 21 experiments that change nothing one falls outside a 95 % interval by chance: a verdict is a reason for more seeds.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev

from reinflow import UserError
from reinflow.metrics import METRICS_FILE, read_rows
from reinflow_so101.commands.monitor import iteration_seconds, last, wide_console
from reinflow_so101.commands.sweep_experiments import BASELINE, EXPECTED
from reinflow_so101.commands.sweep_launcher import EVAL_AFTER, attempts_of, last_line, state_of
from reinflow_so101.commands.sweep_plan import PlannedRun, Sweep

GOAL = 0.8  # tuning success whose episodes are counted
MIN_SEEDS = 3  # of the baseline, for a spread
T_975 = {
    2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 14: 2.145, 19: 2.093, 29: 2.045,
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One training, a line of results.csv; success as a share, None where it is not known."""

    run: str
    experiment: str
    category: str
    parameter: str
    value: str
    difference: str
    seed: int
    start_success: float | None
    final_success: float | None
    final_ci_low: float | None
    final_ci_high: float | None
    final_episodes: int | None
    final_return: float | None
    best_tuning_success: float | None
    episodes_to_80: float | None
    minutes: float | None
    iterations: float | None
    status: str
    verdict: str = ""


def _evaluation(path: Path) -> Mapping[str, float | list[float]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["overall"]
    except (OSError, ValueError, KeyError):
        return {}


def result_of(sweep: Sweep, run: PlannedRun) -> Result:
    """What a training's files say."""
    directory = sweep.directory(run)
    before, after = _evaluation(directory / "eval_before.json"), _evaluation(directory / EVAL_AFTER)
    try:
        rows, attempts, status = read_rows(directory / METRICS_FILE), attempts_of(directory), state_of(sweep, run)
    except UserError as error:
        rows, attempts, status = [], [], f"damaged: {error}"  # type: ignore[assignment]
    evaluated = [row for row in rows if row.get("eval/success_rate") is not None]
    tuning = [(row["progress/episodes"], row["eval/success_rate"]) for row in evaluated]
    seconds = max(sum(attempt["seconds"] for attempt in attempts), iteration_seconds(rows))
    words = {"new": "not started", "failed": f"failed: {last_line(directory)}", "not run": f"not run: {run.note}"}
    low, high = after.get("pc_success_ci95", (None, None))  # type: ignore[misc]
    return Result(
        run.name, run.experiment, run.category, run.parameter, run.value, run.difference, run.seed,
        _share(before.get("pc_success")), _share(after.get("pc_success")), _share(low), _share(high),
        int(after["n_episodes"]) if after else None,  # type: ignore[arg-type]
        after.get("avg_sum_reward"),  # type: ignore[arg-type]
        max((success for _, success in tuning), default=None),
        next((episodes for episodes, success in tuning if success >= GOAL), None),
        round(seconds / 60, 2) if seconds else None, last(rows, "progress/iteration"), words.get(status, status),
    )  # fmt: skip


def _share(percent: object) -> float | None:
    return round(percent / 100, 6) if isinstance(percent, int | float) else None


@dataclass(frozen=True)
class Spread:
    """The baseline's final success over its seeds."""

    values: tuple[float, ...]
    interval: tuple[float, float]
    """95 % Wilson, of all its evaluation episodes."""

    @property
    def mean(self) -> float:
        return fmean(self.values)

    def margin(self, seeds: int) -> float:
        """How far the mean of so many seeds of the same may lie from this one's, with 95 %."""
        n = len(self.values)
        t = T_975[max(df for df in T_975 if df <= n - 1)]
        return t * stdev(self.values) * math.sqrt(1 / seeds + 1 / n)

    def describe(self) -> str:
        """For the console."""
        low, high = 100 * min(self.values), 100 * max(self.values)
        return (
            f"baseline: {len(self.values)} seeds, mean {100 * self.mean:.1f} %, {low:.1f} to {high:.1f} %; another "
            f"seed of it lies within +-{100 * self.margin(1):.1f} points with 95 %, so one of 21 changes that do "
            "nothing falls outside by chance"
        )


def pooled(results: Sequence[Result]) -> tuple[tuple[float, ...], tuple[float, float]]:
    """Final successes of several seeds, and the Wilson interval of all their episodes; nothing gives (), (0, 1)."""
    known = [(r.final_success, r.final_episodes) for r in results if r.final_success is not None and r.final_episodes]
    if not known:
        return (), (0.0, 1.0)
    from reinflow.evaluate import wilson_interval  # which loads torch

    return tuple(s for s, _ in known), wilson_interval(sum(round(s * n) for s, n in known), sum(n for _, n in known))


def spread_of(results: Sequence[Result]) -> Spread | None:
    """Of the baseline's seeds; None with fewer than MIN_SEEDS that have a final evaluation."""
    values, interval = pooled([r for r in results if r.experiment == BASELINE])
    return Spread(values, interval) if len(values) >= MIN_SEEDS else None


def verdict(results: Sequence[Result], spread: Spread | None) -> str:
    """Of one experiment's seeds, in words; "" where there is nothing to say yet."""
    values, (low, high) = pooled(results)
    if not values or results[0].experiment == BASELINE:
        return ""
    if spread is None:
        return f"no spread: fewer than {MIN_SEEDS} seeds of the baseline"
    difference = fmean(values) - spread.mean
    disjoint = low > spread.interval[1] or high < spread.interval[0]
    beyond = disjoint and abs(difference) > spread.margin(len(values))
    return f"{'beyond' if beyond else 'within'} the spread: {100 * difference:+.1f} points"


def by_experiment(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The trainings of each experiment."""
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(result.experiment, []).append(result)
    return grouped


def judged(sweep: Sweep) -> list[Result]:
    """Every training's result, with its experiment's verdict."""
    results = [result_of(sweep, run) for run in sweep.runs]
    spread, groups = spread_of(results), by_experiment(results)
    verdicts = {name: verdict(group, spread) for name, group in groups.items()}
    return [Result(**(asdict(result) | {"verdict": verdicts[result.experiment]})) for result in results]


def report(sweep: Sweep) -> list[Result]:
    """Write results.csv and results.png, print the table."""
    results = judged(sweep)
    path = sweep.root / "results.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Result)])
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)
    print_table(results)
    print(f"wrote {path}" + (f" and {png}" if (png := plot(results, sweep.root / "results.png")) else ""))
    return results


def _percent(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{100 * fmean(known):.1f}" if known else "-"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):,.3g}" if known else "-"


def print_table(results: Sequence[Result]) -> None:
    """A row per experiment, means over its seeds; then what the document expected."""
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    console, groups, spread = wide_console(), by_experiment(results), spread_of(results)
    headings = (
        "experiment", "value", "seeds", "success %", "95 % interval", "best tuning %", "episodes to 80 %", "minutes",
        "status", "verdict",
    )  # fmt: skip
    shown = Table()
    for name in headings:
        shown.add_column(name, no_wrap=name != "experiment", overflow="fold")
    for name, group in groups.items():
        values, (low, high) = pooled(group)
        reached = [r.episodes_to_80 for r in group if r.episodes_to_80 is not None]
        statuses = Counter(r.status.split(":")[0] for r in group)
        shown.add_row(
            escape(name), escape(group[0].value), str(len(group)), _percent(values),
            f"{100 * low:.1f}-{100 * high:.1f}" if values else "-",
            _percent([r.best_tuning_success for r in group]),
            f"{fmean(reached):,.0f} ({len(reached)} of {len(group)})" if reached else "-",
            _mean([r.minutes for r in group]),
            next(iter(statuses)) if len(statuses) == 1 else ", ".join(f"{n} {state}" for state, n in statuses.items()),
            Text(group[0].verdict, style="bold" if "beyond" in group[0].verdict else ""),
        )  # fmt: skip
    console.print(shown)
    for result in results:
        if ":" in result.status:
            console.print(f"{result.run}: {result.status}", highlight=False, markup=False, soft_wrap=True)
    if spread:
        console.print(spread.describe(), highlight=False, markup=False, soft_wrap=True)
    for line in expectations(groups, spread):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def expectations(groups: Mapping[str, Sequence[Result]], spread: Spread | None) -> list[str]:
    """A line for every category that ran whole: what the document expects to be best, and what was."""
    lines = []
    for category, (expected, why) in EXPECTED.items():
        names = [BASELINE, *(name for name, group in groups.items() if group[0].category == category)]
        known = {name: fmean(values) for name in names if (values := pooled(groups.get(name, ()))[0])}
        if len(known) < 2:
            continue
        best = max(known, key=lambda name: known[name])
        words = groups[best][0].verdict if best != BASELINE else "the baseline"
        sure = "" if spread and any("beyond" in groups[name][0].verdict for name in known) else "; nothing is decided"
        lines.append(
            f"{category}: the document expects {' or '.join(expected)} ({why}); highest here: {best} "
            f"{100 * known[best]:.1f} %, {words}{sure}"
        )
    return lines


def plot(results: Sequence[Result], png: Path) -> Path | None:
    """Final success of every training, the baseline's prediction interval as a band; None without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("results.png needs matplotlib: pip install matplotlib, then --report")
        return None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    groups = {name: group for name, group in by_experiment(results).items() if pooled(group)[0]}
    if not groups:
        return None
    figure, axes = plt.subplots(figsize=(7, 1.5 + 0.3 * len(groups)))
    if spread := spread_of(results):
        low, high = spread.mean - spread.margin(1), spread.mean + spread.margin(1)
        label = f"another seed of the baseline, 95 % ({len(spread.values)} seeds)"
        axes.axvspan(100 * max(low, 0), 100 * min(high, 1), color="tab:blue", alpha=0.15, label=label)
        axes.axvline(100 * spread.mean, color="tab:blue", linewidth=1)
    for row, group in enumerate(groups.values()):
        colour = "tab:red" if group[0].verdict.startswith("beyond") else "tab:gray"
        ends = [(r.final_success, r.final_ci_low, r.final_ci_high) for r in group if r.final_success is not None]
        for place, (middle, left, right) in enumerate(ends):
            height = row + 0.12 * (place - (len(ends) - 1) / 2)
            axes.hlines(height, 100 * (left or 0), 100 * (right or 1), color=colour, linewidth=1)
            axes.plot(100 * middle, height, "o", color=colour, markersize=4)
    axes.set(
        xlabel="success after training, %",
        yticks=range(len(groups)),
        yticklabels=list(groups),
        ylim=(len(groups) - 0.5, -0.5),
    )
    axes.grid(alpha=0.3, axis="x")
    if spread:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize="small", frameon=False)
    figure.tight_layout()
    figure.savefig(png, dpi=110)
    plt.close(figure)
    return png
