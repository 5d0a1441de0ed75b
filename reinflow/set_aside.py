"""What a run has after the checkpoint that it goes on from, and the results of an end that is none any more: moved into
a dated folder, not lost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from reinflow import checkpoint
from reinflow.doctor import FINDINGS_FILE
from reinflow.metrics import METRICS_FILE, read_lines

SET_ASIDE = "set_aside"


def set_aside(run_dir: Path, iteration: int) -> Path | None:
    """Move what a run has after ``iteration`` into a dated folder: checkpoints, and the lines of its files.

    Returns:
        The folder; None if there is nothing.
    """
    later = [path for path in checkpoint.list_checkpoints(run_dir) if int(path.name) > iteration]
    if not later:  # lines alone are of iterations that no checkpoint holds: they will be written again
        return None
    files = [path for name in (METRICS_FILE, FINDINGS_FILE) if (path := run_dir / name).exists()]
    ahead = [path for path in files if any(row["progress/iteration"] > iteration for row in read_lines(path))]
    folder = _folder(run_dir)
    for path in ahead:
        shutil.copy2(path, folder / path.name)
    checkpoint.point_last_at(run_dir, iteration)
    for path in later:
        os.replace(path, folder / path.name)
    return folder


def set_results_aside(run_dir: Path, names: Sequence[str]) -> Path | None:
    """Move files and folders of these names into a dated folder; patterns name several.

    Returns:
        The folder; None where there is nothing of these names.
    """
    found = [path for name in names for path in run_dir.glob(name)]
    if not found:
        return None
    folder = _folder(run_dir)
    for path in found:
        os.replace(path, folder / path.name)
    return folder


def _folder(run_dir: Path) -> Path:
    folder = run_dir / SET_ASIDE / datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    folder.mkdir(parents=True)
    return folder
