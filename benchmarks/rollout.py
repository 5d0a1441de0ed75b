"""Rollouts with images: episodes a second of the tiny preset, by vector form and number of environments.

    python benchmarks/rollout.py [--quick] [--csv FILE] [--forms sequential subproc batched] [--envs 1 4 16 64]
    python benchmarks/rollout.py --device cuda --pretrained-path DIR        another policy, another device

A round is one episode per environment: `collect_rollout` with the acting policy and its noise, as in training. The same
actions are then replayed without images, and their physics alone in `mujoco.batch` with as many threads as the form
uses. The split is what leaving a part out saves, in wall-clock milliseconds per episode, so that the parts add up to
the whole and work that runs beside other work counts once:

* physics: `Batch.rollout` alone;
* Python: step_chunk without images, less physics: rewards, records, resets, pipes;
* rendering: step_chunk with images, less step_chunk without;
* policy: everything between two step_chunk; the second table says which part of it.

Bars: >= 20 visual episodes/s (batched, 64 environments); as many at 64 environments as at 16.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from _common import Row, make_parser, print_bar, report, timed
from mujoco.batch import Batch
from physics import Work, batch_alone

from reinflow.env import ChunkResult, ChunkVectorEnv, Observation
from reinflow.policy import FlowPolicy
from reinflow.ppo import ReturnNormalizer
from reinflow.rollout import RolloutState, collect_rollout
from reinflow_so101.opening import make_policy
from so101_sim.scene import PickScene
from so101_sim.vector.make import Backend, make_vector_env
from train_reinflow import PRESETS, TrainingConfig

FORMS = ("sequential", "subproc", "batched")
PARTS = ("physics", "rendering", "policy", "Python")
VERBS = ("preprocess", "encode", "velocity", "noise_std", "value", "postprocess")  # of FlowPolicy
BAR, BAR_ENVS, FEWER_ENVS = 20.0, 64, 16


class Recorder(ChunkVectorEnv):
    """Passes chunks on to a vector environment and keeps what was done."""

    def __init__(self, env: ChunkVectorEnv) -> None:
        self.env, self.num_envs = env, env.num_envs
        self.actions: list[tuple[np.ndarray, Sequence[int] | None]] = []
        self.results: list[ChunkResult] = []

    def reset(self, seeds: Sequence[int]) -> Observation:
        """Of the environment."""
        return self.env.reset(seeds)

    def step_chunk(self, actions: np.ndarray, next_seeds: Sequence[int] | None = None) -> ChunkResult:
        """Of the environment."""
        self.actions.append((actions, next_seeds))
        self.results.append(self.env.step_chunk(actions, next_seeds))
        return self.results[-1]

    def get_state(self) -> dict[str, Any]:
        """Of the environment."""
        return self.env.get_state()

    def set_state(self, state: Mapping[str, Any]) -> Observation:
        """Of the environment."""
        return self.env.set_state(state)


class Stopwatch:
    """Adds up the seconds spent in methods of one object."""

    def __init__(self, owner: Any, names: Sequence[str], device: str) -> None:
        self.seconds = dict.fromkeys(names, 0.0)
        self._device = device
        for name in names:
            setattr(owner, name, self._wrap(name, getattr(owner, name)))

    def _wrap(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed_method(*args: Any, **kwargs: Any) -> Any:
            answer: list[Any] = []
            self.seconds[name] += timed(lambda: answer.append(method(*args, **kwargs)), self._device)
            return answer[0]

        return timed_method


class Bench:
    """One form at one number of environments: with images, and without to replay."""

    def __init__(
        self, config: TrainingConfig, form: Backend, policy: FlowPolicy, watch: Stopwatch, device: str
    ) -> None:
        self.config, self.policy, self.watch = config, policy, watch
        self.row: Row = {"form": form, "envs": config.num_parallel_envs}
        visual, self.num_envs = config.env(), config.num_parallel_envs
        self.blind = dataclasses.replace(visual, render_images=False)
        self.env = make_vector_env(visual, self.num_envs, form)
        self.replay = make_vector_env(self.blind, self.num_envs, form)
        self.threads = 1 if form == "sequential" else min(self.num_envs, os.cpu_count() or 1)
        self.seeds = config.run().training_seeds
        self.current = RolloutState.start(policy, self.env, self.seeds)
        self.replay.reset(self.seeds.of(self.current.episodes))
        self.rounds: list[Row] = []

    def play(self) -> None:
        """One round: milliseconds per episode of every part."""
        recorder = Recorder(self.env)
        before = dict(self.watch.seconds)
        _, info, self.current = collect_rollout(
            self.policy, recorder, self.current, self.config.chunks_per_episode, self.config.chain(),
            self.config.rollout(), ReturnNormalizer(), self.seeds,
        )  # fmt: skip
        blind, work = self._play_again(recorder)
        scene = PickScene(self.blind)
        physics = batch_alone(Batch(scene.model, self.num_envs, nthread=self.threads), scene, work)
        physics()  # the first call starts the threads
        alone = physics()
        parts = (alone, info.seconds_env - blind, info.seconds_policy, blind - alone)
        # N episodes' worth of control steps; a lift ends an episode early and the next one starts.
        scale = 1e3 / self.num_envs
        row = {"episode, ms": (info.seconds_env + info.seconds_policy) * scale} | {
            name: seconds * scale for name, seconds in zip(PARTS, parts, strict=True)
        }
        verbs = {name: (now - before[name]) * scale for name, now in self.watch.seconds.items()}
        rest = row["policy"] - sum(verbs.values())
        self.rounds.append(row | verbs | {"chain and buffer": rest})

    def _play_again(self, recorder: Recorder) -> tuple[float, Work]:
        """Seconds of the recorded chunks without images, and where each of them started.

        Raises:
            RuntimeError: they did not go as before.
        """
        seconds, states = 0.0, []
        for (actions, next_seeds), result in zip(recorder.actions, recorder.results, strict=True):
            states.append(self.replay.get_state())
            start = time.perf_counter()
            again = self.replay.step_chunk(actions, next_seeds)
            seconds += time.perf_counter() - start
            if not np.array_equal(again.rewards, result.rewards):
                raise RuntimeError("the same actions earned other rewards without images: forms or seeds differ")
        return seconds, Work(states, [actions for actions, _ in recorder.actions])

    def medians(self, names: Sequence[str]) -> Row:
        """Medians over the rounds after the first, which warms up."""
        return {name: statistics.median(row[name] for row in self.rounds[1:]) for name in names}

    def close(self) -> None:
        """Both environments."""
        self.env.close()
        self.replay.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=list(FORMS))
    parser.add_argument("--envs", nargs="*", type=int, default=[1, 4, FEWER_ENVS, BAR_ENVS])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pretrained-path", default="tiny")
    args = parser.parse_args(argv)
    if args.quick:
        args.forms, args.envs, args.repeats = ["sequential", "batched"], [2], 1
    config = dataclasses.replace(PRESETS["tiny"], pretrained_path=args.pretrained_path)
    if args.device == "cpu":
        torch.set_num_threads(config.num_threads)
    policy = make_policy(config, args.device)
    watch = Stopwatch(policy, VERBS, args.device)
    benches = []
    for num_envs in args.envs:
        # Forms take turns; sizes follow each other, because idle environments of all sizes would fill the memory.
        sized = dataclasses.replace(config, num_parallel_envs=num_envs, episodes_per_iteration=max(num_envs, 192))
        group = [Bench(sized, form, policy, watch, args.device) for form in args.forms]
        for _ in range(args.repeats + 1):
            for bench in group:
                bench.play()
        for bench in group:
            bench.close()
        benches += group
    note = (
        f"policy on {args.device}, {torch.get_num_threads()} torch threads, environments on all cores (sequential: 1)"
    )
    rows: list[Row] = [
        bench.row | {"episodes/s": 1e3 / bench.medians(["episode, ms"])["episode, ms"]}
        | {f"{name}, ms": value for name, value in bench.medians(PARTS).items()}
        for bench in benches
    ]  # fmt: skip
    report(rows, args, note)
    verbs = (*VERBS, "chain and buffer")
    report([b.row | {f"{k}, ms": v for k, v in b.medians(verbs).items()} for b in benches], args, note, "policy")
    print_bars(rows)


def print_bars(rows: Sequence[Row]) -> None:
    """The bars that this table can tell about."""
    by_size = {row["envs"]: row["episodes/s"] for row in rows if row["form"] == "batched"}
    if BAR_ENVS in by_size:
        print_bar(f"visual episodes/s, batched, {BAR_ENVS} environments:", by_size[BAR_ENVS], BAR)
        if FEWER_ENVS in by_size:
            ratio = by_size[BAR_ENVS] / by_size[FEWER_ENVS]
            print_bar(f"episodes/s at {BAR_ENVS} environments / at {FEWER_ENVS}:", ratio, 1.0)


if __name__ == "__main__":
    main()
