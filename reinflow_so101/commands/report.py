"""reinflow-report: one HTML file about a training, or about several beside each other.

    reinflow-report outputs/train/2026-11-21/10-00-00_tiny
    reinflow-report runs/seed-0 runs/seed-1 runs/seed-2 --output seeds.html

Success with its intervals, where and how episodes fail, films of the same seeds before and after training, every metric
and setting. The file needs no network; it works on running, finished and stopped trainings.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from reinflow import ConfigError, run_command
from reinflow.settings import Range, check_ranges


@dataclass(frozen=True)
class ReportConfig:
    """Write the report on one training or several."""

    run_dirs: tyro.conf.Positional[tuple[str, ...]]
    """Run directories of train_reinflow.py."""
    output: str = ""
    """The file; empty is report.html in the run's directory, or in the current one for several runs."""
    films: Annotated[int, Range(0, 100)] = 6
    """Films in all, of the same seeds before and after training, failures first; 0 for none."""


def parse_args(argv: Sequence[str]) -> ReportConfig:
    """Runs and flags; raises ConfigError."""
    config = tyro.cli(ReportConfig, args=list(argv), description=__doc__, prog="reinflow-report")
    check_ranges(config)
    if not config.run_dirs:
        raise ConfigError("run_dirs is empty: name at least one run directory")
    if Path(config.output).is_dir() and config.output:
        raise ConfigError(f"output={config.output} is a directory: name a file, such as {config.output}/report.html")
    return config


def make_report(config: ReportConfig) -> Path:
    """Write it and say where it is."""
    from reinflow_so101.report.page import write_report

    path = write_report(
        [Path(run) for run in config.run_dirs], Path(config.output) if config.output else None, config.films
    )
    print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB: open it in a browser")
    return path


def main() -> None:
    """Console entry point."""
    run_command("reinflow-report", lambda: make_report(parse_args(sys.argv[1:])))


if __name__ == "__main__":
    main()
