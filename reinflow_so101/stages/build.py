"""The embedded SmolVLA policies from nothing: random weights, perception, demonstrations, a supervised policy.

    reinflow-build --output-dir runs/build

On the same model of CPU, with the same versions and number of threads, this gives the bits that come with the package
(model/tiny_smolvla_base and model/tiny_smolvla). A stage that is done is kept: the same command goes on after a stop.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from reinflow import ConfigError, run_command
from reinflow_so101.stages.build_smolvla import TinyConfig
from reinflow_so101.stages.demonstrations import DemoConfig
from reinflow_so101.stages.pretrain import PretrainConfig
from reinflow_so101.stages.sft_smolvla import SftConfig
from reinflow_vla.directory import read_json, refuse_existing, write_json

BASE, POLICY, BUILD_FILE = "tiny_smolvla_base", "tiny_smolvla", "build.json"
FIRST_DEMONSTRATION = 1_000_000  # far from every seed of training, tuning and reporting
SHIPPED_STEP = 600


@dataclass(frozen=True)
class BuildConfig:
    """Build the embedded SmolVLA policies from nothing."""

    output_dir: Path
    """Gets tiny_smolvla_base and tiny_smolvla, and what they were made of."""
    num_threads: int = 2
    """Threads of torch. The last bits of the weights depend on it; the shipped ones are of 2."""
    smoke: bool = False
    """A few scenes, episodes and steps: whether every stage works, not what it makes."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_threads <= 1_024:
            raise ConfigError(f"num_threads is {self.num_threads}: use 1 to 1,024")


@dataclass(frozen=True)
class Recipe:
    """The settings of every stage; the folders in them are of one build."""

    weights: TinyConfig
    perception: PretrainConfig
    """The first half of the pre-training: small batches at a high rate."""
    refinement: PretrainConfig
    """The second: other scenes, larger batches, a lower rate."""
    demonstrations: DemoConfig
    supervised: SftConfig


def recipe(folder: Path) -> Recipe:
    """How the shipped policies are made; every figure was measured (model/tiny_smolvla/README.md)."""
    return Recipe(
        weights=TinyConfig(folder / "random", num_steps=1),
        perception=PretrainConfig(folder / "random", folder / "perception", steps=1_500, batch_size=32, lr=1.5e-3),
        refinement=PretrainConfig(
            folder / "perception", folder / BASE, steps=1_500, batch_size=48, lr=1e-3, seed=1
        ),
        demonstrations=DemoConfig(folder / "demonstrations", episodes=100, first_seed=FIRST_DEMONSTRATION),
        # Weak on purpose, so that what fails is precision, which RL can mend: few demonstrations, and the last
        # checkpoint before the rate has fallen to zero.
        supervised=SftConfig(
            folder / BASE, folder / "demonstrations", folder / "supervised", episodes=80, steps=700,
            save_every=SHIPPED_STEP, decision_share=0.9, jitter=1, one_step_share=0.9, num_steps=(1,),
            eval_episodes=200,
        ),
    )  # fmt: skip


def smoke(whole: Recipe) -> Recipe:
    """The same in small."""
    few: dict[str, Any] = {"samples": 40, "held_out": 20, "steps": 2, "batch_size": 8}
    return replace(
        whole,
        perception=replace(whole.perception, **few),
        refinement=replace(whole.refinement, **few),
        demonstrations=replace(whole.demonstrations, episodes=3),
        supervised=replace(
            whole.supervised, episodes=2, held_out=1, steps=2, save_every=1, batch_size=4, eval_episodes=2
        ),
    )


def build(config: BuildConfig) -> tuple[Path, Path]:
    """Run the stages that are not done yet; returns the base and the supervised policy."""
    import torch

    from reinflow_so101.stages.build_smolvla import build_policy
    from reinflow_so101.stages.demonstrations import record
    from reinflow_so101.stages.pretrain import pretrain
    from reinflow_so101.stages.sft_smolvla import finetune

    torch.set_num_threads(config.num_threads)
    folder = config.output_dir
    same_build(config)
    plan = smoke(recipe(folder)) if config.smoke else recipe(folder)
    stage("random weights", plan.weights.output_dir, lambda at: build_policy(replace(plan.weights, output_dir=at)))
    stage("perception", plan.perception.output_dir, lambda at: pretrain(replace(plan.perception, output_dir=at)))
    stage(BASE, plan.refinement.output_dir, lambda at: pretrain(replace(plan.refinement, output_dir=at)))
    demonstrations = plan.demonstrations
    stage("demonstrations", demonstrations.output_dir, lambda at: record(replace(demonstrations, output_dir=at)))
    stage("supervised", plan.supervised.output_dir, lambda at: finetune(replace(plan.supervised, output_dir=at)))
    step = 1 if config.smoke else SHIPPED_STEP
    checkpoint = plan.supervised.output_dir / "checkpoints" / f"{step:06d}"
    stage(POLICY, folder / POLICY, lambda at: shutil.copytree(checkpoint, at))
    print(f"wrote {folder / BASE} and {folder / POLICY}")
    return folder / BASE, folder / POLICY


def same_build(config: BuildConfig) -> None:
    """Refuse a folder that holds another build, or anything else; note in it which one this is."""
    settings = {"num_threads": config.num_threads, "smoke": config.smoke}
    file = config.output_dir / BUILD_FILE
    if file.is_file():
        if read_json(file) != settings:
            raise ConfigError(
                f"{config.output_dir} holds a build with {read_json(file)}, this is {settings}: choose another folder"
            )
        return
    refuse_existing(config.output_dir)
    config.output_dir.mkdir(parents=True)
    write_json(file, settings)


def stage(name: str, target: Path, make: Callable[[Path], object]) -> None:
    """Make a folder that is either whole or not there."""
    if target.exists():
        print(f"{name}: done before, in {target}", flush=True)
        return
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    make(part)
    part.rename(target)
    print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


def main() -> None:
    """reinflow-build."""
    config = tyro.cli(BuildConfig, description=__doc__, args=sys.argv[1:])
    run_command("reinflow-build", lambda: build(config))


if __name__ == "__main__":
    main()
