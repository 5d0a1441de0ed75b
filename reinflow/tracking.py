"""Metrics to the console, to metrics.jsonl and to Weights & Biases; each can be off.

Every sink has the methods of ``Sink``, which do nothing: what is off is a plain Sink, not an ``if``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, SupportsFloat

import rich
from rich.console import Console

from reinflow.env import Extra
from reinflow.metrics import TrackingError, check_names, known_metrics
from reinflow.progress import spinner
from reinflow.sinks import Counted, JsonlSink, LiveConsole, PlainConsole, Sink

Metrics = Mapping[str, SupportsFloat]
WandbMode = Literal["auto", "online", "offline", "off"]
WANDB_START_S, WANDB_REACH_S = 60, 10  # limits on its start and its end, and on finding its server
COPIED_MB = 20  # of an artifact: as much is copied, so that it can be sent later whatever becomes of the files
SENT_MB = 100  # more than a usual line sends within WANDB_START_S: larger ones stay where they are

Objective = Literal["success", "return"]
TAG_LENGTH = 64  # Weights & Biases' limit
DATA_DIR = "WANDB_DATA_DIR"  # where it copies to
REPORT: dict[str, str] = {
    "report/success_before": "Noise-free success of the starting policy on the reporting seeds.",
    "report/success_after": "The same of the best checkpoint.",
    "report/return_before": "Mean return of the starting policy on the reporting seeds.",
    "report/return_after": "The same of the best checkpoint.",
}
"""Figures of a whole run, for the table of all runs, each with an explanation."""


class WandbSink(Sink):
    """A Weights & Biases run, over the episodes (or control steps): a resumed run draws over what it repeats, and runs
    with other rollouts compare. ``progress/iteration`` is logged too, for another axis.

    What goes wrong after its start is said once and never ends a training: metrics.jsonl has everything.
    """

    takes_media = True

    def __init__(
        self,
        run_dir: Path,
        mode: Literal["online", "offline"],
        project: str,
        config: Mapping[str, Any],
        run_id: str | None,
        say: Callable[[str], None],
        *,
        counted: Counted = "episodes",
        objective: Objective = "success",
        tags: Sequence[str] = (),
        notes: str = "",
    ) -> None:
        import wandb  # here: its import takes a second and no other sink needs it

        self.say, self.works = say, True
        self.moved = DATA_DIR not in os.environ
        if self.moved:  # else copies of artefacts and tables would lie in the user's home
            os.environ[DATA_DIR] = str(run_dir.resolve() / "wandb")
        try:
            self.run = wandb.init(
                project=project,
                name=run_dir.resolve().name,
                dir=str(run_dir),
                config=dict(config),
                tags=[tag[:TAG_LENGTH] for tag in tags if tag] or None,
                notes=notes or None,
                mode=mode,
                id=run_id,
                # "must" would refuse to go on with a run that was offline so far; offline, the id alone is enough.
                resume="allow" if run_id and mode == "online" else None,
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    init_timeout=WANDB_START_S,
                    login_timeout=WANDB_REACH_S,
                    finish_timeout=WANDB_START_S,
                    finish_timeout_raises=False,
                ),
            )
        except BaseException as error:
            self._give_data_dir_back()
            if not isinstance(error, wandb.Error):
                raise
            raise TrackingError(
                f"Weights & Biases did not start ({error}): log in with `wandb login`, write to disk with "
                "--wandb-mode offline (then `wandb sync`), or turn it off with --no-wandb"
            ) from error
        self._try(partial(self._define_metrics, f"progress/{counted}", objective))

    def _define_metrics(self, axis: str, objective: Objective) -> None:
        """One axis for all; of the result the runs' table shows the best and the last, of all else the last."""
        self.run.define_metric(axis)
        self.run.define_metric("*", step_metric=axis)
        result = "eval/success_rate" if objective == "success" else "eval/return_mean"
        self.run.define_metric(result, step_metric=axis, summary="max,last")

    def _offer(self, what: str, send: Callable[[], object]) -> None:
        """Send something beside the metrics, which go on without it."""
        if self.works:
            try:
                send()
            except Exception as error:  # of any kind, as in _try
                self.say(f"Weights & Biases did not take {what} ({error}): it is in the run directory")

    def _try(self, send: Callable[[], object]) -> None:
        if self.works:
            try:
                send()
            except Exception as error:  # of any kind: it is a copy of what metrics.jsonl holds
                self.works = False
                self.say(f"Weights & Biases stopped ({error}): the training goes on, metrics.jsonl has everything")

    def log(self, metrics: Mapping[str, float]) -> None:
        self._try(lambda: self.run.log(dict(metrics)))

    def alert(self, title: str, text: str, error: bool) -> None:
        self._try(lambda: self.run.alert(title=title, text=text, level="ERROR" if error else "WARN"))

    def summary(self, figures: Mapping[str, float]) -> None:
        self._try(lambda: self.run.summary.update(dict(figures)))

    def film(self, name: str, path: Path, caption: str) -> None:
        def send() -> None:
            import wandb

            self.run.log({name: wandb.Video(str(path), caption=caption, format="mp4")})

        self._offer(f"the film {name}", send)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        def send() -> None:
            import wandb

            self.run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

        self._offer(f"the table {name}", send)

    def artifact(self, path: Path, name: str, kind: str) -> None:
        def send() -> None:
            import wandb

            at = path.resolve()
            files = {file: str(file.relative_to(at)) for file in sorted(at.rglob("*")) if file.is_file()}
            files = files or {at: at.name}
            size = sum(file.stat().st_size for file in files) / 1e6
            artifact = wandb.Artifact(f"{name}-{self.run.id}", type=kind, metadata={"megabytes": round(size, 1)})
            for file, inside in files.items():
                if size > SENT_MB:
                    artifact.add_reference(file.as_uri(), name=inside)
                else:
                    policy: Literal["mutable", "immutable"] = "mutable" if size <= COPIED_MB else "immutable"
                    artifact.add_file(str(file), name=inside, policy=policy, skip_cache=True)
            self.run.log_artifact(artifact)
            stays = (
                f", more than {SENT_MB} MB: it stays in {at}, the artifact names the files" if size > SENT_MB else ""
            )
            self.say(f"Weights & Biases: artifact {name}, {size:,.1f} MB{stays}")

        self._offer(name, send)

    def close(self, failed: bool) -> None:
        with spinner("Weights & Biases: sending what is left"):
            self._try(lambda: self.run.finish(exit_code=int(failed)))
        self._give_data_dir_back()

    def _give_data_dir_back(self) -> None:
        if self.moved:
            os.environ.pop(DATA_DIR, None)


def resolve_wandb_mode(mode: WandbMode) -> tuple[Literal["online", "offline", "off"], str]:
    """What "auto" comes to here, and a line that says why; never a prompt, and an answer within seconds.

    WANDB_MODE decides if it is set. Otherwise "online" needs a key (WANDB_API_KEY or `wandb login`) and a server that
    answers; without them it is "offline".

    Raises:
        TrackingError: "online" was asked for and cannot be.
    """
    if mode == "auto" and (named := os.environ.get("WANDB_MODE")):
        meanings = {"online": "online", "offline": "offline", "dryrun": "offline", "disabled": "off"}
        if named not in meanings:
            raise TrackingError(f"WANDB_MODE={named} is not known: set one of {', '.join(meanings)}")
        mode = meanings[named]  # type: ignore[assignment]
    if mode in ("offline", "off"):
        return mode, ""
    why = _why_not_online()
    if not why:
        return "online", ""
    if mode == "online":
        raise TrackingError(f"Weights & Biases: {why}. Go on without it by --wandb-mode offline or --no-wandb")
    return "offline", f"Weights & Biases: {why}, so the run is kept on disk; `wandb sync` sends it later"


def _why_not_online() -> str:
    import requests
    import wandb

    settings = wandb.Settings()
    settings.update_from_system_settings()  # what `wandb login --host` stored
    settings.update_from_env_vars(dict(os.environ))
    server = str(settings.base_url)
    if not os.environ.get("WANDB_API_KEY") and requests.utils.get_netrc_auth(server) is None:
        return "no key is known (`wandb login` stores one)"
    try:
        requests.head(server, timeout=WANDB_REACH_S)
    except requests.RequestException as error:
        return f"{server} does not answer ({type(error).__name__})"
    return ""


class Tracker:
    """Sends checked metrics to every sink. A context manager: leaving it closes the sinks."""

    def __init__(
        self, sinks: Sequence[Sink], wandb_run_id: str | None = None, extras: Mapping[str, Extra] | None = None
    ) -> None:
        self.sinks = list(sinks)
        self.wandb_run_id = wandb_run_id
        self.known = known_metrics(extras or {})

    def log(self, iteration: int, metrics: Metrics) -> None:
        """Log an iteration's metrics.

        Args:
            iteration: iterations completed; logged as ``progress/iteration``.
            metrics: numbers or 0-dim tensors by the names of METRICS or of the environment's extras.

        Raises:
            TrackingError: a name has no explanation.
        """
        check_names(metrics, self.known)
        numbers = {name: float(value) for name, value in metrics.items()} | {"progress/iteration": float(iteration)}
        for sink in self.sinks:
            sink.log(numbers)

    def progress(self, episodes: int) -> None:
        """Move the live bar within an iteration."""
        for sink in self.sinks:
            sink.progress(episodes)

    @property
    def takes_media(self) -> bool:
        """Whether films and tables go anywhere."""
        return any(sink.takes_media for sink in self.sinks)

    def summary(self, figures: Metrics) -> None:
        """Figures of the whole run, by the names of REPORT, for the table of all runs. Raises TrackingError."""
        check_names(figures, REPORT)
        for sink in self.sinks:
            sink.summary({name: float(value) for name, value in figures.items()})

    def film(self, name: str, path: Path, caption: str) -> None:
        """Show an mp4 of the run directory under ``name``."""
        for sink in self.sinks:
            sink.film(name, path, caption)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Show a table under ``name``."""
        for sink in self.sinks:
            sink.table(name, columns, rows)

    def artifact(self, path: Path, name: str, kind: str) -> None:
        """Send a file or a folder to Weights & Biases, to keep with the run.

        ``name``: there, before the run's id; ``kind``: Weights & Biases' word for what it is, such as "model".
        Up to COPIED_MB it is copied into RUN/wandb, up to SENT_MB it is sent from where it is, offline by a later
        `wandb sync`; of what is larger the artifact names the files with their checksums: nothing is copied or sent.
        """
        for sink in self.sinks:
            sink.artifact(path, name, kind)

    def message(self, text: str) -> None:
        """Print a line without tearing the live bar."""
        for sink in self.sinks:
            sink.message(text)

    def alert(self, title: str, text: str, error: bool = False) -> None:
        """Show ``text`` now; Weights & Biases notifies its user under ``title``."""
        for sink in self.sinks:
            sink.alert(title, text, error)

    def close(self, failed: bool = False) -> None:
        """Close every sink, also those after one that fails to close."""
        with ExitStack() as stack:
            for sink in self.sinks:
                stack.callback(sink.close, failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


def open_tracker(
    run_dir: Path | str,
    *,
    config: Mapping[str, Any],
    num_episodes: int,
    episodes_done: int,
    counted: Counted = "episodes",
    wandb_mode: WandbMode,
    wandb_project: str,
    wandb_run_id: str | None,
    resumed_iteration: int | None,
    extras: Mapping[str, Extra] | None = None,
    tags: Sequence[str] = (),
    notes: str = "",
    objective: Objective = "success",
    console: Console | None = None,
) -> Tracker:
    """A tracker with console, metrics.jsonl and, unless ``wandb_mode`` is "off", Weights & Biases.

    Args:
        run_dir: run directory; made if missing.
        config: JSON-able settings, shown by Weights & Biases.
        num_episodes: training episodes (or control steps, by ``counted``) in all.
        episodes_done: of these, done before this session.
        counted: what the run's length is counted in.
        wandb_mode: "online", "offline" (kept in run_dir, for `wandb sync`), "off" (wandb is not imported) or "auto".
        wandb_project: its project.
        wandb_run_id: run to go on with; None starts one. Save ``Tracker.wandb_run_id`` in checkpoints.
        resumed_iteration: iterations completed at the checkpoint that the run resumes from; later lines of
            metrics.jsonl are dropped, as the run will write them again. None for a new run.
        extras: of the environment, whose metrics are logged too.
        tags: what Weights & Biases finds the run by.
        notes: shown beside the run there.
        objective: of the environment, what is best of a run.
        console: where to print; rich's own by default, which other bars are on. A terminal gets a live bar, anything
            else plain lines.

    Raises:
        TrackingError: Weights & Biases cannot be started.
    """
    run_dir, console = Path(run_dir), console or rich.get_console()
    run_dir.mkdir(parents=True, exist_ok=True)
    wandb_sink = Sink()
    with spinner("Weights & Biases: looking for the server", console):
        mode, why = resolve_wandb_mode(wandb_mode)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    if why:
        say(why)
    if mode != "off":
        with spinner("Weights & Biases: starting", console):
            wandb_sink = run = WandbSink(
                run_dir, mode, wandb_project, config, wandb_run_id, say,
                counted=counted, objective=objective, tags=tags, notes=notes,
            )  # fmt: skip
        wandb_run_id = str(run.run.id)
    jsonl = JsonlSink(run_dir, resumed_iteration)
    # The live bar last: it must not be drawn when another sink fails to start.
    style = LiveConsole if console.is_terminal else PlainConsole
    return Tracker([wandb_sink, jsonl, style(console, num_episodes, episodes_done, counted)], wandb_run_id, extras)
