"""Every benchmark still runs; what it measures is not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *flags: str) -> str:
    """Standard output of a benchmark."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kl_scaling(tmp_path):
    assert "KL" in run("kl_scaling.py", "--quick", "--csv", str(tmp_path / "kl.csv"))
    assert len((tmp_path / "kl.csv").read_text().splitlines()) == 3


def test_plot_runs_reads_recorded_metrics(tmp_path):
    recorded = ROOT / "tests/data/doctor/healthy_20_iterations/metrics.jsonl"
    lines = [json.loads(line) | {"time/iteration": 30.0} for line in recorded.read_text().splitlines()]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    out = run("plot_runs.py", str(tmp_path / "run"), "--png", str(tmp_path / "curve.png"), "--csv-dir", str(tmp_path))
    assert "run: before None, after None, 600" in out
    assert (tmp_path / "curve.png").stat().st_size > 1000
    rows = (tmp_path / "run.csv").read_text().splitlines()
    assert len(rows) == 21
    assert rows[-1].split(",")[1] == f"{lines[-1]['progress/episodes']:.5g}"


def test_memory_compares_plan_and_process(tmp_path):
    out = run("memory.py", "--policy", "tiny-pi0", "--rows", "2", "--csv", str(tmp_path / "memory.csv"))
    assert "forward and backward, 2 decisions" in out
    assert len((tmp_path / "memory.csv").read_text().splitlines()) == 5


@pytest.mark.slow
def test_ablation(tmp_path):
    assert "| preset |" in run("ablation.py", "--quick", "--output-dir", str(tmp_path))
