"""examples/: another robot on reinflow/ alone starts, resumes, is watched, and learns."""

import contextlib
import io
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reinflow.checkpoint import list_checkpoints
from reinflow.evaluate import wilson_interval
from reinflow.metrics import read_metrics
from reinflow_so101.commands.doctor import examine
from tests.documented_commands import started_as

REACHER = Path(__file__).parents[1] / "examples/reacher.py"


def reach(run: Path, *flags: str) -> str:
    command = [sys.executable, str(REACHER), "--output-dir", str(run), *flags]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=run.parent).stdout


def reach_here(run: Path, *flags: str) -> str:
    """The same without a process that imports torch once more. Raises SystemExit for a refusal."""
    out = io.StringIO()
    with started_as(str(REACHER), ["--output-dir", str(run), *flags]), contextlib.redirect_stdout(out):
        runpy.run_path(str(REACHER), run_name="__main__")
    return out.getvalue()


def figures(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(run / "metrics.jsonl")]


def test_the_example_stays_small_and_knows_reinflow_alone():
    text = REACHER.read_text()
    assert text.count("\n") <= 120
    assert not re.search(r"so101|reinflow_vla|reinflow_so101|train_reinflow|lerobot", text)


def test_reacher_resumes_to_what_it_would_have_been(tmp_path):
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    reach(straight, "--episodes", "384")
    reach_here(parts, "--episodes", "192")
    assert [p.name for p in list_checkpoints(parts)] == ["000000", "000001"]
    out = reach_here(parts, "--episodes", "384", "--resume")
    assert re.findall(r"^iteration (\d+)", out, re.MULTILINE) == ["2"]
    assert figures(parts) == figures(straight) and len(figures(parts)) == 2
    assert figures(parts)[-1]["rollout/distance"] > 0  # a metric that the environment declares
    assert {"reward/near", "reward/reached"} <= figures(parts)[-1].keys()
    assert "iterations, healthy" in examine(parts)
    with pytest.raises(SystemExit, match=r"reacher: .*holds a run already"):
        reach_here(parts, "--episodes", "384")  # a run is never written over
    with pytest.raises(SystemExit, match=r"reacher: .*seed"):
        reach_here(parts, "--episodes", "576", "--resume", "--seed", "1")


@pytest.mark.slow
def test_reacher_learns_in_five_minutes(tmp_path):
    """From a policy that knows nothing: none of the first iteration's episodes reach."""
    start = time.monotonic()
    out = reach(tmp_path / "run")
    assert time.monotonic() - start < 300
    rows = figures(tmp_path / "run")
    wins, episodes = round(rows[0]["rollout/success_rate"] * 192), 192
    low = float(re.search(r"seeds from 10000: success .*?interval ([\d.]+)-", out)[1]) / 100
    assert wilson_interval(wins, episodes)[1] < low
