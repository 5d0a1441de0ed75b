"""The directory of a supervised stage: what it was asked for, its figures, what a killed one goes on from, its result.

    <output_dir>/                  the policy, once the stage is finished
                stage.json         settings; and what was measured, once it is finished
                metrics.jsonl      {"step": n, figure: value, ...} a line
                progress/          while it is not (reinflow/supervised.py)

Free of torch, so that a wrong directory is refused at once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from reinflow import ConfigError, UserError
from reinflow.checksums import write_atomically
from reinflow.lock import LOCK_FILE, RunLock
from reinflow.metrics import METRICS_FILE, read_rows
from reinflow.settings import check_same_settings

STAGE_FILE, PROGRESS = "stage.json", "progress"
WAYS = ("resume", "output_dir", "num_threads")  # settings that say how a stage is opened, not what it is


class StageDirectory:
    """An open one; a context manager. What ends it without ``finish`` leaves it ready for --resume."""

    def __init__(self, output_dir: Path, settings: Mapping[str, Any], command: str, file: str = STAGE_FILE) -> None:
        self.output_dir, self.settings, self.command, self.file = output_dir, dict(settings), command, file
        self.lock = RunLock(output_dir)
        self.finished = False

    @classmethod
    def open(
        cls, output_dir: Path, settings: Mapping[str, Any], resume: bool, command: str, file: str = STAGE_FILE
    ) -> Self:
        """A new directory, or with ``resume`` a stage that was cut off.

        Args:
            output_dir: refused if it exists, unless it is resumed.
            settings: JSON-able; a resumed stage keeps its own.
            resume: go on.
            command: the front door's name, for messages.
            file: the name of its settings.

        Raises:
            ConfigError: it exists; it holds nothing to resume, a finished stage, or one of other settings; another
                process has it.
        """
        given = json.loads(json.dumps(dict(settings)))
        if not resume:
            if output_dir.exists():
                raise ConfigError(
                    f"output_dir={output_dir} exists: choose another directory, remove it, or add --resume to go on "
                    "with a stage that was cut off"
                )
            output_dir.mkdir(parents=True)
            stage = cls(output_dir, given, command, file)
            stage._write(given | {"command": command})
            return stage
        stored = read_stage(output_dir, file)
        if stored.get("command") != command:
            raise ConfigError(f"output_dir={output_dir} is of {stored.get('command')}, not of {command}: name another")
        if "record" in stored:
            raise ConfigError(f"output_dir={output_dir} is finished: there is nothing to resume, leave --resume out")
        check_same_settings(given, stored, {*WAYS, "command"})
        return cls(output_dir, {**given, **{name: stored[name] for name in stored if name in given}}, command, file)

    @property
    def progress_dir(self) -> Path:
        """Where Progress keeps what a killed stage goes on from."""
        return self.output_dir / PROGRESS

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The figures so far; a last line that was cut off is left out, one damaged before it is a UserError."""
        return read_rows(self.output_dir / METRICS_FILE)

    def resumed_at(self, step: int) -> None:
        """Drop the figures after ``step``: they will be written again."""
        kept = [row for row in self.metrics if row.get("step", 0) <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_atomically(self.output_dir / METRICS_FILE, text)
        if step:
            print(f"{self.output_dir}: going on after step {step}", flush=True)

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with (self.output_dir / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")

    def finish(self, record: Mapping[str, Any]) -> None:
        """The policy is written: keep what was measured, and drop what a killed stage would have gone on from."""
        self._write(self.settings | {"command": self.command, "record": dict(record)})
        shutil.rmtree(self.progress_dir, ignore_errors=True)
        self.finished = True

    def _write(self, content: Mapping[str, Any]) -> None:
        write_atomically(self.output_dir / self.file, json.dumps(content, indent=2) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lock.release()
        if kind is not None and not self.finished:
            left = {path.name for path in self.output_dir.iterdir()} - {self.file, LOCK_FILE, METRICS_FILE}
            if left or self.metrics:
                if not issubclass(kind, UserError):  # an error of the stage's own says what to do
                    print(f"cut off; the same command with --resume goes on in {self.output_dir}", flush=True)
            else:  # nothing is lost with it
                shutil.rmtree(self.output_dir, ignore_errors=True)


def read_stage(output_dir: Path, file: str = STAGE_FILE) -> dict[str, Any]:
    """The settings of a stage, and "record" once it is finished; raises ConfigError where there is none."""
    path = output_dir / file
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"output_dir={output_dir} holds no stage to resume ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no settings: remove {output_dir} and start again")
    return content
