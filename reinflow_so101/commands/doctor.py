"""reinflow-doctor: read a run's metrics and say what goes wrong, why, and which setting to change.

    reinflow-doctor outputs/train/2026-11-21/10-00-00_tiny

Works on finished and running trainings of train_reinflow.py. The same rules are evaluated while a run trains; what
they say is in its doctor.jsonl. The rules: notes/doctor.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from reinflow import UserError, run_command
from reinflow.doctor import diagnose
from reinflow.metrics import METRICS_FILE, read_metrics
from reinflow.stage import STAGE_FILE
from reinflow.symptoms import History
from reinflow_so101.doctor_rules import RULES

EARLY = 10  # iterations that most rules read


@dataclass(frozen=True)
class DoctorConfig:
    """Examine a training run."""

    run_dir: tyro.conf.Positional[str]
    """Run directory of train_reinflow.py: metrics.jsonl and config.json are read."""


def examine(run_dir: Path) -> str:
    """What the doctor says of a run, for the console.

    Raises:
        UserError: metrics.jsonl or config.json is missing, empty or not readable.
    """
    if any((run_dir / name).is_file() for name in (STAGE_FILE, "sft.json")):
        raise UserError(
            f"{run_dir} is of a supervised stage: what it found is in its findings.jsonl (reinflow-offline-rl) and "
            "was printed; give the run directory of a training"
        )
    for name in (METRICS_FILE, "config.json"):
        if not (run_dir / name).is_file():
            raise UserError(f"{run_dir} has no {name}: give the run directory of a training (outputs/train/...)")
    try:
        rows = read_metrics(run_dir / METRICS_FILE)
        config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        if not rows:
            raise UserError(f"{run_dir / METRICS_FILE} is empty: wait for the first iteration")
        findings = diagnose(rows, config, RULES)
    except json.JSONDecodeError as error:
        raise UserError(f"{run_dir} is damaged: a file is not JSON ({error})") from error
    history = History(rows, config)
    checked = ", ".join(rule.name for rule in RULES if rule.can_judge(history))
    silent = ", ".join(rule.name for rule in RULES if not rule.can_judge(history))
    notes = [f"too few iterations, metrics or settings for: {silent}"] if silent else []
    if history.config.absent:  # another robot's run, or another version's
        notes.append(f"settings that its config.json lacks: {', '.join(sorted(history.config.absent))}")
    if findings:
        count = "1 finding" if len(findings) == 1 else f"{len(findings)} findings, the most fundamental first"
        return "\n\n".join([f"{run_dir}: {len(rows)} iterations, {count}", *map(str, findings)])
    verdict = "healthy" if len(rows) >= EARLY else "healthy so far, but it is too early to tell"
    return "\n".join([f"{run_dir}: {len(rows)} iterations, {verdict}", f"checked: {checked or 'nothing'}", *notes])


def parse_args(argv: Sequence[str]) -> DoctorConfig:
    """The run directory."""
    return tyro.cli(DoctorConfig, args=list(argv), description=__doc__, prog="reinflow-doctor")


def main() -> None:
    """Console entry point."""
    run_command("reinflow-doctor", lambda: print(examine(Path(parse_args(sys.argv[1:]).run_dir))))


if __name__ == "__main__":
    main()
