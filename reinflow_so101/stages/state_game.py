"""What state data or a state-based policy is from, by its reinflow.json, as the state-based stages need it: where to
evaluate, floors for the states' std, and whether an episode's time limit is an end like any other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinflow import ConfigError
from reinflow_gym.config import GymConfig
from reinflow_so101.policy_card import CARD_FILE, card_env
from reinflow_so101.stages.state_data import MINARI, state_card
from reinflow_so101.worlds import World, gym_world, make_world, say_world, write_world_card
from so101_mujoco_utils import ENVIRONMENT_STATE_NAMES
from so101_sim.config import EnvConfig

if TYPE_CHECKING:
    from reinflow.evaluate import EvalResult
    from reinflow.policy import FlowPolicy

# By the end of a state's name (without its axis): floor of the std it is normalised by. The expert is at rest when it
# decides; a policy ends its chunks with joints at 1 rad/s, a hundred of the demonstrations' standard deviations.
LEAST_STATE_STD = {"pos_rad": 0.05, "vel": 2.0, "pos": 0.01, "block": 0.01, "quat": 0.1, "force": 0.5, "progress": 0.1}
LEAST_STD_ELSEWHERE = 1e-3  # of a state that the data hardly varies, where nothing is known of its units


def least_state_std() -> list[float]:
    """LEAST_STATE_STD for each of ENVIRONMENT_STATE_NAMES; radians, rad/s, metres, m/s."""
    names = (re.sub("_[wxyz]$", "", name) for name in ENVIRONMENT_STATE_NAMES)
    return [next(floor for end, floor in LEAST_STATE_STD.items() if name.endswith(end)) for name in names]


@dataclass(frozen=True)
class StateGame:
    """What is played."""

    world: World | None
    """None where nothing says what it is."""

    @property
    def by_return(self) -> bool:
        """Whether the mean return tells policies apart; else success does."""
        return isinstance(self.world, GymConfig)

    @property
    def state_tells_time(self) -> bool:
        """Whether the state says how much of an episode is left, as the arm's does. Then its time limit is an end like
        any other: what would come after it is nothing that data can teach the value of."""
        return isinstance(self.world, EnvConfig)

    def __str__(self) -> str:
        return say_world(self.world) if self.world else f"unknown (no {CARD_FILE} says it): no evaluation"

    def write_card(self, directory: Path) -> None:
        """Beside a policy."""
        if self.world:
            write_world_card(directory, self.world)

    def least_state_std(self, state_dim: int) -> list[float]:
        """Floor of each state's std."""
        return least_state_std() if isinstance(self.world, EnvConfig) else [LEAST_STD_ELSEWHERE] * state_dim

    def score(self, result: EvalResult) -> dict[str, Any]:
        """Figures of an evaluation for a record."""
        figures: dict[str, Any] = {"return": round(result.return_mean, 2)}
        if self.by_return:
            return figures
        interval = [round(bound, 4) for bound in result.interval]
        return {"success": round(result.success_rate, 4), "success_ci95": interval, **figures}

    def evaluate(
        self, policy: FlowPolicy, num_denoising_steps: int, seeds: Sequence[int], num_envs: int
    ) -> EvalResult | None:
        """Noise-free episodes of consecutive seeds; None without any, or where nothing can be played."""
        from reinflow.evaluate import evaluate_seeds
        from reinflow.flow import ChainSpec
        from reinflow.rollout import noise_free_actor

        if not seeds or self.world is None:
            return None
        act = noise_free_actor(policy, ChainSpec(num_denoising_steps))
        return evaluate_seeds(act, partial(make_world, self.world), seeds[0], len(seeds), num_envs)


def arm_game(env: EnvConfig) -> StateGame:
    """A task of the arm as a state-based policy sees it."""
    return StateGame(replace(env, render_images=False, environment_state=True))


def game_of(where: Path | str) -> StateGame:
    """The game of a data set's root, "minari:ID", or a policy's directory; raises ConfigError for a damaged card."""
    if str(where).startswith(MINARI):
        card = state_card(where)
        return StateGame(GymConfig.from_json(card["env"], str(where)) if card else None)
    places = (Path(where), Path(where) / "meta")
    folder = next((place for place in places if (place / CARD_FILE).is_file()), None)
    if folder is None:
        return StateGame(None)
    return StateGame(world) if (world := gym_world(folder)) else arm_game(card_env(folder / CARD_FILE))


def refuse_other_sizes(policy_dir: str, policy: Any, state_dim: int, action_dim: int) -> None:
    """Raise ConfigError unless a policy takes the data's states and actions."""
    if (policy.state_dim, policy.action_dim) != (state_dim, action_dim):
        raise ConfigError(
            f"policy_dir={policy_dir} takes {policy.state_dim} states and {policy.action_dim} actions, the data has "
            f"{state_dim} and {action_dim}: take data of the policy's own environment"
        )
