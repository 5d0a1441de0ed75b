"""What goes wrong in advantage-weighted offline RL: rules over the stage's metrics, in the form of reinflow/doctor.py.

A finding is printed once, when it first holds, and kept in findings.jsonl, whose "progress/iteration" is the step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from reinflow.doctor import Finding, Rule, diagnose
from reinflow.metrics import read_lines
from reinflow.symptoms import RECENT, History, Symptom, values_of

FINDINGS_FILE = "findings.jsonl"
LEAST_EFFECTIVE = 0.1  # of a batch: below, 25 of 256 decisions do all of the teaching
MOST_CLIPPED = 0.1  # of a batch: the clip is for outliers
TOO_FAR = 1.0  # spreads of the data's returns by which no Q may pass the largest return
LEAST_CORRELATION = 0.3  # with the returns of held-out episodes
USEFUL_SPREAD = 0.25  # of the scaled returns: beta 10 then gives one standard deviation a weight of e^2.5 = 12


def _steps(rows: Sequence[Mapping[str, float]]) -> str:
    return f"steps {rows[0]['step']:.0f}-{rows[-1]['step']:.0f}"


def _scale(h: History) -> float:
    """reward_scale with which the returns would have a useful spread."""
    spread = h.rows[-1].get("return_spread") or 0.0
    return h.config["reward_scale"] * USEFUL_SPREAD / spread if spread > 0 else h.config["reward_scale"]


def q_above_returns(h: History) -> Symptom | None:
    rows = h.last(RECENT, RECENT, "q_top", "top_return", "return_spread")
    if not rows or fmean(r["q_top"] - r["top_return"] - TOO_FAR * r["return_spread"] for r in rows) <= 0:
        return None
    last = rows[-1]
    return Symptom(
        f"{_steps(rows)}: Q up to {last['q_top']:.2f}, the largest return of the data is {last['top_return']:.2f}",
        {"lr": h.config["lr"] / 3},
        severity="error",
    )


def q_blind(h: History) -> Symptom | None:
    rows = h.last(RECENT, RECENT, "q_correlation")
    correlation = fmean(values_of(rows, "q_correlation")) if rows else 1.0
    if correlation >= LEAST_CORRELATION:
        return None
    return Symptom(
        f"{_steps(rows)}: correlation of Q with the returns of held-out episodes {correlation:.2f}",
        {"steps": 2 * h.config["critic_steps"]},
    )


def weights_collapse(h: History) -> Symptom | None:
    rows = h.last(RECENT, RECENT, "weight_effective_share", "weight_entropy")
    share = fmean(values_of(rows, "weight_effective_share")) if rows else 1.0
    if share >= LEAST_EFFECTIVE:
        return None
    entropy = fmean(values_of(rows, "weight_entropy"))
    evidence = f"{_steps(rows)}: the weights are worth {share:.1%} of a batch, entropy {entropy:.2f} of 1"
    return Symptom(evidence, {"beta": h.config["beta"] / 3, "scale": _scale(h)})


def weights_clipped(h: History) -> Symptom | None:
    rows = h.last(RECENT, RECENT, "weight_clipped")
    share = fmean(values_of(rows, "weight_clipped")) if rows else 0.0
    if share <= MOST_CLIPPED:
        return None
    return Symptom(f"{_steps(rows)}: {share:.0%} of the weights at w_max={h.config['w_max']:g}", {"scale": _scale(h)})


RULES: tuple[Rule, ...] = (
    Rule(
        q_above_returns,
        f"`q_top` above the data's largest return by more than {TOO_FAR:g} spreads of the returns ({RECENT} lines)",
        "the critics believe in actions that nobody tried, and feed on their own belief through the targets",
        "take next_action=data, a lower lr ({lr:.1e}), or a lower gamma",
    ),
    Rule(
        q_blind,
        f"`q_correlation` below {LEAST_CORRELATION} on held-out episodes ({RECENT} lines)",
        "the critics do not tell good decisions from bad ones they have not seen: the weights are noise",
        "give more critic_steps ({steps}), a higher gamma, more episodes, or rewards that come earlier",
    ),
    Rule(
        weights_collapse,
        f"`weight_effective_share` below {LEAST_EFFECTIVE} ({RECENT} lines)",
        "beta times the spread of Q is so large that a few decisions of each batch do all of the teaching",
        "lower beta ({beta:.2g}) or reward_scale ({scale:.2g})",
    ),
    Rule(
        weights_clipped,
        f"`weight_clipped` above {MOST_CLIPPED:.0%} ({RECENT} lines)",
        "many weights stand at the clip, where better is no longer told from good",
        "lower reward_scale ({scale:.2g}) or beta, or raise w_max",
    ),
)


class Watch:
    """Examines the stage's lines as they come; a resumed one knows what it showed before."""

    def __init__(self, output_dir: Path, settings: Mapping[str, Any], lines: Sequence[Mapping[str, float]]) -> None:
        """``lines``: of metrics.jsonl, up to where the stage goes on from."""
        self.path, self.settings, self.lines = output_dir / FINDINGS_FILE, settings, list(lines)
        done = self.lines[-1]["step"] if self.lines else 0
        kept = (
            [line for line in read_lines(self.path) if line["progress/iteration"] <= done] if self.path.exists() else []
        )
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self.shown = {line["rule"] for line in kept}

    def examine(self, step: int, figures: Mapping[str, float]) -> list[Finding]:
        """Take a line; what is new."""
        self.lines.append({"step": float(step), **figures})
        new = [f for f in diagnose(self.lines, self.settings, RULES) if f.rule not in self.shown]
        with self.path.open("a", encoding="utf-8") as file:
            for finding in new:
                self.shown.add(finding.rule)
                file.write(json.dumps({"progress/iteration": step, **asdict(finding)}) + "\n")
        return new
