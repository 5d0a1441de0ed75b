"""One HTML file about one training or several: charts, tables, films; it needs no network."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import count
from pathlib import Path
from shlex import join, quote
from typing import Any

from reinflow.seeds import FIRST_REPORTING_SEED
from reinflow_so101.doctor_rules import RULES
from reinflow_so101.report import REPORT_FILE
from reinflow_so101.report.charts import COUNTED, Chart, algorithm_charts, phase_totals, reward_charts, time_charts
from reinflow_so101.report.curves import learning_curve
from reinflow_so101.report.episodes import OutcomeRow, kinds_of, map_charts, outcome_chart, outcome_rows, worst_drawn
from reinflow_so101.report.files import RunFiles, read_runs
from reinflow_so101.report.films import Films, ShownFilm, make_films, named_start, within
from reinflow_so101.report.tables import (
    Change,
    Row,
    beyond_preset,
    change_of,
    differing,
    metric_columns,
    metric_explanations,
    results_table,
    say,
    say_score,
    say_time,
)

MOST_BYTES = 10_000_000
DEFAULT_FILMS = 6


@dataclass(frozen=True)
class Remark:
    """What is not there and why, and the commands that make it."""

    text: str
    commands: Sequence[str] = ()


@dataclass(frozen=True)
class Failures:
    """Where and how one run's episodes fail."""

    charts: Sequence[Chart] = ()
    outcomes: Sequence[OutcomeRow] = ()
    when: Sequence[str] = ()  # of the outcomes' counts
    remark: Remark | None = None
    worst: str = ""  # the region of the start that is surely bad


@dataclass(frozen=True)
class RunPart:
    """What the page says of one run."""

    name: str
    about: str
    before: tuple[str, str]
    after: tuple[str, str]
    change: Change | None
    missing: Remark | None  # which evaluations
    doubts: Sequence[Remark]  # of whether they are of this policy
    still_failing: Sequence[int]  # seeds
    facts: Sequence[tuple[str, str]]  # name, value
    failures: Failures
    phases: Sequence[tuple[str, str, float]]  # name, seconds in words, share
    findings: Sequence[Mapping[str, Any]]
    manifest: Sequence[str]
    special: Sequence[Row]  # settings that are not the preset's
    special_remark: str
    config: Sequence[Row]
    path: str


@dataclass(frozen=True)
class Page:
    """All that the template reads."""

    title: str
    made: str
    runs: Sequence[RunPart]
    unit: str  # what an evaluation counts
    test: str  # of the paired differences
    curve: Chart | None
    results: tuple[Sequence[str], Sequence[Sequence[str]]]
    differing: Sequence[Row]
    rewards: Sequence[Chart]
    algorithm: Sequence[Chart]
    not_logged: Sequence[str]
    times: Sequence[Chart]
    metrics: Mapping[str, str]
    columns: Sequence[Mapping[str, Any]]
    axis: str
    thinned: str
    rules: Sequence[Any] = RULES
    films: Sequence[ShownFilm] = ()
    film_remarks: Sequence[Remark] = ()

    def charts(self) -> list[Chart]:
        """Every chart of the page."""
        curve = [self.curve] if self.curve else []
        failures = [chart for run in self.runs for chart in run.failures.charts]
        return [*curve, *failures, *self.rewards, *self.algorithm, *self.times]

    def data(self) -> dict[str, Any]:
        """What the page's script draws."""
        figures = {chart.key: chart.figure() for chart in self.charts()}
        return {"figures": figures, "columns": self.columns, "axis": self.axis, "metrics": self.metrics}


def write_report(
    run_dirs: Sequence[Path],
    path: Path | None = None,
    films: int = DEFAULT_FILMS,
    stopped: Callable[[], bool] = lambda: False,
) -> Path:
    """Write the report on one training or several.

    Args:
        run_dirs: their directories; running and stopped ones are fine.
        path: of the file; None is report.html in the run's directory, or in the current one for several.
        films: at most so many in all; 0 for none.
        stopped: whether somebody asked to stop; the page then has no films.

    Returns:
        Its path.

    Raises:
        UserError: a directory holds no training, or a file in it is damaged; nothing was written.
        OSError: the file cannot be written.
    """
    runs = read_runs(run_dirs)
    path = path or (Path(run_dirs[0]) / REPORT_FILE if len(runs) == 1 else Path(REPORT_FILE))
    page = make_page(runs)
    text = render(replace(page, film_remarks=[Remark("None yet: they are made last, and this page written again.")]))
    _write(path, text)  # before minutes of films, so that a disk that refuses does so now
    shown, remarks = film_all(runs, films, MOST_BYTES - len(text.encode()) - 20_000, stopped)
    _write(path, render(replace(page, films=shown, film_remarks=remarks)))
    return path


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def film_all(
    runs: Sequence[RunFiles], most: int, room: int, stopped: Callable[[], bool]
) -> tuple[list[ShownFilm], list[Remark]]:
    """Films of every run, as many as there is room for, and what must be said of those that are not there."""
    if not most:
        command = join(["reinflow-report", *(str(run.path) for run in runs), "--films", str(DEFAULT_FILMS)])
        return [], [Remark("None in this report; to have some:", [command])]
    share = max(most // len(runs), 1)
    whose = ["" if len(runs) == 1 else f"{run.name}: " for run in runs]
    made: list[Films] = []
    for place, run in enumerate(runs):
        made.append(
            make_films(run, share, stopped) if place * share < most else Films(remark=f"left out (--films {most}).")
        )
    remarks = [f"{who}{_sentence(films.remark)}" for who, films in zip(whose, made, strict=True) if films.remark]
    shown, cut = within([film for films in made for film in films.shown], room)
    return shown, [Remark(text) for text in (*remarks, _sentence(cut)) if text]


def _sentence(text: str) -> str:
    """With a capital."""
    return text[:1].upper() + text[1:]


def make_page(runs: Sequence[RunFiles]) -> Page:
    """Everything but the films."""
    algorithm, not_logged = algorithm_charts(runs)
    metrics = metric_explanations(runs)
    by_return = all(run.is_gym for run in runs)
    long = [run.name for run in runs if len(run.shown_rows) < len(run.rows)]
    thinned = f"Charts of {', '.join(long)} show evenly chosen iterations: metrics.jsonl has all." if long else ""
    return Page(
        title=", ".join(run.name for run in runs),
        made=datetime.now().strftime("%Y-%m-%d %H:%M"),
        runs=[run_part(place, run) for place, run in enumerate(runs)],
        unit="mean return" if by_return else "success",
        test="the paired t test" if by_return else "McNemar's exact test",
        curve=learning_curve(runs),
        results=results_table(runs),
        differing=differing(runs),
        rewards=reward_charts(runs),
        algorithm=algorithm,
        not_logged=not_logged,
        times=time_charts(runs),
        metrics=metrics,
        columns=metric_columns(runs, list(metrics)),
        axis=COUNTED[runs[0].counted],
        thinned=thinned,
    )


def run_part(place: int, run: RunFiles) -> RunPart:
    """What there is to say of one run."""
    special, remark = beyond_preset(run)
    totals = phase_totals(run)
    whole = sum(totals.values()) or 1.0
    manifest = str(run.start.get("manifest", "")).splitlines()
    return RunPart(
        name=run.name, about=about(run),
        before=say_score(run.before, run.is_gym), after=say_score(run.after, run.is_gym),
        change=change_of(run), missing=missing_evaluations(run), doubts=doubts_of(run),
        still_failing=still_failing(run),
        facts=facts_of(run), failures=failures_of(place, run),
        phases=[(name, say_time(took), took / whole) for name, took in totals.items() if took / whole > 0.005],
        findings=run.findings, manifest=[line.strip() for line in manifest if line.strip()],
        special=special, special_remark=remark,
        config=[Row(name, (say(value),)) for name, value in run.config.items()], path=str(run.path),
    )  # fmt: skip


def still_failing(run: RunFiles) -> list[int]:
    """Seeds that fail before and after."""
    kinds = kinds_of(run.before, run.after) if run.before and run.after else {}
    return [seed for seed, kind in kinds.items() if kind == "still failing"]


def about(run: RunFiles) -> str:
    """What was trained on what, in a line."""
    config = run.config
    if run.is_gym:
        return f"{config.get('model_type')} in {config['env_id']}, preset {config.get('preset')}"
    told = f', told "{config["instruction"]}"' if config.get("instruction") else ""
    return f"{config.get('model_type')} on the task {config.get('task', 'lift')}{told}, preset {config.get('preset')}"


def facts_of(run: RunFiles) -> list[tuple[str, str]]:
    """The figures beside the headline."""
    config, done = run.config, run.rows[-1] if run.rows else {}
    found = [("state", run.state), ("training seed", say(config.get("seed")))]
    for name, goal in (("episodes", "num_episodes"), ("timesteps", "total_timesteps")):
        number = done.get(f"progress/{name}")
        if number is not None and (config.get(goal) or name == "episodes"):
            wanted = config.get(goal) if goal == "total_timesteps" or not config.get("total_timesteps") else None
            label = "control steps" if name == "timesteps" else name
            found.append((label, f"{number:,.0f}" + (f" of {wanted:,}" if wanted else "")))
    found.append(("iterations", f"{done.get('progress/iteration') or 0:,.0f}"))
    found.append(("time in iterations", say_time(run.seconds)))
    first = config.get("report_seed")
    if first is not None and (run.before or run.after):
        found.append(("reporting seeds", f"from {first:,}"))
    found.append(("doctor", f"{len({f['rule'] for f in run.findings}) or 'no'} findings"))
    return found


def eval_command(run: RunFiles, when: str) -> str:
    """What plays the reporting seeds again and puts the result where the report looks for it."""
    config, policy, acts = run.config, str(run.path), ""
    if when == "before":
        policy, acts = named_start(run), f" --num-denoising-steps {config.get('num_denoising_steps', 0)}"
    episodes, seed = config.get("report_episodes") or 200, config.get("report_seed", FIRST_REPORTING_SEED)
    seeds = f"--episodes {episodes} --seed {seed}"
    names = (f"eval_{when}" if number == 1 else f"eval_{when}-{number}" for number in count(1))
    place = next(place for name in names if not (place := run.path / name).exists())
    return f"reinflow-eval --policy-path {quote(policy)}{acts} {seeds} --output-dir {quote(str(place))}"


def doubts_of(run: RunFiles) -> list[Remark]:
    """Which evaluation is, or may be, of another policy than the run's, and what plays the right one."""
    return [
        Remark(f"{text} To play the policy that is there now:", [eval_command(run, when)])
        for when, text in run.doubts.items()
    ]


def missing_evaluations(run: RunFiles) -> Remark | None:
    """Which of the two reports is not there; None where both are."""
    absent = [when for when, result in (("before", run.before), ("after", run.after)) if result is None]
    if not absent:
        different = Remark("The evaluations before and after played different seeds: there are no pairs.")
        return None if change_of(run) else different
    if run.state == "running" and absent == ["after"]:
        return Remark("The run is at work: the evaluation after training comes at its end.")
    why = "a run does that with --report-episodes above 0"
    if run.config.get("report_episodes") and run.state != "finished" and absent == ["after"]:
        why = "the run was ended before its last episode, after which it does that"
    return Remark(
        f"Not evaluated {' and '.join(absent)} training: {why}. To make up for it:",
        [eval_command(run, when) for when in absent],
    )


def failures_of(place: int, run: RunFiles) -> Failures:
    """Maps and outcomes from the evaluations before and after."""
    results = {when: result for when, result in (("before", run.before), ("after", run.after)) if result}
    if not results:
        return Failures(remark=missing_evaluations(run))
    charts, missing = map_charts(place, results)
    outcomes, chart = outcome_rows(list(results.values())), outcome_chart(place, results)
    remarks = [missing] if missing else []
    remarks += [] if outcomes else ["the evaluations do not say how their episodes ended"]
    commands: list[str] = []
    if not (charts and outcomes) and not run.is_gym:
        remarks.append("they are of an older version, those of today tell")
        commands = [eval_command(run, when) for when in results]
    text = "; ".join(remarks)
    remark = Remark(f"{_sentence(text)}{':' if commands else '.'}", commands) if text else None
    worst = worst_drawn(results, "after") if run.after and charts else None
    where = worst.describe(run.after.facts) if worst and run.after else ""
    return Failures([*charts, *([chart] if chart else [])], outcomes, list(results), remark, where)


def render(page: Page) -> str:
    """The page as HTML; whatever comes from a run is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    loader = PackageLoader("reinflow_so101.report", ".")
    templates = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return templates.get_template("page.html").render(page=page, plotly=get_plotlyjs())
