"""Physics: substeps a second of the vector environment that executes chunks, without images.

    python benchmarks/physics.py [--quick] [--csv FILE] [--envs 1 8 32 64] [--threads 1 2]

Three chunks of 50 control steps (10 substeps each) from the tiny preset's start states, along the scripted expert's
plan: approach, grasp and lift, so that contacts cost what they cost in training. All variants start every chunk from
the same simulator states and apply the same controls:

* mj_step: one MjData, a Python loop over environments and control steps, `mj_step(nstep=10)` inside, one thread;
* mujoco.batch: `Batch.rollout` alone, controls repeated beforehand, nothing recorded, only the end state kept;
* ours: `BatchedVectorEnv.step_chunk`, with rewards, episode ends and records; no episode ends;
* ours + resets: the same with a time limit that ends every episode after its third chunk, new starts included.

Bar: ours >= 0.9 of mujoco.batch at 32 environments.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import mujoco
import numpy as np
from _common import Row, interleaved, make_parser, median, print_bar, report, speed_ratio
from mujoco.batch import Batch

from reinflow_so101.stages.demonstrations import block_yaw
from so101_mujoco_utils import Array
from so101_sim.config import EnvConfig
from so101_sim.expert import ScriptedExpert
from so101_sim.scene import INTEGRATION_STATE, PickScene
from so101_sim.vector.batched import BatchedVectorEnv
from so101_sim.vector.make import make_vector_env
from train_reinflow import PRESETS

CHUNK, CHUNKS = 50, 3
BAR_ENVS, BAR = 32, 0.9


@dataclasses.dataclass(frozen=True)
class Work:
    """Chunks to execute: where each starts and what it commands."""

    states: list[dict[str, Any]]  # `get_state` of the vector environment before each chunk
    actions: list[Array]  # (N, n, 6) each

    def __len__(self) -> int:
        return len(self.actions)


def tiny_env(**overrides: Any) -> EnvConfig:
    """The tiny preset's task without images; no lift ends an episode."""
    return dataclasses.replace(PRESETS["tiny"].env(), render_images=False, lift_threshold=10.0, **overrides)


def expert_work(config: EnvConfig, num_envs: int, chunks: int) -> Work:
    """Start states and the scripted expert's actions, environment seeds 0, 1, ..."""
    states, actions = [], []
    with BatchedVectorEnv(config, num_envs) as env:
        env.reset(range(num_envs))
        scene = env.scene.layout.scene_state(env.get_state()["rows"])
        expert = ScriptedExpert(env.scene.model)
        plans_rad = [
            expert.plan(scene.joint_pos_rad[i], scene.block_pos[i], block_yaw(scene.block_quat[i]))
            for i in range(num_envs)
        ]
        plans = env.scene.frame.from_rad(np.stack(plans_rad))  # (N, 150, 6)
        for chunk in range(chunks):
            states.append(env.get_state())
            actions.append(plans[:, chunk * CHUNK : (chunk + 1) * CHUNK])
            env.step_chunk(actions[-1])
    return Work(states, actions)


def vector_env(env: BatchedVectorEnv, work: Work) -> Callable[[], float]:
    """Seconds in `step_chunk`; going back to the start states is not counted."""

    def run() -> float:
        seconds = 0.0
        for state, actions in zip(work.states, work.actions, strict=True):
            env.set_state(state)
            start = time.perf_counter()
            env.step_chunk(actions)
            seconds += time.perf_counter() - start
        return seconds

    return run


def batch_alone(batch: Batch, scene: PickScene, work: Work) -> Callable[[], float]:
    """Seconds in `Batch.rollout` for the same chunks; `batch` stands at their end afterwards."""
    substeps = scene.substeps
    controls = [np.repeat(scene.control(actions)[0], substeps, axis=1) for actions in work.actions]

    def run() -> float:
        seconds = 0.0
        for state, control in zip(work.states, controls, strict=True):
            batch.state[:] = state["integration"]
            start = time.perf_counter()
            batch.rollout(control.shape[1], control, record=())
            seconds += time.perf_counter() - start
        return seconds

    return run


def step_loop(scene: PickScene, work: Work) -> Callable[[], float]:
    """Seconds in a loop of `mj_step(model, data, nstep)` for the same chunks."""
    model, data, substeps = scene.model, mujoco.MjData(scene.model), scene.substeps
    controls = [scene.control(actions)[0] for actions in work.actions]

    def run() -> float:
        seconds = 0.0
        for state, control in zip(work.states, controls, strict=True):
            for integration, targets in zip(state["integration"], control, strict=True):
                mujoco.mj_setState(model, data, integration, INTEGRATION_STATE)
                start = time.perf_counter()
                for target in targets:
                    data.ctrl[:] = target
                    mujoco.mj_step(model, data, nstep=substeps)
                seconds += time.perf_counter() - start
        return seconds

    return run


def measure(num_envs: int, num_threads: int, chunks: int, repeats: int) -> Row:
    """One line of the table."""
    endless, ending = (tiny_env(max_steps_per_episode=chunks * CHUNK + extra) for extra in (1, 0))
    work = expert_work(endless, num_envs, chunks)
    with (
        make_vector_env(endless, num_envs, "batched", num_threads=num_threads) as ours,
        make_vector_env(ending, num_envs, "batched", num_threads=num_threads) as resetting,
    ):
        assert isinstance(ours, BatchedVectorEnv) and isinstance(resetting, BatchedVectorEnv)
        variants = {
            "mujoco.batch": batch_alone(Batch(ours.scene.model, num_envs, nthread=num_threads), ours.scene, work),
            "ours": vector_env(ours, work),
            "ours + resets": vector_env(resetting, work),
        }
        if num_threads == 1:
            variants["mj_step"] = step_loop(ours.scene, work)
        times = interleaved(variants, repeats)
    substeps = num_envs * len(work) * CHUNK * endless.steps_per_action
    row: Row = {"envs": num_envs, "threads": num_threads}
    row |= {
        f"{name}, substeps/s": substeps / median(times, name) if name in times else None
        for name in ("mj_step", "mujoco.batch", "ours", "ours + resets")
    }
    row["ours / batch"] = speed_ratio(times, "ours", "mujoco.batch")
    row["with resets / batch"] = speed_ratio(times, "ours + resets", "mujoco.batch")
    row["Python, ms a chunk"] = 1e3 * (median(times, "ours") - median(times, "mujoco.batch")) / len(work)
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--envs", nargs="*", type=int, default=[1, 8, BAR_ENVS, 64])
    parser.add_argument("--threads", nargs="*", type=int, default=sorted({1, os.cpu_count() or 1}))
    args = parser.parse_args(argv)
    chunks = CHUNKS
    if args.quick:
        args.envs, args.threads, args.repeats, chunks = [2], [1], 1, 1
    rows = [measure(n, threads, chunks, args.repeats) for threads in args.threads for n in args.envs]
    report(rows, args, f"scripted expert, {chunks} chunks of {CHUNK} control steps")
    for row in rows:
        if row["envs"] == BAR_ENVS:
            print_bar(f"physics of mujoco.batch's, {row['threads']} threads:", row["ours / batch"], BAR)


if __name__ == "__main__":
    main()
