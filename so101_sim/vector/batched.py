"""All environments in one `mujoco.batch.Batch`: the form of many environments in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mujoco
import numpy as np
from mujoco.batch import Batch
from numpy.typing import NDArray

from reinflow.env import Observation, usable_cores
from so101_mujoco_utils import Array
from so101_sim.config import EnvConfig
from so101_sim.episode import ChunkScore, EpisodeLog
from so101_sim.scene import INTEGRATION_STATE
from so101_sim.vector.base import InProcessVectorEnv, episode_generator

MAX_RENDER_THREADS = 8


class BatchedVectorEnv(InProcessVectorEnv):
    """All environments in one `mujoco.batch.Batch`: a chunk is one call, spread over threads.

    Args:
        num_threads: of physics and rendering; None uses every core, but no more than there are environments.
    """

    def __init__(self, config: EnvConfig, num_envs: int, num_threads: int | None = None) -> None:
        super().__init__(config, num_envs)
        num_threads = num_threads or min(num_envs, usable_cores())
        self._batch = Batch(self.scene.model, num_envs, nthread=num_threads)
        self._data = mujoco.MjData(self.scene.model)
        self._integration = np.zeros((num_envs, mujoco.mj_stateSize(self.scene.model, INTEGRATION_STATE)))
        self._rows = np.zeros((num_envs, self.scene.layout.row_size))
        self._logs = [EpisodeLog() for _ in range(num_envs)]
        if config.render_images:
            self._renderer = self.scene.make_parallel_renderer(min(num_threads, MAX_RENDER_THREADS))

    def _start_episode(self, env: int, seed: int) -> None:
        self.scene.reset(self._data, episode_generator(seed))
        self._integration[env] = self.scene.integration_state(self._data)
        self._rows[env] = self.scene.layout.row(self._data)
        row = self._rows[env]
        self._logs[env].begin(seed, self.scene.block_height(row), self.scene.begin_trace(row))

    def _observe(self, envs: Sequence[int]) -> Observation:
        rows = self._rows[list(envs)]
        seen: Observation = {"agent_pos": self.scene.agent_pos(rows)}
        if self._renderer is not None:
            drawn = self._renderer.render_all(rows[:, : self.scene.model.nq])
            seen["pixels"] = {camera: np.stack([images[camera] for images in drawn]) for camera in self.config.cameras}
        if self.config.environment_state:
            seen["environment_state"] = self.scene.environment_state(rows, [self._logs[env].length for env in envs])
        return seen

    def _advance(self, actions: Array, live: NDArray[np.int64]) -> list[ChunkScore]:
        if not len(live):
            return []
        control, clipped, leaning = self.scene.control(actions)
        rows, integration = self._rollout(control, live)
        steps = np.array([self._logs[env].length for env in live])
        traces = self.scene.taxonomy.stack(self._logs[env].trace for env in live)
        score = self.scene.score(self._rows[live], rows, steps, clipped, leaning, traces)
        order, last = np.arange(len(live)), score.lengths - 1
        rows, integration = rows[order, last], integration[order, last]
        # The batch stops a simulation that warns, and its clock with it.
        expected = self._integration[live, 0] + score.lengths * self.scene.control_period_s
        stable = np.abs(integration[:, 0] - expected) <= 0.5 * self.scene.model.opt.timestep
        score = score.cut_off(~stable, self.scene.layout.scene_state(self._rows[live]).block_pos[..., 2], traces)
        self._rows[live[stable]], self._integration[live[stable]] = rows[stable], integration[stable]
        for row, env in enumerate(live.tolist()):
            self._logs[env].record(score, row)
        return [score]

    def _rollout(self, control: Array, live: NDArray[np.int64]) -> tuple[Array, Array]:
        """Controls (L, n, nu) -> rows (L, n, R) and integration states (L, n, states) after each control step."""
        substeps = self.scene.substeps
        self._batch.state[live] = self._integration[live]
        recorded = self._batch.rollout(
            control.shape[1] * substeps,
            np.repeat(control, substeps, axis=1),
            record=("qpos", "qvel", "sensordata", int(INTEGRATION_STATE)),
            ids=live,
        )
        at = slice(substeps - 1, None, substeps)
        rows = np.concatenate([recorded[name][:, at] for name in ("qpos", "qvel", "sensordata")], axis=-1)
        return rows, recorded[int(INTEGRATION_STATE)][:, at]

    def _log(self, env: int) -> EpisodeLog:
        return self._logs[env]

    def _simulation_state(self) -> dict[str, Any]:
        return {"integration": self._integration.copy(), "rows": self._rows.copy()}

    def _set_simulation_state(self, state: Mapping[str, Any]) -> None:
        integration = np.array(state["integration"], dtype=np.float64)
        if integration.shape != self._integration.shape:
            raise ValueError(f"state is {integration.shape}, this scene's {self._integration.shape}: another model?")
        self._integration[:], self._rows[:] = integration, state["rows"]
        self._logs = [EpisodeLog.restored(episode) for episode in state["episodes"]]
