"""One PPO update of the policy: what the prefix cache and executing fewer tokens save.

    python benchmarks/update.py [--quick] [--csv FILE]
    python benchmarks/update.py --size real --decisions 2 --minibatch 2 --repeats 2     SmolVLA's 450 M, random weights
    python benchmarks/update.py --compile          # and the same through torch.compile, a minute or two for each shape
    python benchmarks/update.py --device cuda --size real --csv notes/results/gpu_update.csv

Seconds of an update (256 decisions, 5 epochs; --decisions and --epochs are measured, then scaled up linearly), split
into encode (getting the prefix back from the buffer), forward (the action expert), backward, optimiser (Adam over the
whole expert, once per --accumulation minibatches). `cached` keeps keys and values and runs the executed tokens alone;
`heads` trains the velocity head alone, on what it read when the policy acted, with Adam over that head.
`naive` keeps the images, runs vision tower and language model for every minibatch, and all 50 tokens: what a trainer
does that knows no cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from _common import Row, interleaved, make_parser, median, print_bar, report, speed_ratio, timed
from torch import Tensor

from reinflow.env import Observation
from reinflow.flow import ChainSpec, chain_log_prob, sample_chain
from reinflow.policy import Context
from reinflow_smolvla import ReinFlowSmolVLA
from reinflow_vla.base import TrainableGroups
from reinflow_vla.prefix_cache import GIB, HEADS, Keep, PrefixCache
from so101_mujoco_utils import model_dir

CHUNK = 50
DECISIONS, EPOCHS = 256, 5  # of the update that is reported
REAL_GIB = 16.0
PARTS = ("encode", "forward", "backward", "optimiser")
GROWTH_BAR = 0.15
BARS = {("tiny", 1, 50): 1.5, ("tiny", 1, 10): 4.0, ("real", 1, 50): 8.0, ("real", 4, 10): 10.0}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to do the update."""

    keep: Keep
    tokens: int  # computed; at least the executed ones
    steps: int  # K
    compiled: bool = False

    @property
    def heads_alone(self) -> bool:
        """Whether nothing before the heads learns."""
        return self.keep == HEADS


@dataclasses.dataclass
class Rollout:
    """What an update reads of a rollout."""

    context: Context
    chain: Tensor
    head_inputs: Tensor | None = None


def build(size: str, device: str, directory: Path, vlm_dtype: str) -> ReinFlowSmolVLA:
    """The embedded policy, or one of SmolVLA's real size with random weights; what learns is fp32."""
    if size == "real":
        from _real_size import write_real_smolvla

        write_real_smolvla(directory)
    policy = ReinFlowSmolVLA.from_pretrained(
        directory if size == "real" else model_dir() / "tiny_smolvla", device, num_denoising_steps=1,
        n_action_steps=CHUNK, sigma_min=0.1, sigma_max=0.1, groups=TrainableGroups(True, True, True, True, True),
        critic_hidden_size=512,
    )  # fmt: skip
    if size == "real":
        policy.vla.model.vlm_with_expert.vlm.to(getattr(torch, vlm_dtype))
    return policy


def observe(policy: ReinFlowSmolVLA, decisions: int, image_size: int) -> Observation:
    """Random images and joints: their content does not change the cost."""
    rng, shape = np.random.default_rng(0), (decisions, image_size, image_size, 3)
    return {
        "pixels": {name: rng.integers(0, 255, shape, dtype=np.uint8) for name in policy.cameras},
        "agent_pos": rng.normal(0, 1, (decisions, policy.action_dim)).astype(np.float32),
        "task": ["pick up the block"] * decisions,
    }


def roll_out(policy: ReinFlowSmolVLA, variant: Variant, context: Context) -> Rollout:
    """Decide once on every row of a context that holds everything."""
    configure(policy, variant)
    rows, device, chain_spec = len(context["pad"]), context["pad"].device, spec(variant)
    x_0 = torch.randn(rows, variant.tokens, policy.padded_action_dim, device=device)
    eps = torch.randn(rows, *chain_spec.noise_shape(variant.tokens, policy.action_dim), device=device)
    drawn = sample_chain(policy, context, chain_spec, x_0, eps)
    return Rollout(policy.to_buffer(context), drawn.chain, drawn.head_inputs)


def spec(variant: Variant) -> ChainSpec:
    """The chain of a variant; one ratio per control step."""
    return ChainSpec(variant.steps, "action")


def configure(policy: ReinFlowSmolVLA, variant: Variant) -> None:
    """Let the policy act and update as ``variant``."""
    policy.prefix_cache, policy.n_action_steps = PrefixCache(variant.keep), variant.tokens
    policy.compile_expert("inductor" if variant.compiled else None)


def score(policy: ReinFlowSmolVLA, context: Context, rollout: Rollout, rows: Tensor, variant: Variant) -> Tensor:
    """Mean log-prob of these stored chains."""
    head_inputs = None if rollout.head_inputs is None else rollout.head_inputs[rows]
    return chain_log_prob(policy, context, rollout.chain[rows], spec(variant), None, head_inputs).log_prob.mean()


def update(
    policy: ReinFlowSmolVLA, variant: Variant, rollout: Rollout, optimizer: torch.optim.Optimizer,
    args: argparse.Namespace, split: dict[str, list[float]],
) -> float:  # fmt: skip
    """Seconds of the whole update, scaled up from ``args.epochs`` passes; adds those of each part to ``split``."""
    configure(policy, variant)
    seconds = dict.fromkeys(PARTS, 0.0)
    results: dict[str, Any] = {}

    def measure(part: str, work: Callable[[], Any]) -> None:
        def call() -> None:
            results[part] = work()

        seconds[part] += timed(call, args.device)

    for _ in range(args.epochs):
        optimizer.zero_grad(set_to_none=True)
        for rows in torch.arange(len(rollout.chain)).split(args.minibatch):
            part = {name: tensor[rows] for name, tensor in rollout.context.items()}
            measure("encode", partial(dict, part) if variant.heads_alone else partial(policy.from_buffer, part))
            measure("forward", partial(score, policy, results["encode"], rollout, rows, variant))
            measure("backward", results["forward"].backward)
        measure("optimiser", optimizer.step)
    passes = EPOCHS * DECISIONS / (args.epochs * args.decisions)
    steps = EPOCHS * DECISIONS / (args.epochs * args.minibatch * args.accumulation)
    for name in PARTS:
        seconds[name] *= steps if name == "optimiser" else passes
        split[name].append(seconds[name])
    return sum(seconds.values())


def compare(policy: ReinFlowSmolVLA, args: argparse.Namespace, steps: int, executed: int) -> list[Row]:
    """Rows of the table for K ``steps`` and ``executed`` actions: cached, embeddings, naive."""
    variants = {
        "cached": Variant("kv", executed, steps),
        "embeddings": Variant("embeddings", executed, steps),
        "naive": Variant("none", CHUNK, steps),
        "heads": Variant(HEADS, executed, steps),
    }
    if args.compile:
        variants["compiled"] = dataclasses.replace(variants["cached"], compiled=True)
    image_size = policy.vla.config.resize_imgs_with_padding[0]
    batch = policy.preprocess(observe(policy, args.decisions, image_size))
    with torch.no_grad():
        everything = policy.encode_everything(batch)
    rollouts = {name: roll_out(policy, variant, everything) for name, variant in variants.items()}
    groups = policy.trainable_groups()
    optimizer = torch.optim.Adam(policy.policy_parameters(), lr=0.0, fused=True)
    of_heads = torch.optim.Adam([*groups["action_head"], *groups["noise_head"]], lr=0.0, fused=True)
    split: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in variants}

    def work(name: str) -> Callable[[], float]:
        descends = of_heads if variants[name].heads_alone else optimizer
        return lambda: update(policy, variants[name], rollouts[name], descends, args, split[name])

    warm = args.compile or not (args.quick or args.size == "real")
    times = interleaved({name: work(name) for name in variants}, args.repeats, warmups=int(warm))
    rows: list[Row] = []
    for name in variants:
        parts = {part: float(np.median(split[name][part][-args.repeats :])) for part in PARTS}
        rows.append({
            "K": steps, "executed": executed, "update": name, "seconds": sum(parts.values()), **parts,
            "naive / this": speed_ratio(times, name, "naive"),
        })  # fmt: skip
    if not args.quick and (args.size, steps, executed) in BARS:
        label = f"{args.size}, K = {steps}, {executed} executed, cached against naive:"
        print_bar(label, rows[0]["naive / this"], BARS[args.size, steps, executed])
    return rows


def growth(policy: ReinFlowSmolVLA, args: argparse.Namespace) -> list[Row]:
    """Seconds of the cached update, K = 1, whole chunk, scaled to 256 decisions from a quarter, a half and all."""
    variant = Variant("kv", CHUNK, 1)
    batch = policy.preprocess(observe(policy, args.decisions, policy.vla.config.resize_imgs_with_padding[0]))
    configure(policy, variant)
    whole = roll_out(policy, variant, policy.encode(batch))
    optimizer = torch.optim.Adam(policy.policy_parameters(), lr=0.0, fused=True)
    sizes = {str(size): size for size in (args.decisions // 4, args.decisions // 2, args.decisions)}

    def work(size: int) -> Callable[[], float]:
        part = Rollout({name: tensor[:size] for name, tensor in whole.context.items()}, whole.chain[:size])
        settings = argparse.Namespace(**(vars(args) | {"decisions": size}))
        return lambda: update(policy, variant, part, optimizer, settings, {name: [] for name in PARTS})

    times = interleaved({name: work(size) for name, size in sizes.items()}, args.repeats)
    rows = [{"decisions": size, "seconds for 256": median(times, name)} for name, size in sizes.items()]
    seconds = [row["seconds for 256"] for row in rows]
    if not args.quick:
        print_bar("spread of the time per decision", max(seconds) / min(seconds) - 1, GROWTH_BAR, at_least=False)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--size", choices=("tiny", "real"), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--vlm-dtype", default="bfloat16", choices=("bfloat16", "float32"), help="real size; bf16 is slow on many CPUs"
    )
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 is its own choice")
    parser.add_argument("--decisions", type=int, default=DECISIONS, help="measured, then scaled to 256")
    parser.add_argument("--epochs", type=int, default=1, help="measured, then scaled to 5")
    parser.add_argument("--minibatch", type=int, default=64)
    parser.add_argument("--compile", action="store_true", help="add a cached update with a compiled expert")
    parser.add_argument("--accumulation", type=int, default=15, help="minibatches per optimiser step")
    args = parser.parse_args(argv)
    if args.quick:
        args.decisions, args.minibatch, args.repeats = 4, 4, 1
    if args.size == "real" and psutil.virtual_memory().available < REAL_GIB * GIB:
        print(f"skipped: the real size needs {REAL_GIB:.0f} GiB of free memory")
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = [(1, CHUNK), (1, 10), (4, CHUNK), (4, 10)]
    if args.size == "real" and args.device == "cpu":
        cases = [(1, CHUNK), (4, 10)]
    with tempfile.TemporaryDirectory() as directory:
        policy = build(args.size, args.device, Path(directory) / "policy", args.vlm_dtype)
        rows = [row for steps, executed in cases for row in compare(policy, args, steps, executed)]
        linear = growth(policy, args) if args.size == "tiny" else []
    dtype = f", VLM {args.vlm_dtype}" if args.size == "real" else ""
    threads = f"{args.size} SmolVLA{dtype}, {len(policy.cameras)} cameras, {torch.get_num_threads()} threads"
    report(rows, args, f"{threads}, {args.decisions} decisions in minibatches of {args.minibatch} measured")
    if linear:
        report(linear, args, threads, "growth")


if __name__ == "__main__":
    main()
