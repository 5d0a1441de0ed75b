"""What every part of the project needs to know about the SO-101 in MuJoCo: joint frames and units, normalisation
constants, the model file, the state of the scene, and the reward.

Units are in the names: `_rad` is MuJoCo's frame, a `JointFrame` is the only way to any other one. Reward, success and
the privileged state are pure functions of a `SceneState`, so that single, subprocess and batched environments score
their steps with the same code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:  # settings are checked before MuJoCo is loaded
    import mujoco

Array = NDArray[np.float64]

JOINT_NAMES = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
NUM_JOINTS = len(JOINT_NAMES)
CAMERA_NAMES = ("camera_up", "wrist_camera", "camera_side")
SENSOR_DIMS = {
    "tool_pos": 3,
    "block_pos": 3,
    "block_quat": 4,
    "block_linvel": 3,
    "fixed_jaw_contact": 3,
    "moving_jaw_contact": 3,
}

# Statistics of the SO-100 data behind lerobot/smolvla_base, in the "so100_legacy" frame (degrees).
SMOLVLA_STATE_MEAN = (1.596, 119.944, 109.770, 56.706, -27.423, 12.003)
SMOLVLA_STATE_STD = (26.392, 52.411, 49.854, 36.998, 59.360, 19.040)

GRIPPER_CLOSED_RAD = -0.174533
GRIPPER_RANGE_RAD = 1.919862
LIMIT_TOLERANCE_RAD = 1e-4  # a float32 target at a limit comes back up to 1e-6 rad outside: that is not a clipped one


# --- Joint frames ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JointFrame:
    """An affine map between MuJoCo joint angles and the units of a policy: values = scale * q_rad + offset.

    Attributes:
        name: key in `FRAMES`.
        scale, offset: (6,) units per radian, and units at q = 0, in the order of `JOINT_NAMES`.
        units: (6,) the unit of each value.
    """

    name: str
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    units: tuple[str, ...]

    def from_rad(self, q_rad: ArrayLike) -> Array:
        """MuJoCo radians (..., 6) -> this frame's values (..., 6), float64. Raises ValueError on another last axis."""
        return _joint_array(q_rad, "q_rad") * np.array(self.scale) + np.array(self.offset)

    def to_rad(self, values: ArrayLike) -> Array:
        """This frame's values (..., 6) -> MuJoCo radians (..., 6), float64. Raises ValueError on another last axis."""
        return (_joint_array(values, "values") - np.array(self.offset)) / np.array(self.scale)


_DEG_PER_RAD = 180.0 / np.pi
_PCT_PER_RAD = 100.0 / GRIPPER_RANGE_RAD

FRAMES = {
    # LeRobot's SO-101 driver with use_degrees=True: the gripper is a percentage, 0 closed and 100 open.
    "lerobot": JointFrame(
        name="lerobot",
        scale=(_DEG_PER_RAD,) * 5 + (_PCT_PER_RAD,),
        offset=(0.0,) * 5 + (-GRIPPER_CLOSED_RAD * _PCT_PER_RAD,),
        units=("deg",) * 5 + ("pct",),
    ),
    # The absolute servo frame of the older SO-100 recordings: degrees for all six joints.
    "so100_legacy": JointFrame(
        name="so100_legacy",
        scale=(_DEG_PER_RAD,) * 6,
        offset=(0.0, 120.0, 110.0, 57.0, -27.0, 12.0),
        units=("deg",) * 6,
    ),
}


HALF_RANGES_DEG = (
    110.0,
    100.0,
    96.83,
    95.0,
    180.0,
)  # the joint ranges, and the full turn that LeRobot gives wrist_roll


def m100_frame(half_ranges_deg: tuple[float, ...] = HALF_RANGES_DEG) -> JointFrame:
    """LeRobot's SO-101 driver with use_degrees=False: -100 and 100 are the ends of each arm joint's calibrated range,
    its middle is 0; the gripper is a percentage.

    Args:
        half_ranges_deg: (5,) half of each arm joint's range.
    """
    return JointFrame(
        name="lerobot_m100_100",
        scale=(*(100.0 / half * _DEG_PER_RAD for half in half_ranges_deg), _PCT_PER_RAD),
        offset=(0.0,) * 5 + (-GRIPPER_CLOSED_RAD * _PCT_PER_RAD,),
        units=("%",) * 5 + ("pct",),
    )


def _joint_array(values: ArrayLike, name: str) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0 or array.shape[-1] != NUM_JOINTS:
        raise ValueError(f"{name} must end in {NUM_JOINTS} joints {JOINT_NAMES}, got shape {array.shape}")
    return array


def clip_to_limits(target_rad: ArrayLike, limits_rad: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    """Clips joint targets to the joint limits.

    Args:
        target_rad: (..., 6) radians.
        limits_rad: (6, 2) lower and upper limits, radians.

    Returns:
        The clipped targets (..., 6), and how many joints of each target were outside by more than
        `LIMIT_TOLERANCE_RAD`, (...) int.
    """
    target = _joint_array(target_rad, "target_rad")
    limits = np.asarray(limits_rad, dtype=np.float64)
    clipped = np.clip(target, limits[:, 0], limits[:, 1])
    return clipped, np.asarray(np.count_nonzero(np.abs(target - clipped) > LIMIT_TOLERANCE_RAD, axis=-1))


# --- The model ------------------------------------------------------------------------------------------------------


def model_dir() -> Path:
    """The directory of scene.xml and the embedded policies: `model/` in a checkout, inside so101_sim in a wheel.

    Raises:
        FileNotFoundError: neither is beside this module.
    """
    here = Path(__file__).resolve().parent
    for name in ("model", "so101_sim/model"):
        if (here / name / "scene.xml").is_file():
            return here / name
    raise FileNotFoundError(f"no model/scene.xml or so101_sim/model/scene.xml in {here}: reinstall, or pass model_path")


DEFAULT_SCENE = "model/scene.xml"


def scene_path(model_path: str | Path | None) -> Path:
    """The MJCF file that ``model_path`` names; the default name means the shipped scene wherever one stands.

    Raises:
        FileNotFoundError: no such file.
    """
    if model_path is None or (str(model_path) == DEFAULT_SCENE and not Path(DEFAULT_SCENE).is_file()):
        return model_dir() / "scene.xml"
    if not Path(model_path).is_file():
        raise FileNotFoundError(f"model_path={model_path} does not exist: leave it out for the shipped scene")
    return Path(model_path)


def load_model(model_path: str | Path | None = None, cameras: tuple[str, ...] = CAMERA_NAMES) -> mujoco.MjModel:
    """Loads the scene and checks that it has every element the environment reads.

    Args:
        model_path: an MJCF file with the joint, body and sensor names of model/scene.xml; None is the shipped scene.
        cameras: cameras that must exist.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file does not compile, or elements are missing; every missing one is listed.
    """
    import mujoco

    path = scene_path(model_path)
    model = mujoco.MjModel.from_xml_path(str(path))
    missing = _missing_elements(model, cameras)
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: name these elements as model/scene.xml does")
    return model


def _missing_elements(model: mujoco.MjModel, cameras: tuple[str, ...]) -> list[str]:
    import mujoco

    obj = mujoco.mjtObj
    wanted = [("joint", obj.mjOBJ_JOINT, name) for name in JOINT_NAMES]
    wanted += [("actuator", obj.mjOBJ_ACTUATOR, name) for name in JOINT_NAMES]
    wanted += [("body", obj.mjOBJ_BODY, name) for name in ("block", "gripper", "moving_jaw_so101_v1")]
    wanted += [("sensor", obj.mjOBJ_SENSOR, name) for name in SENSOR_DIMS]
    wanted += [("camera", obj.mjOBJ_CAMERA, name) for name in cameras]
    missing = [f"{kind} {name!r}" for kind, kind_id, name in wanted if mujoco.mj_name2id(model, kind_id, name) < 0]
    missing += [
        f"sensor {name!r} with {dim} values"
        for name, dim in SENSOR_DIMS.items()
        if f"sensor {name!r}" not in missing and model.sensor(name).dim[0] != dim
    ]
    if "body 'block'" not in missing and not _block_is_free(model):
        missing.append("a freejoint on body 'block'")
    missing += [
        f"a limit on joint {name!r}"
        for name in JOINT_NAMES
        if f"joint {name!r}" not in missing and not model.joint(name).limited[0]
    ]
    return missing


def _block_is_free(model: mujoco.MjModel) -> bool:
    import mujoco

    body = model.body("block")
    return bool(body.jntnum[0] == 1 and model.jnt_type[body.jntadr[0]] == mujoco.mjtJoint.mjJNT_FREE)


# --- The state of the scene -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SceneState:
    """What reward, success and critics read: float64 arrays, any leading dimensions (...), SI units, world frame."""

    tool_pos: Array  # (..., 3) m, the point between the fingertips
    block_pos: Array  # (..., 3) m, the block's centre
    block_quat: Array  # (..., 4) wxyz
    block_linvel: Array  # (..., 3) m/s
    fixed_jaw_force: Array  # (..., 3) N, net contact force between the fixed jaw and the block; zero without contact
    moving_jaw_force: Array  # (..., 3) N, the same for the moving jaw
    joint_pos_rad: Array  # (..., 6)
    joint_vel: Array  # (..., 6) rad/s


class SceneLayout:
    """Where a model keeps the quantities of a `SceneState`.

    A *row* is the concatenation [qpos, qvel, sensordata] of one instant: rows are what environments record, carry and
    save. As with mj_step, the sensors of a row describe the instant one substep (2 ms) before its qpos.
    """

    def __init__(self, model: mujoco.MjModel) -> None:
        self.nq, self.nv, self.row_size = model.nq, model.nv, model.nq + model.nv + model.nsensordata
        block_joint = model.body("block").jntadr[0]
        self.block_qpos = slice(model.jnt_qposadr[block_joint], model.jnt_qposadr[block_joint] + 7)
        self.joint_qpos = np.array([model.joint(name).qposadr[0] for name in JOINT_NAMES])
        self.joint_dofs = np.array([model.joint(name).dofadr[0] for name in JOINT_NAMES])
        self.actuators = np.array([model.actuator(name).id for name in JOINT_NAMES])
        self.limits_rad = np.array([model.joint(name).range for name in JOINT_NAMES])  # (6, 2)
        start = self.nq + self.nv
        addresses = {name: start + int(model.sensor(name).adr[0]) for name in SENSOR_DIMS}
        self._sensors = {name: slice(first, first + SENSOR_DIMS[name]) for name, first in addresses.items()}

    def row(self, data: mujoco.MjData) -> Array:
        """The row (R,) of an MjData, a copy."""
        return np.concatenate([data.qpos, data.qvel, data.sensordata])

    def scene_state(self, rows: Array) -> SceneState:
        """Rows (..., R) -> the SceneState with the same leading dimensions."""
        sensors = {name: rows[..., columns] for name, columns in self._sensors.items()}
        return SceneState(
            tool_pos=sensors["tool_pos"],
            block_pos=sensors["block_pos"],
            block_quat=sensors["block_quat"],
            block_linvel=sensors["block_linvel"],
            fixed_jaw_force=sensors["fixed_jaw_contact"],
            moving_jaw_force=sensors["moving_jaw_contact"],
            joint_pos_rad=rows[..., self.joint_qpos],
            joint_vel=rows[..., self.nq + self.joint_dofs],
        )

    def joint_pos_rad(self, rows: Array) -> Array:
        """Rows (..., R) -> joint angles (..., 6), radians."""
        return rows[..., self.joint_qpos]


ENVIRONMENT_STATE_NAMES = (
    *(f"{name}_pos_rad" for name in JOINT_NAMES),
    *(f"{name}_vel" for name in JOINT_NAMES),
    *(f"tool_pos_{axis}" for axis in "xyz"),
    *(f"block_pos_{axis}" for axis in "xyz"),
    *(f"tool_to_block_{axis}" for axis in "xyz"),
    *(f"block_quat_{axis}" for axis in "wxyz"),
    *(f"block_linvel_{axis}" for axis in "xyz"),
    *(f"fixed_jaw_force_{axis}" for axis in "xyz"),
    *(f"moving_jaw_force_{axis}" for axis in "xyz"),
    "progress",
)
_FORCE_SCALE_N = 5.0


def environment_state(state: SceneState, progress: ArrayLike) -> NDArray[np.float32]:
    """The privileged simulator state, for critics and state-based policies.

    Args:
        state: with leading dimensions (...).
        progress: (...) the share of the episode's time limit that is used, 0 to 1.

    Returns:
        (..., S) float32 in the order of `ENVIRONMENT_STATE_NAMES`: radians, rad/s, metres, m/s; the quaternion with
        w >= 0; forces as f / (|f| + 5 N), because contact forces reach tens of newtons.
    """
    quat = np.where(state.block_quat[..., :1] < 0.0, -state.block_quat, state.block_quat)
    parts = (
        state.joint_pos_rad,
        state.joint_vel,
        state.tool_pos,
        state.block_pos,
        state.block_pos - state.tool_pos,
        quat,
        state.block_linvel,
        _soft_force(state.fixed_jaw_force),
        _soft_force(state.moving_jaw_force),
        np.asarray(progress, dtype=np.float64)[..., None],
    )
    return np.concatenate(parts, axis=-1).astype(np.float32)


def _soft_force(force: Array) -> Array:
    return force / (_norm(force)[..., None] + _FORCE_SCALE_N)


def _norm(vector: Array) -> Array:
    # Written out: a library reduction may sum in another order for another memory layout, and the vector forms of the
    # environment must agree to the last bit.
    return np.sqrt(sum(vector[..., axis] * vector[..., axis] for axis in range(vector.shape[-1])))


# --- Reward and success ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardConfig:
    """Scales of the reward terms; see `compute_reward` for what each one multiplies."""

    mode: str = "seed"
    # Above the distance penalty near the block (0.03 a step), too little to matter far away.
    contact_bonus: float = 0.1
    # For coming from above instead of bumping into the side.
    height_alignment_bonus: float = 0.05
    # Metres above the floor: clearly lifted, not just nudged.
    lift_threshold: float = 0.08
    # Metres: the height of the block's centre when it lies on the floor.
    block_rest_height: float = 0.0125
    reach_scale: float = 1.0
    # Metres, the distance that earns half of reach_scale: steep over the last centimetres, where a grasp is decided.
    reach_length: float = 0.05
    grasp_scale: float = 1.0
    lift_scale: float = 2.0
    # More than all shaping together (less than 4.7), so that no half-way state competes with a lift.
    success_bonus: float = 5.0


_SEED_TERMS = ("distance", "height_alignment", "contact")
REWARD_TERMS = {
    "seed": _SEED_TERMS,
    "staged": (*_SEED_TERMS, "reach", "grasp", "lift", "success"),
    "sparse": ("success",),
}
ALIGNED_HORIZONTAL_M = 0.1
ALIGNED_ABOVE_M = 0.02
GRASP_FORCE_N = 0.2
GRASP_OPPOSITION_COS = -0.5  # the two jaws' forces point at least 120 degrees apart


def compute_reward(previous: SceneState, state: SceneState, config: RewardConfig) -> dict[str, Array]:
    """The reward of one control step as named terms; the reward is their sum.

    Each shaping term is a potential P(state). Mode "seed", the documented formula, pays P(state) at every step: staying
    is paid. Mode "staged" pays P(state) - P(previous): the sum over an episode telescopes to P(end) - P(start), so
    hovering, camping in contact, or touching again and again earn nothing more. (Differences are not discounted: with
    gamma < 1 a discounted sum stays below max P - P(start).) Only `success` is paid as an event; mode "sparse" pays
    nothing else.

    | term             | P(state)                                                    | P range      | modes        |
    |------------------|-------------------------------------------------------------|--------------|--------------|
    | distance         | -d, d = |tool - block| in m                                 | -0.5 .. 0    | seed, staged |
    | height_alignment | height_alignment_bonus if horizontal d < 0.1 m and the tool |              |              |
    |                  | is more than 0.02 m above the block                         | 0 or 0.05    | seed, staged |
    | contact          | contact_bonus if a jaw touches the block                    | 0 or 0.1     | seed, staged |
    | reach            | reach_scale * L / (L + d), L = reach_length                 | 0 .. 1       | staged       |
    | grasp            | grasp_scale if both jaws press (> 0.2 N each) with forces   |              |              |
    |                  | at least 120 degrees apart                                  | 0 or 1       | staged       |
    | lift             | lift_scale * height gained / height to gain, within 0 .. 1  | 0 .. 2       | staged       |
    | success          | success_bonus, once, in the step that lifts the block above |              | staged,      |
    |                  | lift_threshold                                              | 0 or 5       | sparse       |

    Rewards have no unit: the seed's distance term counts a metre as 1.

    Args:
        previous, state: before and after the control step, any leading dimensions (...).

    Returns:
        Terms of shape (...), float64, always in the same order.
    """
    succeeded = is_success(state, config.lift_threshold) & ~is_success(previous, config.lift_threshold)
    success = {"success": np.where(succeeded, config.success_bonus, 0.0)}
    if config.mode == "sparse":
        return success
    now = _seed_potentials(state, config)
    if config.mode == "seed":
        return now
    now |= _staged_potentials(state, config)
    before = _seed_potentials(previous, config) | _staged_potentials(previous, config)
    return {name: now[name] - before[name] for name in now} | success


def _seed_potentials(state: SceneState, config: RewardConfig) -> dict[str, Array]:
    offset = state.tool_pos - state.block_pos
    aligned = (_norm(offset[..., :2]) < ALIGNED_HORIZONTAL_M) & (offset[..., 2] > ALIGNED_ABOVE_M)
    touching = (_norm(state.fixed_jaw_force) > 0.0) | (_norm(state.moving_jaw_force) > 0.0)
    return {
        "distance": -_norm(offset),
        "height_alignment": np.where(aligned, config.height_alignment_bonus, 0.0),
        "contact": np.where(touching, config.contact_bonus, 0.0),
    }


def _staged_potentials(state: SceneState, config: RewardConfig) -> dict[str, Array]:
    distance = _norm(state.tool_pos - state.block_pos)
    span = config.lift_threshold - config.block_rest_height
    lifted = np.clip((state.block_pos[..., 2] - config.block_rest_height) / span, 0.0, 1.0)
    return {
        "reach": config.reach_scale * config.reach_length / (config.reach_length + distance),
        "grasp": np.where(is_grasped(state), config.grasp_scale, 0.0),
        "lift": config.lift_scale * lifted,
    }


def is_grasped(state: SceneState) -> NDArray[np.bool_]:
    """(...) bool: both jaws press on the block, from opposite sides."""
    fixed, moving = state.fixed_jaw_force, state.moving_jaw_force
    fixed_n, moving_n = _norm(fixed), _norm(moving)
    dot = sum(fixed[..., axis] * moving[..., axis] for axis in range(3))
    opposed = dot < GRASP_OPPOSITION_COS * fixed_n * moving_n
    return opposed & (fixed_n > GRASP_FORCE_N) & (moving_n > GRASP_FORCE_N)


def is_success(state: SceneState, lift_threshold: float) -> NDArray[np.bool_]:
    """(...) bool: the block's centre is more than `lift_threshold` metres above the floor (world z = 0).

    The one definition of success in the project. Height alone is the documented rule: how the block got there is not
    asked.
    """
    return np.asarray(state.block_pos[..., 2] > lift_threshold)
