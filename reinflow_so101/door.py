"""The door: how anyone's policy fits this arm and these cameras, settled before any weight is read.

What does not fit is listed in one error, each with the flag that mends it; what was chosen is said.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from reinflow import ConfigError, UserError
from reinflow_so101.policy_card import CARD_FILE
from reinflow_vla.adaptation import (
    Statistics,
    features_of,
    known_cameras,
    needed,
    normalization_modes,
    stored_rename,
    stored_statistics,
    write_adapted,
)
from reinflow_vla.directory import (
    ACTION,
    CONFIG_FILE,
    OBS_IMAGES_PREFIX,
    OBS_STATE,
    PREPROCESSOR_FILE,
    STATISTICS,
    check_trusted,
    read_json,
)
from reinflow_vla.soundness import check_sound, reading
from so101_mujoco_utils import FRAMES, JOINT_NAMES, NUM_JOINTS, Array, JointFrame, m100_frame

LIMITS_DEG = np.array([[-110, 110], [-100, 100], [-96.83, 96.83], [-95, 95], [-157.21, 162.79], [-10, 100]])
CENTRE_DEG, END_DEG = 8.0, 40.0  # so far beyond a joint limit may lie a mean, and an extreme: targets do, to press
RANGES = (("q01", "q99"), ("q10", "q90"), ("min", "max"))
STEPS_FIELDS = ("num_steps", "num_inference_steps")
MOTOR_STEPS = 4_096  # of a full turn
LEROBOTS_STEPS = 10  # where a config.json says nothing


@dataclass(frozen=True)
class DoorSettings:
    """What the user says of how a policy fits; TrainingConfig says why under each field."""

    rename_map: str = ""
    normalization: str = "auto"
    joint_frame: str = "auto"
    calibration: str = ""
    instruction: str = ""


@dataclass
class Entrance:
    """A policy as it comes in: what it is called here, in which units, with which sizes."""

    source: Path
    cameras: dict[str, str] = field(default_factory=dict)  # the policy's -> the environment's
    statistics: dict[str, Statistics] | None = None  # in the environment's units; None: as they are
    chunk_size: int = 0
    n_action_steps: int = 0
    num_denoising_steps: int = 0
    image_size: int = 0
    lines: list[str] = field(default_factory=list)  # what was chosen, for people
    problems: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> Path:
        """The policy's directory in the environment's terms; raises ConfigError with every problem."""
        if self.problems:
            raise ConfigError("; ".join(self.problems))
        write_adapted(self.source, folder, cameras=self.cameras, state_dim=NUM_JOINTS, statistics=self.statistics)
        return folder


@contextmanager
def adapted(entrance: Entrance) -> Iterator[Path]:
    """The policy's directory in the environment's terms, for as long as it is read; errors name the original."""
    with TemporaryDirectory() as folder:
        try:
            yield entrance.write(Path(folder))
        except UserError as error:
            raise type(error)(str(error).replace(folder, str(entrance.source))) from error


def enter(directory: Path, settings: DoorSettings, cameras: tuple[str, ...], frame: str = "lerobot") -> Entrance:
    """Settle how a VLA's directory fits an environment.

    Args:
        directory: of the policy.
        settings: the user's.
        cameras: that the environment renders, in its order.
        frame: the environment's joint units, a key of FRAMES.

    Raises:
        ConfigError: a flag cannot be read. What does not fit is in the entrance's ``problems``.
        UserError: the directory is damaged, or more than data.
    """
    entrance = Entrance(directory)
    config = read_json(directory / CONFIG_FILE)
    check_trusted(directory)
    check_sound(directory, {directory / CONFIG_FILE: config})
    entrance.chunk_size = _whole(config, "chunk_size", entrance)
    entrance.n_action_steps = _whole(config, "n_action_steps", entrance)
    steps = next((name for name in STEPS_FIELDS if name in config), "")
    entrance.num_denoising_steps = _whole(config, steps, entrance) if steps else LEROBOTS_STEPS
    _compare_instruction(entrance, settings)
    with reading(directory):
        _settle_cameras(entrance, settings, cameras)
        _settle_joints(entrance, settings, FRAMES[frame])
    return entrance


def _compare_instruction(entrance: Entrance, settings: DoorSettings) -> None:
    own = _card_env(entrance.source).get("instruction")
    if own and settings.instruction and own != settings.instruction:
        entrance.lines.append(f'instruction: "{settings.instruction}" here, the policy was made for "{own}"')


def _card_env(directory: Path) -> dict[str, Any]:
    """The environment in a directory's reinflow.json; empty without one."""
    env = read_json(directory / CARD_FILE).get("env") if (directory / CARD_FILE).is_file() else None
    return env if isinstance(env, dict) else {}


def _whole(config: Mapping[str, Any], name: str, entrance: Entrance) -> int:
    value = config.get(name)
    if type(value) is int and value > 0:
        return value
    entrance.problems.append(f"{entrance.source / CONFIG_FILE} has no {name}: restore it from the policy's export")
    return 0


# --- Cameras ----------------------------------------------------------------------------------------------------------


def _settle_cameras(entrance: Entrance, settings: DoorSettings, cameras: tuple[str, ...]) -> None:
    known, declared = known_cameras(entrance.source)
    if not known:
        entrance.problems.append(f"{entrance.source} looks through no camera: a VLA needs one")
        return
    rename, where = read_rename_map(settings.rename_map), "rename_map"
    if not rename:
        rename, where = stored_rename(entrance.source), f"the rename map stored in {PREPROCESSOR_FILE}"
    given = {_bare(theirs): _bare(ours) for ours, theirs in rename.items()}
    if strange := sorted(name for name in given if name not in (*known, *declared)):
        if settings.rename_map:
            entrance.problems.append(
                f"rename_map leads to {', '.join(strange)}, which {entrance.source} does not know: it looks through "
                f"{', '.join(known)} (the map goes environment -> policy)"
            )
        given = {name: ours for name, ours in given.items() if name not in strange}
    chosen = {name: given.get(name, name) for name in known}
    numbered = [re.fullmatch(r"(?:camera|image|cam)_?(\d*)", name) for name in known]
    if not given and all(numbered) and not set(known) & set(cameras):
        by_number = sorted(known, key=lambda name: int(re.sub(r"\D", "", name) or 0))
        position = dict(zip(by_number, cameras, strict=False))
        chosen, where = {name: position[name] for name in known if name in position}, "their position"
    absent = [name for name in known if chosen.get(name) not in cameras]
    if absent:
        proposal = {
            OBS_IMAGES_PREFIX + ours: OBS_IMAGES_PREFIX + theirs
            for theirs, ours in zip(absent, [c for c in cameras if c not in chosen.values()] or cameras, strict=False)
        }
        entrance.problems.append(
            f"cameras={' '.join(cameras)} lacks {' '.join(absent)}, which {entrance.source} looks through: add them to "
            f"cameras if the scene has them, or say which is which: --rename-map '{json.dumps(proposal)}'"
        )
    if len(set(chosen.values())) < len(chosen):
        entrance.problems.append(f"rename_map gives two of the policy's cameras one image: {chosen}")
    entrance.cameras = chosen
    if any(theirs != ours for theirs, ours in chosen.items()):
        pairs = ", ".join(f"{theirs} is {ours}" for theirs, ours in chosen.items())
        entrance.lines.append(f"cameras by {where}: {pairs}")
    else:
        entrance.lines.append(f"cameras by name: {', '.join(known)}")
    if declared:
        entrance.lines.append(f"declared but never trained with, left out as LeRobot does: {', '.join(declared)}")
    shape = features_of(entrance.source)[OBS_IMAGES_PREFIX + known[0]].get("shape") or [3, 256, 256]
    entrance.image_size = int(shape[1])
    if shape[1] != shape[2]:
        entrance.lines.append(
            f"the policy's images are {shape[2]}x{shape[1]}; the simulator renders squares, which LeRobot pads"
        )


def read_rename_map(text: str) -> dict[str, str]:
    """The flag's JSON, environment -> policy, names without their prefix; raises ConfigError."""
    if not text:
        return {}
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"rename_map={text} is no JSON ({error}): {_EXAMPLE}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content.values()):
        raise ConfigError(f"rename_map={text} maps no names: {_EXAMPLE}")
    return {_bare(ours): _bare(theirs) for ours, theirs in content.items()}


_EXAMPLE = """write '{"observation.images.camera_up": "observation.images.front"}', environment -> policy"""


def _bare(name: str) -> str:
    return name.removeprefix(OBS_IMAGES_PREFIX)


# --- Joints -----------------------------------------------------------------------------------------------------------


def _settle_joints(entrance: Entrance, settings: DoorSettings, target: JointFrame) -> None:
    modes = normalization_modes(entrance.source)
    found, source = _choose_statistics(entrance, settings, modes)
    stored = read_json(entrance.source / CONFIG_FILE)
    padded = {stored.get("max_state_dim"), stored.get("max_action_dim")}
    wrong = False
    for name in (ACTION, OBS_STATE):
        sizes = {len(values) for what, values in found.get(name, {}).items() if what in needed(name, modes)}
        if not sizes:  # no statistics: what is declared must do
            sizes = {int(math.prod(features_of(entrance.source).get(name, {}).get("shape") or [0]))}
        declared = int(math.prod(features_of(entrance.source).get(name, {}).get("shape") or [NUM_JOINTS]))
        if declared not in (NUM_JOINTS, *padded):  # a base declares what it pads to
            sizes = {declared}
        if sizes != {NUM_JOINTS}:
            entrance.problems.append(
                f"{entrance.source} has {name} of shape {sorted(sizes)}, the SO-101 needs [{NUM_JOINTS}]: fine-tune "
                "the policy on SO-101 data first (lerobot-train), or name a data set by --normalization dataset:PATH"
            )
            wrong = True
    if wrong or not found:
        return
    frame = _choose_frame(entrance, settings, found, target)
    if frame is None:
        return
    raw = [name for name in (OBS_STATE, ACTION) if not needed(name, modes)]
    if raw and frame.name != target.name:
        entrance.problems.append(
            f"{entrance.source} takes {' and '.join(raw)} as they are (IDENTITY): the units of {frame.name} cannot "
            "be folded in. Train it on data in LeRobot's degrees"
        )
        return
    if source == "policy":
        entrance.lines.append(f"statistics of the policy's own, in the units of {frame.name}")
    statistics = {name: _folded(values, frame, target) for name, values in found.items()}
    if source != "policy" or frame.name != target.name:
        entrance.statistics = statistics
        if frame.name != target.name:
            entrance.lines.append(
                f"statistics are folded from {frame.name} into {target.name}; the export needs no flag"
            )


def _choose_statistics(
    entrance: Entrance, settings: DoorSettings, modes: Mapping[str, str]
) -> tuple[dict[str, Statistics], str]:
    """Statistics of state and action, and where they are from."""
    own, groups = stored_statistics(entrance.source)
    complete = all(set(needed(name, modes)) <= own.get(name, {}).keys() for name in (OBS_STATE, ACTION))
    wanted = settings.normalization
    if wanted.startswith("dataset:"):
        found, source = _of_dataset(wanted.removeprefix("dataset:")), wanted
    elif wanted == "policy" or (wanted == "auto" and (complete or not groups)):
        found, source = own, "policy"
    elif wanted == "auto" and "so100" in groups:
        found, source = groups["so100"], "so100"
    elif wanted in groups:
        found, source = groups[wanted], wanted
    else:
        entrance.problems.append(
            f"normalization={wanted}: {entrance.source} keeps its statistics by data set; choose one of "
            f"{', '.join(sorted(groups)) or 'policy'}, or name your data: --normalization dataset:PATH"
        )
        return {}, wanted
    if source != "policy":
        borrowed = OBS_STATE not in found
        found = found | ({OBS_STATE: found[ACTION]} if borrowed and ACTION in found else {})
        entrance.lines.append(f"statistics of {source}" + (", those of actions for the state too" if borrowed else ""))
    missing = [f"{n}.{w}" for n in (OBS_STATE, ACTION) for w in needed(n, modes) if w not in found.get(n, {})]
    if missing:
        entrance.problems.append(
            f"{entrance.source} holds no {', '.join(missing)} ({source}): LeRobot would leave joints and actions as "
            "they are. Fine-tune the policy on SO-101 data (lerobot-train writes them), or --normalization dataset:PATH"
        )
        return {}, source
    return {name: values for name, values in found.items() if name in (OBS_STATE, ACTION)}, source


def _of_dataset(path: str) -> dict[str, Statistics]:
    file = Path(path) / "meta" / "stats.json"
    if not file.is_file():
        raise ConfigError(f"normalization=dataset:{path} has no meta/stats.json: name a LeRobotDataset's folder")
    content, wanted = read_json(file), {what for pair in STATISTICS.values() for what in pair} | {"min", "max"}
    try:
        found: dict[str, Statistics] = {
            name: {w: np.asarray(v, dtype=np.float64).reshape(-1) for w, v in content[name].items() if w in wanted}
            for name in (OBS_STATE, ACTION)
            if isinstance(content.get(name), dict)
        }
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"normalization=dataset:{path}: {file} holds no numbers ({error}): record it again"
        ) from error
    if any(len(values) != NUM_JOINTS for statistics in found.values() for values in statistics.values()):
        raise ConfigError(f"normalization=dataset:{path} is of another robot: an SO-101 has {NUM_JOINTS} joints")
    return found


def _choose_frame(
    entrance: Entrance, settings: DoorSettings, found: Mapping[str, Statistics], target: JointFrame
) -> JointFrame | None:
    frames = joint_frames(settings.calibration)
    misfits = misfits_of(found, frames)
    if settings.joint_frame != "auto":
        if misfits[settings.joint_frame]:
            better = [name for name, misfit in misfits.items() if not misfit]
            hint = f": {', '.join(better)} would fit" if better else ""
            entrance.lines.append(f"joint_frame={settings.joint_frame} puts {misfits[settings.joint_frame]}{hint}")
        return frames[settings.joint_frame]
    stored = _card_env(entrance.source).get("joint_frame")
    if stored in FRAMES:
        return FRAMES[stored]
    fitting = [name for name, misfit in misfits.items() if not misfit]
    if not fitting:
        entrance.problems.append(
            f"the statistics of {entrance.source} fit no joint frame ("
            + "; ".join(f"{name} would put {misfit}" for name, misfit in misfits.items())
            + "): name one by --joint-frame, or other statistics by --normalization"
        )
        return None
    chosen = target.name if target.name in fitting else fitting[0]
    if chosen != target.name:
        entrance.lines.append(f"joint frame {chosen}: {target.name} would put {misfits[target.name]}")
    elif len(fitting) > 1:
        others = ", ".join(name for name in fitting if name != chosen)
        entrance.lines.append(f"joint frame {chosen}, the usual one; {others} would fit too (--joint-frame)")
    return frames[chosen]


def joint_frames(calibration: str = "") -> dict[str, JointFrame]:
    """All units that joints of an SO-101 are recorded in; raises ConfigError for what is no calibration of one."""
    return {**FRAMES, "lerobot_m100_100": m100_frame(half_ranges(calibration)) if calibration else m100_frame()}


def misfits_of(found: Mapping[str, Statistics], frames: Mapping[str, JointFrame]) -> dict[str, str]:
    """What statistics would put beyond a joint limit, by the units they are taken in; empty where they fit."""
    return {name: _misfit(found, frame) for name, frame in frames.items()}


def _misfit(found: Mapping[str, Statistics], frame: JointFrame) -> str:
    """What statistics in a frame would put beyond a joint limit; empty if nothing."""
    for name in (ACTION, OBS_STATE):
        values = found.get(name, {})
        pairs = [(values[low], values[high]) for low, high in RANGES if low in values and high in values]
        centres = [values["mean"]] if "mean" in values else [(low + high) / 2 for low, high in pairs]
        marks = [(centre, CENTRE_DEG) for centre in centres] + [(end, END_DEG) for pair in pairs for end in pair]
        for mark, allowed in marks:
            degrees = np.rad2deg(frame.to_rad(mark))
            beyond = np.maximum(LIMITS_DEG[:, 0] - degrees, degrees - LIMITS_DEG[:, 1])
            joint = int(beyond.argmax())
            if not beyond[joint] <= allowed:
                limit = " to ".join(f"{x:g}" for x in LIMITS_DEG[joint])
                return f"{JOINT_NAMES[joint]} at {degrees[joint]:.0f} degrees, its limits are {limit}"
    return ""


def half_ranges(calibration: str) -> tuple[float, ...]:
    """Degrees to either side of the middle that the five arm joints turn by, from LeRobot's calibration file; raises
    ConfigError."""
    content = read_json(Path(calibration))
    halves = []
    for name in JOINT_NAMES[:-1]:
        joint = content.get(name)
        low, high = (joint.get(f"range_{end}") for end in ("min", "max")) if isinstance(joint, dict) else (None, None)
        if type(low) is not int or type(high) is not int:
            raise ConfigError(
                f"calibration={calibration} is no calibration of an SO-101 (it lacks {name} with whole numbers "
                "range_min and range_max): take LeRobot's"
            )
        halves.append((high - low) / 2 * 360 / MOTOR_STEPS)
    if not all(1 <= half <= 180 for half in halves):
        raise ConfigError(
            f"calibration={calibration} has ranges of {[round(2 * half) for half in halves]} degrees: calibrate again"
        )
    halves[4] = 180.0  # LeRobot's wrist_roll turns all the way
    return tuple(halves)


def _folded(values: Statistics, source: JointFrame, target: JointFrame) -> Statistics:
    """Statistics in one frame -> in another; both are affine in the angle, with positive scales."""
    factor: Array = np.array(target.scale) / np.array(source.scale)
    return {
        what: value * factor if what == "std" else target.from_rad(source.to_rad(value))
        for what, value in values.items()
    }
