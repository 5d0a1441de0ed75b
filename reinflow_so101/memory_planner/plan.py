"""reinflow-memory: what a training needs of GPU memory and RAM, before it is started and without its weights.

    reinflow-memory --model-type pi0 --num-envs 8 --minibatch-size 4
    reinflow-memory --model-type smolvla --num-envs 16 --vram-gb 12 --sweep

Takes every flag of train_reinflow.py. The policy's real code runs on tensors that have only a shape (trace.py);
its figures stand beside measured ones in notes/results/README.md. With --for-device cpu everything is RAM.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Literal

from reinflow import ConfigError, UserError
from reinflow.progress import spinner, tracked
from reinflow_so101.checks import WORKER_FIELDS, FlatConfig
from reinflow_so101.command_line import parse_flags, starting_point
from reinflow_so101.opening import published_sizes, settle
from reinflow_so101.policies import FAMILIES
from reinflow_so101.skeletons import PUBLISHED

if TYPE_CHECKING:
    from reinflow_so101.memory_planner.trace import PassBytes
    from reinflow_vla.prefix_cache import PrefixCache

GIB = 2**30
CUDA_CONTEXT = 0.9 * GIB  # driver context, kernels and cuBLAS work space; not measured here
FRAGMENTATION = 1.05  # of PyTorch's caching allocator; not measured here
CPU_FRAGMENTATION = 1.3  # of the C library's; between two measurements, 1.18 and 1.41 (notes/results/README.md)
PROGRAM = 0.8 * GIB  # resident: Python with torch, LeRobot and MuJoCo
OFFLOADING_GB = 0.1  # so small a prefix cache on the device sends it to host memory
SWEEP_ENVS, SWEEP_MINIBATCH = (1, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Limits:
    """What must suffice."""

    vram_gb: float = 24.0
    """GPU memory in GiB that must suffice."""
    ram_gb: float = 0.0
    """RAM in GiB that must suffice; 0 does not ask."""
    for_device: Literal["cuda", "cpu"] = "cuda"
    """Where the policy will run; on cpu everything is RAM."""
    sweep: bool = False
    """Print a table over num_parallel_envs and minibatch_size, too."""

    def __post_init__(self) -> None:
        if self.vram_gb <= 0 or self.ram_gb < 0:
            raise ConfigError(f"vram_gb={self.vram_gb} and ram_gb={self.ram_gb}: give sizes in GiB, ram_gb may be 0")

    @property
    def device_gb(self) -> float:
        """GiB where the policy runs."""
        return self.vram_gb if self.for_device == "cuda" else self.ram_gb


@dataclass(frozen=True)
class MemoryConfig:
    """A training and what must suffice for it."""

    training: FlatConfig
    limits: Limits

    def __post_init__(self) -> None:
        if self.training.model_type == "flow_mlp":
            raise ConfigError("model_type=flow_mlp has nothing to plan (4 MB): use smolvla or pi0")


@dataclass(frozen=True)
class Row:
    """A line of the breakdown; bytes."""

    name: str
    rollout: float
    update: float
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What a training needs; bytes."""

    rows: tuple[Row, ...]  # on the policy's device
    ram: tuple[Row, ...]  # on the host, beside a policy on an accelerator
    cache: PrefixCache
    refused: str  # why the run would not start: the prefix cache has no room
    overhead: float

    def phase(self, name: Literal["rollout", "update"]) -> float:
        """Device memory of one phase, the allocator's share included."""
        return self.overhead * sum(getattr(row, name) for row in self.rows)

    @property
    def device_bytes(self) -> float:
        """Peak on the policy's device."""
        return max(self.phase("rollout"), self.phase("update"))

    @property
    def host_bytes(self) -> float:
        """Peak RAM beside a policy on an accelerator."""
        return max(sum(row.rollout for row in self.ram), sum(row.update for row in self.ram))


def make_plan(config: MemoryConfig, passes: PassBytes) -> Plan:
    """Put a training together from what its passes need, with the prefix cache that the run itself would choose."""
    from reinflow.policy import PolicyError
    from reinflow_vla.prefix_cache import KEEPS, PrefixCache, plan_prefix_cache

    c, limits, weights = config.training, config.limits, passes.frozen + passes.policy + passes.critic
    ram = limits.ram_gb * GIB - PROGRAM if limits.ram_gb else math.inf
    if limits.for_device == "cuda":
        free = {"cuda": limits.vram_gb * GIB - CUDA_CONTEXT - weights, "cpu": ram}
    else:
        free = {"cpu": ram - weights}
    decisions, refused = c.decisions_per_iteration, ""
    try:
        cache = plan_prefix_cache(
            c.prefix_cache, passes.kept, decisions, limits.for_device, c.prefix_cache_gb, lambda d: max(free[d], 0)
        )
    except PolicyError as error:
        smallest = min(KEEPS, key=lambda keep: passes.kept[keep])
        cache, refused = PrefixCache(smallest if c.prefix_cache == "auto" else c.prefix_cache), str(error)
    return _plan(config, passes, cache, refused)


def fits(plan: Plan, config: MemoryConfig) -> bool:
    """Whether both limits hold."""
    limits = config.limits
    return (
        not plan.refused
        and (limits.device_gb == 0 or plan.device_bytes <= limits.device_gb * GIB)
        and (limits.for_device == "cpu" or limits.ram_gb == 0 or plan.host_bytes <= limits.ram_gb * GIB)
    )


def _plan(config: MemoryConfig, passes: PassBytes, cache: PrefixCache, refused: str) -> Plan:
    from reinflow.learner import KL_SAMPLE
    from reinflow.rollout import ROW_TILE  # an evaluation has at least so many

    c, keep, offload = config.training, cache.keep, cache.offload
    decisions, envs, rows = c.decisions_per_iteration, c.num_parallel_envs, c.minibatch_size
    decision = passes.kept[keep] + passes.rest
    learned = passes.policy + passes.critic
    buffer = decisions * (passes.rest if offload else decision)
    kl_sample = KL_SAMPLE * (2 if c.policy_optimizer == "natural" else 1)  # decisions copied to measure the KL on
    sample = min(kl_sample, decisions) * (passes.rest if offload else decision)
    acting = (1 if c.time_limit_is_terminal else 2) * envs * (passes.kept["kv"] + passes.rest)
    anchor = c.anchor_coeff > 0
    copies = (2 if c.policy_optimizer == "natural" else c.undo_overshoot) + anchor  # natural: and the step's direction
    moments = 2 * passes.critic + (passes.natural if c.policy_optimizer == "natural" else 2 * passes.policy)
    device = [
        Row("frozen weights", passes.frozen, passes.frozen),
        Row("trainable weights, fp32", learned, learned),
        Row("optimiser's moments", moments, moments, c.policy_optimizer),
        Row("gradients", 0, learned),
        Row("copies of the policy", anchor * passes.policy, copies * passes.policy, "undo, step, anchor"),
        Row("rollout buffer", buffer, buffer, f"{decisions} decisions x {decision / 2**20:.2f} MiB, {keep}"),
        Row("decisions for the KL", 0, sample),
        Row("current observations", acting, envs * (passes.kept["kv"] + passes.rest), f"{envs} envs, kv"),
        Row("encoding", passes.encode(max(envs, ROW_TILE)), 0, f"vision tower and language model, {envs} envs"),
        # The optimiser's step comes after it and works in place: Adam is fused.
        Row("forward and backward", 0, passes.update(keep)(rows), f"{rows} decisions x {c.num_denoising_steps} steps"),
    ]
    if config.limits.for_device == "cpu":
        device.append(Row("program", PROGRAM, PROGRAM))
        return Plan(tuple(device), (), cache, refused, CPU_FRAGMENTATION)
    device.append(Row("CUDA context", CUDA_CONTEXT, CUDA_CONTEXT))
    # All weights are built on the CPU in fp32 before they move; then the memory is free for the offloaded cache.
    building = 4 * passes.scalars
    kept = decisions * passes.kept[keep] if offload else 0
    host = (
        Row("program", PROGRAM, PROGRAM),
        Row("building the policy (once) or the offloaded cache", max(building, kept), max(building, kept)),
    )
    return Plan(tuple(device), host, cache, refused, FRAGMENTATION)


def traced(training: FlatConfig) -> PassBytes:
    """``trace_passes``, once for all settings that only say how often and how many."""
    one_process = {name: getattr(type(training), name) for name in ("rollout_backend", *WORKER_FIELDS)}
    return _traced(replace(
        training, num_parallel_envs=1, use_subproc_env=False, minibatch_size=1, gradient_accumulation_steps=1,
        episodes_per_iteration=1, prefix_cache="auto", prefix_cache_gb=0.0, **one_process,
    ))  # fmt: skip


@cache
def _traced(training: FlatConfig) -> PassBytes:
    from reinflow_so101.memory_planner.trace import trace_passes

    with spinner("tracing the policy's passes"):
        return trace_passes(training)


def switches(config: MemoryConfig) -> Iterator[tuple[str, FlatConfig]]:
    """Settings that need less memory, the cheapest in speed and quality first; each alone."""
    training = config.training
    if training.model_type == "pi0":
        if training.pi0_vlm_dtype != "bfloat16":
            yield "--pi0-vlm-dtype bfloat16", replace(training, pi0_vlm_dtype="bfloat16")
        if not training.pi0_gradient_checkpointing:
            yield "--pi0-gradient-checkpointing", replace(training, pi0_gradient_checkpointing=True)
    if training.prefix_cache == "kv":
        yield "--prefix-cache auto", replace(training, prefix_cache="auto")
    if config.limits.for_device == "cuda" and training.prefix_cache_gb != OFFLOADING_GB:
        yield f"--prefix-cache-gb {OFFLOADING_GB}", replace(training, prefix_cache_gb=OFFLOADING_GB)
    for rows in (8, 4, 2, 1):
        if rows < training.minibatch_size:
            batch = training.minibatch_size * training.gradient_accumulation_steps
            flags = f"--minibatch-size {rows} --gradient-accumulation-steps {batch // rows}"
            smaller = replace(training, minibatch_size=rows, gradient_accumulation_steps=batch // rows)
            yield flags, smaller
    for envs in (16, 8, 4, 1):
        if training.num_rollout_workers <= envs < training.num_parallel_envs:
            yield f"--num-parallel-envs {envs}", replace(training, num_parallel_envs=envs, use_subproc_env=False)
    if training.model_type == "pi0" and training.peft_rank == 0 and training.train_full_expert:
        yield "--peft-rank 16", replace(training, peft_rank=16)


def heads_alone(training: FlatConfig) -> FlatConfig:
    """The last resort, which learns less: an update runs nothing but the heads."""
    return replace(training, train_full_expert=False, train_time_mlp=False, peft_rank=0, prefix_cache="auto")


def advice(config: MemoryConfig, plan: Plan) -> str:
    """Whether the limits hold, and if not the first switch, alone or on top of the earlier ones, that makes them."""
    limits = f"{config.limits.device_gb:g} GiB" + (" RAM" if config.limits.for_device == "cpu" else "")
    if fits(plan, config):
        spare = config.limits.device_gb - plan.device_bytes / GIB
        return f"{limits} suffice, {spare:.1f} GiB are left" if spare > 0 else "no limit given"
    tried = replace(config)
    flags: list[str] = []
    for flag, training in switches(config):
        alone = replace(config, training=training)
        if fits(make_plan(alone, traced(training)), config):
            return f"{limits} do not suffice; this switch does it: {flag}"
    for _ in range(len(list(switches(config)))):
        flag, training = next(switches(tried), ("", tried.training))
        if not flag:
            break
        tried = replace(tried, training=training)
        flags.append(flag)
        if fits(make_plan(tried, traced(training)), config):
            return f"{limits} do not suffice; these switches together do it: {' '.join(flags)}"
    for before, training in (([], config.training), (flags, tried.training)):
        heads = replace(config, training=heads_alone(training))
        if fits(make_plan(heads, traced(heads.training)), config):
            kept = [flag for flag in before if not flag.startswith("--peft-rank")]
            said = " ".join([*kept, "--no-train-full-expert --no-train-time-mlp"])
            return f"{limits} do not suffice for the expert; the heads alone can be trained: {said}"
    return f"{limits} do not suffice, with no switch: a larger device or a smaller policy is needed"


def print_plan(config: MemoryConfig, plan: Plan) -> None:
    """The breakdown, in GiB."""
    from rich.console import Console
    from rich.table import Table

    console, where = Console(), "GPU" if config.limits.for_device == "cuda" else "RAM"
    table = Table("GiB", f"{where}, rollout", f"{where}, update", "")
    for row in plan.rows:
        table.add_row(row.name, f"{row.rollout / GIB:.3f}", f"{row.update / GIB:.3f}", row.note)
    totals = [f"{plan.phase('rollout') / GIB:.2f}", f"{plan.phase('update') / GIB:.2f}"]
    table.add_row("sum", *totals, f"{plan.overhead:.2f} x, for the allocator" if plan.overhead > 1 else "")
    console.print(table)
    if plan.ram:
        print(f"RAM: {plan.host_bytes / GIB:.1f} GiB (" + ", ".join(row.name for row in plan.ram) + ")")
    print(plan.refused or plan.cache.describe(config.training.decisions_per_iteration))


def sweep_table(config: MemoryConfig, passes: PassBytes) -> list[list[float]]:
    """Peak bytes on the device by num_parallel_envs (rows) and minibatch_size (columns); inf: no room for a cache."""

    def peak(envs: int, rows: int) -> float:
        c = config.training
        # One optimiser batch must fit into a rollout, whatever its minibatches are.
        episodes = max(c.episodes_per_iteration, envs, -(-rows // c.chunks_per_episode))
        accumulation = max(1, min(c.gradient_accumulation_steps, episodes * c.chunks_per_episode // rows))
        changed = replace(
            c, num_parallel_envs=envs, minibatch_size=rows, gradient_accumulation_steps=accumulation,
            episodes_per_iteration=episodes, use_subproc_env=False,
            num_rollout_workers=min(c.num_rollout_workers, envs),
        )  # fmt: skip
        plan = make_plan(replace(config, training=changed), passes)
        return math.inf if plan.refused else plan.device_bytes

    numbers = tracked(SWEEP_ENVS, "sweep, numbers of environments")
    return [[peak(envs, rows) for rows in SWEEP_MINIBATCH] for envs in numbers]


def print_sweep(config: MemoryConfig, passes: PassBytes) -> None:
    """The sweep in GiB; what does not fit is marked."""
    from rich.console import Console
    from rich.table import Table

    title = "peak in GiB by num_parallel_envs and minibatch_size (x: over, inf: no prefix cache fits)"
    table = Table("envs", *(f"M {rows}" for rows in SWEEP_MINIBATCH), title=title)
    limit = config.limits.device_gb * GIB
    for envs, peaks in zip(SWEEP_ENVS, sweep_table(config, passes), strict=True):
        table.add_row(str(envs), *(f"{p / GIB:.1f}" + (" x" if 0 < limit < p else "") for p in peaks))
    Console().print(table)


def run(config: MemoryConfig) -> Plan:
    """Print the plan (and the sweep) and what to do."""
    passes = traced(config.training)
    plan = make_plan(config, passes)
    print_plan(config, plan)
    if config.limits.sweep:
        print_sweep(config, passes)
    print(advice(config, plan))
    return plan


def parse_args(argv: Sequence[str], presets: Mapping[str, FlatConfig]) -> MemoryConfig:
    """The limits, and flags over the chosen preset of train_reinflow.py."""
    if "--resume" in argv:
        raise UserError("reinflow-memory plans a new training: leave --resume out")
    training, limits = parse_flags(argv, starting_point(argv, presets), __doc__, Limits(), "reinflow-memory")
    return MemoryConfig(_settled(training), limits)


def _settled(training: FlatConfig) -> FlatConfig:
    """What is left to the policy, as it says; a published one is planned without its files."""
    if training.policy_path in PUBLISHED:
        return published_sizes(training)
    if 0 in (training.chunk_size, training.n_action_steps, training.num_denoising_steps, training.image_size):
        return settle(training, FAMILIES[training.model_type].directory(training.policy_path))
    return training


def command(argv: Sequence[str], presets: Mapping[str, FlatConfig]) -> Plan:
    """reinflow-memory."""
    return run(parse_args(argv, presets))
