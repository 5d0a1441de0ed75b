"""The learning curve: noise-free success on tuning seeds, sampled success of the training, the reports around it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from reinflow.evaluate import EvalResult
from reinflow_so101.command_line import CHANGEABLE_ON_RESUME
from reinflow_so101.report.charts import Chart, Trace, band, color, column, line, logged, number, over_training
from reinflow_so101.report.files import RunFiles

NOT_OF_A_GROUP = (CHANGEABLE_ON_RESUME | {"seed"}) - {"num_episodes", "total_timesteps"}
"""Settings in which trainings of one band may differ: the seed, and how the computer goes about it."""


def grouped(runs: Sequence[RunFiles]) -> list[list[RunFiles]]:
    """Runs that differ in their seed alone, together."""
    groups: dict[str, list[RunFiles]] = {}
    for run in runs:
        key = {name: value for name, value in run.config.items() if name not in NOT_OF_A_GROUP}
        groups.setdefault(repr(sorted(key.items())), []).append(run)
    return list(groups.values())


def learning_curve(runs: Sequence[RunFiles]) -> Chart | None:
    """Success over the training (the return for Gymnasium); None where nothing was logged yet."""
    by_return = all(run.is_gym for run in runs)
    factor = 1.0 if by_return else 100.0
    name = "return_mean" if by_return else "success_rate"
    data: list[Trace] = []
    shapes: list[dict[str, Any]] = []
    for place, run in enumerate(runs):
        shade, one = color(place), len(runs) == 1
        thin: dict[str, Any] = {"line": {"color": f"{shade}/0.45", "width": 1.2}, "mode": "lines", "showlegend": one}
        drawn = line(run, f"rollout/{name}", "training, with noise", shade, factor=factor, **thin)
        drawn += _evaluations(run, f"eval/{name}", "noise-free, tuning seeds", shade, factor)
        drawn += _reports(run, shade, by_return)
        data += drawn if one else _of_one(drawn, run.name)
        if one:
            shapes += _report_bands(run, by_return)
    data += [trace for group in grouped(runs) if len(group) > 1 for trace in _spread(group, f"eval/{name}", factor)]
    if not data:
        return None
    what = "Return" if by_return else "Success"
    note = (
        "Healthy: the noise-free curve leaves the band of the start and rises; the sampled one follows from below. "
        "Points with bars are the reporting seeds, which chose nothing; bands and bars are 95 % intervals"
        + ("; thin lines are sampled; a grey band spans training seeds." if len(runs) > 1 else ".")
    )
    yaxis = {"rangemode": "tozero"} if by_return else {"range": [0, 102]}
    unit = "mean return of an episode" if by_return else "% of the episodes"
    return over_training("curve", f"{what} over training", unit, note, runs, data, shapes, yaxis, wide=True, height=420)


def _of_one(traces: Sequence[Trace], name: str) -> list[Trace]:
    """The traces of one run among several: the legend names it once, the hover always."""
    shown = [
        trace
        | {"legendgroup": name, "name": name, "showlegend": False}
        | ({"hovertemplate": f"{name}: {trace['hovertemplate']}"} if "hovertemplate" in trace else {})
        for trace in traces
    ]
    named = [place for place, trace in enumerate(traces) if "tuning" in trace["name"] and "fill" not in trace]
    if shown:
        shown[named[0] if named else 0]["showlegend"] = True
    return shown


def _evaluations(run: RunFiles, metric: str, label: str, shade: str, factor: float) -> list[Trace]:
    rows = logged(run, metric)
    if not rows:
        return []
    traces: list[Trace] = []
    if all(row.get("eval/ci_low") is not None for row in rows):
        low, high = (column(rows, f"eval/ci_{end}", factor) for end in ("low", "high"))
        x = column(rows, run.counted)
        traces.append(band(x, low, high, shade, label, legendgroup=label, showlegend=False))
    return traces + line(run, metric, label, shade, factor=factor, mode="lines+markers", legendgroup=label)


def score(result: EvalResult, by_return: bool) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % interval: percentages, or returns."""
    if by_return:
        spread = 1.96 * result.return_error
        return result.return_mean, result.return_mean - spread, result.return_mean + spread
    low, high = result.interval
    return 100 * result.success_rate, 100 * low, 100 * high


def _reports(run: RunFiles, shade: str, by_return: bool) -> list[Trace]:
    """The evaluations before and after, as points with their intervals."""
    points = [(0.0, run.before, "before")] if run.before else []
    if run.after:
        iteration = run.after_iteration
        last = run.rows[-1]["progress/iteration"] if run.rows else 0
        points.append((run.x_at((last or 0) if iteration is None else iteration), run.after, "after"))
    traces = []
    for x, result, when in points:
        middle, low, high = score(result, by_return)
        bars = {"type": "data", "symmetric": False, "array": [number(high - middle)], "color": shade, "thickness": 2}
        traces.append(
            {
                "x": [number(x)], "y": [number(middle)], "name": f"{when}, reporting seeds", "type": "scatter",
                "mode": "markers", "error_y": bars | {"arrayminus": [number(middle - low)]},
                "marker": {"color": shade, "size": 11, "symbol": "diamond" if when == "after" else "diamond-open"},
                "cliponaxis": False,
                "hovertemplate": f"{when}, reporting seeds %{{y:.4g}} [{low:.4g}, {high:.4g}]<extra></extra>",
            }
        )  # fmt: skip
    return traces


def _report_bands(run: RunFiles, by_return: bool) -> list[dict[str, Any]]:
    """The start's interval across the chart, as what to leave behind."""
    if not run.before:
        return []
    middle, low, high = score(run.before, by_return)
    across = {"xref": "paper", "x0": 0, "x1": 1, "yref": "y", "layer": "below"}
    return [
        {"type": "rect", "y0": low, "y1": high, "fillcolor": "c7/0.16", "line": {"width": 0}, **across},
        {
            "type": "line", "y0": middle, "y1": middle, "line": {"color": "muted", "dash": "dash", "width": 1.5},
            "label": {"text": "before training", "textposition": "end", "yanchor": "top", "font": {"color": "muted"}},
            **across,
        },
    ]  # fmt: skip


def _spread(group: Sequence[RunFiles], metric: str, factor: float) -> list[Trace]:
    """Mean of the training seeds, and a band from the lowest to the highest, at the iterations where all were
    evaluated."""
    columns = [{row["progress/iteration"] or 0.0: row for row in logged(run, metric)} for run in group]
    common = sorted(set.intersection(*(set(rows) for rows in columns)))
    if not common:
        return []
    x = [number(fmean(rows[at][run.counted] or 0.0 for run, rows in zip(group, columns, strict=True))) for at in common]
    values = [[factor * (rows[at][metric] or 0.0) for rows in columns] for at in common]
    low, high = ([number(end(row)) for row in values] for end in (min, max))
    label = f"mean of {len(group)} seeds"
    mean: Trace = {
        "x": x, "y": [number(fmean(row)) for row in values], "name": label, "type": "scatter", "mode": "lines",
        "line": {"color": "ink", "width": 3}, "legendgroup": label,
    }  # fmt: skip
    return [band(x, low, high, "c7", label, legendgroup=label, showlegend=False), mean]
