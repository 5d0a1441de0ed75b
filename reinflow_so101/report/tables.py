"""The report's tables: results side by side, settings and what is special about them, every metric with its meaning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from reinflow.evaluate import EvalResult
from reinflow.metrics import REWARD_FAMILY, known_metrics
from reinflow.paired import Paired, PairError, compare_results, say_p
from reinflow_so101.command_line import WAYS
from reinflow_so101.commands.monitor import last
from reinflow_so101.presets import PRESET_VALUES
from reinflow_so101.report.charts import column
from reinflow_so101.report.curves import score
from reinflow_so101.report.files import RunFiles

NONE = "-"


@dataclass(frozen=True)
class Row:
    """One setting: its value in every run, in words."""

    name: str
    values: tuple[str, ...]


def say(value: Any) -> str:
    """A setting's value, as in config.json."""
    return value if isinstance(value, str) and value else json.dumps(value)


def say_score(result: EvalResult | None, by_return: bool) -> tuple[str, str]:
    """The figure of an evaluation, and its interval with the number of episodes; dashes without one."""
    if result is None:
        return NONE, ""
    middle, low, high = score(result, by_return)
    if by_return:
        return f"{middle:,.1f}", f"95 % interval {low:,.1f} to {high:,.1f}, {len(result.episodes)} episodes"
    counts = f"{result.num_successes}/{len(result.episodes)}"
    return f"{middle:.1f} %", f"{counts}, 95 % interval {low:.1f} to {high:.1f} %"


@dataclass(frozen=True)
class Change:
    """Before against after on the same seeds, in words; ``counts`` where success is what counts."""

    difference: str
    interval: str
    p: str
    test: str
    counts: Paired | None = None


def change_of(run: RunFiles) -> Change | None:
    """The paired comparison of a run's two reports; None without both, or where they played different seeds."""
    if run.before is None or run.after is None:
        return None
    try:
        paired = compare_results(run.before, run.after)
    except PairError:
        return None
    low, high = paired.interval
    p = f"p {say_p(paired.p_value)}"
    if isinstance(paired, Paired):
        interval = f"{100 * low:+.1f} to {100 * high:+.1f}"
        return Change(f"{100 * paired.difference:+.1f} points", interval, p, "McNemar, exact", paired)
    return Change(f"{paired.difference:+,.1f}", f"{low:+,.1f} to {high:+,.1f}", p, "paired t")


def say_time(seconds: float) -> str:
    """As 1 h 23 min, 12.4 min or 35 s."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    whole = timedelta(seconds=round(seconds))
    return f"{whole.days * 24 + whole.seconds // 3600} h {whole.seconds % 3600 // 60} min"


def results_table(runs: Sequence[RunFiles]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and a row per run."""
    head = ("run", "seed", "state", "episodes", "time", "before", "after", "difference", "p", "best tuning", "findings")
    rows: list[tuple[str, ...]] = []
    for run in runs:
        change = change_of(run)
        done = last(run.rows, "progress/episodes")
        tuning = [row.get("eval/success_rate") for row in run.rows]
        best = max((value for value in tuning if value is not None), default=None)
        rows.append(
            (
                run.name, say(run.config.get("seed")), run.state, f"{done or 0:,.0f}", say_time(run.seconds),
                _with_interval(run.before, run.is_gym), _with_interval(run.after, run.is_gym),
                f"{change.difference} [{change.interval}]" if change else NONE,
                change.p.removeprefix("p ").removeprefix("= ") if change else NONE,
                NONE if best is None else f"{100 * best:.1f} %", str(len({f["rule"] for f in run.findings})),
            )
        )  # fmt: skip
    return head, rows


def _with_interval(result: EvalResult | None, by_return: bool) -> str:
    if result is None:
        return NONE
    _, low, high = score(result, by_return)
    return f"{say_score(result, by_return)[0]} [{low:,.1f}, {high:,.1f}]"


def differing(runs: Sequence[RunFiles]) -> list[Row]:
    """Settings in which the runs differ, but for where they lie."""
    names = [name for run in runs for name in run.config]
    rows = [Row(name, tuple(say(run.config.get(name)) for run in runs)) for name in dict.fromkeys(names)]
    return [row for row in rows if row.name not in WAYS and len(set(row.values)) > 1]


def beyond_preset(run: RunFiles) -> tuple[list[Row], str]:
    """Settings that are not the preset's (value, the preset's), and a remark on what could not be compared."""
    preset = str(run.config.get("preset", ""))
    stored = run.start.get("preset")
    if isinstance(stored, Mapping):
        defaults, remark = stored, ""
    else:
        defaults = PRESET_VALUES.get(preset, {})
        remark = "the run is older than start.json, so only the fields that its preset sets were compared"
    rows = [
        Row(name, (say(value), say(_listed(defaults[name]))))
        for name, value in run.config.items()
        if name in defaults and value != _listed(defaults[name]) and name not in WAYS
    ]
    return rows, remark


def _listed(value: Any) -> Any:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def metric_explanations(runs: Sequence[RunFiles]) -> dict[str, str]:
    """Every metric that a run logged, with its explanation where one is known."""
    extras = {
        name: extra
        for run in runs
        for result in (run.before, run.after)
        if result
        for name, extra in result.extras.items()
    }
    known = known_metrics(extras) | _known_worlds(runs)
    names = dict.fromkeys(name for run in runs for row in run.rows for name in row)
    ordered = [*(name for name in known if name in names), *sorted(name for name in names if name not in known)]
    return {name: known.get(name, known["reward/<term>"] if name.startswith(REWARD_FAMILY) else "") for name in ordered}


def _known_worlds(runs: Sequence[RunFiles]) -> dict[str, str]:
    """Explanations of the arm's own figures, which its environment declares."""
    if all(run.is_gym for run in runs):
        return {}
    from so101_sim.episode import EXTRAS

    return {name: text for name, text in known_metrics(EXTRAS).items() if name.split("/")[1] in EXTRAS}


def metric_columns(runs: Sequence[RunFiles], names: Sequence[str]) -> list[dict[str, Any]]:
    """The data behind the search: of every run the x axis, and the values of every metric that it logged."""
    return [
        {
            "name": run.name,
            "x": column(run.shown_rows, run.counted),
            "series": {name: values for name in names if any_of(values := column(run.shown_rows, name))},
        }
        for run in runs
    ]


def any_of(values: Sequence[float | None]) -> bool:
    """Whether there is a value at all."""
    return any(value is not None for value in values)
