"""Scripted expert for the pick-up task: inverse kinematics at a few waypoints, smooth joint motion between them.

It is the source of demonstrations, and the test of the scene: if this cannot lift the block, no policy can.

A plan has four phases on a fixed clock (50 Hz control steps): approach with the jaw open until it is above the block,
descend, close, lift. The phase that a plan starts in follows from the clock and from the state: a demonstration can be
re-planned in the middle of an episode, and a perturbed arm that has lost its place falls back to an earlier phase.
Nothing is random: the same arguments give the same plan.

Angles are radians, lengths metres. The joint order is that of `JOINT_NAMES`.
"""

from dataclasses import dataclass

import mujoco
import numpy as np

from so101_mujoco_utils import JOINT_NAMES

PHASES = ("approach", "descend", "close", "lift")
# First and last control step of each phase. The gaps are short rests: the chunk boundaries at 50 and 100 fall on an
# open gripper at rest above the block, and on a gripper that has just closed.
PHASE_STEPS = {"approach": (0, 45), "descend": (48, 74), "close": (76, 96), "lift": (100, 135)}

JAW_OPEN_RAD = np.deg2rad(50.0)
JAW_CLOSED_RAD = np.deg2rad(-5.0)

HOVER_HEIGHT = 0.065  # tool above the block's centre before the descent
LIFT_HEIGHT = 0.14  # tool above the floor at the end
GRASP_SHIFT = 0.0035  # along the closing axis, towards the moving jaw: leaves about 4 mm between fixed jaw and block
MAX_JOINT_SPEED = 4.5  # rad/s at the peak of a motion; the servos saturate near 4.9 (2.94 N m over damping 0.6)
MIN_PHASE_STEPS = 8
JAW_HOLDING_RAD = np.deg2rad(14.0)  # jaws around the 25 mm block touch it at about 7 degrees
UP = np.array([0.0, 0.0, 1.0])
MINIMUM_JERK_PEAK = 1.875  # peak speed of a minimum-jerk motion over its mean speed


@dataclass(frozen=True)
class Segment:
    """A path of joint knots (k, 6), walked in `num_steps` control steps, its end then held for `rest` steps."""

    knots_rad: np.ndarray
    num_steps: int
    rest: int


def minimum_jerk(fraction: np.ndarray) -> np.ndarray:
    """Path parameter in 0..1 with zero velocity and acceleration at both ends, for time fractions in 0..1."""
    return fraction**3 * (10.0 - 15.0 * fraction + 6.0 * fraction**2)


def approach_tilt_rad(distance: float) -> float:
    """Outward tilt of the fingers from straight down, for a distance (m) from the shoulder's axis.

    Straight down is out of reach above the block beyond about 0.22 m, and on the floor beyond 0.27 m.
    """
    return float(np.deg2rad(np.interp(distance, [0.20, 0.26, 0.32], [0.0, 10.0, 25.0])))


class ScriptedExpert:
    """Plans joint targets that grasp the block and lift it. Holds its own MjData, touches nobody else's."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self._model = model
        self._data = mujoco.MjData(model)
        joints = [model.joint(name) for name in JOINT_NAMES]
        self._qpos_index = np.array([joint.qposadr[0] for joint in joints])
        self._dof_index = np.array([joint.dofadr[0] for joint in joints])
        self._range_rad = np.array([joint.range for joint in joints])  # (6, 2)
        self._tool_id = model.site("tool").id
        self._tip_ids = [model.site("fixed_fingertip").id, model.site("moving_fingertip").id]
        self._block_rest_height = float(model.geom("block").size[2])
        mujoco.mj_kinematics(model, self._data)
        self._shoulder_xy = self._data.joint("shoulder_pan").xanchor[:2].copy()

    def plan(
        self, q_rad: np.ndarray, block_pos: np.ndarray, block_yaw_rad: float, start_step: int = 0, num_steps: int = 150
    ) -> np.ndarray:
        """Absolute joint targets, one per control step from `start_step` on.

        Args:
            q_rad: (6,) joint angles now.
            block_pos: (3,) block centre in the world, m.
            block_yaw_rad: rotation of the block about z; any of its four equivalent values.
            start_step: control step of the episode at which the plan starts.
            num_steps: control steps of the whole episode. The phases keep their clock: fewer than about 140 cut the
                lift short, more hold it longer.

        Returns:
            (num_steps - start_step, 6) targets in radians, within the joint ranges.
        """
        q_rad = np.asarray(q_rad, dtype=float)
        block_pos = np.array(block_pos, dtype=float)
        first_phase = self._entry_phase(q_rad, block_pos, start_step)
        if first_phase != "lift":  # a block in the air that is not held is about to lie on the floor
            block_pos[2] = min(block_pos[2], self._block_rest_height)
        paths = self._waypoint_paths(q_rad, block_pos, block_yaw_rad)
        segments = _schedule(paths, first_phase, start_step, num_steps)
        targets = np.concatenate([_walk(segment) for segment in segments])[: num_steps - start_step]
        missing = num_steps - start_step - len(targets)
        targets = np.concatenate([targets, np.repeat(segments[-1].knots_rad[-1:], missing, axis=0)])
        return np.clip(targets, self._range_rad[:, 0], self._range_rad[:, 1])

    # Waypoints

    def _waypoint_paths(self, q_rad: np.ndarray, block_pos: np.ndarray, block_yaw_rad: float) -> dict[str, np.ndarray]:
        """Joint knots (k, 6) of each phase; past the approach `q_rad` only decides which faces to grasp."""
        radial = block_pos[:2] - self._shoulder_xy
        distance = float(np.linalg.norm(radial))
        tilt = approach_tilt_rad(distance)
        # The seed depends on the block alone, so that a re-plan from a perturbed state finds the same waypoints.
        seed = np.array([np.arctan2(radial[0], radial[1]), 0.0, 0.2, 1.2, q_rad[4], JAW_OPEN_RAD])
        above = block_pos + HOVER_HEIGHT * UP
        over = self._solve(seed, above, tilt, None)
        yaw = self._nearest_face_yaw(over, block_yaw_rad)
        shift = GRASP_SHIFT * np.array([np.cos(yaw), np.sin(yaw), 0.0])
        over = self._solve(over, above + shift, tilt, yaw)
        descent = [over]
        for height in np.linspace(HOVER_HEIGHT, 0.0, 5)[1:]:
            descent.append(self._solve(descent[-1], block_pos + shift + height * UP, tilt, yaw))
        around = descent[-1]
        grasped = np.append(around[:5], JAW_CLOSED_RAD)
        # Higher up only a tilted hand is within reach; the wrist keeps its roll, as the block is now turned with it.
        lift = [grasped]
        for fraction in np.linspace(0.0, 1.0, 4)[1:]:
            height = block_pos[2] + fraction * (LIFT_HEIGHT - block_pos[2])
            tilt_up = tilt + fraction * max(0.0, np.deg2rad(35.0) - tilt)
            lift.append(self._solve(lift[-1], np.array([*(block_pos + shift)[:2], height]), tilt_up, None))
        return {
            "approach": np.array([q_rad, *self._rise(q_rad, block_pos), over]),
            "descend": np.array(descent),
            "close": np.array([around, grasped]),
            "lift": np.array(lift),
        }

    def _rise(self, q_rad: np.ndarray, block_pos: np.ndarray) -> list[np.ndarray]:
        """No knot, or one straight above a tool so low and near that its direct way to the block would push it."""
        self._forward(q_rad)
        tool = self._data.site_xpos[self._tool_id].copy()
        gap = float(np.linalg.norm(tool[:2] - block_pos[:2]))
        # Fading with the gap keeps the plan a continuous function of the block's place.
        rise = max(0.0, HOVER_HEIGHT - tool[2]) * float(np.interp(gap, [0.035, 0.065], [1.0, 0.0]))
        if rise < 1e-3:
            return []
        tilt = float(np.arcsin(np.clip(self._radial_lean(), -1.0, 1.0)))
        risen = self._solve(q_rad, tool + rise * UP, tilt, None)
        if self._block_in_jaws(q_rad, block_pos):  # let go of it on the way up, but do not open onto one outside
            risen[5] = max(risen[5], 0.5 * JAW_OPEN_RAD)
        return [risen]

    def _nearest_face_yaw(self, q_rad: np.ndarray, block_yaw_rad: float) -> float:
        """World yaw of the closing axis across two of the block's faces that takes the least wrist roll from here."""
        self._forward(q_rad)
        now = np.arctan2(*self._gripper_axes()[1::-1, 0])
        turn = block_yaw_rad - now
        quarter = np.pi / 2
        turn -= quarter * np.round(turn / quarter)
        candidates = turn + quarter * np.array([0.0, -np.sign(turn), np.sign(turn)])
        # Fingers down, wrist_roll turns the closing axis the other way round.
        rolls = q_rad[4] - candidates
        low, high = self._range_rad[4]
        allowed = candidates[(rolls > low) & (rolls < high)]
        return float(now + allowed[0])

    # Inverse kinematics

    def _forward(self, q_rad: np.ndarray) -> None:
        self._data.qpos[self._qpos_index] = q_rad
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)

    def _gripper_axes(self) -> np.ndarray:
        """(3, 3) tool frame in the world: column 0 is the closing axis, column 2 points from the tips to the wrist."""
        return self._data.site_xmat[self._tool_id].reshape(3, 3)

    def _radial(self) -> np.ndarray:
        """(3,) horizontal unit vector from the shoulder's axis to the tool."""
        radial = np.append(self._data.site_xpos[self._tool_id][:2] - self._shoulder_xy, 0.0)
        return radial / np.linalg.norm(radial)

    def _radial_lean(self) -> float:
        """Sine of the fingers' outward tilt at the pose last passed to `_forward`."""
        return float(-self._radial() @ self._gripper_axes()[:, 2])

    def _solve(
        self, seed_rad: np.ndarray, target: np.ndarray, tilt_rad: float, yaw_rad: float | None, iterations: int = 40
    ) -> np.ndarray:
        """Damped least squares: tool at `target`, fingers `tilt_rad` outward, closing axis at `yaw_rad` if given.

        Position counts fully, tilt only weakly: where both cannot be had, the fingers tilt. Returns (6,) radians with
        the seed's jaw angle, and the seed's wrist_roll if `yaw_rad` is None.
        """
        q_rad = np.clip(seed_rad, self._range_rad[:, 0], self._range_rad[:, 1])
        free = np.arange(4 if yaw_rad is None else 5)
        for _ in range(iterations):
            self._forward(q_rad)
            error, jacobian = self._task_error(target, tilt_rad, yaw_rad)
            if np.abs(error).max() < 1e-5:
                break
            jacobian = jacobian[:, free]
            step = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 1e-6 * np.eye(len(error)), error)
            largest = np.abs(step).max()
            if largest > 0.3:
                step *= 0.3 / largest
            q_rad[free] = np.clip(q_rad[free] + step, self._range_rad[free, 0], self._range_rad[free, 1])
        return q_rad

    def _task_error(self, target: np.ndarray, tilt_rad: float, yaw_rad: float | None) -> tuple[np.ndarray, np.ndarray]:
        """Residual (4 or 5,) and its Jacobian (4 or 5, 6) at the pose last passed to `_forward`."""
        jac_pos, jac_rot = np.zeros((3, self._model.nv)), np.zeros((3, self._model.nv))
        mujoco.mj_jacSite(self._model, self._data, jac_pos, jac_rot, self._tool_id)
        jac_pos, jac_rot = jac_pos[:, self._dof_index], jac_rot[:, self._dof_index]  # (3, 6)
        axes = self._gripper_axes()
        position = self._data.site_xpos[self._tool_id]

        radial, fingers = self._radial(), -axes[:, 2]
        tilt_weight = 0.02  # metres per unit of sin(tilt)
        rows = [jac_pos, tilt_weight * (radial @ np.cross(jac_rot.T, fingers).T)[None]]
        errors = [target - position, [tilt_weight * (np.sin(tilt_rad) - radial @ fingers)]]
        if yaw_rad is not None:
            closing = axes[:, 0]
            moved = np.cross(jac_rot.T, closing).T  # (3, 6)
            yaw_rate = (closing[0] * moved[1] - closing[1] * moved[0]) / (closing[0] ** 2 + closing[1] ** 2)
            turn = yaw_rad - np.arctan2(closing[1], closing[0])
            yaw_weight = 0.05  # metres per radian
            rows.append(yaw_weight * yaw_rate[None])
            errors.append([yaw_weight * np.arctan2(np.sin(turn), np.cos(turn))])
        return np.concatenate(errors), np.concatenate(rows)

    # Time

    def _entry_phase(self, q_rad: np.ndarray, block_pos: np.ndarray, start_step: int) -> str:
        """The phase that the clock asks for, or an earlier one if the arm is not where that phase can start."""
        scheduled = next((name for name in PHASES if start_step < PHASE_STEPS[name][1]), "lift")
        in_jaws = self._block_in_jaws(q_rad, block_pos)
        offset = self._data.site_xpos[self._tool_id] - block_pos
        lateral, height = float(np.linalg.norm(offset[:2])), float(offset[2])
        jaw_open = q_rad[5] > 0.6 * JAW_OPEN_RAD
        ready = {
            "lift": in_jaws and q_rad[5] < JAW_HOLDING_RAD,
            "close": in_jaws and lateral < 0.008 and abs(height) < 0.008,
            "descend": in_jaws or (jaw_open and lateral < 0.018 and 0.03 < height < HOVER_HEIGHT + 0.02),
            "approach": True,
        }
        earlier = PHASES[PHASES.index(scheduled) :: -1]
        return next(name for name in earlier if ready[name])

    def _block_in_jaws(self, q_rad: np.ndarray, block_pos: np.ndarray) -> bool:
        """Whether the block's centre lies between the fingertips, so that centring and closing will not miss."""
        self._forward(q_rad)
        axes, tool = self._gripper_axes(), self._data.site_xpos[self._tool_id]
        across, along, deep = axes.T @ (block_pos - tool)
        fixed_tip, moving_tip = (axes[:, 0] @ (self._data.site_xpos[tip] - tool) for tip in self._tip_ids)
        margin = 0.008
        return bool(fixed_tip + margin < across < moving_tip - margin and abs(along) < 0.018 and abs(deep) < 0.02)


def _schedule(paths: dict[str, np.ndarray], first_phase: str, start_step: int, num_steps: int) -> list[Segment]:
    """Segments from the first phase to the lift.

    A plan that starts late hurries, but not beyond the servos' speed, until it is back on the clock; if the clock
    cannot be met any more, everything hurries to end with the episode.
    """
    phases = PHASES[PHASES.index(first_phase) :]
    knots = [paths[name] for name in phases]
    if first_phase != "approach":
        knots[0] = _from_here(paths["approach"][0], knots[0])
    least = np.array([_fewest_steps(path) for path in knots])
    ends = np.array([PHASE_STEPS[name][1] for name in phases])
    begins = np.array([PHASE_STEPS[name][0] for name in phases])
    nominal = ends - np.maximum(begins, start_step)
    met = np.flatnonzero(start_step + np.cumsum(least) <= ends)
    if len(met) and met[0] == 0:
        hurried, durations = 0, nominal
    else:
        hurried = int(met[0]) + 1 if len(met) else len(phases)
        available = (ends[hurried - 1] if len(met) else num_steps - 5) - start_step
        durations = np.concatenate([_share(available, least[:hurried], (ends - begins)[:hurried]), nominal[hurried:]])
    rests = np.append(begins[1:] - ends[:-1], 0)
    rests[: max(0, hurried - 1)] = 0
    segments = [Segment(*segment) for segment in zip(knots, durations.tolist(), rests.tolist(), strict=True)]
    wait = max(0, int(begins[0]) - start_step) if hurried == 0 else 0
    return [Segment(knots[0][:1], 0, wait), *segments] if wait else segments


def _share(available: int, least: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Integer durations (n,) of at least `least` that add up to `available`, the surplus in proportion to `wanted`."""
    surplus = max(0, available - int(least.sum()))
    shares = np.floor(surplus * wanted / wanted.sum()).astype(int)
    shares[-1] += surplus - int(shares.sum())
    return least + shares


def _fewest_steps(path: np.ndarray) -> int:
    """Control steps that a path (k, 6) takes at the highest joint speed."""
    return max(MIN_PHASE_STEPS, int(np.ceil(50.0 * MINIMUM_JERK_PEAK * _arc(path)[-1] / MAX_JOINT_SPEED)))


def _arc(path: np.ndarray) -> np.ndarray:
    """(k,) length of the path (k, 6) up to each knot, in radians of the joint that moves most."""
    return np.append(0.0, np.cumsum(np.abs(np.diff(path, axis=0)).max(axis=1)))


def _from_here(q_rad: np.ndarray, path: np.ndarray) -> np.ndarray:
    """The path (k, 6) bent to start at `q_rad` and to keep its end; the difference fades over the knots.

    On a path that is already under way the knots behind the arm are dropped first. The jaw is not bent: where the path
    holds it still, a jaw that is out of place goes there in the first stretch.
    """
    nearest = int(np.argmin(np.abs(path[:, :5] - q_rad[:5]).max(axis=1)))
    ahead = path[min(nearest, len(path) - 2) :]
    fade = np.linspace(1.0, 0.0, len(ahead))[:, None]
    bent = ahead + fade * (q_rad - ahead[0])
    bent[1:, 5] = ahead[1:, 5]
    return bent


def _walk(segment: Segment) -> np.ndarray:
    """(num_steps + rest, 6) targets: the path at minimum-jerk speed, then its end."""
    path, arc = segment.knots_rad, _arc(segment.knots_rad)
    along = minimum_jerk(np.arange(1, segment.num_steps + 1) / max(1, segment.num_steps)) * arc[-1]
    moving = np.stack([np.interp(along, arc, joint) for joint in path.T], axis=1)
    return np.concatenate([moving, np.repeat(path[-1:], segment.rest, axis=0)])
