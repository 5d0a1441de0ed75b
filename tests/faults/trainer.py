"""Real trainings by the dozen: a process that has imported everything once forks a child for each, and kills it.

``python -m tests.faults.trainer`` is that process; ``Trainer`` speaks to it. A child runs train_reinflow.main() and is
told when to die: at its n-th step on the disk (every one counts: a file opened, written, flushed, renamed, removed).
Instead of dying it can find its directory moved away.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
FAST = [
    "--preset", "flow_mlp", "--no-wandb", "--num-envs", "2", "--episodes-per-iteration", "2", "--minibatch-size", "2",
    "--gradient-accumulation-steps", "1", "--num-critic-epochs", "1", "--critic-warmup-iters", "0",
    "--eval-interval", "0", "--report-episodes", "0", "--save-interval", "2", "--num-threads", "1", "--device", "cpu",
]  # fmt: skip
"""A training of 0.1 s per iteration, which saves after every one."""


@dataclass(frozen=True)
class Ended:
    """How a training ended: ``code`` is negative for a signal; ``steps`` it did on the disk, ``at`` was the last."""

    code: int
    out: str
    err: str
    steps: int
    at: str

    @property
    def killed(self) -> bool:
        """Whether kill -9 ended it."""
        return self.code == -signal.SIGKILL


class Trainer:
    """Trainings in their own processes, one after the other."""

    def __init__(self, folder: Path) -> None:
        """``folder`` takes what the processes print."""
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.trainer"], cwd=ROOT, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(
        self,
        flags: Sequence[str],
        watched: Path,
        *,
        die_at: int | str = 0,
        vanish_to: Path | None = None,
        kill_after: float = 0,
        during: Callable[[int], None] | None = None,
        samples: Path | None = None,
        limit_s: float = 300,
    ) -> Ended:
        """A training to its end.

        Args:
            flags: of the command.
            watched: the run's directory; what is done below it counts as a step.
            die_at: number of the step at which the process kills itself, or words of the step before it; 0 is never.
            vanish_to: where the directory is moved then, instead.
            kill_after: seconds until it is killed from outside; 0 is never.
            during: called with its pid while it runs.
            samples: where it leaves a line of memory and open files after every iteration.
            limit_s: it is killed after that long in any case.
        """
        out, err, at = (self.folder / name for name in ("out", "err", "at"))
        order = {"flags": list(flags), "watched": str(watched), "die_at": die_at, "samples": str(samples or "")}
        order["vanish_to"] = str(vanish_to or "")
        pid = self._ask(order | {"out": str(out), "err": str(err), "at": str(at)})["pid"]
        timer = threading.Timer(kill_after or limit_s, self._kill, [pid])
        timer.start()
        try:
            if during:
                during(pid)
            code = self._answer()["code"]
        finally:
            timer.cancel()
        steps, _, last = at.read_text().partition(" ")
        return Ended(code, out.read_text(), err.read_text(), int(steps), last)

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        print(json.dumps(order), file=self.process.stdin)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        assert line, f"the process that forks trainings ended: {self.process.poll()}"
        return json.loads(line)

    @staticmethod
    def _kill(pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """End the forking process."""
        self.process.stdin.close()
        self.process.wait(30)


# --- In the processes -------------------------------------------------------------------------------------------------

FILE_EVENTS = {"open", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.truncate", "os.chmod"}
REMOVALS = {"os.remove", "os.rmdir"}  # shutil.rmtree names what it removes by a directory's descriptor


class Steps:
    """Counts what this process does below a directory, and kills it before the n-th step."""

    def __init__(self, watched: str, die_at: int | str, vanish_to: str, log: str) -> None:
        self.watched, self.die_at, self.vanish_to = watched, die_at, vanish_to
        self.count, self.over = 0, False
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        sys.addaudithook(self._heard)
        self._count_flushes()
        self._count_torn_writes()
        self._note("start")

    def step(self, what: str, torn: str = "") -> None:
        """Count one; ``torn`` is a file of which only half has been written if this is the end."""
        if self.over:
            return
        self.count += 1
        self._note(what)
        if self.count == self.die_at:
            self.over = True
            self._end(torn)
        elif isinstance(self.die_at, str) and self.die_at in what:
            self.die_at = self.count + 1

    def _end(self, torn: str) -> None:
        if self.vanish_to:
            os.rename(self.watched, self.vanish_to)
            return
        if torn:
            os.truncate(torn, os.path.getsize(torn) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def _note(self, what: str) -> None:
        os.pwrite(self.log, f"{self.count} {what}".ljust(300).encode(), 0)

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS or event in REMOVALS:
            paths = [os.fsdecode(arg) for arg in args if isinstance(arg, str | bytes | os.PathLike)]
            if event in REMOVALS or any(path.startswith(self.watched) for path in paths):
                self.step(f"{event} {' '.join(path.removeprefix(self.watched) for path in paths)}")

    def _count_flushes(self) -> None:
        flush = os.fsync

        def fsync(descriptor: int) -> None:
            self.step("os.fsync")
            flush(descriptor)

        os.fsync = fsync

    def _count_torn_writes(self) -> None:
        import safetensors.torch

        serialize, write_text = safetensors.torch.serialize_file, Path.write_text

        def serialize_file(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
            self.step(f"safetensors {str(filename).removeprefix(self.watched)}")
            serialize(tensors, filename, *args, **kwargs)
            self.step(f"half of {str(filename).removeprefix(self.watched)}", torn=str(filename))

        def text(path: Path, *args: Any, **kwargs: Any) -> int:
            written = write_text(path, *args, **kwargs)
            if str(path).startswith(self.watched):
                self.step(f"half of {str(path).removeprefix(self.watched)}", torn=str(path))
            return written

        safetensors.torch.serialize_file, Path.write_text = serialize_file, text


def sample_after_iterations(file: str) -> None:
    """A line of iteration, resident bytes and open files whenever a run comes to its save."""
    import psutil

    from reinflow.run import Run

    me, save_if_due = psutil.Process(), Run.save_if_due

    def sampled(run: Run) -> None:
        save_if_due(run)
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(f"{run.iteration} {me.memory_info().rss} {me.num_fds()}\n")

    Run.save_if_due = sampled


def child(order: dict[str, Any]) -> NoReturn:
    """One training, in a fork."""
    import train_reinflow

    for name, stream in (("out", 1), ("err", 2)):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["train_reinflow.py", *order["flags"]]
    if order["samples"]:
        sample_after_iterations(order["samples"])
    Steps(order["watched"], order["die_at"], order["vanish_to"], order["at"])
    code = 0
    try:
        train_reinflow.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    """Import once, then fork for every order."""
    import torch

    for name in (
        "train_reinflow", "reinflow.run", "reinflow.learner", "reinflow.flow_mlp", "reinflow_so101.policies",
        "reinflow_so101.policy_card", "reinflow_so101.doctor_rules", "so101_sim.scene", "so101_sim.vector.make",
    ):  # fmt: skip
        importlib.import_module(name)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # it imports a second's worth of torch
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    serve()
