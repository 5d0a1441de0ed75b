"""Worlds of MuJoCo Warp: all environments are simulated, and seen, on one device, where torch takes the images.

The start of an episode, its rewards and its end are those of the other forms, from the same `PickScene`. The physics is
fp32, so trajectories agree with theirs to rounding and not to the bit. Needs the extra `warp`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from reinflow import ConfigError
from reinflow.env import Observation
from so101_mujoco_utils import Array
from so101_sim.config import EnvConfig
from so101_sim.episode import ChunkScore, EpisodeLog
from so101_sim.scene import INTEGRATION_STATE, PickScene
from so101_sim.vector.base import InProcessVectorEnv, ObservationBuffer, episode_generator

if TYPE_CHECKING:
    from torch import Tensor

CONTACTS = 64
"""Contacts a world at first: 21 are the most that expert and flailing arm make of the shipped scene. More are made room
for when they are needed."""
GROWTHS = 4
"""How often: 16 times as many contacts as at first, more than the shipped scene has pairs of geoms for."""

# The parts of a MuJoCo state, in its order, by the names of MuJoCo Warp's arrays.
_PARTS = {
    mujoco.mjtState.mjSTATE_TIME: "time",
    mujoco.mjtState.mjSTATE_QPOS: "qpos",
    mujoco.mjtState.mjSTATE_QVEL: "qvel",
    mujoco.mjtState.mjSTATE_ACT: "act",
    mujoco.mjtState.mjSTATE_WARMSTART: "qacc_warmstart",
    mujoco.mjtState.mjSTATE_CTRL: "ctrl",
    mujoco.mjtState.mjSTATE_QFRC_APPLIED: "qfrc_applied",
    mujoco.mjtState.mjSTATE_XFRC_APPLIED: "xfrc_applied",
    mujoco.mjtState.mjSTATE_EQ_ACTIVE: "eq_active",
    mujoco.mjtState.mjSTATE_MOCAP_POS: "mocap_pos",
    mujoco.mjtState.mjSTATE_MOCAP_QUAT: "mocap_quat",
    mujoco.mjtState.mjSTATE_USERDATA: "userdata",
}


def check_warp() -> None:
    """Raise ConfigError where MuJoCo Warp is not installed."""
    if not all(find_spec(package) for package in ("warp", "mujoco_warp")):
        raise ConfigError('vector=warp needs MuJoCo Warp: pip install "reinflow-so101[warp]"')


def _load_warp() -> tuple[Any, Any]:
    """The modules warp and mujoco_warp, which say nothing but warnings from now on."""
    check_warp()
    import warp

    warp.config.log_level = warp.LOG_WARNING
    import mujoco_warp

    return warp, mujoco_warp


class WarpWorlds:
    """N simulations of a scene on one device, whose states come and go as MuJoCo's integration states.

    Args:
        scene: its model and substeps.
        num_worlds: N.
        device: "cpu", or a CUDA device by torch's name.
        contacts: a world has room for on average.

    Raises:
        ConfigError: MuJoCo Warp is not installed, or cannot simulate what the scene has.
    """

    def __init__(self, scene: PickScene, num_worlds: int, device: str, contacts: int = CONTACTS) -> None:
        self._wp, self._mjw = _load_warp()
        self._scene, self._num_worlds, self._contacts = scene, num_worlds, contacts
        self._device = self._wp.get_device(device)
        sizes = {part: mujoco.mj_stateSize(scene.model, part) for part in _PARTS}
        self._parts = {name: sizes[part] for part, name in _PARTS.items() if sizes[part]}
        if sum(self._parts.values()) != mujoco.mj_stateSize(scene.model, INTEGRATION_STATE):
            raise ConfigError("vector=warp carries no plugins and no histories of the scene: use --vector batched")
        with self._wp.ScopedDevice(self._device):
            try:
                self._model = self._mjw.put_model(scene.model)
            except (NotImplementedError, ValueError) as error:
                raise ConfigError(f"vector=warp cannot simulate the scene ({error}): use --vector batched") from error
            self._model.opt.warn_overflow = 0  # they are looked at, and made room for, after every chunk
            self._model.opt.deterministic = True  # a GPU would add up in any order otherwise
            self._allocate()

    def _allocate(self) -> None:
        """Data with room for the contacts; compiles what a substep needs, and records a control step's substeps as a
        graph: launched from Python, the 106 kernels of each cost more than they compute (8 worlds on a CPU: 15 times).
        """
        model = self._scene.model
        widest = max(1, int(model.geom_condim.max()))
        rows = self._contacts * widest + 2 * (model.nv + model.ntendon) + 6 * model.neq  # friction and limits
        self._data = self._mjw.make_data(model, self._num_worlds, nconmax=self._contacts, njmax=rows)
        self._mjw.step(self._model, self._data)
        with self._wp.ScopedCapture() as capture:
            for _ in range(self._scene.substeps):
                self._mjw.step(self._model, self._data)
        self._control_step = capture.graph

    def states(self) -> Array:
        """(N, states) integration states of all worlds, fp32 numbers."""
        parts = [getattr(self._data, name).numpy().reshape(self._num_worlds, -1) for name in self._parts]
        return np.concatenate(parts, axis=1).astype(np.float64)

    def set_states(self, states: Array) -> None:
        """Puts all worlds into states (N, states)."""
        ends = np.cumsum(list(self._parts.values()))[:-1]
        for name, values in zip(self._parts, np.split(states, ends, axis=1), strict=True):
            array = getattr(self._data, name)
            kind = self._wp.dtype_to_numpy(array.dtype) if array.dtype is self._wp.bool else np.float32
            array.assign(np.ascontiguousarray(values.astype(kind)).reshape(array.numpy().shape))

    def play(self, control: Array) -> tuple[Array, NDArray[np.bool_]]:
        """Control steps in all worlds.

        Args:
            control: (N, n, nu).

        Returns:
            (N, n, R) rows after each, and the worlds (N,) that stayed sound: the others are back where they were, after
            numbers beyond MuJoCo's own limit (mjMAXVAL) or more contacts than there was room for.
        """
        with self._wp.ScopedDevice(self._device):
            before = self.states()
            rows, overflow = self._record(control)
            for _ in range(GROWTHS):
                if not (overflow & self._growable()).any():
                    break
                self._contacts *= 2
                self._allocate()
                self.set_states(before)
                rows, overflow = self._record(control)
            with np.errstate(invalid="ignore"):
                sound: NDArray[np.bool_] = (np.abs(rows) <= mujoco.mjMAXVAL).all(axis=(1, 2)) & ~(overflow != 0)
            if not sound.all():
                self.set_states(np.where(sound[:, None], self.states(), before))
        return rows, sound

    def _growable(self) -> int:
        kinds = self._mjw.OverflowType
        return int(kinds.NEFC | kinds.NJMAX_NNZ | kinds.BROADPHASE | kinds.NARROWPHASE | kinds.CCD)

    def _record(self, control: Array) -> tuple[Array, NDArray[np.int32]]:
        """(N, n, nu) -> rows (N, n, R) and what overflowed in each world (N,), read once the chunk is through."""
        wp, data, n = self._wp, self._data, control.shape[1]
        controls = wp.array(np.ascontiguousarray(control.swapaxes(0, 1), dtype=np.float32))  # (n, N, nu)
        sources = (data.qpos, data.qvel, data.sensordata)
        records = [wp.empty((n, *source.shape), dtype=wp.float32) for source in sources]
        data.overflow.zero_()
        for step in range(n):
            wp.copy(data.ctrl, controls[step])
            wp.capture_launch(self._control_step)
            for record, source in zip(records, sources, strict=True):
                wp.copy(record[step], source)
        rows = np.concatenate([record.numpy() for record in records], axis=-1)  # (n, N, R)
        kinds = self._mjw.OverflowType
        counted = ~int(kinds.ITERATIONS | kinds.LS_ITERATIONS)  # MuJoCo, too, takes what the solver came to by then
        return rows.swapaxes(0, 1).astype(np.float64), data.overflow.numpy() & counted


class WarpCameras:
    """What the cameras of N worlds see, ray-traced on the device: a pure function of qpos, as `SceneRenderer`."""

    def __init__(self, scene: PickScene, num_worlds: int, device: str) -> None:
        self._wp, self._mjw = _load_warp()
        self._device, config = self._wp.get_device(device), scene.config
        self.cameras, self.size, self._num_worlds = tuple(config.cameras), config.image_size, num_worlds
        with self._wp.ScopedDevice(self._device):
            self._model = self._mjw.put_model(scene.model)
            self._data = self._mjw.make_data(scene.model, num_worlds, nconmax=0, njmax=0)  # for kinematics alone
            self._context = self._mjw.create_render_context(
                scene.model, num_worlds, (self.size, self.size), render_rgb=True, render_depth=False,
                cam_active=list(self.cameras),
            )  # fmt: skip
        self.render(np.tile(scene.model.qpos0, (num_worlds, 1)))  # compiles

    def render(self, qpos: Array) -> dict[str, Tensor]:
        """Images {camera: (N, size, size, 3) uint8} of the configurations qpos (N, nq), on the device."""
        import torch

        model, data, context = self._model, self._data, self._context
        with self._wp.ScopedDevice(self._device):
            self._wp.synchronize_device(self._device)  # torch, which has a stream of its own, may read the last images
            data.qpos.assign(np.ascontiguousarray(qpos, dtype=np.float32))
            for stage in (self._mjw.kinematics, self._mjw.com_pos, self._mjw.camlight):
                stage(model, data)
            self._mjw.refit_bvh(model, data, context)
            self._mjw.render(model, data, context)
            self._wp.synchronize_device(self._device)
            packed = self._wp.to_torch(context.rgb_data)  # (N, pixels of all cameras), each 0xAARRGGBB
        colours = packed.view(torch.uint8).view(self._num_worlds, len(self.cameras), self.size, self.size, 4)
        views = colours.flip(-1)[..., 1:].unbind(1)  # bytes lie from the lowest to the highest: B, G, R, A
        return {camera: view.contiguous() for camera, view in zip(self.cameras, views, strict=True)}


class DeviceObservations(ObservationBuffer):
    """Current observations whose images are torch tensors {camera: (N, h, w, 3) uint8} on the worlds' device."""

    def __init__(self, config: EnvConfig, num_envs: int, device: str) -> None:
        import torch

        shape = (num_envs, config.image_size, config.image_size, 3)
        names = config.cameras if config.render_images else ()
        super().__init__(
            config, num_envs, {name: torch.zeros(shape, dtype=torch.uint8, device=device) for name in names}
        )


class WarpVectorEnv(InProcessVectorEnv):
    """All environments in MuJoCo Warp, on the CPU or on a CUDA device: `pixels` are tensors there, the rest is numpy.

    A chunk runs on the device and gives its rows to the host once, where `PickScene` scores them. All worlds are
    simulated up to the end of a chunk, those too whose episode has ended.

    Args:
        device: "cpu", or a CUDA device by torch's name.
    """

    def __init__(self, config: EnvConfig, num_envs: int, device: str = "cpu") -> None:
        check_warp()
        buffers = (DeviceObservations(config, num_envs, device), DeviceObservations(config, num_envs, device))
        super().__init__(config, num_envs, buffers)
        self.worlds = WarpWorlds(self.scene, num_envs, device)
        self.views = WarpCameras(self.scene, num_envs, device) if config.render_images else None
        self._data = mujoco.MjData(self.scene.model)
        self._starts: dict[int, Array] = {}  # states that the device does not have yet
        self._rows = np.zeros((num_envs, self.scene.layout.row_size))
        self._logs = [EpisodeLog() for _ in range(num_envs)]

    def _start_episode(self, env: int, seed: int) -> None:
        self.scene.reset(self._data, episode_generator(seed))
        self._starts[env] = self.scene.integration_state(self._data)
        self._rows[env] = row = self.scene.layout.row(self._data)
        self._logs[env].begin(seed, self.scene.block_height(row), self.scene.begin_trace(row))

    def _send_starts(self) -> None:
        """All at once: each would cost as much as all of them."""
        if self._starts:
            states = self.worlds.states()
            states[list(self._starts)] = list(self._starts.values())
            self.worlds.set_states(states)
            self._starts.clear()

    def _observe(self, envs: Sequence[int]) -> Observation:
        rows = self._rows[list(envs)]
        seen: Observation = {"agent_pos": self.scene.agent_pos(rows)}
        if self.views is not None:
            images = self.views.render(self._rows[:, : self.scene.model.nq])
            seen["pixels"] = {camera: view[list(envs)] for camera, view in images.items()}
        if self.config.environment_state:
            seen["environment_state"] = self.scene.environment_state(rows, [self._logs[env].length for env in envs])
        return seen

    def _advance(self, actions: Array, live: NDArray[np.int64]) -> list[ChunkScore]:
        if not len(live):
            return []
        self._send_starts()
        control, clipped, leaning = self.scene.control(actions)
        everyone = np.zeros((self.num_envs, *control.shape[1:]))
        everyone[..., self.scene.layout.actuators] = self.scene.layout.joint_pos_rad(self._rows)[:, None]  # hold still
        everyone[live] = control
        rows, sound = self.worlds.play(everyone)
        rows, stable = rows[live], sound[live]
        steps = np.array([self._logs[env].length for env in live])
        traces = self.scene.taxonomy.stack(self._logs[env].trace for env in live)
        rows[~stable] = self._rows[live[~stable], None]  # no NaN is scored
        score = self.scene.score(self._rows[live], rows, steps, clipped, leaning, traces)
        score = score.cut_off(~stable, self.scene.layout.scene_state(self._rows[live]).block_pos[..., 2], traces)
        self._rows[live] = rows[np.arange(len(live)), score.lengths - 1]
        for row, env in enumerate(live.tolist()):
            self._logs[env].record(score, row)
        return [score]

    def _log(self, env: int) -> EpisodeLog:
        return self._logs[env]

    def _simulation_state(self) -> dict[str, Any]:
        self._send_starts()
        return {"integration": self.worlds.states(), "rows": self._rows.copy()}

    def _set_simulation_state(self, state: Mapping[str, Any]) -> None:
        integration = np.array(state["integration"], dtype=np.float64)
        expected = (self.num_envs, mujoco.mj_stateSize(self.scene.model, INTEGRATION_STATE))
        if integration.shape != expected:
            raise ValueError(f"state is {integration.shape}, this scene's {expected}: another model?")
        self._starts.clear()
        self.worlds.set_states(integration)
        self._rows[:] = state["rows"]
        self._logs = [EpisodeLog.restored(episode) for episode in state["episodes"]]
