"""Charts as plotly reads them: plain dicts of traces and a layout.

A colour is a name (``c0`` to ``c7``, ``ink``, ``muted``; ``c0/0.2`` is a fifth of its opacity) that the page turns into
one of the light or the dark palette, so that a chart follows the reader's theme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from reinflow.symptoms import SURROGATE_LOSS
from reinflow_so101.report.files import RunFiles

Trace = dict[str, Any]
Row = Mapping[str, float | None]
DASHES = ("solid", "dash", "dot", "dashdot")
NUM_COLORS = 7  # c7 is the grey of what stands behind
COUNTED = {
    "progress/episodes": "training episodes",
    "progress/timesteps": "control steps of training",
    "progress/iteration": "iterations",
}
MARKS = "doctor"  # the group of the doctor's marks in a legend


@dataclass(frozen=True)
class Chart:
    """One figure of the page."""

    key: str  # of its element
    title: str
    unit: str  # of the y axis
    note: str  # what is healthy, a sentence
    data: Sequence[Trace]
    layout: Mapping[str, Any] = field(default_factory=dict)
    wide: bool = False  # takes the whole width
    height: int = 300  # pixels

    def figure(self) -> dict[str, Any]:
        """What the page's script draws."""
        return {"data": list(self.data), "layout": dict(self.layout), "height": self.height}


def color(index: int) -> str:
    """Of the index-th run or line."""
    return f"c{index % NUM_COLORS}"


def number(value: float | None) -> float | None:
    """Rounded to five digits, so that a page of many points stays small; None where there is no finite value."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")


def column(rows: Sequence[Row], name: str, factor: float = 1.0) -> list[float | None]:
    """A metric of every row."""
    values = (row.get(name) for row in rows)
    return [number(None if value is None else factor * value) for value in values]


def logged(run: RunFiles, name: str) -> list[Row]:
    """The shown rows that hold a metric."""
    return [row for row in run.shown_rows if row.get(name) is not None]


def line(
    run: RunFiles, metric: str, label: str, shade: str, dash: str = "solid", factor: float = 1.0, **more: Any
) -> list[Trace]:
    """A metric over the training; [] where the run does not log it."""
    rows = logged(run, metric)
    if not rows:
        return []
    mode = "lines+markers" if len(rows) < 30 else "lines"
    shown: Trace = {
        "x": column(rows, run.counted), "y": column(rows, metric, factor), "name": label, "mode": mode,
        "type": "scatter", "hovertemplate": f"{label} %{{y:.4g}}<extra></extra>",
        "line": {"color": shade, "dash": dash, "width": 2}, "marker": {"color": shade, "size": 5},
    }  # fmt: skip
    return [shown | more]


def band(x: Sequence[Any], low: Sequence[Any], high: Sequence[Any], shade: str, label: str, **more: Any) -> Trace:
    """An area between two curves, without a hover of its own."""
    shown: Trace = {
        "x": [*x, *reversed(x)], "y": [*high, *reversed(low)], "fill": "toself", "type": "scatter", "mode": "lines",
        "fillcolor": f"{shade}/0.18", "line": {"color": f"{shade}/0", "width": 0}, "name": label, "hoverinfo": "skip",
    }  # fmt: skip
    return shown | more


def level(value: float, label: str, last: float, shade: str = "muted") -> Trace:
    """A dotted horizontal line with its name, up to the last x: a bound, a goal."""
    return {
        "x": [0, last], "y": [value, value], "name": label, "type": "scatter", "mode": "lines", "hoverinfo": "skip",
        "line": {"color": shade, "dash": "dot", "width": 1.5},
    }  # fmt: skip


def zone(low: float, high: float, shade: str = "c2") -> dict[str, Any]:
    """A horizontal stripe: where values are healthy."""
    return {
        "type": "rect", "xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": low, "y1": high, "layer": "below",
        "fillcolor": f"{shade}/0.13", "line": {"width": 0},
    }  # fmt: skip


def marks(runs: Sequence[RunFiles]) -> tuple[list[Trace], list[dict[str, Any]]]:
    """What the doctor said and when: a trace of marks at the top, and a vertical line each."""
    traces: list[Trace] = []
    shapes: list[dict[str, Any]] = []
    for run in runs:
        if not run.findings:
            continue
        places = [run.x_at(finding["progress/iteration"]) for finding in run.findings]
        whose = f"{run.name}: " if len(runs) > 1 else ""
        texts = [f"{whose}{finding['rule']}" for finding in run.findings]
        traces.append(
            {
                "x": places, "y": [0.97] * len(places), "yaxis": "y2", "text": texts, "mode": "markers",
                "type": "scatter", "name": "the doctor's findings", "legendgroup": MARKS, "showlegend": not traces,
                "marker": {"symbol": "triangle-down", "size": 11, "color": "c1"},
                "hovertemplate": "doctor: %{text}<extra></extra>",
            }
        )  # fmt: skip
        shapes += [
            {
                "type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": x, "x1": x, "layer": "below",
                "line": {"color": "c1/0.6", "width": 1, "dash": "dash"},
            }
            for x in sorted(set(places))
        ]  # fmt: skip
    return traces, shapes


def over_training(
    key: str, title: str, unit: str, note: str, runs: Sequence[RunFiles], data: Sequence[Trace],
    shapes: Sequence[dict[str, Any]] = (), yaxis: Mapping[str, Any] | None = None, **more: Any,
) -> Chart:  # fmt: skip
    """A chart over the training's length, with the doctor's marks."""
    doctor, lines = marks(runs)
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": COUNTED[runs[0].counted]}, "rangemode": "tozero"},
        "yaxis": yaxis or {},
        "shapes": [*shapes, *lines],
        "hovermode": "x unified",
    }
    if doctor:
        layout["yaxis2"] = {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True}
    return Chart(key, title, unit, note, [*data, *doctor], layout, **more)


@dataclass(frozen=True)
class Panel:
    """A chart of one or more metrics of the update, and how to read it."""

    key: str
    title: str
    unit: str
    note: str
    metrics: Mapping[str, str]  # name -> label
    settings: tuple[str, ...] = ()  # drawn as dotted levels
    log: bool = False
    healthy: tuple[float, float] | None = None
    span: tuple[float, float] | None = None  # of the y axis
    rangemode: str = "tozero"
    factor: float = 1.0


PANELS = (
    Panel(
        "kl", "KL of an update", "nats per ratio group",
        "Healthy: about target_kl (dotted) or below, without spikes; above it updates stop early.",
        {"ppo/approx_kl": "KL"}, settings=("target_kl",),
    ),
    Panel(
        "ratio", "Probability ratio, new to old", "ratio, log scale",
        "Healthy: smallest and largest within a factor of a few of 1. Beyond 10 or below 0.1 the rollout says nothing "
        "about the new policy. A single step per rollout leaves them at 1.",
        {"ppo/ratio_max": "largest", "ppo/ratio_mean": "mean", "ppo/ratio_min": "smallest"}, log=True,
    ),
    Panel(
        "clip", "Clipped ratios", "% of the ratios",
        "Healthy: 5 to 30 % (shaded) with several steps an iteration; above 50 % steps are too large or too many. One "
        "step per rollout clips nothing.",
        {"training/clip_fraction": "clipped"}, healthy=(5, 30), factor=100,
    ),
    Panel(
        "noise", "Exploration noise", "std, normalised actions",
        "Healthy: a learned std between its bounds; at a bound the noise head has no gradient. Equal bounds fix it.",
        {"noise/sigma_max": "upper bound", "noise/std_mean": "mean std", "noise/sigma_min": "lower bound"},
    ),
    Panel(
        "gradients", "Gradient norms before clipping", "norm, log scale",
        "Healthy: level, and the last step's not far above the first's; a hundred times grad_clip_norm (dotted) means "
        "that nearly all of every gradient is cut away.",
        {
            "gradients/policy_norm": "policy", "gradients/policy_norm_first": "its first step",
            "gradients/policy_norm_last": "its last step", "gradients/critic_norm": "critic",
        },
        settings=("grad_clip_norm",), log=True,
    ),
    Panel(
        "explained_variance", "Variance that the critic explains", "1 is a perfect critic",
        "Healthy: above 0 and rising after the critic's warm-up; at 0 the critic is no better than a constant.",
        {"ppo/explained_variance": "explained variance"}, span=(-0.5, 1.05),
    ),
    Panel(
        "policy_loss", "Policy loss", "clipped surrogate",
        "Healthy: near 0 or a little below. It says which way a step went, not how good the policy is; above "
        f"{SURROGATE_LOSS:g} with several steps, later steps undo the first.",
        {"loss/policy": "policy loss"}, rangemode="normal",
    ),
    Panel(
        "value_loss", "Value loss", "half squared error, normalised returns",
        "Healthy: falls at first, then stays level; a lasting rise means that returns change faster than the critic "
        "follows.",
        {"loss/value": "value loss"},
    ),
    Panel(
        "lr", "Learning rates", "Adam's rate, log scale",
        "As scheduled; 0 (left out here) during the critic's warm-up. Natural steps do not use the policy's.",
        {"lr/policy": "policy", "lr/critic": "critic"}, log=True,
    ),
)  # fmt: skip


def panel_chart(panel: Panel, runs: Sequence[RunFiles]) -> Chart | None:
    """A panel's chart; None where no run logs any of its metrics."""
    present = [metric for metric in panel.metrics if any(logged(run, metric) for run in runs)]
    dashes = dict(zip(present, cycle(DASHES), strict=False))
    data: list[Trace] = []
    for place, run in enumerate(runs):
        for index, metric in enumerate(present):
            shade, label = color(place if len(runs) > 1 else index), panel.metrics[metric]
            of_run = {"legendgroup": run.name, "showlegend": index == 0} if len(runs) > 1 else {}
            drawn = line(run, metric, label, shade, dashes[metric], panel.factor, **of_run)
            data += [_of_run(trace, run.name) for trace in drawn] if of_run else drawn
    if not data:
        return None
    if panel.log:
        for trace in data:
            trace["y"] = [y or None for y in trace["y"]]  # 0 has no place there
    end = max(x or 0 for trace in data for x in trace["x"])
    if len(runs) > 1 and len(present) > 1:
        data += [_dash_key(panel.metrics[metric], dash) for metric, dash in dashes.items()]
    for setting in panel.settings:
        values = dict.fromkeys(run.config.get(setting) for run in runs)
        numbers = [value for value in values if isinstance(value, int | float) and value]
        data += [level(value, f"{setting} {value:g}", end) for value in numbers]
    yaxis: dict[str, Any] = _log_axis(data) if panel.log else {"rangemode": panel.rangemode}
    if panel.span:
        yaxis |= {"range": list(panel.span)}
    shapes = [zone(*panel.healthy)] if panel.healthy else []
    return over_training(panel.key, panel.title, panel.unit, panel.note, runs, data, shapes, yaxis)


def _of_run(trace: Trace, name: str) -> Trace:
    """A line among those of several runs: the legend names the run, the hover both."""
    return trace | {"name": name, "hovertemplate": f"{name}: {trace['hovertemplate']}"}


def _dash_key(label: str, dash: str) -> Trace:
    """A legend entry that says what a dash stands for."""
    shown = {"color": "muted", "dash": dash, "width": 2}
    return {"x": [None], "y": [None], "name": label, "type": "scatter", "mode": "lines", "line": shown}


def _log_axis(data: Sequence[Trace]) -> dict[str, Any]:
    """Powers of ten; where the values span less than that, 2 and 5 too, over a decade at least."""
    values = [y for trace in data for y in trace["y"] if y and y > 0] or [1.0]
    low, high = math.log10(min(values)), math.log10(max(values))
    if high - low > 1.5:
        return {"type": "log", "dtick": 1}
    middle, half = (low + high) / 2, max((high - low) / 2 + 0.1, 0.5)
    decades = range(math.floor(middle - half), math.ceil(middle + half) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]  # plotly's own say 5 for .5
    labels = [f"{tick:g}" for tick in ticks]
    return {"type": "log", "tickvals": ticks, "ticktext": labels, "range": [middle - half, middle + half]}


def algorithm_charts(runs: Sequence[RunFiles]) -> tuple[list[Chart], list[str]]:
    """The update's charts, and the titles of those that have nothing to show."""
    drawn = [(panel, panel_chart(panel, runs)) for panel in PANELS]
    return [chart for _, chart in drawn if chart], [panel.title for panel, chart in drawn if chart is None]


def reward_charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """Reward terms, stacked, one chart a run."""
    return [chart for place, run in enumerate(runs) if (chart := _reward_chart(run, place, len(runs)))]


def _reward_chart(run: RunFiles, place: int, total: int) -> Chart | None:
    terms = sorted({name for row in run.rows for name in row if name.startswith("reward/")})
    rows = [row for row in run.shown_rows if row.get("rollout/return_mean") is not None]
    if not rows or not terms:
        return None
    means = {term: sum(row.get(term) or 0.0 for row in rows) / len(rows) for term in terms}
    terms.sort(key=lambda term: -abs(means[term]))
    data: list[Trace] = [
        {
            "x": column(rows, run.counted), "y": column(rows, term), "name": term.removeprefix("reward/"),
            "type": "scatter", "mode": "lines", "stackgroup": "up" if means[term] >= 0 else "down",
            "line": {"color": color(index), "width": 1}, "fillcolor": f"{color(index)}/0.5",
        }
        for index, term in enumerate(terms)
    ]  # fmt: skip
    data += line(run, "rollout/return_mean", "return", "ink", "dot")
    title = "Reward terms" if total == 1 else f"Reward terms of {run.name}"
    note = (
        "Healthy: what success pays takes over. A shaping term that grows alone is being farmed. The terms add up to "
        "the return (dotted)."
    )
    return over_training(f"reward{place}", title, "mean sum over an episode", note, [run], data, wide=total == 1)


PHASES = (
    ("time/rollout_env", "rollout: environments"),
    ("time/rollout_policy", "rollout: policy"),
    ("time/update", "update"),
    ("time/eval", "evaluation"),
)
REST = "other: saving, logging"


def phase_seconds(run: RunFiles, rows: Sequence[Row]) -> dict[str, list[float]]:
    """Seconds of each phase of every row; what no phase names is in REST."""
    phases = {label: [row.get(name) or 0.0 for row in rows] for name, label in PHASES}
    whole = [row.get("time/iteration") or 0.0 for row in rows]
    named = [sum(parts) for parts in zip(*phases.values(), strict=True)]
    return phases | {REST: [max(all_ - part, 0.0) for all_, part in zip(whole, named, strict=True)]}


def phase_totals(run: RunFiles) -> dict[str, float]:
    """Seconds of each phase over the training; a line that stands for several iterations holds their mean, and an
    evaluation's as it was."""
    totals = dict.fromkeys([*(label for _, label in PHASES), REST], 0.0)
    before = 0.0
    for row in run.rows:
        count = max((row["progress/iteration"] or 0.0) - before, 0.0)
        before = row["progress/iteration"] or before
        for label, (seconds,) in phase_seconds(run, [row]).items():
            totals[label] += seconds * (1 if label == "evaluation" else count)
    return totals


def time_charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """Where the time of an iteration goes, one chart a run."""
    return [chart for place, run in enumerate(runs) if (chart := _time_chart(run, place, len(runs)))]


def _time_chart(run: RunFiles, place: int, total: int) -> Chart | None:
    rows = [row for row in run.shown_rows if row.get("time/iteration") is not None]
    if not rows:
        return None
    data: list[Trace] = [
        {
            "x": column(rows, run.counted), "y": [number(value) for value in seconds], "name": label, "type": "bar",
            "marker": {"color": "muted" if label == REST else color(index), "line": {"width": 0}},
        }
        for index, (label, seconds) in enumerate(phase_seconds(run, rows).items())
        if any(seconds)
    ]  # fmt: skip
    title = "Time of an iteration" if total == 1 else f"Time of an iteration of {run.name}"
    note = "Healthy: level bars, higher only where an evaluation falls due; on a CPU mostly physics."
    chart = over_training(f"time{place}", title, "seconds", note, [run], data, wide=total == 1)
    return Chart(**{**vars(chart), "layout": {**chart.layout, "barmode": "stack", "bargap": 0.1}})
