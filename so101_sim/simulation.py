"""One simulated arm and its episode: what the gymnasium face and the sequential vector form are built on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import gymnasium
import mujoco
import numpy as np
from numpy.typing import ArrayLike, NDArray

from so101_mujoco_utils import NUM_JOINTS, Array
from so101_sim.episode import ChunkScore, EpisodeLog
from so101_sim.renderer import RenderError, SceneRenderer
from so101_sim.scene import INTEGRATION_STATE, PickScene


class Simulation:
    """An arm in the scene, stepped in chunks of control steps.

    Args:
        scene: may be shared.
        renderer: one to share between simulations of the scene; None makes one at the first image.
    """

    def __init__(self, scene: PickScene, renderer: SceneRenderer | None = None) -> None:
        self.scene, self.config = scene, scene.config
        self.model, self.data = scene.model, mujoco.MjData(scene.model)
        self.episode = EpisodeLog()
        self._row: Array | None = None
        self._ended = True
        self._renderer, self._owns_renderer = renderer, renderer is None
        self._viewer: Any = None

    @property
    def row(self) -> Array:
        """(R,) the last recorded instant, see `SceneLayout`. Raises ResetNeeded before the first episode."""
        if self._row is None:
            raise gymnasium.error.ResetNeeded("call reset() before anything else")
        return self._row

    def start_episode(
        self,
        rng: np.random.Generator,
        seed: int | None,
        options: Mapping[str, Any] | None = None,
        follow: bool = False,
    ) -> None:
        """Start an episode with what `rng` draws; `seed` names it. Options: see `PickScene.reset`. `follow` it for its
        outcome and facts."""
        self.scene.reset(self.data, rng, options)
        self._row, self._ended = self.scene.layout.row(self.data), False
        trace = self.scene.begin_trace(self._row) if follow else None
        self.episode.begin(seed, self.scene.block_height(self._row), trace)

    def advance(self, actions: ArrayLike) -> ChunkScore:
        """Run the targets (n, 6) one control step each, up to the episode's end; the score of the chunk, N = 1. Where
        the physics become unstable the episode is cut off, and the score says so.

        Raises:
            ValueError: wrong shape, NaN or infinity.
            gymnasium.error.ResetNeeded: the episode has ended.
        """
        if self._ended:
            raise gymnasium.error.ResetNeeded("the episode has ended: call reset()")
        if np.ndim(actions) != 2 or len(np.asarray(actions)) == 0:
            raise ValueError(f"a chunk of actions has shape (n, {NUM_JOINTS}) with n >= 1, got {np.shape(actions)}")
        control, clipped, leaning = self.scene.control(actions)
        before = self.row
        rows, stable = self._simulate(control)
        if not stable:
            rows[:] = before
        traces = self.scene.taxonomy.stack([self.episode.trace])
        length = np.array([self.episode.length])
        score = self.scene.score(before[None], rows[None], length, clipped[None], leaning[None], traces)
        score = score.cut_off(np.array([not stable]), np.array([self.scene.block_height(before)]), traces)
        self._row = rows[score.lengths[0] - 1]
        self._ended = bool(score.terminated[0] or score.truncated[0])
        self.episode.record(score, 0)
        return score

    def _simulate(self, control: Array) -> tuple[Array, bool]:
        """Controls (n, nu) -> rows (n, R), and whether MuJoCo was content; stops where the episode ends and repeats its
        last row from there."""
        rows = np.empty((len(control), self.scene.layout.row_size))
        left = self.config.max_steps_per_episode - self.episode.length
        warned = self.data.warning.number.sum()
        last = 0
        for last in range(min(len(control), left)):
            self.data.ctrl[:] = control[last]
            mujoco.mj_step(self.model, self.data, nstep=self.scene.substeps)
            rows[last] = self.scene.layout.row(self.data)
            if self._viewer is not None:
                self._viewer.sync()
            if self.scene.is_success(rows[last]):
                break
        rows[last + 1 :] = rows[last]
        return rows, bool(self.data.warning.number.sum() == warned)

    def observation(self) -> dict[str, Any]:
        """The observation of the current instant, in fresh arrays."""
        observation: dict[str, Any] = {"agent_pos": self.scene.agent_pos(self.row)}
        if self.config.render_images:
            observation["pixels"] = self.images()
        if self.config.environment_state:
            observation["environment_state"] = self.scene.environment_state(self.row, self.episode.length)
        return observation

    def images(self) -> dict[str, NDArray[np.uint8]]:
        """Every camera's view (h, w, 3) of the current instant."""
        if self._renderer is None:
            self._renderer = self.scene.make_renderer()
        return self._renderer.render(self.row[: self.model.nq])

    def open_viewer(self) -> None:
        """Show the simulation in MuJoCo's window from now on, a frame per control step.

        Raises:
            RenderError: there is no display.
        """
        import glfw
        import mujoco.viewer

        # Asked first: the viewer itself ends the process when there is no display.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not glfw.init():
                raise RenderError("the viewer cannot open a window: run on a machine with a display, or without render")
        try:
            self._viewer = mujoco.viewer.launch_passive(self.model, self.data)
        except RuntimeError as error:  # macOS: "launch_passive requires that the Python script be run under mjpython"
            raise RenderError(
                f"the viewer cannot start ({error}): on macOS run with mjpython, or without render"
            ) from error

    def get_state(self) -> dict[str, Any]:
        """What the episode goes on from bit for bit: numpy arrays and JSON-able values."""
        return {
            "integration": self.scene.integration_state(self.data),
            "row": self.row.copy(),
            "ended": self._ended,
            "episode": asdict(self.episode),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go back to a `get_state`, of this or another simulation of the same scene. Raises ValueError on another."""
        integration = np.asarray(state["integration"], dtype=np.float64)
        expected = mujoco.mj_stateSize(self.model, INTEGRATION_STATE)
        if integration.shape != (expected,):
            raise ValueError(f"state has {integration.shape}, this scene needs ({expected},): another model?")
        mujoco.mj_resetData(self.model, self.data)
        mujoco.mj_setState(self.model, self.data, integration, INTEGRATION_STATE)
        self._row, self._ended = np.array(state["row"], dtype=np.float64), bool(state["ended"])
        self.episode = EpisodeLog.restored(state["episode"])

    def close(self) -> None:
        """Free the renderer, unless it is shared, and close the viewer."""
        if self._viewer is not None:
            self._viewer.close()
            self._viewer = None
        if self._renderer is not None and self._owns_renderer:
            self._renderer.close()
            self._renderer = None
