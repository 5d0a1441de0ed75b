"""The limit: how fast this machine multiplies matrices, and what fraction of that an update of the tiny preset reaches.

    python benchmarks/limit.py [--quick] [--csv FILE]

The first table is the measured peak, fp32 in torch: a large product, and one with the shape of the tiny expert's layers
(a minibatch of chunks times a square weight), which is what its width allows at best.

The second sets the arithmetic of an update against its time. *Needed* is the ideal update: every decision once forward
and backward through action expert and loss per policy epoch, and through the critic per critic epoch; nothing else.
*Done* is all that `PPOLearner.update` multiplies: ratio guard, K-FAC's covariances, the search for the step's length.
Both are counted by torch.utils.flop_counter on the real classes; linear solves and elementwise work are not counted.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from _common import Row, interleaved, make_parser, median, open_run, report, timed
from torch.utils.flop_counter import FlopCounterMode

from reinflow import ppo
from reinflow.flow import chain_log_prob
from reinflow.learner import PPOLearner
from reinflow.policy import FlowPolicy
from reinflow.rollout import RolloutBuffer
from reinflow_smolvla import ReinFlowSmolVLA
from reinflow_so101.opening import make_policy
from train_reinflow import PRESETS, TrainingConfig, rollout


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def matmul(rows: int, inner: int, columns: int, threads: int) -> Callable[[], float]:
    """Seconds of one product (rows, inner) x (inner, columns)."""
    a, b, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)

    def run() -> float:
        with torch_threads(threads):
            return timed(lambda: torch.mm(a, b, out=out))

    return run


def measure_peak(size: int, chunk_rows: int, width: int, threads: Sequence[int], repeats: int) -> list[Row]:
    """The first table. Of each shape the fastest round counts: a peak is what nothing disturbs."""
    shapes = {"large": (size, size, size), "expert layer": (chunk_rows, width, width)}
    variants = {(name, t): matmul(*shape, t) for name, shape in shapes.items() for t in threads}
    times = interleaved({f"{name} {t}": run for (name, t), run in variants.items()}, 3 * repeats)
    rows: list[Row] = []
    for name, (m, k, n) in shapes.items():
        rates = {f"{t} threads, GFLOP/s": 2e-9 * m * k * n / min(times[f"{name} {t}"]) for t in threads}
        rows.append({"product": name, "shape": f"{m} x {k} x {n}", **rates})
    return rows


def count_flops(function: Callable[[], object]) -> float:
    """Multiplications and additions of matrix products in one call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


def ideal_flops(config: TrainingConfig, policy: FlowPolicy, buffer: RolloutBuffer) -> float:
    """Of an update that takes every decision once forward and backward per epoch, policy and critic."""
    rows = min(config.minibatch_size, buffer.num_decisions)
    context = {name: tensor.flatten(0, 1)[:rows] for name, tensor in buffer.context.items()}
    chain = buffer.chain.flatten(0, 1)[:rows]
    # Which loss follows the log-prob or the value makes no difference to the products.
    score = count_flops(lambda: chain_log_prob(policy, context, chain, config.chain()).log_prob.sum().backward())
    value = count_flops(lambda: policy.value(context).sum().backward())
    per_decision = (config.num_ppo_epochs * score + config.num_critic_epochs * value) / rows
    return per_decision * buffer.num_decisions


class Update:
    """The update of `config` on a recorded rollout, repeatable: every run starts from the acting weights."""

    def __init__(self, config: TrainingConfig, buffer: RolloutBuffer) -> None:
        self.seed, self.buffer = config.seed, buffer
        self.policy = make_policy(config, "cpu")
        self.needed = ideal_flops(config, self.policy, buffer)  # before K-FAC hooks its own products into the layers
        settings = config.learner()
        self.learner = PPOLearner(self.policy, config.chain(), settings, config.seed)
        self._start = {name: tensor.clone() for name, tensor in self.policy.trainable_state().items()}
        self.done = count_flops(self.run)

    def run(self) -> float:
        """Seconds of one whole update."""
        self.policy.load_trainable_state(self._start)
        for optimizer in (self.learner.policy_optimizer, self.learner.critic_optimizer):
            optimizer.state.clear()
        self.learner.normalizer = ppo.ReturnNormalizer()
        self.learner.generator.manual_seed(self.seed)
        return timed(lambda: self.learner.update(self.buffer))


def measure_updates(config: TrainingConfig, peak: float, repeats: int) -> list[Row]:
    """The second table, with the preset's optimiser and with five epochs of Adam that nothing stops early.

    Args:
        peak: FLOP/s of a large product at the threads that the update uses.
    """
    config, run = open_run(config)
    buffer = rollout(run, config)
    run.env.close()
    c, batch = config, config.minibatch_size
    adam = dataclasses.replace(
        config, policy_optimizer="adam", num_ppo_epochs=5, num_critic_epochs=5, target_kl=0.0,
        gradient_accumulation_steps=1,
    )  # fmt: skip
    updates = {
        f"preset: {c.num_ppo_epochs} {c.policy_optimizer} step, {c.num_critic_epochs} critic epochs": config,
        f"5 epochs of Adam and critic in batches of {batch}": adam,
    }
    made = {name: Update(settings, buffer) for name, settings in updates.items()}
    times = interleaved({name: update.run for name, update in made.items()}, repeats)
    return [
        {
            "update": name,
            "decisions": buffer.num_decisions,
            "seconds": median(times, name),
            "needed, GFLOP": 1e-9 * update.needed,
            "done, GFLOP": 1e-9 * update.done,
            "done / needed": update.done / update.needed,
            "done, GFLOP/s": 1e-9 * update.done / median(times, name),
            "fraction of the limit": update.needed / median(times, name) / peak,
        }
        for name, update in made.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    args = make_parser(__doc__).parse_args(argv)
    config, size = PRESETS["tiny"], 2048
    if args.quick:
        size, args.repeats = 256, 1
        config = dataclasses.replace(
            config, num_parallel_envs=2, episodes_per_iteration=2, minibatch_size=6, gradient_accumulation_steps=1,
            num_critic_epochs=2,
        )  # fmt: skip
    vlm_with_expert = cast(ReinFlowSmolVLA, make_policy(config, "cpu")).vla.model.vlm_with_expert
    width = vlm_with_expert.expert_hidden_size
    rows_of_chunks, threads = config.minibatch_size * config.n_action_steps, sorted({1, os.cpu_count() or 1})
    peaks = measure_peak(size, rows_of_chunks, width, threads, args.repeats)
    report(peaks, args, "fp32, the fastest of three times as many rounds", "peak")
    with torch_threads(config.num_threads):
        peak = 1e9 * peaks[0][f"{config.num_threads} threads, GFLOP/s"]
        rows = measure_updates(config, peak, args.repeats)
        report(rows, args, f"{config.num_threads} torch threads, limit {1e-9 * peak:.1f} GFLOP/s")


if __name__ == "__main__":
    main()
