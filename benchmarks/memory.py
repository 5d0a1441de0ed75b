"""Memory of the tiny preset: the rollout buffer, the update's peak, and whether a long run stays flat. Linux only.

    python benchmarks/memory.py [--quick] [--csv FILE] [--iterations 1000] [--only flat]

* Buffer: bytes of the tensors that a rollout keeps per decision, by number of cameras. Extra cameras are shown to the
  embedded policy, which was not trained on them: sizes do not depend on that.
* Update: resident memory before, and its highest value during `PPOLearner.update` on 192 decisions, by minibatch; each
  in a fresh process, with the kernel's own high-water mark.
* Flat: resident memory over many small iterations of the real loop (rollout, update, evaluation, log, checkpoint), and
  a line fitted to it after the first fifth. Beside it what of the C heap is in use (glibc's mallinfo2): resident memory
  also moves by what the allocator keeps for later.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from _common import Row, make_parser, open_run, report

import train_reinflow
from reinflow.rollout import RolloutState
from reinflow_smolvla import ReinFlowSmolVLA
from reinflow_vla.base import OBS_IMAGES_PREFIX
from so101_mujoco_utils import CAMERA_NAMES
from train_reinflow import PRESETS, TrainingConfig, evaluate, rollout, update

MINIBATCHES = (8, 32, 96, 192)
DECISIONS = 192
WARM_UP = 0.2  # share of the iterations before the fitted line


def status_mb(name: str) -> float:
    """A field of this process's status in MB: VmRSS, resident now, or VmHWM, its highest value."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) / 1024


class HeapInfo(ctypes.Structure):
    """glibc's struct mallinfo2: ten sizes, of which the eighth counts the bytes in use."""

    _fields_ = (
        *((f"size_{index}", ctypes.c_size_t) for index in range(7)),
        ("uordblks", ctypes.c_size_t),
        *((f"size_{index}", ctypes.c_size_t) for index in (8, 9)),
    )


def heap_mb() -> float:
    """MB that are in use on the C heap, all arenas together; Python's objects below 512 bytes are not among them."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = HeapInfo
    return mallinfo2().uordblks / 2**20


def small(num_envs: int, minibatch: int, chunks: int = 3, steps: int = 50, **overrides: Any) -> TrainingConfig:
    """The tiny preset with one episode of `chunks` decisions, `steps` control steps each, per environment and
    iteration, on one torch thread."""
    config = PRESETS["tiny"]
    return dataclasses.replace(
        config, num_threads=1, num_parallel_envs=num_envs, episodes_per_iteration=num_envs, minibatch_size=minibatch,
        gradient_accumulation_steps=num_envs * chunks // minibatch, num_critic_epochs=2,
        chunks_per_episode=chunks, n_action_steps=steps, max_steps_per_episode=chunks * steps, **overrides,
    )  # fmt: skip


def buffer_row(cameras: int, num_envs: int) -> Row:
    """Bytes per decision of every tensor in the rollout buffer."""
    config = small(num_envs, num_envs, cameras=CAMERA_NAMES)
    config, run = open_run(config)
    try:
        vla_config = cast(ReinFlowSmolVLA, run.policy).vla.config
        image = next(iter(vla_config.image_features.values()))
        others = {k: v for k, v in vla_config.input_features.items() if not k.startswith(OBS_IMAGES_PREFIX)}
        vla_config.input_features = {OBS_IMAGES_PREFIX + name: image for name in CAMERA_NAMES[:cameras]} | others
        run.current = RolloutState.start(run.policy, run.env, run.seeds)
        buffer = rollout(run, config)
    finally:
        run.env.close()
    tensors = {f"context {name}": tensor for name, tensor in buffer.context.items()}
    tensors |= {f.name: getattr(buffer, f.name) for f in dataclasses.fields(buffer) if f.name != "context"}
    sizes = {name: t.nbytes / buffer.num_decisions for name, t in tensors.items() if t is not None}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:4]
    row: Row = {"cameras": cameras, "bytes a decision": round(sum(sizes.values()))}
    row |= {name: round(sizes[name]) for name in largest}
    row["the rest"] = round(sum(sizes.values()) - sum(sizes[name] for name in largest))
    return row | {"MB an iteration of the preset": sum(sizes.values()) * PRESETS["tiny"].decisions_per_iteration / 1e6}


def update_row(minibatch: int, num_envs: int) -> Row:
    """Resident memory around one update, in this process."""
    config = small(num_envs, minibatch)
    torch.set_num_threads(config.num_threads)
    config, run = open_run(config)
    buffer = rollout(run, config)
    run.env.close()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = status_mb("VmRSS")
    run.learner.update(buffer)
    peak = status_mb("VmHWM")
    return {
        "minibatch": minibatch,
        "decisions": buffer.num_decisions,
        "before, MB": before,
        "peak, MB": peak,
        "peak - before, MB": peak - before,
    }


def update_row_in_child(minibatch: int) -> Row:
    """`update_row` in a fresh process."""
    command = [sys.executable, __file__, "--minibatch", str(minibatch)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory_by_iteration(config: TrainingConfig) -> list[tuple[float, float]]:
    """MB resident, and in use on the heap, after every iteration of the loop of train_reinflow.train."""
    samples = []
    config, run = train_reinflow.open_run(config)
    with run:
        for iteration in run.iterations():
            update(run, config, rollout(run, config))
            if config.eval_interval and iteration % config.eval_interval == 0:
                evaluate(run, config)
            run.log()
            run.save_if_due()
            samples.append((status_mb("VmRSS"), heap_mb()))
    return samples


def flat_row(iterations: int) -> Row:
    """Growth of a run of many small iterations: episodes of one chunk of 10 control steps in two environments."""
    with (
        tempfile.TemporaryDirectory() as directory,
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        config = small(
            2, 2, chunks=1, steps=10, num_episodes=2 * iterations, eval_interval=50, eval_episodes=2,
            save_interval=100, report_episodes=0, wandb_enabled=False, output_dir=str(Path(directory) / "run"),
        )  # fmt: skip
        resident, heap = np.array(memory_by_iteration(config)).T
    # Early iterations fill caches: the line starts later.
    first = int(WARM_UP * iterations)
    at = np.arange(first, iterations)
    slopes = [100 * float(np.polyfit(at, values[first:], 1)[0]) for values in (resident, heap)]
    return {
        "iterations": iterations,
        "after the first, MB": float(resident[0]),
        f"after {first + 1}, MB": float(resident[first]),
        "at the end, MB": float(resident[-1]),
        "highest, MB": float(resident.max()),
        "growth, MB per 100 iterations": slopes[0],
        "heap in use: growth, MB per 100 iterations": slopes[1],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--only", choices=("buffer", "update", "flat"), help="one of the three tables")
    parser.add_argument("--minibatch", type=int, help="measure one update in this process and print it as JSON")
    args = parser.parse_args(argv)
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("memory.py reads /proc: run it on Linux")
    if args.minibatch:
        print(json.dumps(update_row(args.minibatch, DECISIONS // 3)))
        return
    counts: tuple[int, ...] = (1, 2, 3)
    if args.quick:
        args.iterations, counts = 3, (1,)
    args.repeats = 1  # sizes do not scatter
    if args.only in (None, "buffer"):
        report([buffer_row(count, 2 if args.quick else 8) for count in counts], args, "tensor bytes", "buffer")
    if args.only in (None, "update"):
        updates = [update_row(6, 2)] if args.quick else [update_row_in_child(size) for size in MINIBATCHES]
        report(updates, args, "1 torch thread", "update")
    if args.only in (None, "flat"):
        report([flat_row(args.iterations)], args, "2 environments, episodes of one chunk of 10 steps", "flat")


if __name__ == "__main__":
    main()
