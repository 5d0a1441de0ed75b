"""N simulations in this process, one after the other; the form of a single environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reinflow.env import Observation
from so101_mujoco_utils import Array
from so101_sim.config import EnvConfig
from so101_sim.episode import ChunkScore, EpisodeLog
from so101_sim.simulation import Simulation
from so101_sim.vector.base import InProcessVectorEnv, ObservationBuffer, episode_generator


class SequentialVectorEnv(InProcessVectorEnv):
    """N simulations that share a scene and a renderer."""

    def __init__(
        self,
        config: EnvConfig,
        num_envs: int,
        buffers: tuple[ObservationBuffer, ObservationBuffer] | None = None,
    ) -> None:
        super().__init__(config, num_envs, buffers)
        self._renderer = renderer = self.scene.make_renderer() if config.render_images else None
        self.simulations = [Simulation(self.scene, renderer) for _ in range(num_envs)]

    def _start_episode(self, env: int, seed: int) -> None:
        self.simulations[env].start_episode(episode_generator(seed), seed, follow=True)

    def _observe(self, envs: Sequence[int]) -> Observation:
        return _stacked([self.simulations[env].observation() for env in envs])

    def _advance(self, actions: Array, live: NDArray[np.int64]) -> list[ChunkScore]:
        return [self.simulations[env].advance(chunk) for env, chunk in zip(live.tolist(), actions, strict=True)]

    def _log(self, env: int) -> EpisodeLog:
        return self.simulations[env].episode

    def _simulation_state(self) -> dict[str, Any]:
        states = [simulation.get_state() for simulation in self.simulations]
        return {
            "integration": np.stack([state["integration"] for state in states]),
            "rows": np.stack([state["row"] for state in states]),
        }

    def _set_simulation_state(self, state: Mapping[str, Any]) -> None:
        for row, simulation in enumerate(self.simulations):
            single = {name: state[name][row] for name in ("integration", "ended")}
            simulation.set_state(single | {"row": state["rows"][row], "episode": state["episodes"][row]})

    def open_viewer(self) -> None:
        """Show the first simulation in MuJoCo's window from now on. Raises RenderError without a display."""
        self.simulations[0].open_viewer()

    def close(self) -> None:
        """See `ChunkVectorEnv.close`."""
        for simulation in self.simulations:
            simulation.close()
        super().close()


def _stacked(singles: Sequence[Mapping[str, Any]]) -> Observation:
    """What `Simulation.observation` gives of several environments as one observation."""
    stacked: Observation = {"agent_pos": np.stack([single["agent_pos"] for single in singles])}
    if "pixels" in singles[0]:
        cameras = singles[0]["pixels"]
        stacked["pixels"] = {camera: np.stack([single["pixels"][camera] for single in singles]) for camera in cameras}
    if "environment_state" in singles[0]:
        stacked["environment_state"] = np.stack([single["environment_state"] for single in singles])
    return stacked
