"""Rollout workers on Ray: copies of the policy with environments of their own, on this machine or on others.

A run's N environments are divided over them in contiguous parts. Once an iteration the driver, which learns, sends what
has changed of the weights; every worker then plays its part of the rollout, and the driver joins the parts. An
episode's start and noise follow from its seed, so the rollout is the one of a single process: to rounding, and to the
bit where the parts are whole tiles of a matrix product (``ROW_TILE`` rows).

The driver keeps where every worker's environments stood when the iteration began: a worker that is lost with its
process or its machine is replaced, and its part is played again from there, with the same numbers.

Ray is loaded by whoever makes ``RolloutWorkers``; nothing else here needs it.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reinflow import ConfigError, UserError
from reinflow.env import ChunkResult, ChunkVectorEnv, EpisodeStats, Observation, join_states, part_of_state
from reinflow.flow import ChainSpec
from reinflow.policy import FlowPolicy
from reinflow.ppo import ReturnNormalizer
from reinflow.rollout import ROW_TILE, RolloutBuffer, RolloutInfo, RolloutSettings, RolloutState
from reinflow.rollout_part import Make, Opened, Packed, Part, RolloutWorker, pack, unpack, unseen
from reinflow.seeds import TrainingSeeds

LOSSES_IN_A_ROW = 3  # of one worker, which end the run
CLOSE_TIMEOUT_S, REACH_TIMEOUT_S = 2.0, 10.0
SAY_WAITS_S, PLACE_TIMEOUT_S = 30.0, 300.0  # for a process: where there is no room, Ray would wait for ever


class RolloutWorkerError(UserError, RuntimeError):
    """A rollout worker failed or was lost again and again; the message names it and its environments."""


@dataclass
class Worker:
    """One worker as the driver knows it."""

    index: int
    rows: range  # its environments among all
    handle: Any = None  # of Ray's actor
    opened: Opened | None = None
    env_state: dict[str, Any] | None = None  # when the iteration began
    losses: int = 0  # in a row

    def __str__(self) -> str:
        where = f", process {self.opened.pid} on {self.opened.host}" if self.opened else ""
        return f"{self.index} (environments {self.rows.start}-{self.rows.stop - 1}{where})"


@dataclass
class JoinedInfo(RolloutInfo):
    """Of a rollout that workers played; times of environments and policy are means over the workers."""

    costs: dict[str, float] = field(default_factory=dict)  # metrics of what it took to play it elsewhere

    def metrics(self) -> dict[str, float]:
        return super().metrics() | self.costs


def parts_of(num_envs: int, num_workers: int) -> list[range]:
    """Contiguous parts of the environments, even but for a tile; of whole tiles where every worker gets one."""
    unit = ROW_TILE if num_envs >= ROW_TILE * num_workers else 1
    tiles = -(-num_envs // unit)
    ends = [min(unit * (tiles * i // num_workers), num_envs) for i in range(num_workers + 1)]
    return [range(*pair) for pair in pairwise(ends)]


def connect(cpus: int) -> bool:
    """Join the cluster that RAY_ADDRESS names, or start one of this machine alone with ``cpus``, quietly.

    Returns:
        Whether it is ours to end; False where this process was connected already.

    Raises:
        ConfigError: Ray is not installed, or nothing answers at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "rollout_backend=ray needs Ray: pip install 'ray>=2.40,<3', or leave out --rollout-backend"
        ) from error
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # by default whatever else runs here comes first
    address = os.environ.get("RAY_ADDRESS", "")
    alone: dict[str, Any] = {} if address else {"num_cpus": cpus, "include_dashboard": False}
    try:
        if ":" in address:  # Ray itself would try for minutes
            host, port = address.removeprefix("ray://").rsplit(":", 1)
            socket.create_connection((host, int(port)), REACH_TIMEOUT_S).close()
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **alone)
    except (OSError, RuntimeError, ValueError) as error:
        if not address:
            raise ConfigError(
                f"rollout_backend=ray: Ray does not start on this machine ({_line(error)}): mend that, or leave out "
                "--rollout-backend"
            ) from error
        raise ConfigError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({_line(error)}): start one with `ray start --head`, "
            "or unset RAY_ADDRESS for one of this machine alone"
        ) from error
    return True


def _line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


class RolloutWorkers(ChunkVectorEnv):
    """N environments on rollout workers, and the workers' copies of the driver's policy.

    For a run it is an environment: started, saved and gone back to. What the environments show stays with the workers,
    whose policies decide on it: ``reset`` and ``set_state`` return an empty observation, and ``collect_rollout`` takes
    the place of ``step_chunk``.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        make: Make,
        num_envs: int,
        num_workers: int,
        cpus: int = 1,
        gpus: float = 0.0,
        say: Callable[[str], None] = print,
    ) -> None:
        """Start the workers, each with ``cpus`` threads and the share ``gpus`` of a GPU.

        Args:
            policy: the driver's, which learns.
            make: a copy of it with environments.
            num_envs: N.
            num_workers: W <= N.
            cpus: that Ray gives each of them.
            gpus: likewise; 0 acts on the CPU.
            say: prints a line.

        Raises:
            ConfigError: Ray is not installed, the cluster is not there or too small.
            RolloutWorkerError: a worker found no room, or could not be built; its message is in it.
        """
        self.policy, self.num_envs, self.say = policy, num_envs, say
        self._make, self._cpus, self._gpus = make, cpus, gpus
        self._sent: dict[str, Tensor] = {}  # what the workers have of the weights
        self._lost = 0
        self._costs: dict[str, float] = {}  # of the last rollout
        self._told = False
        self.workers: list[Worker] = []
        self._is_ours = connect(num_workers * cpus)
        try:
            self._refuse_small_cluster(num_workers)
            self.workers = [Worker(index, rows) for index, rows in enumerate(parts_of(num_envs, num_workers))]
            for worker in self.workers:
                self._launch(worker)
            for worker in self.workers:
                self._await_room(worker)
            for worker, opened in zip(self.workers, self._ask(self._open, replacing=False), strict=True):
                worker.opened = opened
        except BaseException:
            self.close()
            raise
        for name, value in self._opened(self.workers[0]).declared.items():
            setattr(self, name, value)

    def _refuse_small_cluster(self, num_workers: int) -> None:
        import ray

        there = ray.cluster_resources()
        for name, each in (("CPU", self._cpus), ("GPU", self._gpus)):
            if num_workers * each > there.get(name, 0.0):
                raise ConfigError(
                    f"num_rollout_workers={num_workers} of {each:g} {name} each do not fit into the Ray cluster, which "
                    f"has {there.get(name, 0.0):g}: add nodes, or ask for less"
                )

    @staticmethod
    def _opened(worker: Worker) -> Opened:
        assert worker.opened is not None
        return worker.opened

    def describe(self) -> str:
        """One line on where they are."""
        opened = [self._opened(worker) for worker in self.workers]
        places = ", ".join(
            f"{worker.rows.start}-{worker.rows.stop - 1} on {at.host} ({at.device})"
            for worker, at in zip(self.workers, opened, strict=True)
        )
        threads = "1 thread" if self._cpus == 1 else f"{self._cpus} threads"
        return f"rollout workers of {threads} play environments {places}"

    # --- An environment, for a run ----------------------------------------------------------------------------------

    def reset(self, seeds: Sequence[int]) -> Observation:
        """Start the episodes; see the class for what it returns."""
        replies = self._ask(lambda w: w.handle.reset.remote([int(s) for s in seeds[w.rows.start : w.rows.stop]]))
        for worker, state in zip(self.workers, replies, strict=True):
            worker.env_state = state
        return {}

    def step_chunk(self, actions: NDArray[Any], next_seeds: Sequence[int] | None = None) -> NoReturn:
        """Not here: the workers act by their own policies."""
        raise TypeError("environments on rollout workers are played by collect_rollout, not chunk by chunk")

    def get_state(self) -> dict[str, Any]:
        """See ``ChunkVectorEnv.get_state``; the driver has it, no worker is asked."""
        states = [worker.env_state for worker in self.workers if worker.env_state is not None]
        if not states:
            raise RuntimeError("call reset(seeds) before anything else")
        return join_states(states)

    def set_state(self, state: Mapping[str, Any]) -> Observation:
        """Go back to a ``get_state`` of any form; see the class for what it returns."""
        for worker in self.workers:
            worker.env_state = part_of_state(state, worker.rows)
        self._ask(lambda w: w.handle.set_state.remote(w.env_state))
        return {}

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        import ray

        if self.workers and ray.is_initialized():
            handles = [worker.handle for worker in self.workers if worker.handle is not None]
            ray.wait([h.close.remote() for h in handles], num_returns=len(handles), timeout=CLOSE_TIMEOUT_S)
            for handle in handles:
                ray.kill(handle)
        self.workers = []
        if self._is_ours:
            ray.shutdown()
            self._is_ours = False

    # --- A rollout --------------------------------------------------------------------------------------------------

    def collect_rollout(
        self,
        current: RolloutState,
        num_chunk_steps: int,
        spec: ChainSpec,
        settings: RolloutSettings,
        normalizer: ReturnNormalizer,
        seeds: TrainingSeeds,
        after_chunk: Callable[[ChunkResult], None] | None = None,
    ) -> tuple[RolloutBuffer, RolloutInfo, RolloutState]:
        """``reinflow.rollout.collect_rollout`` by the workers, with the driver's weights as they are now.

        ``after_chunk`` hears of a worker's chunks when it has played them all.

        Raises:
            RolloutWorkerError: a worker failed, or was lost LOSSES_IN_A_ROW times in a row.
        """
        started, lost_before = time.perf_counter(), self._lost
        self._say_costs(started)
        sent = self._broadcast()
        playing = time.perf_counter()

        def play(worker: Worker) -> Any:
            standing = unseen(current, slice(worker.rows.start, worker.rows.stop))
            return worker.handle.play.remote(
                standing, num_chunk_steps, spec, settings, normalizer, seeds, self.policy.learns_heads_alone
            )

        def hear(part: Part) -> None:
            for chunk in part.chunks if after_chunk else ():
                after_chunk(chunk)  # type: ignore[misc]

        parts: list[Part] = self._ask(play, hear)
        buffer = self._join(parts)
        for worker, part in zip(self.workers, parts, strict=True):
            worker.env_state = part.env_state
        ended, slowest = time.perf_counter(), max(part.seconds for part in parts)
        costs = {
            "time/rollout": ended - started,
            "time/broadcast": playing - started,
            "time/gather": ended - playing - slowest,
            "ray/broadcast_mb": sent / 1e6,
            "ray/rollout_mb": sum(_bytes(part) for part in parts) / 1e6,
            "ray/workers_lost": float(self._lost - lost_before),
        }
        self._costs = costs | {"started": started, "first": float(not self._costs)}
        return buffer, self._joined_info(parts, costs), _standing([part.current for part in parts])

    def _broadcast(self) -> int:
        """Send what has changed of the weights since the last time; returns its bytes, which go to every node once."""
        import ray

        state = {name: tensor.detach().cpu() for name, tensor in self.policy.trainable_state().items()}
        changed = {
            name: tensor
            for name, tensor in state.items()
            if name not in self._sent or not torch.equal(self._sent[name], tensor)
        }
        self._sent |= {name: tensor.clone() for name, tensor in changed.items()}
        message = {name: pack(tensor) for name, tensor in changed.items()}
        weights = ray.put(message)
        self._ask(lambda w: w.handle.load.remote(weights))
        return sum(array.nbytes for array, _ in message.values())

    def _join(self, parts: Sequence[Part]) -> RolloutBuffer:
        """Parts along the environments, every tensor where this policy's own rollouts would keep it."""
        device = self.policy.device
        row = {name: unpack(value)[0, :1].to(device) for name, value in parts[0].context.items()}
        kept = {name: tensor.device for name, tensor in self.policy.to_buffer(row).items()}
        context = {name: self._joined([p.context[name] for p in parts], kept[name]) for name in row}
        tensors = {name: self._joined([p.tensors[name] for p in parts], device) for name in parts[0].tensors}
        return RolloutBuffer(context=context, **tensors)

    def _joined(self, parts: Sequence[Packed], device: torch.device) -> Tensor:
        """(T, n, ...) of every worker -> (T, N, ...); written into place, so that nothing is held twice."""
        (steps, _, *rest), dtype = parts[0][0].shape, parts[0][1]
        whole = torch.empty((steps, self.num_envs, *rest), dtype=dtype, device=device)
        for worker, part in zip(self.workers, parts, strict=True):
            whole[:, worker.rows.start : worker.rows.stop].copy_(unpack(part))
        return whole

    def _joined_info(self, parts: Sequence[Part], costs: dict[str, float]) -> JoinedInfo:
        env, policy = (
            float(np.mean([getattr(part.info, name) for part in parts])) for name in ("seconds_env", "seconds_policy")
        )
        return JoinedInfo(list(self._in_order(parts)), env, policy, self.objective, costs)

    def _in_order(self, parts: Sequence[Part]) -> Iterator[EpisodeStats]:
        """The episodes that ended, in the order of one process: by chunk step, then by environment."""
        left = [iter(part.info.episodes) for part in parts]
        for chunks in zip(*(part.chunks for part in parts), strict=True):
            for worker, episodes, chunk in zip(self.workers, left, chunks, strict=True):
                for _ in chunk.episodes:
                    stats = next(episodes)
                    yield replace(stats, env=stats.env + worker.rows.start)

    def _say_costs(self, now: float) -> None:
        """Once, of an iteration like most: the first one sends all weights."""
        costs = self._costs
        if self._told or not costs or costs["first"] or costs["ray/workers_lost"]:
            return
        self._told = True
        seconds, apart = now - costs["started"], costs["time/broadcast"] + costs["time/gather"]
        self.say(
            f"an iteration of {seconds:.1f} s sends {costs['ray/broadcast_mb']:,.2f} MB of changed weights to "
            f"{len(self.workers)} rollout workers and takes {costs['ray/rollout_mb']:,.1f} MB back: {apart:.2f} s, "
            f"{apart / seconds:.1%} of it"
        )

    # --- Workers come and go ----------------------------------------------------------------------------------------

    def _launch(self, worker: Worker) -> None:
        import ray

        options = {"num_cpus": self._cpus, "num_gpus": self._gpus, "scheduling_strategy": "SPREAD"}
        worker.handle = ray.remote(RolloutWorker).options(**options).remote()

    def _await_room(self, worker: Worker) -> None:
        """Until it has a process. Raises RolloutWorkerError where the cluster has no place for one."""
        import ray

        ready = [worker.handle.__ray_ready__.remote()]
        if ray.wait(ready, timeout=SAY_WAITS_S)[0]:
            return
        number = worker.index
        self.say(f"rollout worker {number} waits for room in the Ray cluster, up to {PLACE_TIMEOUT_S:.0f} s")
        if not ray.wait(ready, timeout=PLACE_TIMEOUT_S)[0]:
            free = ray.available_resources()
            asked = f"{self._cpus} CPU" + (f" and {self._gpus:g} GPU" if self._gpus else "")
            raise RolloutWorkerError(
                f"rollout worker {number} found no node of the Ray cluster with {asked} free ({free.get('CPU', 0.0):g} "
                f"CPU, {free.get('GPU', 0.0):g} GPU free in all): add nodes, or ask for fewer or smaller workers; a "
                "run that had begun goes on with --resume"
            )

    def _open(self, worker: Worker) -> Any:
        device = "cuda" if self._gpus else "cpu"
        return worker.handle.open.remote(self._make, len(worker.rows), device, self._cpus)

    def _ask(
        self,
        ask: Callable[[Worker], Any],
        hear: Callable[[Any], None] = lambda _: None,
        replacing: bool = True,
    ) -> list[Any]:
        """A question to all workers at once; a lost one is replaced and asked again.

        Args:
            ask: sends the question, gives what Ray calls the answer by.
            hear: gets every answer as it comes.
            replacing: False where a lost worker is an error at once.

        Returns:
            Their answers, by worker.
        """
        import ray

        answers: dict[int, Any] = {}
        waiting = {ask(worker): worker for worker in self.workers}
        while waiting:
            ready = ray.wait(list(waiting), num_returns=1)[0][0]
            worker = waiting.pop(ready)
            try:
                answers[worker.index] = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise RolloutWorkerError(f"rollout worker {worker} failed: {_cause(error)}") from error
            except _losses() as error:
                self._replace(worker, error, replacing)
                waiting[ask(worker)] = worker
                continue
            worker.losses = 0
            hear(answers[worker.index])
        return [answers[worker.index] for worker in self.workers]

    def _replace(self, worker: Worker, error: Exception, replacing: bool) -> None:
        """A new worker that stands where the lost one stood when the iteration began."""
        import ray

        while True:
            worker.losses += 1
            self._lost += 1
            if worker.losses >= LOSSES_IN_A_ROW or not replacing:
                raise RolloutWorkerError(
                    f"rollout worker {worker} was lost {worker.losses} times in a row ({_line(error)}): is its machine "
                    "out of memory? Fewer environments or workers need less; the run goes on with --resume"
                ) from error
            self.say(f"rollout worker {worker} was lost ({_line(error)}): a new one plays its part again")
            ray.kill(worker.handle)
            try:
                self._launch(worker)
                self._await_room(worker)
                worker.opened = ray.get(self._open(worker))
                ray.get(worker.handle.load.remote({name: pack(tensor) for name, tensor in self._sent.items()}))
                if worker.env_state is not None:
                    ray.get(worker.handle.set_state.remote(worker.env_state))
                return
            except ray.exceptions.RayTaskError as failure:
                raise RolloutWorkerError(f"the new rollout worker {worker} failed: {_cause(failure)}") from failure
            except _losses() as again:
                error = again


def _losses() -> tuple[type[Exception], ...]:
    """What Ray raises where a process, its machine or what it had computed is gone."""
    from ray import exceptions

    return (
        exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.NodeDiedError,
        exceptions.ObjectLostError, exceptions.OutOfMemoryError,
    )  # fmt: skip


def _cause(error: Any) -> str:
    """What was raised in a worker, on one line: a user's error by its message, any other with its place."""
    text = " ".join(str(error.cause).split())
    if isinstance(error.cause, UserError):
        return text
    places = re.findall(r'File "([^"]+)", line (\d+)', str(error))  # Ray appends the worker's traceback
    where = f" ({places[-1][0]}:{places[-1][1]})" if places else ""
    return f"{type(error.cause).__name__}: {text}{where}"


def _bytes(part: Part) -> int:
    return sum(array.nbytes for tensors in (part.tensors, part.context) for array, _ in tensors.values())


def _standing(parts: Sequence[RolloutState]) -> RolloutState:
    """Where all environments stand, from those of every worker."""
    numbers = {name: np.concatenate([getattr(p, name) for p in parts]) for name in ("episodes", "decisions", "broken")}
    return RolloutState(context={}, state=None, stride=parts[0].stride, **numbers)
