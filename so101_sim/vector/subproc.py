"""The subprocess form of the vector environment: each worker holds a `SequentialVectorEnv` of a few environments.

One message per worker and call goes over a pipe; images go through shared memory. Workers are plain Python processes
that import nothing but the environment: `multiprocessing` would import the main script, and with it the policy's
libraries, into each of them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reinflow import UserError
from reinflow.env import ChunkResult, Observation, join_states, part_of_state, usable_cores
from so101_sim.config import EnvConfig
from so101_sim.vector.base import ObservationBuffer, SO101VectorEnv
from so101_sim.vector.sequential import SequentialVectorEnv

Pixels = dict[str, NDArray[np.uint8]]
CLOSE_TIMEOUT_S = 5.0
POLL_S, ANSWER_TIMEOUT_S = 10.0, 600.0  # how often a silent worker is looked at, and when it is given up


class WorkerError(UserError, RuntimeError):
    """A worker process was killed or stopped from outside; the message names it and its environments."""


_WORKER = """import sys
sys.path.insert(0, sys.argv[1])
from so101_sim.vector.subproc import worker_main
worker_main(sys.argv[2])"""


class SubprocVectorEnv(SO101VectorEnv):
    """N environments in worker processes, in contiguous groups.

    Args:
        num_workers: None uses one per core, but no more than there are environments.

    Raises:
        RuntimeError: a worker failed, now or in a later call; its traceback is in the message.
        WorkerError: a worker was killed or stopped, or gave no answer for ANSWER_TIMEOUT_S.
    """

    def __init__(self, config: EnvConfig, num_envs: int, num_workers: int | None = None) -> None:
        super().__init__(config, num_envs)
        if os.name != "posix":
            raise RuntimeError("the subproc backend needs a POSIX system: use backend='batched'")
        num_workers = min(num_envs, num_workers or usable_cores())
        self._groups = [group.tolist() for group in np.array_split(np.arange(num_envs), num_workers)]
        self._memory = _shared_file(2 * _pixels_size(config, num_envs))
        # Current and final images; the rest of an observation travels in the message.
        self._pixels = _map_pixels(self._memory, config, num_envs)
        self._workers: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        try:
            for group in self._groups:
                self._start_worker(group)
            self._collect()  # wait until all have loaded the scene, so that errors appear here
        except BaseException:
            self.close()
            raise

    def _start_worker(self, group: list[int]) -> None:
        ours, theirs = Pipe()
        files = (theirs.fileno(), self._memory)
        command = [sys.executable, "-c", _WORKER, str(Path(__file__).resolve().parents[2]), str(theirs.fileno())]
        self._workers.append(subprocess.Popen(command, pass_fds=files))
        theirs.close()
        self._pipes.append(ours)
        ours.send((self.config, self.num_envs, group, self._memory))

    def reset(self, seeds: Sequence[int]) -> Observation:
        """See `ChunkVectorEnv.reset`."""
        checked = self._check_seeds(seeds)
        return self._observation(self._call("reset", [([checked[env] for env in group],) for group in self._groups]))

    def step_chunk(self, actions: ArrayLike, next_seeds: Sequence[int] | None = None) -> ChunkResult:
        """See `ChunkVectorEnv.step_chunk`."""
        values, following = self._check_actions(actions), None if next_seeds is None else self._check_seeds(next_seeds)
        seeds = [None if following is None else [following[env] for env in group] for group in self._groups]
        chunks = [(values[group], part) for group, part in zip(self._groups, seeds, strict=True)]
        return self._merge(self._call("step_chunk", chunks))

    def get_state(self) -> dict[str, Any]:
        """See `ChunkVectorEnv.get_state`."""
        return join_states(self._call("get_state", [()] * len(self._groups)))

    def set_state(self, state: Mapping[str, Any]) -> Observation:
        """See `ChunkVectorEnv.set_state`."""
        self._check_state(state)
        parts = [(part_of_state(state, range(group[0], group[-1] + 1)),) for group in self._groups]
        return self._observation(self._call("set_state", parts))

    def _call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        if not self._pipes:
            raise RuntimeError("this vector environment is closed")
        for pipe, argument in zip(self._pipes, arguments, strict=True):
            with contextlib.suppress(OSError):  # the worker is gone: _collect says which one and why
                pipe.send((method, argument))
        return self._collect()

    def _collect(self) -> list[Any]:
        """One reply per worker; all are read before an error is raised, so that none answers a later call."""
        replies, failures, lost = [], [], False
        for index, (pipe, worker) in enumerate(zip(self._pipes, self._workers, strict=True)):
            try:
                kind, value = pipe.recv() if _answers(pipe, worker) else ("lost", "it was stopped, or hangs")
            except (EOFError, OSError):
                kind, value = "lost", f"it died (exit code {worker.wait()}): out of memory, or killed?"
            replies.append(value)
            lost |= kind == "lost"
            if kind in ("error", "lost"):
                failures.append(f"environment worker {index} (environments {self._groups[index]}): {value}")
        if failures:
            raise (WorkerError if lost else RuntimeError)("\n".join(failures))
        return replies

    def _observation(self, parts: list[Observation]) -> Observation:
        merged = _concatenate(parts)
        merged["pixels"] = {camera: images.copy() for camera, images in self._pixels[0].items()}
        return merged

    def _merge(self, parts: list[ChunkResult]) -> ChunkResult:
        finals = np.concatenate(
            [np.array(group)[part.final_indices] for group, part in zip(self._groups, parts, strict=True)]
        )
        final_observation = None
        if len(finals):
            final_observation = _concatenate([p.final_observation for p in parts if p.final_observation is not None])
            final_observation["pixels"] = {camera: images[finals] for camera, images in self._pixels[1].items()}
        states = [p.environment_states for p in parts if p.environment_states is not None]
        return ChunkResult(
            observation=self._observation([p.observation for p in parts]),
            rewards=np.concatenate([p.rewards for p in parts]),
            reward_terms={
                name: np.concatenate([p.reward_terms[name] for p in parts]) for name in parts[0].reward_terms
            },
            active=np.concatenate([p.active for p in parts]),
            terminated=np.concatenate([p.terminated for p in parts]),
            truncated=np.concatenate([p.truncated for p in parts]),
            final_indices=finals,
            final_observation=final_observation,
            environment_states=np.concatenate(states) if states else None,
            episodes=[
                replace(stats, env=group[stats.env])
                for group, part in zip(self._groups, parts, strict=True)
                for stats in part.episodes
            ],
        )

    def close(self) -> None:
        """See `ChunkVectorEnv.close`."""
        for pipe in self._pipes:
            pipe.close()  # workers leave when their pipe closes
        for worker in self._workers:
            try:
                worker.wait(CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        if self._memory >= 0:
            os.close(self._memory)
        self._pipes, self._workers, self._memory = [], [], -1


def _answers(pipe: Connection, worker: subprocess.Popen[bytes]) -> bool:
    """Wait for a worker's reply, or its end; False if it is stopped or silent for too long."""
    give_up = time.monotonic() + ANSWER_TIMEOUT_S
    while not pipe.poll(POLL_S):
        if _is_stopped(worker.pid) or time.monotonic() > give_up:
            return False
    return True


def _is_stopped(pid: int) -> bool:
    try:
        shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # a container without ps: the time limit alone is left
        return False
    return shown.stdout.lower().startswith("t")


def _concatenate(parts: list[Observation]) -> Observation:
    """Observations without images, stacked along the environments."""
    merged: Observation = {
        "agent_pos": np.concatenate([part["agent_pos"] for part in parts]),
        "task": [task for part in parts for task in part["task"]],
    }
    if "environment_state" in parts[0]:
        merged["environment_state"] = np.concatenate([part["environment_state"] for part in parts])
    return merged


# --- Shared memory --------------------------------------------------------------------------------------------------


def _pixels_size(config: EnvConfig, num_envs: int) -> int:
    return num_envs * len(config.cameras) * config.image_size**2 * 3 if config.render_images else 0


def _shared_file(size: int) -> int:
    """An unnamed file of `size` bytes, in memory where the system has that; it vanishes with its last user."""
    directory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryFile(dir=directory) as file:
        file.truncate(max(size, 1))
        return os.dup(file.fileno())


def _map_pixels(memory: int, config: EnvConfig, num_envs: int) -> tuple[Pixels, Pixels]:
    """The current and the final images {camera: (N, h, w, 3)} in the shared file."""
    if not config.render_images:
        return {}, {}
    shape = (2, len(config.cameras), num_envs, config.image_size, config.image_size, 3)
    size = 2 * _pixels_size(config, num_envs)
    both = np.frombuffer(mmap.mmap(memory, size), dtype=np.uint8).reshape(shape)
    current, final = (dict(zip(config.cameras, bank, strict=True)) for bank in both)
    return current, final


# --- In the worker --------------------------------------------------------------------------------------------------


def worker_main(pipe_fd: str) -> None:
    """Serves one group of environments until the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # to a whole group: they are the parent's to handle
        signal.signal(number, signal.SIG_IGN)
    pipe = Connection(int(pipe_fd))
    try:
        env = _worker_env(*pipe.recv())
        pipe.send(("ok", None))
    except Exception:  # whatever it is, the parent has to know
        pipe.send(("error", traceback.format_exc()))
        return
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            break
        try:
            reply = ("ok", _serve(env, method, arguments))
        except Exception:  # raised again in the parent, by _collect
            reply = ("error", traceback.format_exc())
        pipe.send(reply)
    env.close()


def _worker_env(config: EnvConfig, num_envs: int, group: list[int], memory: int) -> SequentialVectorEnv:
    rows = slice(group[0], group[-1] + 1)
    current, final = (
        ObservationBuffer(config, len(group), {camera: images[rows] for camera, images in bank.items()})
        for bank in _map_pixels(memory, config, num_envs)
    )
    return SequentialVectorEnv(config, len(group), (current, final))


def _serve(env: SequentialVectorEnv, method: str, arguments: tuple[Any, ...]) -> Any:
    if method == "get_state":
        return env.get_state()
    result = getattr(env, method)(*arguments)
    if isinstance(result, ChunkResult):
        final = result.final_observation
        return replace(
            result,
            observation=_without_pixels(result.observation),
            final_observation=None if final is None else _without_pixels(final),
        )
    return _without_pixels(result)


def _without_pixels(observation: Observation) -> Observation:
    rest = observation.copy()
    rest.pop("pixels", None)
    return rest
