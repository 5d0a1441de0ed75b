"""MuJoCo Warp worlds: episodes a second, what physics, drawing and the rest take of them, and memory.

    python benchmarks/warp_worlds.py [--quick] [--csv FILE] [--device cpu] [--worlds 1 4 16 64]

Episodes of three chunks of 50 control steps (10 substeps each) on the tiny preset's task and cameras, along the
scripted expert's plans, with next seeds: what `WarpVectorEnv.step_chunk` does in a training. A lift ends no episode, so
that all sizes do the same work.

* start: seconds until the environments stand, kernels loaded from the cache (or compiled, the first time);
* physics: `WarpWorlds.play`; drawing: `WarpCameras.render`, after every chunk and for the last instants of the episodes
  that ended; the rest: starts, rewards, records, all on the host;
* memory: of the GPU, or of the process, more than before the environments were made;
* batched: episodes a second of the form that CPUs are for, on all cores, up to MOST_BATCHED environments.

On CUDA 1 to 8,192 worlds, as many as fit. Bar: from GROWTH_FROM worlds on, the time of an episode grows no faster than
their number does (by GROWTH at most; a GPU is to be below 1).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import psutil
import torch
from _common import Row, make_parser, print_bar, report

from reinflow_so101.stages.demonstrations import block_yaw
from so101_mujoco_utils import Array
from so101_sim.config import EnvConfig
from so101_sim.expert import ScriptedExpert
from so101_sim.vector.base import SO101VectorEnv
from so101_sim.vector.batched import BatchedVectorEnv
from so101_sim.vector.warp import WarpVectorEnv
from train_reinflow import PRESETS

CHUNK, CHUNKS = 50, 3
PLANS = 64  # different ones; more worlds repeat them
MOST_BATCHED = 64
GROWTH_FROM, GROWTH = 16, 1.25


def endless_lift() -> EnvConfig:
    """The tiny preset's task; no lift ends an episode."""
    return dataclasses.replace(PRESETS["tiny"].env(), lift_threshold=10.0)


def expert_plans(config: EnvConfig, num_envs: int) -> Array:
    """Actions (N, 150, 6) for the environment seeds 0, 1, ..., the first PLANS of them over and over."""
    blind = dataclasses.replace(config, render_images=False)
    with BatchedVectorEnv(blind, min(num_envs, PLANS)) as env:
        env.reset(range(env.num_envs))
        scene = env.scene.layout.scene_state(env.get_state()["rows"])
        expert = ScriptedExpert(env.scene.model)
        plans_rad = [
            expert.plan(scene.joint_pos_rad[i], scene.block_pos[i], block_yaw(scene.block_quat[i]))
            for i in range(env.num_envs)
        ]
        plans = env.scene.frame.from_rad(np.stack(plans_rad))
    return plans[np.arange(num_envs) % PLANS]


class Clock:
    """Adds up the seconds of what it is put in front of."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed; it must have finished when it returns."""

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            self.seconds += time.perf_counter() - start
            return result

        return timed


def play(env: SO101VectorEnv, plans: Array, chunk: int) -> float:
    """Seconds of an episode in every environment, the start of the next one included."""
    seeds = np.arange(env.num_envs) % PLANS
    start = time.perf_counter()
    for first in range(0, CHUNKS * chunk, chunk):
        env.step_chunk(plans[:, first : first + chunk], seeds.tolist())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def used_mb(device: str) -> float:
    """Memory in use: of the GPU by all processes, or of this process."""
    gc.collect()
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        return (total - free) / 2**20
    return float(psutil.Process().memory_info().rss) / 2**20


def measure(worlds: int, device: str, chunk: int, repeats: int) -> Row:
    """One line of the table."""
    config = dataclasses.replace(endless_lift(), max_steps_per_episode=CHUNKS * chunk)
    plans, before, start = expert_plans(config, worlds), used_mb(device), time.perf_counter()
    with WarpVectorEnv(config, worlds, device) as env:
        ready = time.perf_counter() - start
        assert env.views is not None
        physics, drawing = Clock(), Clock()
        env.worlds.play = physics.of(env.worlds.play)  # type: ignore[method-assign]
        env.views.render = drawing.of(env.views.render)  # type: ignore[method-assign]
        env.reset((np.arange(worlds) % PLANS).tolist())
        play(env, plans, chunk)
        memory, physics.seconds, drawing.seconds = used_mb(device) - before, 0.0, 0.0
        times = [play(env, plans, chunk) for _ in range(repeats)]
    whole, parts = statistics.median(times), [clock.seconds / repeats for clock in (physics, drawing)]
    row: Row = {
        "worlds": worlds, "episodes/s": worlds / whole, "s for all": whole, "physics, s": parts[0],
        "drawing, s": parts[1], "the rest, s": statistics.mean(times) - sum(parts), "memory, MB": memory,
        "start, s": ready, "batched, episodes/s": None,
    }  # fmt: skip
    if worlds <= MOST_BATCHED:
        with BatchedVectorEnv(config, worlds) as batched:
            batched.reset((np.arange(worlds) % PLANS).tolist())
            play(batched, plans, chunk)
            seconds = statistics.median(play(batched, plans, chunk) for _ in range(repeats))
            row["batched, episodes/s"] = worlds / seconds
    return row


def check_growth(rows: Sequence[Row]) -> None:
    """From GROWTH_FROM worlds on, against the nearest smaller size that was measured."""
    for less, more in pairwise(rows):
        if less["worlds"] >= GROWTH_FROM:
            ratio = more["s for all"] / less["s for all"] / (more["worlds"] / less["worlds"])
            what = f"growth of an episode's seconds over that of worlds, {less['worlds']} to {more['worlds']}"
            print_bar(what, ratio, GROWTH, at_least=False)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--worlds", type=int, nargs="+", help="1 to 8,192 on CUDA, 1 to 64 on a CPU")
    args = parser.parse_args(argv)
    on_gpu = args.device.startswith("cuda")
    args.worlds = args.worlds or ([4**i for i in range(7)] + [8192] if on_gpu else [1, 4, 16, 32, 64])
    args.repeats = 1 if args.quick else args.repeats
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    args, rows = parse(argv), []
    for worlds in args.worlds[:1] if args.quick else args.worlds:
        try:
            rows.append(measure(worlds, args.device, 5 if args.quick else CHUNK, args.repeats))
        except (RuntimeError, MemoryError) as error:
            print(f"{worlds:,} worlds do not fit: {str(error).splitlines()[0]}", flush=True)
            break
        print(f"{worlds:,} worlds: {rows[-1]['episodes/s']:.2f} episodes/s", flush=True)
    report(rows, args, f"{torch.get_num_threads()} torch threads, device {args.device}")
    check_growth(rows)


if __name__ == "__main__":
    main()
