"""Do outcomes depend on policy and seed alone? The same seeds with other numbers of environments and vector forms.

    python benchmarks/batch_invariance.py [--quick] [--csv FILE] [--policy tiny] [--episodes 200] [--seed 10000]

The noise is the same to the bit (tests/reinflow/test_noise.py). A matrix product rounds its last rows in another way
where they do not fill a tile of its kernel, and a contact may turn that into another outcome: reinflow/rollout.py
fills the tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from _common import Row, make_parser, print_bar, report

from reinflow.evaluate import EvalResult, evaluate_seeds
from reinflow_so101.commands.evaluate import EvalConfig, make_actor
from reinflow_so101.policies import EMBEDDED
from reinflow_so101.policy_card import stored_env
from so101_sim.vector.make import Backend, make_vector_env

VARIANTS: tuple[tuple[int, Backend], ...] = (
    (64, "batched"),
    (7, "batched"),
    (7, "sequential"),
    (7, "subproc"),
    (64, "subproc"),
    (1, "sequential"),
)
BAR = 199 / 200


def measure(policy: str, first_seed: int, episodes: int, variants: Sequence[tuple[int, Backend]]) -> list[Row]:
    """A row per variant: in how many episodes it agrees with the first."""
    directory = EMBEDDED[policy].embedded
    env = stored_env(directory)
    results: dict[tuple[int, Backend], EvalResult] = {}
    for num_envs, form in variants:
        act = make_actor(EvalConfig(policy_path=policy, output_dir="", env=env), directory)
        make_env = partial(make_vector_env, env, backend=form)
        results[num_envs, form] = evaluate_seeds(act, make_env, first_seed, episodes, num_envs)
    reference = results[variants[0]].episodes
    return [
        {
            "envs": num_envs,
            "form": form,
            "success": result.success_rate,
            "same outcome": sum(a.success == b.success for a, b in zip(result.episodes, reference, strict=True)),
            "same length": sum(a.length == b.length for a, b in zip(result.episodes, reference, strict=True)),
            "largest difference of returns": max(
                abs(a.return_ - b.return_) for a, b in zip(result.episodes, reference, strict=True)
            ),
            "episodes": episodes,
        }
        for (num_envs, form), result in results.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--policy", default="tiny", choices=tuple(EMBEDDED))
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=10_000)
    args = parser.parse_args(argv)
    if args.quick:
        args.policy, args.episodes = "flow_mlp", 12
    args.repeats = 1
    rows = measure(args.policy, args.seed, args.episodes, VARIANTS)
    report(rows, args, f"policy {args.policy}, seeds from {args.seed}")
    print_bar("least agreement", min(row["same outcome"] for row in rows) / args.episodes, BAR)


if __name__ == "__main__":
    main()
