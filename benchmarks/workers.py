"""Rollouts by workers on Ray against one process: seconds, bytes, and what it costs that they are elsewhere.

    python benchmarks/workers.py [--quick] [--csv FILE] [--preset tiny] [--workers 1 2] [--envs 64]

A round is one rollout of the preset by each variant, from the same weights, on the next episodes. Everything has one
thread (one process: its policy; a worker: all it does) except physics and rendering of one process, which take
--local-threads. Before a round all trainable weights of the driver are moved a little, as by an update, so that all of
them travel; with --heads only the heads learn, and only they do. `apart` is the share of a rollout that is neither
acting nor simulating in the slowest worker: sending weights, starting, bringing parts back, joining them.

The columns `predicted` are what the model of notes/scaling.md says from the one-worker row: its playing divided by the
workers, and the rest as it is.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from _common import Row, Times, interleaved, make_parser, median, print_bar, report, speed_ratio, timed

from reinflow.env import ChunkVectorEnv
from reinflow.ppo import ReturnNormalizer
from reinflow.rollout import RolloutState, collect_rollout
from reinflow.rollout_workers import RolloutWorkers, connect
from reinflow_so101.opening import make_policy
from reinflow_so101.workers import Copy, for_workers
from reinflow_so101.worlds import make_world
from train_reinflow import PRESETS, TrainingConfig

LOCAL, BAR = "one process", 1.6
COSTS = ("time/broadcast", "time/gather", "ray/broadcast_mb", "ray/rollout_mb")


class Variant:
    """One way to play the rollouts, with a policy of its own."""

    def __init__(self, config: TrainingConfig, workers: int, threads: int) -> None:
        self.config, self.name = config, f"{workers} workers" if workers else LOCAL
        self.policy = make_policy(config)
        self.env: ChunkVectorEnv
        if workers:
            settings = for_workers(config.policy(), config.policy_path, Path())
            settings = dataclasses.replace(settings, **self.policy.settled())
            make = Copy(settings, config.env(), config.world(), config.chunk_steps_per_rollout, "")
            self.env = RolloutWorkers(self.policy, make, config.num_parallel_envs, workers, say=lambda _: None)
        else:
            self.env = make_world(config.world(), config.num_parallel_envs, num_threads=threads)
        self.seeds = config.run().training_seeds
        self.current = RolloutState.start(self.policy, self.env, self.seeds)
        self.costs: list[dict[str, float]] = []

    def play(self) -> float:
        """Seconds of one rollout, after all that learns has moved."""
        for parameters in self.policy.trainable_groups().values():
            for parameter in parameters:
                parameter.data.mul_(1 + 1e-6)
        return timed(self._play)

    def _play(self) -> None:
        env, c = self.env, self.config
        collect: Callable[..., Any] = partial(collect_rollout, self.policy, env)
        if isinstance(env, RolloutWorkers):
            collect = env.collect_rollout
        _, info, self.current = collect(
            self.current, c.chunk_steps_per_rollout, c.chain(), c.rollout(), ReturnNormalizer(), self.seeds
        )
        self.costs.append(info.metrics())

    def row(self, times: Times, single: float | None) -> Row:
        """A line of the table; ``single`` is the playing of one worker."""
        seconds = median(times, self.name)
        episodes = self.config.chunk_steps_per_rollout * self.config.num_parallel_envs / self.config.chunks_per_episode
        row: Row = {
            "variant": self.name, "envs": self.config.num_parallel_envs, "rollout, s": seconds,
            "episodes/s": episodes / seconds, "times one process": speed_ratio(times, self.name, LOCAL),
        }  # fmt: skip
        if not isinstance(self.env, RolloutWorkers):
            return row
        sent, gathered, weights, parts = (statistics.median(costs[name] for costs in self.costs[1:]) for name in COSTS)
        row |= {"weights, MB": weights, "parts, MB": parts, "broadcast, s": sent, "gather, s": gathered}
        row["apart"] = f"{(sent + gathered) / seconds:.1%}"
        if single is not None:
            row["predicted, s"] = single / len(self.env.workers) + sent + gathered
        return row

    def playing(self, times: Times) -> float:
        """Seconds of a rollout in which its slowest worker plays."""
        apart = (costs["time/broadcast"] + costs["time/gather"] for costs in self.costs[1:])
        return median(times, self.name) - statistics.median(apart)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--preset", choices=("tiny", "flow_mlp"), default="tiny")
    parser.add_argument("--workers", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--envs", type=int, default=64)
    parser.add_argument("--heads", action="store_true", help="the heads alone learn")
    parser.add_argument("--local-threads", type=int, default=1, help="of physics and rendering in one process")
    args = parser.parse_args(argv)
    if args.quick:
        args.preset, args.workers, args.envs, args.repeats = "flow_mlp", [1, 2], 4, 1
    torch.set_num_threads(1)
    config = dataclasses.replace(
        PRESETS[args.preset], num_parallel_envs=args.envs, episodes_per_iteration=3 * args.envs, minibatch_size=2,
        gradient_accumulation_steps=1,
    )  # fmt: skip
    if args.heads:
        config = dataclasses.replace(config, train_time_mlp=False, train_full_expert=False)
    connect(sum(args.workers))  # one cluster for all of them
    try:
        variants = [Variant(config, workers, args.local_threads) for workers in (0, *args.workers)]
        times = interleaved({variant.name: variant.play for variant in variants}, args.repeats)
        first = next((v for v in variants if v.name == "1 workers"), None)
        single = first.playing(times) if first else None
        rows = [variant.row(times, single) for variant in variants]
        for variant in variants:
            variant.env.close()
    finally:
        ray.shutdown()
    report(rows, args, f"{args.preset}, 1 thread each, {args.local_threads} of physics and rendering in one process")
    if len(args.workers) > 1 and 1 in args.workers:
        most = f"{max(args.workers)} workers"
        print_bar(f"{most} against 1", speed_ratio(times, most, "1 workers"), BAR)


if __name__ == "__main__":
    main()
