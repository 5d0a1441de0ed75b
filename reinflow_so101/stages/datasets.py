"""Whether a LeRobotDataset can be learned from, by what it says of itself, before anything of it is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reinflow import UserError
from reinflow_vla.directory import ACTION, OBS_IMAGES_PREFIX, OBS_STATE, read_json
from so101_mujoco_utils import NUM_JOINTS

CONTROL_FPS = 50


class SftError(UserError, RuntimeError):
    """The fine-tuning cannot start; the message holds the remedy."""


def check_dataset(root: Path, cameras: Sequence[str] = ()) -> None:
    """Refuse a data set that cannot be learned from, by what it says of itself; nothing of it is decoded.

    Args:
        root: of a LeRobotDataset.
        cameras: features that the policy looks through.

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
            f"{root} is of LeRobot's format {version}, this one reads {CODEBASE_VERSION}: convert it with python -m "
            f"lerobot.scripts.convert_dataset_v21_to_v30 --repo-id NAME --root {root}"
        )
    if not info.get("total_episodes"):
        raise SftError(f"{root} holds no whole episode (total_episodes in meta/info.json): was the recording finished?")
    features = info.get("features", {})
    for name in (OBS_STATE, ACTION):
        if (shape := features.get(name, {}).get("shape")) != [NUM_JOINTS]:
            raise SftError(f"{root} has {name} of shape {shape}, the SO-101 needs [{NUM_JOINTS}]: use data of this arm")
    if round(float(info.get("fps") or 0)) != CONTROL_FPS:
        raise SftError(
            f"{root} is of {info.get('fps')} frames a second, the simulator's control steps are {CONTROL_FPS}: record "
            f"with --fps={CONTROL_FPS}"
        )
    found = [name for name in features if name.startswith(OBS_IMAGES_PREFIX)]
    absent = [name for name in cameras if name not in found]
    if absent:
        raise SftError(
            f"{root} lacks {', '.join(absent)}, the policy's eyes; it has {', '.join(found) or 'none'}: take "
            "a policy with those cameras, or record with the policy's"
        )
