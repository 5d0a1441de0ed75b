"""What Weights & Biases shows of a training beside its metrics: the report's figures, where and how episodes fail,
films of the same seeds before and after, and at the end the policy and the page to keep (notes/dashboard.md)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from reinflow_so101.checks import FlatConfig
from reinflow_so101.report import FILMS, REPORT_FILE
from reinflow_so101.report.after import EPISODES_PER_FILM

if TYPE_CHECKING:
    from reinflow.evaluate import EvalResult
    from reinflow.run import Run

FILMED = 3  # episodes of a film at most, one below the other; one in EPISODES_PER_FILM of what was evaluated

Table = tuple[list[str], list[list[object]]]
"""Columns and rows."""


def show_report(run: Run, config: FlatConfig, when: Literal["before", "after"], result: EvalResult) -> None:
    """Show an evaluation on the reporting seeds of the policy as it is; films and tables only where somebody looks."""
    tracker = run.tracker
    figures = {f"report/return_{when}": result.return_mean}
    if result.objective == "success":
        figures[f"report/success_{when}"] = result.success_rate
    tracker.summary(figures)
    if not tracker.takes_media or config.env_id:
        return
    for name, (columns, rows) in (("regions", regions(result)), ("outcomes", outcomes(result))):
        if rows:
            tracker.table(f"report/{name}_{when}", columns, rows)
    most = min(FILMED, len(result.episodes) // EPISODES_PER_FILM)
    films: dict[str, list[int]] = {
        when: seeds_to_film(run.run_dir, most) or [row.seed for row in result.episodes[:most]]
    }
    if when == "after":
        films["failures"] = [row.seed for row in result.episodes if not row.success][:most]
    for name, seeds in films.items():
        if seeds:
            show_film(run, config, name, seeds)


def regions(result: EvalResult) -> Table:
    """Success by where the episodes started: the cells of a map, then strips."""
    from reinflow.regions import success_by_region

    names = [f"{result.facts[fact].key(fact) if fact in result.facts else fact}" for fact in result.start_facts]
    columns = [f"{name} {end}" for name in names for end in ("from", "to")]
    rows: list[list[object]] = []
    for region in success_by_region(result):
        bounds = [end for fact in result.start_facts for end in region.bounds.get(fact, (None, None))]
        rows.append([*bounds, region.rate, *region.interval, region.episodes])
    return [*columns, "success", "ci_low", "ci_high", "episodes"], rows


def outcomes(result: EvalResult) -> Table:
    """How often episodes ended in which way, in the environment's order."""
    rows: list[list[object]] = [
        [name, count, count / len(result.episodes), result.outcomes.get(name, "")]
        for name, count in result.outcome_counts().items()
    ]
    return ["outcome", "episodes", "share", "what it is"], rows


def seeds_to_film(run_dir: Path, most: int) -> list[int]:
    """The seeds that are shown before and after, failures of the starting policy first; [] without its evaluation."""
    from reinflow.evaluate import EvalInfoError, read_eval_info
    from reinflow_so101.report.episodes import choose, kinds_of

    try:
        before = read_eval_info(run_dir / "eval_before.json")
    except EvalInfoError:
        return []
    return list(choose(kinds_of(before), most))


def show_film(run: Run, config: FlatConfig, name: str, seeds: Sequence[int]) -> None:
    """Film the policy as it is on these seeds, into RUN/films; what stands in the way is said and ends nothing."""
    from reinflow.evaluate import EvaluationStopped
    from reinflow.rollout import noise_free_actor

    act = run.unless_stopped(noise_free_actor(run.policy, config.chain()))
    try:
        from reinflow_so101.films import film_episodes, mp4_bytes, stack

        films = film_episodes(act, config.env(), seeds, name)
        path = run.run_dir / FILMS / f"{name}.mp4"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(mp4_bytes(stack(films)))
    except EvaluationStopped:
        return
    except Exception as error:  # no OpenGL, a full disk: a training does not end for want of a film
        run.tracker.message(f"no film of {name} ({error})")
        return
    caption = "; ".join(f"seed {film.seed}: {film.outcome}" for film in films)
    run.tracker.film(f"{FILMS}/{name}", path, caption)


def keep_results(run: Run) -> None:
    """The policy that a finished training is for, and its page, if there is one, as artefacts."""
    from reinflow.checkpoint import PRETRAINED

    if run.progress < 1:  # it will go on
        return
    page = run.run_dir / REPORT_FILE
    run.tracker.artifact(run.kept / PRETRAINED, "policy", "model")
    if page.is_file():
        run.tracker.artifact(page, "report", "report")
