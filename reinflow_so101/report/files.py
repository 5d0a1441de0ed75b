"""What a training's directory says, read for its report; nothing is changed there."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from reinflow import UserError
from reinflow.checkpoint import BEST, CHECKPOINTS, LAST, PRETRAINED, stored_value
from reinflow.checksums import sha256
from reinflow.doctor import FINDINGS_FILE
from reinflow.evaluate import EvalResult, read_eval_info
from reinflow.metrics import METRICS_FILE, read_lines, read_metrics
from reinflow.settings import CONFIG_FILE, read_config
from reinflow_so101.commands.monitor import STAGE_FILES, budget, failed, iteration_seconds, last, owner
from reinflow_so101.manifest import START_FILE
from reinflow_vla.directory import weights_file

EVAL_FILE = "eval_info.json"  # of reinflow-eval
FINDING = ("rule", "severity", "evidence", "cause", "remedy")  # what a line of doctor.jsonl tells
MOST_POINTS, FEWEST_POINTS = 1_200, 100  # of a line in all runs together, and in one of them


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that a run's directory holds, and whether it is of the policy that the report is about."""

    result: EvalResult
    fits: bool | None  # None: the file does not say which weights it played
    written: float  # seconds, of the file
    iteration: int | None = None  # of the checkpoint that was played, where the file tells
    place: str = ""  # in the run's directory


@dataclass(frozen=True)
class RunFiles:
    """One training, as its files have it."""

    path: Path
    name: str  # among the runs of this report
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, float | None]] = ()  # of metrics.jsonl
    findings: Sequence[Mapping[str, Any]] = ()  # of doctor.jsonl, in the order of their iterations
    before: EvalResult | None = None
    after: EvalResult | None = None
    doubts: Mapping[str, str] = field(
        default_factory=dict
    )  # when -> why that evaluation is, or may be, of another policy
    after_iteration: int | None = None  # that the evaluation after played, where that is known
    start: Mapping[str, Any] = field(default_factory=dict)  # what trains, and the preset's settings at that time
    state: str = "stopped"  # running, finished, stopped or failed
    most_points: int = MOST_POINTS  # of a line in a chart

    @property
    def is_gym(self) -> bool:
        """Whether it acts in a Gymnasium environment, which is judged by its return."""
        return bool(self.config.get("env_id"))

    @property
    def counted(self) -> str:
        """The metric on the x axis."""
        return _counted(self.config, self.rows)

    @cached_property
    def shown_rows(self) -> Sequence[Mapping[str, float | None]]:
        """The rows that charts show: all, or evenly chosen ones and every evaluation of a very long run."""
        step = math.ceil(len(self.rows) / self.most_points)
        return [
            row
            for number, row in enumerate(self.rows)
            if step <= 1 or number % step == 0 or any(name.startswith("eval/") for name in row)
        ]

    def x_at(self, iteration: float) -> float:
        """Where an iteration lies on the x axis."""
        reached = [row for row in self.rows if (row["progress/iteration"] or 0) <= iteration]
        return float((reached[-1].get(self.counted) if reached else 0) or 0)

    @property
    def seconds(self) -> float:
        """Of all iterations."""
        return iteration_seconds(self.rows)

    @property
    def final_policy(self) -> Path | None:
        """The best checkpoint's policy, else the last one's."""
        return _final_policy(self.path)


def _final_policy(path: Path) -> Path | None:
    places = (path / CHECKPOINTS / name / PRETRAINED for name in (BEST, LAST))
    return next((place for place in places if place.is_dir()), None)


def _iteration_of(policy: Path | None) -> int | None:
    name = policy.resolve().parent.name if policy else ""
    return int(name) if re.fullmatch(r"\d+", name) else None


def _counted(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    wanted = budget(config)[0] if "num_episodes" in config else "progress/episodes"
    return wanted if rows and wanted in rows[-1] else "progress/iteration"


def read_run(path: Path, name: str, most_points: int = MOST_POINTS) -> RunFiles:
    """A training's files.

    Args:
        path: its directory.
        name: what the report calls it.
        most_points: of a line in a chart, so that the page stays small.

    Raises:
        UserError: it is no training, or a file of it is damaged; the message names file and line.
    """
    if not (path / CONFIG_FILE).is_file() or not _is_training(path):
        kind = "is of a supervised stage" if any((path / f).is_file() for f in STAGE_FILES) else "holds no training"
        raise UserError(f"{path} {kind}: name the run directory of train_reinflow.py (with config.json)")
    config = read_config(path)
    rows = read_metrics(path / METRICS_FILE) if (path / METRICS_FILE).is_file() else []
    policy = _final_policy(path)
    found = {when: _evaluation(path, when, _weights(policy, when)) for when in ("before", "after")}
    before, after = found["before"], found["after"]
    return RunFiles(
        path, name, config, rows, _findings(path / FINDINGS_FILE),
        before=before.result if before else None, after=after.result if after else None,
        doubts={when: text for when, one in found.items() if one and (text := _doubt(one, when, policy))},
        after_iteration=after.iteration if after and after.iteration is not None else _iteration_of(policy),
        start=_start(path), state=_state(path, config, rows), most_points=most_points,
    )  # fmt: skip


def _is_training(path: Path) -> bool:
    if any((path / name).is_file() for name in STAGE_FILES):
        return False
    return (path / METRICS_FILE).is_file() or (path / CHECKPOINTS).is_dir()


def _findings(path: Path) -> list[dict[str, Any]]:
    """What the doctor said; raises UserError for a line that does not tell all of it."""
    findings = read_lines(path) if path.is_file() else []
    for number, finding in enumerate(findings, 1):
        if lacking := [key for key in FINDING if not isinstance(finding.get(key), str)]:
            raise UserError(
                f"{path}, line {number}, is damaged: it has no {', '.join(lacking)}; mend or remove the line"
            )
    return findings


def _weights(policy: Path | None, when: str) -> str:
    """sha256 of the weights that the report shows before or after training; "" where that is not known."""
    if policy is None:
        return ""
    try:
        if when == "before":
            return str(stored_value(policy.parent, "start_weights") or "")
        return sha256(weights_file(policy))
    except (UserError, OSError):  # a checkpoint that is being replaced, or is damaged: films say so
        return ""


def _evaluation(path: Path, when: str, weights: str) -> Evaluation | None:
    """The newest that fits the policy, else the newest: of the training's own and of what reinflow-eval wrote into
    folders of that name (eval_after, eval_after-2, ...)."""
    places = [path / f"eval_{when}.json", *path.glob(f"eval_{when}*/{EVAL_FILE}")]
    found = [_read_evaluation(place, path, weights) for place in places if place.is_file()]
    rank = {True: 2, None: 1, False: 0}
    return max(found, key=lambda one: (rank[one.fits], one.written), default=None)


def _read_evaluation(place: Path, run: Path, weights: str) -> Evaluation:
    result = read_eval_info(place)
    policy = json.loads(place.read_text(encoding="utf-8")).get("policy")
    played: Mapping[str, Any] = policy if isinstance(policy, dict) else {}
    fits = played["sha256"] == weights if played.get("sha256") and weights else None
    iteration = played.get("iteration")
    if iteration is None and played.get("directory"):
        iteration = _iteration_of(Path(str(played["directory"])))
    return Evaluation(
        result, fits, place.stat().st_mtime, iteration if isinstance(iteration, int) else None,
        str(place.relative_to(run)),
    )  # fmt: skip


def _doubt(found: Evaluation, when: str, policy: Path | None) -> str:
    """Why an evaluation is, or may be, of another policy than the report's; "" where nothing speaks for that."""
    if found.fits is False and when == "before":
        return f"The evaluation before ({found.place}) is of another policy than the run started from."
    if found.fits is False:
        of = "an earlier policy" if found.iteration is None else f"the policy of iteration {found.iteration}"
        return f"The evaluation after ({found.place}) is of {of}, before training went on."
    if found.fits is None and when == "after" and policy:
        weights = weights_file(policy)
        if weights.is_file() and weights.stat().st_mtime > found.written:
            return (
                f"The evaluation after ({found.place}) is older than the policy in {policy.parent.name}, and does not "
                "say which one it played."
            )
    return ""


def _start(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads((path / START_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path / START_FILE} is damaged ({error}): remove it, the report goes without") from error
    return content if isinstance(content, dict) else {}


def _state(path: Path, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    holder = owner(path)
    if holder and holder.get("pid") != os.getpid():  # a training that writes its own report is at its end
        return "running"
    counted, total = budget(config) if "num_episodes" in config else ("progress/episodes", math.inf)
    if (last(rows, counted) or 0.0) >= total:
        return "finished"
    return "failed" if failed(path) else "stopped"


def read_runs(paths: Sequence[Path]) -> list[RunFiles]:
    """Several trainings under names that tell them apart; raises UserError as ``read_run`` does, or for one named
    twice."""
    resolved = [path.resolve() for path in paths]
    if twice := [path for path, real in zip(paths, resolved, strict=True) if resolved.count(real) > 1]:
        raise UserError(f"{twice[0]} is named twice: name every run once")
    names = [path.name for path in resolved]
    if len(set(names)) < len(names):
        common = Path(os.path.commonpath([path.parent for path in resolved]))
        names = [str(path.relative_to(common)) for path in resolved]
    points = max(MOST_POINTS // len(paths), FEWEST_POINTS)
    return [read_run(path, name, points) for path, name in zip(paths, names, strict=True)]
