"""KL of one optimiser step against D, sigma and the learning rate: is the scaling rule of --auto-scale right?

    python benchmarks/kl_scaling.py [--quick] [--csv notes/results/kl_scaling.csv]

One Adam step of the whole action expert of the embedded policy on 64 first decisions, with random normalised advantages
(before anything is learnt an advantage is mostly noise) and a summed log-prob. Only D (through n_action_steps), sigma
and the rate differ. KL is the exact Gaussian one, from the means before and after; median over seeds.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reinflow import ppo
from reinflow.flow import ChainSpec, chain_log_prob, sample_chain, transition
from reinflow_so101.opening import make_policy
from so101_sim.vector.make import make_vector_env
from train_reinflow import PRESETS

CASES = [  # executed actions, sigma, lr
    (5, 0.1, 1e-5), (10, 0.1, 1e-5), (25, 0.1, 1e-5), (50, 0.1, 1e-5),
    (50, 0.2, 1e-5), (50, 0.33, 1e-5), (50, 0.1, 2e-5), (50, 0.33, 1e-6),
]  # fmt: skip


def one_step_kl(n: int, sigma: float, lr: float, seed: int, context) -> float:
    """KL, summed over D and averaged over decisions, that one Adam step causes."""
    config = dataclasses.replace(
        PRESETS["tiny"], n_action_steps=n, chunks_per_episode=150 // n, sigma_min=sigma, sigma_max=sigma
    )
    policy, spec = make_policy(config, "cpu"), ChainSpec(1, "chunk")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(context["features"]), n, policy.padded_action_dim, generator=generator)
    eps = torch.randn(len(noise), *spec.noise_shape(n, policy.action_dim), generator=generator)
    sample = sample_chain(policy, context, spec, noise, eps)
    time = torch.ones(len(noise))
    with torch.no_grad():
        before = transition(policy, context, noise, time, spec).mean
    advantages = ppo.normalize_advantages(torch.randn(len(noise), generator=generator))
    optimizer = torch.optim.Adam(policy.policy_parameters(), lr=lr, eps=1e-5)
    score = chain_log_prob(policy, context, sample.chain, spec)
    loss, _ = ppo.policy_loss(score.log_prob, sample.log_prob, advantages, 0.2)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        shift = (transition(policy, context, noise, time, spec).mean - before)[..., : policy.action_dim]
    return float((shift**2).sum((1, 2)).mean() / (2 * sigma**2))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = PRESETS["tiny"]
    policy = make_policy(config, "cpu")
    with make_vector_env(config.env(), 8 if args.quick else 64) as env:
        context = policy.encode(policy.preprocess(env.reset(range(env.num_envs))))
    rows = []
    for n, sigma, lr in CASES[:2] if args.quick else CASES:
        kls = [one_step_kl(n, sigma, lr, seed, context) for seed in range(1 if args.quick else 5)]
        kl, dims = statistics.median(kls), n * policy.action_dim
        rows.append(
            {"D": dims, "sigma": sigma, "lr": lr, "kl": kl, "kl_sigma2_over_D_lr2": kl * sigma**2 / dims / lr**2}
        )
    print(f"{'D':>5} {'sigma':>6} {'lr':>8} {'KL':>9} {'KL sigma^2 / (D lr^2)':>22}")
    for row in rows:
        print(
            f"{row['D']:5d} {row['sigma']:6.2f} {row['lr']:8.0e} {row['kl']:9.4f} {row['kl_sigma2_over_D_lr2']:22.3g}"
        )
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
