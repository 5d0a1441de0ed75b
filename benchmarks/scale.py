"""The model of scale: how long an iteration takes on more cores, GPUs and nodes, from costs measured on this machine.

    python benchmarks/scale.py                 # the tables of notes/scaling.md
    python benchmarks/scale.py --measured DIR  # costs of a finished run of the preset tiny instead of the stored ones

An iteration of one learner is a sum: physics and images on the cores, encoding and denoising where the policy is, the
update, and with several learners the sums over them. Operations are counted by PyTorch's own counter on the real
classes, of any size, without weights; the share of its published rate that a device reaches is printed.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import _common as c
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from reinflow.flow import chain_log_prob
from reinflow.natural import NaturalGradient
from reinflow_so101.memory_planner.plan import GIB, Limits, MemoryConfig, fits, make_plan
from reinflow_so101.memory_planner.trace import PassBytes, blank_batch, shapes_only, trace_passes
from reinflow_so101.opening import published_sizes
from reinflow_so101.skeletons import PUBLISHED, skeleton
from reinflow_vla.pi0_directory import replaced
from train_reinflow import PRESETS, TrainingConfig

ROWS = 2  # one row alone may take other paths


@dataclass(frozen=True)
class Machine:
    """A node: what a process on one of its accelerators (or its cores) has."""

    name: str
    cores: int  # beside one accelerator
    narrow: float  # FLOP/s of bf16 products, as reached
    wide: float  # of fp32 ones, as reached
    link: float  # bytes/s between accelerators of a node
    network: float  # bytes/s between nodes
    memory: float  # GiB of an accelerator, or of the machine


NATURAL = 2.1  # passes a natural step costs: covariances, three KL measurements, ratio guard (notes/performance.md)
PER_NODE = 8  # accelerators
SIMULATORS, SIMULATOR_CORES = 4, 64  # nodes of rollout workers beside one learner, and the cores of each
# Reached by SmolVLA's shape on one H100, preprocessing included (notes/results/2026-11-26-gpu*.csv): acting for 64
# environments in bf16, 4 % of the published rate, so that other cards are assumed to do the same; and, as a share of
# the published fp32 rate, the cached update.
NARROW, SHARE_WIDE = 40e12, 0.4
HERE = Machine("2 cores, this one", 2, 66e9, 59e9, 4e9, 1e9, 23)  # as reached on them by the tiny policy
H100 = Machine("H100", 16, NARROW, SHARE_WIDE * 67e12, 450e9, 50e9, 80)
RTX4090 = Machine("RTX 4090", 16, NARROW, SHARE_WIDE * 82e12, 25e9, 1.2e9, 24)


@dataclass(frozen=True)
class Costs:
    """What one episode of the arm costs a core, and the rest of an iteration that no accelerator takes away."""

    core_seconds: float = 0.038  # of an episode: physics, images, Python (tiny's run of 2026-11-26, notes/results)
    chunk_step: float = 0.01  # seconds of launches and copies per chunk step, whatever the environments
    message: float = 1e-3  # seconds of waiting for each other at a sum, times the root of the learners' number


@dataclass(frozen=True)
class Work:
    """Of one policy; FLOP of one decision."""

    encode: float
    denoise: float  # all K steps of acting
    update: float  # forward and backward in all K steps, once
    heads: float  # the same of the heads alone
    sums: int  # scalars that learners add up in an update
    head_sums: int  # the same of the heads alone
    narrow: bool  # whether the frozen part is bf16


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """FLOP of what runs within; fused attention, which has no meta kernel, by hand."""
    counter = FlopCounterMode(display=False)
    extra = 0

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        nonlocal extra
        extra += 2 * query.numel() * key.shape[-2] + 2 * query.shape[:-1].numel() * value.shape[-2] * value.shape[-1]
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    with shapes_only(), replaced(nn.functional, {"scaled_dot_product_attention": attention}), counter:
        yield counter
        counter.attention = extra  # type: ignore[attr-defined]


def flop(counter: FlopCounterMode) -> float:
    """Per row."""
    return (counter.get_total_flops() + counter.attention) / ROWS  # type: ignore[attr-defined]


def work_of(config: TrainingConfig) -> Work:
    """Count every pass of a training's policy."""
    policy, spec = skeleton(config.policy(), config.env()), config.chain()
    with counted() as encode, torch.no_grad():
        context = policy.encode(blank_batch(policy, config, ROWS))
    with shapes_only():
        chain = torch.zeros(ROWS, spec.num_denoising_steps + 1, policy.denoised_steps, policy.padded_action_dim)
        noisy = torch.zeros(ROWS, spec.num_noisy_steps, dtype=torch.int64)
        width = policy.vla.model.action_out_proj.in_features
        read = torch.zeros(ROWS, spec.num_noisy_steps, policy.denoised_steps, width)
    with counted() as acting, torch.no_grad():
        chain_log_prob(policy, context, chain, spec, noisy)
    with counted() as update:
        chain_log_prob(policy, context, chain, spec, noisy).log_prob.sum().backward()
    with counted() as heads:
        chain_log_prob(policy, context, chain, spec, noisy, read).log_prob.sum().backward()
    groups = policy.trainable_groups()
    head = [*groups["action_head"], *groups["noise_head"]]
    sums, head_sums = (added_up(config, policy, learning) for learning in (policy.policy_parameters(), head))
    narrow = config.policy_path in PUBLISHED  # which are read in bf16, less what learns
    return Work(flop(encode), flop(acting), flop(update), flop(heads), sums, head_sums, narrow)


def added_up(config: TrainingConfig, policy: nn.Module, learning: Sequence[nn.Parameter]) -> int:
    """Scalars that learners add up in an update: gradients and, with a natural step, covariances and directions."""
    gradients = sum(p.numel() for p in learning)
    if config.policy_optimizer != "natural":
        return gradients
    optimizer = NaturalGradient(policy, learning, config.natural_damping, config.natural_momentum)
    shapes = [shape for layer in optimizer.layers for shape in optimizer.state_shapes(layer.weight).values()]
    return gradients + sum(math.prod(shape) for shape in shapes)


@dataclass(frozen=True)
class Iteration:
    """Predicted seconds of one iteration."""

    physics: float
    policy: float
    update: float
    sync: float

    @property
    def all(self) -> float:
        """Of these together."""
        return self.physics + self.policy + self.update + self.sync


def predict(
    config: TrainingConfig, work: Work, costs: Costs, machine: Machine, ranks: int, heads: bool, worker_cores: int = 0
) -> Iteration:
    """An iteration of ``config`` on so many learners.

    Args:
        config: settings, which count over all learners.
        work: of its policy.
        costs: of its environments.
        machine: of every learner.
        ranks: learners.
        heads: whether the heads alone learn.
        worker_cores: of rollout workers without accelerators, which then play and act in place of the learner.
    """
    decisions, natural = config.decisions_per_iteration, config.policy_optimizer == "natural"
    episodes = decisions / config.chunks_per_episode
    frozen = machine.narrow if work.narrow else machine.wide
    physics = episodes * costs.core_seconds / (worker_cores or ranks * machine.cores)
    if worker_cores:
        acting = decisions * (work.encode + work.denoise) / (worker_cores * HERE.wide / HERE.cores)
    else:
        acting = decisions * (work.encode / frozen + work.denoise / machine.wide) / ranks
    acting += config.chunk_steps_per_rollout * costs.chunk_step
    passes = NATURAL if natural else config.num_ppo_epochs
    update = decisions * passes * (work.heads if heads else work.update) / machine.wide / ranks
    steps = 1 if natural else max(decisions * config.num_ppo_epochs // config.learner().batch_size, 1)
    link = machine.link if ranks <= PER_NODE else machine.network
    travels = 2 * 4 * (work.head_sums if heads else work.sums) * (ranks - 1) / ranks  # round a ring, there and back
    sync = steps * (travels / link + costs.message * max(ranks - 1, 0) ** 0.5)
    return Iteration(physics, acting, update, sync)


# --- What is asked ----------------------------------------------------------------------------------------------------


def policies() -> dict[str, TrainingConfig]:
    """What is predicted, by size; sizes that a policy decides are those that LeRobot publishes."""
    smolvla = replace(PRESETS["finetune"], pretrained_path="lerobot/smolvla_base", cameras=TrainingConfig.cameras)
    pi0 = replace(
        smolvla, model_type="pi0", pi0_pretrained_path="lerobot/pi0", policy_optimizer="adam", num_ppo_epochs=2
    )
    return {
        "tiny, 3 M": PRESETS["tiny"],
        "SmolVLA, 450 M": published_sizes(smolvla),
        "Pi0, 3.5 B": published_sizes(pi0),
    }


def grown(config: TrainingConfig, times: int) -> TrainingConfig:
    """Rollouts of so many learners: each keeps the preset's environments and episodes."""
    return replace(
        config, num_parallel_envs=times * config.num_parallel_envs,
        episodes_per_iteration=times * config.episodes_per_iteration,
        gradient_accumulation_steps=times * config.gradient_accumulation_steps,
    )  # fmt: skip


def measured_costs(run: Path, cores: int) -> Costs:
    """Of a finished run of the preset tiny that had ``cores`` cores to itself."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    episodes = rows[-1]["progress/episodes"] / len(rows)
    return Costs(cores * fmean(row["time/rollout_env"] for row in rows) / episodes)


def planned(config: TrainingConfig, passes: PassBytes, machine: Machine) -> str:
    """GiB of one accelerator, for the preset's own rollout, by reinflow-memory, and whether it has them."""
    limits = Limits(machine.memory) if machine != HERE else Limits(ram_gb=machine.memory, for_device="cpu")
    question = MemoryConfig(config, limits)
    plan = make_plan(question, passes)
    return f"{plan.device_bytes / GIB:.1f}{'' if fits(plan, question) else ', too many'}"


def table(machines: Sequence[Machine], costs: Costs, ranks: Sequence[int]) -> list[c.Row]:
    """Every policy on every number of accelerators."""
    rows: list[c.Row] = []
    for name, config in policies().items():
        work, frozen = work_of(config), replace(config, train_time_mlp=False, train_full_expert=False)
        passes = {False: (config, trace_passes(config)), True: (frozen, trace_passes(frozen))}
        places = [(machine, number, 0) for machine in machines for number in ranks]
        places += [(machine, 1, SIMULATORS) for machine in machines if machine == H100]
        for (machine, number, nodes), heads in itertools.product(places, (False, True)):
            wide = grown(config, number)
            seconds = predict(wide, work, costs, machine, number, heads, nodes * SIMULATOR_CORES)
            beside = f" and {nodes} simulator nodes" if nodes else ""
            episodes = wide.decisions_per_iteration / wide.chunks_per_episode
            rows.append({
                "policy": name, "learns": "heads" if heads else "whole expert",
                "on": f"{number} x {machine.name}{beside}",
                "episodes an iteration": int(episodes), "s": f"{seconds.all:.3g}",
                "episodes/s": f"{episodes / seconds.all:.3g}",
                "physics": f"{seconds.physics / seconds.all:.0%}", "acting": f"{seconds.policy / seconds.all:.0%}",
                "update": f"{seconds.update / seconds.all:.0%}", "sums": f"{seconds.sync / seconds.all:.0%}",
                "hours x accelerators for 10,000 episodes": f"{number * 1e4 * seconds.all / episodes / 3600:.2g}",
                "GiB planned": planned(*passes[heads], machine),
            })  # fmt: skip
    return rows


def main() -> None:
    """Print the table."""
    parser = c.make_parser(__doc__)
    parser.add_argument("--measured", default="", help="a finished run of the preset tiny on a quiet machine")
    parser.add_argument("--cores", type=int, default=2, help="cores that it had")
    args = parser.parse_args()
    costs = measured_costs(Path(args.measured), args.cores) if args.measured else Costs()
    ranks = (1,) if args.quick else (1, 8, 64)
    rows = table((HERE,), costs, (1,)) + table((RTX4090, H100), costs, ranks)
    note = (
        f"predicted; an episode takes {1e3 * costs.core_seconds:.1f} ms of one core, accelerators reach "
        f"{NARROW / 1e12:.0f} TFLOP/s (bf16) and {SHARE_WIDE:.0%} of their published fp32 rates, as one H100 did"
    )
    c.report(rows, args, note)


if __name__ == "__main__":
    main()
