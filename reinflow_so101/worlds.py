"""Where a policy acts: the SO-101 arm in MuJoCo, or a Gymnasium environment. Their cards, and their vector forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from reinflow import ConfigError
from reinflow_gym.config import GymConfig
from reinflow_so101.policy_card import CARD_FILE, policy_card
from reinflow_vla.directory import read_json
from so101_sim.config import EnvConfig
from so101_sim.tasks.registry import describe

if TYPE_CHECKING:
    from reinflow.env import ChunkVectorEnv

World = EnvConfig | GymConfig


def make_world(
    world: World,
    num_envs: int,
    backend: str = "auto",
    viewer: bool = False,
    num_threads: int | None = None,
    device: str = "cpu",
) -> ChunkVectorEnv:
    """N environments on `num_threads` cores, None is all of them. `backend`, `viewer` and `device` are of the arm; see
    so101_sim.vector.make."""
    if isinstance(world, GymConfig):
        from reinflow_gym.vector import make_gym_env

        return make_gym_env(world, num_envs, 0 if num_threads == 1 else num_threads)
    from so101_sim.vector.make import make_vector_env

    return make_vector_env(world, num_envs, backend, num_threads, viewer, device)  # type: ignore[arg-type]


def world_card(world: World) -> dict[str, str]:
    """File name -> content of what goes beside a policy that acts there."""
    if isinstance(world, GymConfig):
        return {CARD_FILE: json.dumps({"env": world.to_json()}, indent=2) + "\n"}
    return policy_card(world)


def write_world_card(directory: Path, world: World) -> None:
    """Put it there."""
    for name, content in world_card(world).items():
        (directory / name).write_text(content, encoding="utf-8")


def gym_world(policy_dir: Path) -> GymConfig | None:
    """The Gymnasium environment that a policy or a data set's meta folder says it is of; None where it says another."""
    path = policy_dir / CARD_FILE
    stored = read_json(path).get("env") if path.is_file() else None
    if not isinstance(stored, dict) or "env_id" not in stored:
        return None
    return GymConfig.from_json(stored, str(path))


def say_world(world: World) -> str:
    """In words."""
    if isinstance(world, GymConfig):
        return f"{world.env_id}, up to {world.max_steps_per_episode} control steps an episode"
    return describe(world)


def check_world(world: GymConfig, state_dim: int, action_dim: int, where: Path) -> None:
    """Raise ConfigError where a policy was made for other states or actions than the environment has."""
    with make_world(world, 1) as env:
        found = (env.state_dim, env.action_dim)  # type: ignore[attr-defined]
    if found != (state_dim, action_dim):
        raise ConfigError(
            f"env_id={world.env_id} has states of {found[0]} and actions of {found[1]} numbers, the policy in {where} "
            f"takes {state_dim} and gives {action_dim}: name the environment it was made for, or a policy for this one"
        )
