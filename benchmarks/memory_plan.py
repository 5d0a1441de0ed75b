"""Memory that reinflow-memory plans against what PyTorch's allocator and the process really take, on the CPU.

    python benchmarks/memory_plan.py --policy tiny --rows 8
    python benchmarks/memory_plan.py --policy tiny-pi0 --rows 8
    python benchmarks/memory_plan.py --policy smolvla --rows 2 --csv FILE    # real size, random weights
    python benchmarks/memory_plan.py --policy smolvla --rows 2 --heads-alone

The allocator's own records (torch.profiler) say what was allocated at the peak of a pass, kernels' work space included;
they share nothing with the trace on shapes that the plan is made of.
"""

from __future__ import annotations

import csv
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import psutil
import torch
import tyro
from torch.profiler import ProfilerActivity, profile

from reinflow.flow import chain_log_prob, sample_chain
from reinflow.learner import make_policy_optimizer
from reinflow_so101.memory_planner.plan import CPU_FRAGMENTATION
from reinflow_so101.memory_planner.trace import PassBytes, trace_passes
from reinflow_so101.opening import make_policy
from reinflow_so101.policies import vla_settings
from reinflow_so101.skeletons import published_smolvla
from reinflow_vla.base import ReinFlowVLA
from reinflow_vla.prefix_cache import HEADS, PrefixCache
from so101_sim.vector.base import blank_observation
from train_reinflow import PRESETS, TrainingConfig

MIB = 2**20


@dataclass(frozen=True)
class MemoryBenchmark:
    """Compare planned and measured memory."""

    policy: Literal["tiny", "tiny-pi0", "smolvla"] = "tiny"
    """Preset; smolvla is the published size with random weights."""
    rows: int = 8
    """Observations encoded and decisions differentiated at once."""
    heads_alone: bool = False
    """With everything before the heads frozen, and what they read kept."""
    csv: str = ""
    """Append the table to this file."""


@dataclass(frozen=True)
class Comparison:
    """Planned and measured bytes of one thing."""

    name: str
    planned: float
    measured: float

    @property
    def error(self) -> float:
        """Planned over measured, minus one."""
        return self.planned / self.measured - 1


def allocated_peak(run: Callable[[], Any]) -> int:
    """Bytes that the CPU allocator had handed out during ``run`` at most, beyond what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = peak = 0
    for _, size in sorted(_allocations(profiler.profiler.kineto_results.experimental_event_tree())):
        live += size
        peak = max(peak, live)
    return peak


def _allocations(events: Any) -> Iterator[tuple[int, int]]:
    """(time, bytes) of every allocation, negative where memory is given back."""
    for event in events:
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from _allocations(event.children)


def compare(config: TrainingConfig, policy: ReinFlowVLA, passes: PassBytes, rows: int) -> list[Comparison]:
    """Weights, one decision's share of the buffer, the peak of encoding and that of a second backward pass."""
    observation, spec = blank_observation(config.env()), config.chain()
    optimizer = make_policy_optimizer(policy, config.learner())
    one = policy.preprocess(observation | {"task": [config.instruction]})
    batch = {k: v.expand(rows, *v.shape[1:]).contiguous() if isinstance(v, torch.Tensor) else v for k, v in one.items()}
    context = policy.to_buffer(policy.encode(batch))
    noise = torch.zeros(rows, policy.n_action_steps, policy.padded_action_dim)
    shape = spec.noise_shape(policy.n_action_steps, policy.action_dim)
    drawn = sample_chain(policy, policy.encode(batch), spec, noise, torch.randn(rows, *shape))
    chain, read = drawn.chain, drawn.head_inputs

    def encode() -> Any:
        return policy.encode({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()})

    def update() -> None:
        inputs = {name: tensor.clone() for name, tensor in context.items()}  # rows taken from the buffer
        head_inputs = None if read is None else read.clone()
        chain_log_prob(policy, inputs, chain.clone(), spec, None, head_inputs).log_prob.sum().backward()

    def updates() -> None:
        update()
        update()  # beside gradients and covariances of the first

    updates()
    gradients = sum(p.grad.nbytes for p in policy.parameters() if p.grad is not None)
    optimizer.zero_grad()
    storages = [t.untyped_storage() for t in (*policy.parameters(), *policy.buffers())]
    tensors = {storage.data_ptr(): storage.nbytes() for storage in storages}
    keep = policy.prefix_cache.keep
    kept = (sum(t.nbytes for t in context.values()) + chain.nbytes + (0 if read is None else read.nbytes)) / rows
    return [
        Comparison("weights", passes.frozen + passes.policy + passes.critic, sum(tensors.values())),
        Comparison("buffer, per decision", passes.kept[keep] + passes.rest, kept),
        Comparison(f"encoding, {rows} observations", passes.encode(rows), allocated_peak(encode)),
        Comparison(
            f"forward and backward, {rows} decisions", passes.update(keep)(rows), allocated_peak(updates) - gradients
        ),
    ]


def real_smolvla(config: TrainingConfig, folder: Path) -> ReinFlowVLA:
    """A SmolVLA of the published size with random weights."""
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    from reinflow_smolvla import ReinFlowSmolVLA
    from reinflow_so101.stages.build_smolvla import identity_stats
    from reinflow_vla.directory import quiet

    settings = published_smolvla(config.env(), config.chunk_size, config.n_action_steps, folder)
    with quiet():
        policy = SmolVLAPolicy(settings)
    processors = make_pre_post_processors(settings, dataset_stats=identity_stats())
    return ReinFlowSmolVLA(policy, *processors, **vla_settings(config.policy()))


def main() -> None:
    """Print the table."""
    options = tyro.cli(MemoryBenchmark, description=__doc__)
    config = replace(PRESETS[options.policy], prefix_cache="kv", num_threads=1)
    if options.policy == "smolvla":  # as many bytes as the real instruction has tokens: the tokenizer is not SmolVLM's
        config = replace(config, instruction="pick up")
    if options.heads_alone:
        config = replace(config, train_time_mlp=False, train_full_expert=False, prefix_cache="heads")
    torch.set_num_threads(1)
    passes, process = trace_passes(config), psutil.Process()
    before = process.memory_info().rss
    with TemporaryDirectory() as folder:
        if options.policy == "smolvla":
            policy: Any = real_smolvla(config, Path(folder))
        else:
            policy = make_policy(config, "cpu")
        policy.prefix_cache = PrefixCache(HEADS if options.heads_alone else "kv")
        rows = compare(config, policy, passes, options.rows)
    gradients, peaks = sum(p.nbytes for p in policy.policy_parameters()), [row.planned for row in rows[2:]]
    if options.policy == "smolvla":  # of a tiny policy the program's own noise is larger
        measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        planned = CPU_FRAGMENTATION * (rows[0].planned + gradients + max(peaks))
        rows.append(Comparison("process: peak RSS over the program's", planned, measured))
    print(f"program alone: {before / MIB:.0f} MiB RSS")
    name = f"{options.policy}, heads alone" if options.heads_alone else options.policy
    lines = [[name, r.name, f"{r.planned / MIB:.3f}", f"{r.measured / MIB:.3f}", f"{r.error:+.1%}"] for r in rows]
    for line in lines:
        print("  ".join(line))
    if options.csv:
        new = not Path(options.csv).exists()
        with open(options.csv, "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["policy", "what", "planned_mib", "measured_mib", "error"])
            writer.writerows(lines)


if __name__ == "__main__":
    main()
