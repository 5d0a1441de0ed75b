"""A LeRobotDataset of whole episodes: whether it can be learned from, by what it says of itself, and then in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from reinflow import UserError
from reinflow.progress import spinner, tracked
from reinflow_so101.stages.demonstrations import DECISION_STEPS, quiet_lerobot
from reinflow_vla.directory import ACTION, OBS_IMAGES_PREFIX, OBS_STATE, read_json
from so101_mujoco_utils import JOINT_NAMES, NUM_JOINTS

if TYPE_CHECKING:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

CONTROL_FPS = 50
PARTS = ("meta/stats.json", "meta/tasks.parquet", "meta/episodes", "data")
FARTHEST = 720.0  # degrees or percent: no joint is told or found beyond
MEMORY_SHARE = 0.6  # of what is free, for images


class SftError(UserError, RuntimeError):
    """The fine-tuning cannot start; the message holds the remedy."""


def check_dataset(root: Path, cameras: Sequence[str] = (), control_hz: float = 0.0) -> None:
    """Refuse a data set that cannot be learned from, by what it says of itself; nothing of it is decoded.

    Args:
        root: of a LeRobotDataset.
        cameras: features that the policy looks through.
        control_hz: frames a second; 0 is the simulator's usual rate.

    Raises:
        SftError: it is not there, of an older version, half-written, of another robot, rate or other cameras.
    """
    from lerobot.datasets.dataset_metadata import CODEBASE_VERSION

    if not (root / "meta" / "info.json").is_file():
        raise SftError(f"{root} holds no LeRobotDataset (no meta/info.json): record one with reinflow-demos")
    info = read_json(root / "meta" / "info.json")
    version = str(info.get("codebase_version"))
    if version.split(".", maxsplit=1)[0] != CODEBASE_VERSION.split(".")[0]:
        raise SftError(
            f"{root} is of LeRobot's format {version}, this one reads {CODEBASE_VERSION}: "
            + (
                f"convert it with python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id NAME --root {root} "
                "--push-to-hub=false"
                if version.startswith("v2")
                else "record it with this LeRobot"
            )
        )
    if not info.get("total_episodes"):
        raise SftError(f"{root} holds no whole episode (total_episodes in meta/info.json): was the recording finished?")
    if gone := [name for name in PARTS if not (root / name).exists()]:
        raise SftError(f"{root} lacks {', '.join(gone)}: was the recording finished? Restore it, or record again")
    features = info.get("features")
    if not isinstance(features, dict) or not all(isinstance(feature, dict) for feature in features.values()):
        raise SftError(f"{root}/meta/info.json has no features: {features!r}: record it again")
    for name in (OBS_STATE, ACTION):
        if (shape := features.get(name, {}).get("shape")) != [NUM_JOINTS]:
            raise SftError(f"{root} has {name} of shape {shape}, the SO-101 needs [{NUM_JOINTS}]: use data of this arm")
        names = features[name].get("names")
        if isinstance(names, list) and [str(n).removesuffix(".pos") for n in names] != list(JOINT_NAMES):
            order = ", ".join(map(str, names))
            raise SftError(f"{root} has {name} in the order {order}: record it in the arm's, {', '.join(JOINT_NAMES)}")
    rate, fps = control_hz or CONTROL_FPS, info.get("fps")
    if not isinstance(fps, int | float) or round(fps) != round(rate):
        known = isinstance(fps, int | float) and fps > 0
        raise SftError(
            f"{root} is of {fps} frames a second, the simulator's control steps are {rate:g}: record with "
            f"--fps={rate:g}" + (f", or have the arm simulated at that rate: --control-hz {fps:g}" if known else "")
        )
    found = [name for name in features if name.startswith(OBS_IMAGES_PREFIX)]
    absent = [name for name in cameras if name not in found]
    if absent:
        raise SftError(
            f"{root} lacks {', '.join(absent)}, the policy's eyes; it has {', '.join(found) or 'none'}: say which is "
            "which, recorded -> policy: --rename-map "
            f"""'{{"{(found or ["observation.images.NAME"])[0]}": "{absent[0]}"}}'"""
        )


def camera_names(root: Path) -> list[str]:
    """Names of the cameras that a dataset was recorded with; none where it is no dataset."""
    info = root / "meta" / "info.json"
    features = read_json(info).get("features") if info.is_file() else None
    names = features if isinstance(features, dict) else {}
    return [name.removeprefix(OBS_IMAGES_PREFIX) for name in names if name.startswith(OBS_IMAGES_PREFIX)]


@dataclass
class Demonstrations:
    """E episodes of up to L frames in memory; images of the kept frames only. What lies beyond the end of an episode
    repeats its last frame."""

    state: NDArray[np.float32]  # (E, L, 6)
    action: NDArray[np.float32]  # (E, L, 6)
    images: dict[str, NDArray[np.uint8]]  # the policy's camera: (M, 3, h, w), M kept frames
    kept: NDArray[np.int64]  # (E, L) row in images, -1 where the frame is not kept
    lengths: NDArray[np.int64]  # (E,) frames
    instructions: list[str]
    instruction_of: NDArray[np.int64]  # (E,) index
    stats: dict[str, dict[str, NDArray[np.float32]]] = field(default_factory=dict)

    @cached_property
    def stored(self) -> list[NDArray[np.int64]]:
        """Of each episode the frames whose images are kept."""
        return [np.flatnonzero(rows >= 0) for rows in self.kept]


def decisions(length: int, every: int = DECISION_STEPS) -> NDArray[np.int64]:
    """Control steps at which a policy with whole chunks decides."""
    return np.arange(0, length, every)


def frames_to_keep(length: int, jitter: int, stride: int = 5, every: int = DECISION_STEPS) -> NDArray[np.int64]:
    """Frames of an episode that can be drawn: all near the decisions, and every fifth."""
    frame = np.arange(length)
    near = np.abs(frame[:, None] - decisions(length, every)).min(axis=1) <= jitter
    return frame[near | (frame % stride == 0)]


def read_demonstrations(
    root: Path,
    repo_id: str,
    jitter: int,
    cameras: Mapping[str, str] | None = None,
    every: int = DECISION_STEPS,
    control_hz: float = 0.0,
    size: tuple[int, int] | None = None,
) -> Demonstrations:
    """Read and decode a dataset of whole episodes.

    Args:
        root: of the dataset.
        repo_id: its name.
        jitter: frames so near to a decision are kept.
        cameras: the policy's feature -> the dataset's; None takes all that there are.
        every: control steps between decisions.
        control_hz: as in `check_dataset`.
        size: (height, width) that larger images are scaled to, as LeRobot's SmolVLA does it; None keeps them.

    Raises:
        SftError: it is not there, not whole, or too large for memory.
    """
    check_dataset(root, control_hz=control_hz)
    with spinner(f"reading {root}"):
        dataset, columns = _opened(root, repo_id)
    episode, task = columns["episode_index"], columns["task_index"]
    for name in (OBS_STATE, ACTION):
        wrong = ~(np.abs(columns[name]) <= FARTHEST).all(axis=1)  # NaN too
        if wrong.any():
            row = int(wrong.argmax())
            raise SftError(
                f"{root}: {name} of row {row}, in episode {episode[row]}, is {columns[name][row].tolist()}: no pose in "
                " degrees and percent. Delete that episode (lerobot-edit-dataset) or record again"
            )
    wanted = dict(cameras) if cameras is not None else {key: key for key in dataset.meta.camera_keys}
    starts = np.flatnonzero(np.diff(episode, prepend=episode[0] - 1))
    lengths = np.diff(np.append(starts, len(episode)))
    index = starts[:, None] + np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)  # (E, L)
    kept = np.full(index.shape, -1, dtype=np.int64)
    rows: list[int] = []
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        keep = frames_to_keep(int(length), jitter, every=every)
        kept[number, keep] = len(rows) + np.arange(len(keep))
        rows += (start + keep).tolist()
    shapes = {key: _kept_shape(dataset.meta.features[name]["shape"], size) for key, name in wanted.items()}
    _refuse_too_large(root, len(rows) * sum(int(np.prod(shape)) for shape in shapes.values()))
    return Demonstrations(
        state=columns[OBS_STATE][index],
        action=columns[ACTION][index],
        images=_decoded(dataset, rows, wanted, shapes),
        kept=kept,
        lengths=lengths,
        instructions=[str(text) for text in dataset.meta.tasks.sort_values("task_index").index],
        instruction_of=task[starts],
        stats={ACTION: {name: np.asarray(dataset.meta.stats[ACTION][name]) for name in ("mean", "std")}},
    )


def _opened(root: Path, repo_id: str) -> tuple[LeRobotDataset, dict[str, NDArray[Any]]]:
    """The dataset, and its columns without the images."""
    quiet_lerobot()
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    try:
        dataset = LeRobotDataset(repo_id, root=root, video_backend="pyav")
        names = [OBS_STATE, ACTION, "episode_index", "task_index"]
        columns = dataset.hf_dataset.with_format("numpy", columns=names)[:]
        found = {name: np.stack(columns[name]) for name in names}
        return dataset, found | {name: found[name].astype(np.float32) for name in (OBS_STATE, ACTION)}
    except Exception as error:  # a half-written one shows itself in any way
        reason = " ".join(str(error).split())[:200]
        raise SftError(
            f"{root} cannot be read by LeRobot ({type(error).__name__}: {reason}). A recording that was cut off before "
            "LeRobot's finalize() has no end: record it again"
        ) from error


def _kept_shape(recorded: Sequence[int], size: tuple[int, int] | None) -> tuple[int, int, int]:
    """(3, h, w) of an image in memory: as recorded (h, w, 3), or of ``size`` where that is less."""
    height, width, channels = recorded
    if size and height * width > size[0] * size[1]:
        height, width = size
    return channels, height, width


def _decoded(
    dataset: LeRobotDataset, rows: list[int], cameras: Mapping[str, str], shapes: Mapping[str, tuple[int, int, int]]
) -> dict[str, NDArray[np.uint8]]:
    """Images (M, 3, h, w) of these rows by the policy's camera."""
    from lerobot.policies.common.vla_utils import resize_with_pad

    images: dict[str, NDArray[np.uint8]] = {key: np.empty((len(rows), *shapes[key]), dtype=np.uint8) for key in cameras}
    for at, row in enumerate(tracked(rows, "decoding, frames")):
        frame = dataset[row]
        for key, recorded in cameras.items():
            image = frame[recorded]
            if tuple(image.shape) != shapes[key]:
                image = resize_with_pad(image[None], *shapes[key][1:], pad_value=0)[0]
            images[key][at] = (image * 255.0).round().byte().numpy()
    return images


def _refuse_too_large(root: Path, needed: int) -> None:
    import psutil

    if needed > MEMORY_SHARE * psutil.virtual_memory().available:
        raise SftError(
            f"the images of {root} take {needed / 2**30:.1f} GiB of memory, more than is free: record smaller ones, or "
            "train with lerobot-train, which reads them from the disk"
        )
