"""Gymnasium tasks: control steps a second of the vector environment that executes chunks, beside gymnasium.vector.

    python benchmarks/gym_speed.py [--quick] [--csv FILE] [--env-ids Hopper-v5 HalfCheetah-v5] [--envs 16] [--chunk 4]

Random actions, the same for all; ended episodes restart at once in all (autoreset mode SAME_STEP). Nobody checks spaces
at every step (disable_env_checker):

* SyncVectorEnv: gymnasium's own, one process, a step of every environment a call;
* AsyncVectorEnv: gymnasium's own, a process for each environment, observations in shared memory;
* ours: `GymVectorEnv.step_chunk`, a worker process a core, one message a worker and chunk.

Bar: ours >= 0.8 of the better of gymnasium's two.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from _common import Row, Times, interleaved, make_parser, median, print_bar, report
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import TimeLimit
from numpy.typing import NDArray

from reinflow_gym.config import GymConfig
from reinflow_gym.group import make_single
from reinflow_gym.vector import GymVectorEnv

BAR, CHUNKS = 0.8, 100
Actions = NDArray[np.float32]


def random_actions(env: GymVectorEnv, chunks: int, n: int) -> Actions:
    """(chunks, N, n, A) within the Box."""
    low, high = env.spaces.low, env.spaces.high
    shape = (chunks, env.num_envs, n, env.action_dim)
    return np.random.default_rng(0).uniform(low, high, shape).astype(np.float32)


def ours(env: GymVectorEnv, actions: Actions) -> Callable[[], float]:
    """Seconds for all chunks."""

    def run() -> float:
        env.reset(range(env.num_envs))
        start = time.perf_counter()
        for number, chunk in enumerate(actions):
            env.step_chunk(chunk, [1_000 + number] * env.num_envs)
        return time.perf_counter() - start

    return run


def gymnasiums(env: VectorEnv[Any, Any, Any], actions: Actions) -> Callable[[], float]:
    """Seconds for the same actions, a step a call."""

    def run() -> float:
        env.reset(seed=0)
        start = time.perf_counter()
        for chunk in actions:
            for step in range(chunk.shape[1]):
                env.step(chunk[:, step])
        return time.perf_counter() - start

    return run


def measure(env_id: str, num_envs: int, num_workers: int, n: int, chunks: int, repeats: int) -> Row:
    """One line of the table."""
    config = GymConfig(env_id)
    make = [lambda: TimeLimit(make_single(config), config.max_steps_per_episode)] * num_envs
    with GymVectorEnv(config, num_envs, num_workers) as env:
        actions = random_actions(env, chunks, n)
        theirs = {
            "SyncVectorEnv": SyncVectorEnv(make, autoreset_mode=AutoresetMode.SAME_STEP),
            "AsyncVectorEnv": AsyncVectorEnv(make, autoreset_mode=AutoresetMode.SAME_STEP),
        }
        variants = {"ours": ours(env, actions)} | {name: gymnasiums(vector, actions) for name, vector in theirs.items()}
        times = interleaved(variants, repeats)
        for vector in theirs.values():
            vector.close()
    steps = num_envs * n * chunks
    row: Row = {"env": env_id, "envs": num_envs, "workers": num_workers, "chunk": n}
    row |= {f"{name}, steps/s": steps / median(times, name) for name in (*theirs, "ours")}
    return row | {"ours / better": to_better(times, list(theirs))}


def to_better(times: Times, others: Sequence[str]) -> float:
    """How many times as fast as the faster of the others, by the medians."""
    return min(median(times, name) for name in others) / median(times, "ours")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--env-ids", nargs="*", default=["Hopper-v5", "HalfCheetah-v5"])
    parser.add_argument("--envs", type=int, default=16)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--chunk", type=int, default=4)
    args = parser.parse_args(argv)
    chunks = CHUNKS
    if args.quick:
        args.env_ids, args.envs, args.workers, args.repeats, chunks = args.env_ids[:1], 2, 2, 1, 3
    rows = [measure(env_id, args.envs, args.workers, args.chunk, chunks, args.repeats) for env_id in args.env_ids]
    report(rows, args, f"random actions, {chunks} chunks")
    for row in rows:
        print_bar(f"{row['env']}, of the better of gymnasium.vector:", row["ours / better"], BAR)


if __name__ == "__main__":
    main()
