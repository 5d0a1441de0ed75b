"""The report that a training writes of itself when it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reinflow_so101.checks import FlatConfig

if TYPE_CHECKING:
    from reinflow.run import Run

MOST_FILMS, EPISODES_PER_FILM = 4, 10  # a trial of a few episodes is not worth the time of films


def write_page(run: Run, config: FlatConfig) -> None:
    """Write RUN/report.html and say where it is; what stands in the way is said and ends nothing."""
    films = min(config.report_episodes // EPISODES_PER_FILM, MOST_FILMS)
    try:
        from reinflow_so101.report.page import write_report

        path = write_report([run.run_dir], films=films)
    except Exception as error:  # a full disk, a damaged file: the training is done and its policy saved
        again = f"reinflow-report {run.run_dir}"
        run.tracker.message(f"no report.html ({' '.join(str(error).split())}); once that is mended: {again}")
    else:
        run.tracker.message(f"report: {path}; open it in a browser")
