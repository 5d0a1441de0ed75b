"""A thousand iterations in one process: memory, open files and the disk stay as they were."""

from pathlib import Path

import pytest

from reinflow.checkpoint import BEST, LAST, list_checkpoints, resolve_checkpoint
from reinflow.metrics import read_metrics
from tests.faults.trainer import FAST, Trainer

ITERATIONS, KEPT = 1_000, 3
FLAGS = [
    "--episodes", str(2 * ITERATIONS), "--keep-checkpoints", str(KEPT), "--eval-interval", "50", "--eval-episodes", "2",
]  # fmt: skip


@pytest.mark.slow
def test_a_thousand_iterations(trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory, samples = tmp_path / "run", tmp_path / "samples"
    ended = trainer.run([*FAST, *FLAGS, "--output-dir", str(directory)], directory, samples=samples, limit_s=3600)
    assert ended.code == 0, ended.err
    lines = {int(i): (int(rss), int(files)) for i, rss, files in map(str.split, samples.read_text().splitlines())}
    assert list(lines) == list(range(1, ITERATIONS + 1))
    (early, early_files), (late, late_files) = lines[100], lines[ITERATIONS]
    with capsys.disabled():
        print(
            f"\nfaults: soak iterations={ITERATIONS} memory={early >> 20} -> {late >> 20} MiB "
            f"files={early_files} -> {late_files}"
        )
    assert late < 1.1 * early, f"{early} bytes after iteration 100, {late} after {ITERATIONS}"
    assert late_files == early_files, f"{early_files} open files after iteration 100, {late_files} after {ITERATIONS}"
    logged = [row["progress/iteration"] for row in read_metrics(directory / "metrics.jsonl")]
    assert logged == list(range(1, ITERATIONS + 1))
    kept = {path.resolve() for path in list_checkpoints(directory)}
    newest = {directory.resolve() / "checkpoints" / f"{i:06d}" for i in range(ITERATIONS - KEPT + 1, ITERATIONS + 1)}
    assert kept == newest | {resolve_checkpoint(directory, BEST)} and resolve_checkpoint(directory, LAST) in newest
    left = {path.name for path in (directory / "checkpoints").iterdir()} - {path.name for path in kept}
    assert left == {LAST, BEST}, f"also left in checkpoints/: {left}"
