"""What a rollout worker is made of: a copy of the run's policy, and its part of the environments."""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reinflow import ConfigError
from reinflow.checksums import sha256
from reinflow_so101.policies import FAMILIES, PolicySettings, build_policy
from reinflow_so101.worlds import World, make_world
from reinflow_vla.directory import weights_file
from so101_sim.config import EnvConfig

if TYPE_CHECKING:
    from reinflow.env import ChunkVectorEnv
    from reinflow.policy import FlowPolicy


@dataclass(frozen=True)
class Copy:
    """Builds them, on whatever machine a worker finds itself; rollout workers call it with their part's size.

    The policy is built as the driver's was, by the same name or path, which must lead to the same weights there.
    """

    policy: PolicySettings
    env: EnvConfig
    world: World
    chunk_steps: int  # of a rollout
    weights: str  # sha256 of the policy's weights; "" is not compared

    def __call__(self, num_envs: int, device: str, threads: int) -> tuple[FlowPolicy, ChunkVectorEnv]:
        """Raises ConfigError where the policy is not there, or is another."""
        if self.weights:
            self._compare()
        policy = build_policy(self.policy, self.env, self.chunk_steps * num_envs, device)
        return policy, make_world(self.world, num_envs, num_threads=threads)

    def _compare(self) -> None:
        path, here = self.policy.policy_path, socket.gethostname()
        try:
            found = sha256(weights_file(FAMILIES[self.policy.model_type].directory(path)))
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read on {here} ({error}): put the policy where every rollout worker finds it"
            ) from error
        if found != self.weights:
            raise ConfigError(f"{path} on {here} is another policy than the driver's: copy the driver's there")


def for_workers(settings: PolicySettings, name: str, directory: Path) -> PolicySettings:
    """The driver's policy as workers build it.

    Args:
        settings: of the driver's, with what was settled when it was built.
        name: what the user calls the policy: an embedded one and one of the hub have that name everywhere.
        directory: where the driver read it.
    """
    is_named = FAMILIES[settings.model_type].embedded_directory(name) is not None or not Path(name).exists()
    path = name if is_named else str(directory.absolute())
    return replace(settings, policy_path=path, prefix_cache_gb=0.0, compile_expert=False)
