"""reinflow-materialize: a copy of a policy that plain LeRobot loads from anywhere.

A SmolVLA names the folder of its backbone. An embedded policy, and what is trained from it, names one inside itself, by
a relative path, so that it can be moved; LeRobot would look for that in the working directory.

    reinflow-materialize --policy-dir tiny-base --output-dir runs/base
    lerobot-train --policy.path=runs/base ...
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from reinflow import run_command
from reinflow.checkpoint import CHECKPOINTS, PRETRAINED
from reinflow.checksums import SUMS_FILE, write_sums
from reinflow_so101.commands.evaluate import find_policy
from reinflow_so101.policies import EMBEDDED
from reinflow_vla.directory import (
    CONFIG_FILE,
    PolicyDirectoryError,
    locate_policy,
    read_json,
    refuse_existing,
    refuse_inside,
    resolve_folder,
    store_tokenizer,
    stored_tokenizer,
)
from reinflow_vla.smolvla_directory import write_references


@dataclass(frozen=True)
class MaterializeConfig:
    """Copy a policy directory and write absolute paths into it, for programs that know only LeRobot."""

    policy_dir: Path
    """What to copy: a policy directory, a run (its best checkpoint), or "tiny", "tiny-base", "tiny-pi0"."""
    output_dir: Path
    """Where the copy goes and must stay; refused if it exists."""


def materialize(policy_dir: str | Path, output_dir: str | Path) -> Path:
    """Copy a SmolVLA or Pi0 directory and write absolute paths, so that stock LeRobot loads it from anywhere.

    A Pi0 of other than the published sizes loads inside ``pi0_directory.reduced_sizes`` only.

    Returns:
        The absolute path of the copy. It must not be moved afterwards (materialise again instead).
    """
    ours = str(policy_dir) in EMBEDDED or any((Path(policy_dir) / name).is_dir() for name in (CHECKPOINTS, PRETRAINED))
    source = locate_policy(find_policy(str(policy_dir)) if ours else policy_dir)
    target = Path(output_dir).resolve()
    refuse_existing(target)
    refuse_inside(target, source)
    vlm_name = read_json(source / CONFIG_FILE).get("vlm_model_name")
    folder = Path(resolve_folder(source, str(vlm_name or stored_tokenizer(source))))
    if not folder.is_dir():
        raise PolicyDirectoryError(f"{source} refers to the hub ({folder}): LeRobot loads it as it is, nothing to do")
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(SUMS_FILE))
    inside = target / folder.name
    if folder.parent != source:
        shutil.copytree(folder, inside, dirs_exist_ok=True)
    if vlm_name:
        write_references(target, str(inside))
    else:
        store_tokenizer(target, str(inside))
    write_sums(target)
    return target


def main() -> None:
    """reinflow-materialize."""
    import tyro

    config = tyro.cli(MaterializeConfig, description=MaterializeConfig.__doc__)
    run_command("reinflow-materialize", lambda: print(f"wrote {materialize(config.policy_dir, config.output_dir)}"))


if __name__ == "__main__":
    main()
