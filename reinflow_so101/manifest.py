"""What a training is about to do, said before its first step."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from reinflow.settings import config_to_json
from reinflow_so101.checks import FlatConfig
from reinflow_so101.presets import PRESET_VALUES
from reinflow_so101.worlds import say_world

if TYPE_CHECKING:
    from torch import nn

    from reinflow.policy import FlowPolicy

DOCUMENTED = ("smolvla", "pi0")
START_FILE = "start.json"  # of a run: the manifest, and all settings of its preset as they were then


def manifest(policy: FlowPolicy, config: FlatConfig) -> str:
    """Lines on what trains, what is frozen, what the export keeps, and on the task."""
    groups = {name: group for name, group in policy.trainable_groups().items() if group}
    learning = {id(p) for group in groups.values() for p in group}
    frozen = [p for p in policy.parameters() if id(p) not in learning]
    trains = "; ".join(f"{name} {_count(group)}" for name, group in groups.items())
    lines = [
        f"trains: {trains}; fp32, {config.policy_optimizer} (critic: adam)",
        f"frozen: {_count(frozen)} {_kinds(frozen)}".rstrip(),
    ]
    if policy.rounded:
        lines.append(
            f"plain LeRobot holds {_count(policy.rounded)} of what trains in bf16: they act as that from here on, over "
            "fp32 masters, so that it runs what is trained"
        )
    rate, task = f", {config.control_hz or 50:g} a second", f"task: {say_world(config.world())}"
    if config.env_id:
        rate = ""
    else:
        task += f', told "{config.instruction}", reward {config.reward_mode}'
    lines += [
        f"actions: {config.chunk_size} predicted, {config.n_action_steps} executed, {config.chunks_per_episode} times "
        f"an episode{rate}; {config.num_denoising_steps} denoising steps, exported too",
        task,
    ]
    if config.preset in DOCUMENTED:
        lines.append(
            f"preset {config.preset}: the document's settings, kept as they are; nobody has shown them to learn with a "
            "policy of this kind. --preset finetune has those that are measured here to learn"
        )
    return "\n".join(f"  {line}" for line in lines)


def write_start(run_dir: Path, policy: FlowPolicy, config: FlatConfig) -> None:
    """Keep for a run's report what was said before its first step, and what its preset alone would have set. A resumed
    run keeps what it has."""
    path = run_dir / START_FILE
    if not (config.resume and path.exists()):
        preset = type(config)(preset=config.preset, **PRESET_VALUES[config.preset])
        content = {"manifest": manifest(policy, config), "preset": config_to_json(preset)}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _count(parameters: list[nn.Parameter]) -> str:
    return f"{sum(p.numel() for p in parameters):,} in {len(parameters)} tensors"


def _kinds(parameters: list[nn.Parameter]) -> str:
    kinds = Counter(str(p.dtype).removeprefix("torch.") for p in parameters)
    return f"({', '.join(f'{number} {kind}' for kind, number in kinds.most_common())})" if kinds else ""
