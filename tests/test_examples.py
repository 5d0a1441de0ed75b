"""examples/: another robot on reinflow/ alone starts, resumes, is watched, and learns."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from reinflow.checkpoint import list_checkpoints
from reinflow.metrics import read_metrics
from reinflow_so101.commands.doctor import examine

REACHER = Path(__file__).parents[1] / "examples/reacher.py"


def reach(run: Path, *flags: str) -> str:
    command = [sys.executable, str(REACHER), "--output-dir", str(run), *flags]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=run.parent).stdout


def figures(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(run / "metrics.jsonl")]


def test_the_example_stays_small_and_knows_reinflow_alone():
    text = REACHER.read_text()
    assert text.count("\n") <= 120
    assert not re.search(r"so101|reinflow_vla|reinflow_so101|train_reinflow|lerobot", text)


def test_reacher_resumes_to_what_it_would_have_been(tmp_path):
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    reach(straight, "--episodes", "576")
    reach(parts, "--episodes", "384")
    assert [p.name for p in list_checkpoints(parts)] == ["000002"]
    out = reach(parts, "--episodes", "576", "--resume")
    assert "iteration 3 " in out and "iteration 2 " not in out
    assert figures(parts) == figures(straight) and len(figures(parts)) == 3
    assert figures(parts)[-1]["rollout/distance"] > 0  # a metric that the environment declares
    assert "iterations, healthy" in examine(parts)


@pytest.mark.slow
def test_reacher_learns_in_five_minutes(tmp_path):
    out = reach(tmp_path / "run")
    (low, before), (after, high) = (
        [float(x) for x in re.search(rf"{when}: success .*?interval ([\d.]+)-([\d.]+) %", out).groups()]
        for when in ("before", "after")
    )
    assert before < after, (low, before, after, high)
