"""A policy directory in another robot's or simulator's terms: cameras renamed, statistics replaced, units folded in.

Only JSON and statistics change; the weights are linked. What comes out is a stock directory again, so that everything
behind it, exports included, knows one set of names and units.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reinflow_vla.directory import (
    ACTION,
    CONFIG_FILE,
    OBS_IMAGES_PREFIX,
    OBS_STATE,
    POSTPROCESSOR_FILE,
    PREPROCESSOR_FILE,
    STATISTICS,
    read_json,
    write_json,
)
from reinflow_vla.soundness import PolicyDirectoryError
from reinflow_vla.trust import check_steps

Values = NDArray[np.float64]
Statistics = dict[str, Values]  # of one feature: mean, std, min, max, q01, ... -> (dimensions,)
NORMALIZERS = ("normalizer_processor", "unnormalizer_processor")
_KEY = re.compile(
    r"(?:(?P<group>.+?)\.buffer[._])?(?P<feature>action|observation[._]state)\.(?P<what>mean|std|min|max|q\d\d)"
)


def features_of(directory: Path) -> dict[str, dict[str, Any]]:
    """Inputs and outputs that a directory declares: in config.json, or where that has none in its normaliser."""
    config = read_json(directory / CONFIG_FILE)
    normalised: dict[str, Any] = {}
    for step in _steps(directory, NORMALIZERS):
        features = step.get("config", {}).get("features")
        normalised |= features if isinstance(features, dict) else {}
    declared: dict[str, Any] = {}
    for part, is_output in (("input_features", False), ("output_features", True)):
        stored = config.get(part)
        kept = {n: f for n, f in normalised.items() if isinstance(f, dict) and (f.get("type") == "ACTION") == is_output}
        declared |= stored if isinstance(stored, dict) and stored else kept
    if not declared or not all(isinstance(feature, dict) for feature in declared.values()):
        raise PolicyDirectoryError(
            f"{directory / CONFIG_FILE} and {PREPROCESSOR_FILE} name no features: add input_features and "
            "output_features as LeRobot writes them, or export the policy again"
        )
    return declared


def known_cameras(directory: Path) -> tuple[list[str], list[str]]:
    """Names of the cameras that a policy was trained with, and of those that are declared only: a base's, say.

    Cameras with statistics of their own, also under the names that its data had for them, were in its data; else those
    in its normaliser; else all that are declared. LeRobot fills in empty ones itself.
    """
    declared = _cameras(features_of(directory))
    normalised = set()
    for step in _steps(directory, NORMALIZERS[:1]):
        features = step.get("config", {}).get("features")
        normalised |= set(_cameras(features if isinstance(features, dict) else {}))
    seen = {
        m[1] for name in _stored(directory) if (m := re.fullmatch(rf"{re.escape(OBS_IMAGES_PREFIX)}(.+)\.\w+", name))
    }
    renamed = {ours.removeprefix(OBS_IMAGES_PREFIX): theirs for ours, theirs in stored_rename(directory).items()}
    seen |= {str(renamed[name]).removeprefix(OBS_IMAGES_PREFIX) for name in seen if name in renamed}
    trained = seen & set(declared) or normalised & set(declared) or set(declared)
    return [name for name in declared if name in trained], [name for name in declared if name not in trained]


def _cameras(features: Mapping[str, Any]) -> list[str]:
    names = (name.removeprefix(OBS_IMAGES_PREFIX) for name in features if name.startswith(OBS_IMAGES_PREFIX))
    return [name for name in names if not name.startswith("empty_camera_")]


def stored_rename(directory: Path) -> dict[str, str]:
    """The rename map in a directory's preprocessor, robot -> policy; empty without one."""
    for step in _steps(directory, ("rename_observations_processor",)):
        return dict(step.get("config", {}).get("rename_map") or {})
    return {}


def normalization_modes(directory: Path) -> dict[str, str]:
    """LeRobot's normalisation mode of state and action."""
    modes: dict[str, str] = {}
    for step in _steps(directory, NORMALIZERS):
        norm_map = step.get("config", {}).get("norm_map") or {}
        modes |= {OBS_STATE: norm_map.get("STATE", "IDENTITY"), ACTION: norm_map.get("ACTION", "IDENTITY")}
    return modes


def stored_statistics(directory: Path) -> tuple[dict[str, Statistics], dict[str, dict[str, Statistics]]]:
    """Statistics of state and action by feature, and those that are kept by the name of a data set (group)."""
    own: dict[str, Statistics] = {}
    groups: dict[str, dict[str, Statistics]] = {}
    for name, values in _stored(directory).items():
        if match := _KEY.fullmatch(name):
            group, feature = match["group"], match["feature"].replace("observation_state", OBS_STATE)
            place = own if group is None else groups.setdefault(group, {})
            place.setdefault(feature, {})[match["what"]] = values
    return own, groups


def needed(feature: str, modes: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the statistics that a feature's mode reads."""
    return STATISTICS.get(modes.get(feature, "IDENTITY"), ())


def _steps(directory: Path, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Processor steps of these names, of both pipelines."""
    found = []
    for name in (PREPROCESSOR_FILE, POSTPROCESSOR_FILE):
        content = read_json(directory / name)
        check_steps(directory / name, content)
        found += [step for step in content["steps"] if step["registry_name"] in names]
    return found


def _stored(directory: Path) -> dict[str, Values]:
    """Everything in the state files of the normalisers."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    found: dict[str, Values] = {}
    for step in _steps(directory, NORMALIZERS):
        if file := step.get("state_file"):
            try:
                found |= {name: np.asarray(v, dtype=np.float64) for name, v in load_file(directory / file).items()}
            except (SafetensorError, OSError, ValueError) as error:
                raise PolicyDirectoryError(f"{directory / file} cannot be read ({error}): restore it") from error
    return found


def write_adapted(
    source: Path,
    target: Path,
    *,
    cameras: Mapping[str, str],
    state_dim: int,
    statistics: Mapping[str, Statistics] | None,
) -> None:
    """Write ``source`` into the empty folder ``target`` in other terms; weights and folders are linked.

    Args:
        source: a policy directory.
        target: where to.
        cameras: the policy's camera -> its new name; those that are not in it are left out.
        state_dim: number of joints, of state and action.
        statistics: of state and action; None keeps those that are there.
    """
    from safetensors.numpy import save_file

    for path in source.iterdir():
        if path.name not in (CONFIG_FILE, PREPROCESSOR_FILE, POSTPROCESSOR_FILE, "checksums.json", ".git", ".cache"):
            os.symlink(path.resolve(), target / path.name)
    features = features_of(source)
    config = read_json(source / CONFIG_FILE)
    actions = [name for name, feature in features.items() if feature.get("type") == "ACTION"]
    renamed = _renamed(features, cameras, state_dim)
    config["input_features"] = {name: feature for name, feature in renamed.items() if name not in actions}
    config["output_features"] = {name: feature for name, feature in renamed.items() if name in actions}
    write_json(target / CONFIG_FILE, config)
    for file in (PREPROCESSOR_FILE, POSTPROCESSOR_FILE):
        content = read_json(source / file)
        for step in content["steps"]:
            settings = step.setdefault("config", {})
            if step["registry_name"] == "rename_observations_processor":
                settings["rename_map"] = {}
            if step["registry_name"] in NORMALIZERS:
                settings["features"] = renamed
                if statistics is not None:
                    step["state_file"] = f"{file.removesuffix('.json')}_statistics.safetensors"
                    flat = {f"{name}.{w}": v.astype(np.float32) for name, s in statistics.items() for w, v in s.items()}
                    (target / step["state_file"]).unlink(missing_ok=True)  # never through a link to the original
                    save_file(flat, target / step["state_file"])
        write_json(target / file, content)


def _renamed(features: Mapping[str, Any], cameras: Mapping[str, str], state_dim: int) -> dict[str, Any]:
    """Features by their new names, with the joints' true number."""
    new = {}
    for name, feature in features.items():
        camera = name.removeprefix(OBS_IMAGES_PREFIX)
        if name in (OBS_STATE, ACTION):
            new[name] = feature | {"shape": [state_dim]}
        elif name == camera or camera.startswith("empty_camera_"):
            new[name] = feature
        elif camera in cameras:
            new[OBS_IMAGES_PREFIX + cameras[camera]] = feature
    return new
