"""How much of an outcome is the policy's first noise? The same scenes, x_0 of the seed against that of another one.

    python benchmarks/first_noise.py [--quick] [--csv FILE] [--policy tiny] [--episodes 200] [--seed 10000]

x_0 follows from seed and decision (reinflow/noise.py), so that two policies compared on a seed get the same one. What
it would cost if they did not: outcomes that change although neither policy nor scene did.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from _common import Row, make_parser, report

from reinflow.env import Observation
from reinflow.evaluate import evaluate_seeds
from reinflow.paired import compare
from reinflow_so101.commands.evaluate import EvalConfig, make_actor
from reinflow_so101.policies import EMBEDDED
from reinflow_so101.policy_card import stored_env
from so101_sim.vector.make import make_vector_env

OTHER = 1_000_000  # added to a seed: another x_0
NUM_ENVS = 32


def measure(policy: str, first_seed: int, episodes: int) -> Row:
    """A row: how often each way succeeds, and in how many scenes one of them alone does."""
    directory = EMBEDDED[policy].embedded
    env = stored_env(directory)
    act = make_actor(EvalConfig(policy_path=policy, output_dir="", env=env), directory)

    def act_otherwise(observation: Observation, seeds: Sequence[int], decision: int) -> np.ndarray:
        return act(observation, [seed + OTHER for seed in seeds], decision)

    play = partial(evaluate_seeds, make_env=partial(make_vector_env, env), first_seed=first_seed, episodes=episodes)
    own, other, again = (play(way, num_envs=NUM_ENVS) for way in (act, act_otherwise, act))
    changed, repeated = compare(own.episodes, other.episodes), compare(own.episodes, again.episodes)
    return {
        "episodes": episodes,
        "success": own.success_rate,
        "success with another x_0": other.success_rate,
        "outcomes that change": changed.only_a + changed.only_b,
        "outcomes that change with the same x_0": repeated.only_a + repeated.only_b,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--policy", default="tiny", choices=tuple(EMBEDDED))
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=10_000)
    args = parser.parse_args(argv)
    if args.quick:
        args.episodes = 8
    args.repeats = 1
    report([measure(args.policy, args.seed, args.episodes)], args, f"policy {args.policy}, seeds from {args.seed}")


if __name__ == "__main__":
    main()
