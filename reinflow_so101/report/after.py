"""The report that a training writes of itself when it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from reinflow_so101.checks import FlatConfig
from reinflow_so101.report import FILMS, REPORT_FILE

if TYPE_CHECKING:
    from reinflow.run import Run

MOST_FILMS, EPISODES_PER_FILM = 4, 10  # a trial of a few episodes is not worth the time of films
RESULTS = ("eval_after*", REPORT_FILE, f"{FILMS}/after.mp4", f"{FILMS}/failures.mp4")
"""What a run's directory holds of its end; none of it is of the policy any more once training goes on."""


def played_policy(run: Run, when: Literal["before", "after"]) -> dict[str, Any]:
    """Which weights an evaluation of the run plays: the directory, their sha256 and, after training, the iteration."""
    from reinflow.checkpoint import PRETRAINED
    from reinflow.checksums import sha256
    from reinflow_so101.command_line import PATH_FIELDS
    from reinflow_vla.directory import weights_file

    if when == "before":
        return {"directory": run.config[PATH_FIELDS[run.config["model_type"]]], "sha256": run.start_weights}
    kept = run.kept.resolve()
    policy = kept / PRETRAINED
    return {"directory": str(policy), "sha256": sha256(weights_file(policy)), "iteration": int(kept.name)}


def write_page(run: Run, config: FlatConfig) -> None:
    """Write RUN/report.html and say where it is; what stands in the way is said and ends nothing. A signal leaves the
    films out."""
    films = min(config.report_episodes // EPISODES_PER_FILM, MOST_FILMS)
    try:
        from reinflow_so101.report.page import write_report

        path = write_report([run.run_dir], films=films, stopped=lambda: run.stop_requested)
    except Exception as error:  # a full disk, a damaged file: the training is done and its policy saved
        again = f"reinflow-report {run.run_dir}"
        run.tracker.message(f"no {REPORT_FILE} ({' '.join(str(error).split())}); once that is mended: {again}")
    else:
        run.tracker.message(f"report: {path}; open it in a browser")
