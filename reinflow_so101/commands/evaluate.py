"""reinflow-eval: noise-free success of a policy on fixed seeds.

    reinflow-eval --policy-path model/tiny_smolvla --episodes 200 --seed 10000 --output-dir outputs/eval

Works on a run directory or a checkpoint of train_reinflow.py (its best checkpoint, else its last) and on any stock
LeRobot policy directory whose cameras and joints match. A SmolVLA, a Pi0 or Pi0.5 and a flow_mlp (the small MLP on
simulator state) go through the same policy object as in training.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro

from reinflow import ConfigError, run_command
from reinflow.seeds import FIRST_REPORTING_SEED
from reinflow.settings import SEED, Range, check_ranges, cut
from reinflow_so101.command_line import flag_value, pick_device
from reinflow_so101.door import DoorSettings
from reinflow_so101.policies import EMBEDDED, ActingSettings, family_of
from reinflow_so101.policy_card import TASK_GROUP, env_of_task, known_env, stored_env
from reinflow_so101.worlds import gym_world, make_world, say_world
from reinflow_vla.directory import CONFIG_FILE, check_trusted, read_json
from reinflow_vla.trust import no_remote_code
from so101_sim.config import EnvConfig
from so101_sim.tasks.registry import describe, how_to_choose, named, shows_one_scene

if TYPE_CHECKING:
    from reinflow.env import Observation
    from reinflow.evaluate import Act, EvalResult

VIDEO_INTERVAL = 2  # control steps per frame: 25 frames a second at 50 Hz


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a policy noise-free on fixed seeds."""

    policy_path: str
    """Run directory, checkpoint, or policy directory; "tiny", "tiny-pi0" and "flow_mlp" name the embedded policies."""
    output_dir: str
    """Where eval_info.json (LeRobot's shape) and the video go; refused if it holds an evaluation."""
    episodes: Annotated[int, Range(1, 1_000_000)] = 200
    """Episodes; episode i uses seed + i."""
    seed: Annotated[int, SEED] = FIRST_REPORTING_SEED
    """First seed. From 10,000 up they are for reporting, 5,000 to 9,999 for tuning."""
    num_parallel_envs: Annotated[int, Range(1, 65_536)] = 32
    """Environments that act at once."""
    num_denoising_steps: Annotated[int, Range(0, 1_000)] = 0
    """K; 0 takes what is stored with the policy."""
    n_action_steps: Annotated[int, Range(0, 1_000)] = 0
    """Executed actions per chunk; 0 takes what is stored with the policy."""
    video: bool = False
    """Write an mp4 grid of the first episodes, all cameras of the environment side by side."""
    gif: bool = False
    """With video: write it as video.gif too, for a README."""
    video_episodes: Annotated[int, Range(1, 256)] = 4
    """Episodes in the video."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "cpu"
    """Where the policy runs; auto takes cuda, then mps, then cpu."""
    pi0_tokenizer_path: str = ""
    """Folder with PaliGemma's tokenizer, for a Pi0 whose stored tokenizer cannot be had."""
    rename_map: str = ""
    """Which camera of the scene is which of the policy's; this and the next three as in a training."""
    normalization: str = "auto"
    """Statistics of joints and actions: policy, the name of a data set, or dataset:PATH."""
    joint_frame: Literal["auto", "lerobot", "lerobot_m100_100", "so100_legacy"] = "auto"
    """Units of those statistics."""
    calibration: str = ""
    """LeRobot's calibration file of one's own arm, for lerobot_m100_100."""
    task: str = ""
    """Named task to play, such as lift or lift_wide; empty takes the one that the policy was made for."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """The environment: the task's, as the policy sees it; these flags override it. Not read where the policy acts in a
    Gymnasium environment, which its reinflow.json names."""

    @property
    def acting(self) -> ActingSettings:
        """How the policy acts."""
        return ActingSettings(
            pick_device(self.device), self.num_denoising_steps, self.n_action_steps, self.pi0_tokenizer_path,
            cut(self, DoorSettings), self.env.cameras, self.env.joint_frame,
        )  # fmt: skip


def check_config(config: EvalConfig) -> None:
    """Raise a ConfigError for what cannot work."""
    if config.task:
        named(config.task)
    check_ranges(config)
    if Path(config.output_dir).exists() and not Path(config.output_dir).is_dir():
        raise ConfigError(f"output_dir={config.output_dir} is a file: choose a directory")
    if (Path(config.output_dir) / "eval_info.json").exists():
        raise ConfigError(f"output_dir={config.output_dir} holds an evaluation already: choose another directory")


def find_policy(path: str) -> Path:
    """Policy directory behind a run, a checkpoint or a policy directory; raises ConfigError."""
    from reinflow.checkpoint import BEST, CHECKPOINTS, PRETRAINED, resolve_checkpoint

    if path in EMBEDDED:
        return EMBEDDED[path].embedded
    root = Path(path)
    best = root / CHECKPOINTS / BEST
    if (root / CHECKPOINTS).is_dir() or (root / PRETRAINED).is_dir():
        if (supervised := sorted(root.glob(f"{CHECKPOINTS}/[0-9]*/{CONFIG_FILE}"))) and not best.exists():
            return supervised[-1].parent  # of reinflow-sft, whose checkpoints are policies
        return resolve_checkpoint(best if best.exists() else root) / PRETRAINED
    if not (root / CONFIG_FILE).is_file():
        raise ConfigError(f"policy_path={path} is no run, checkpoint or policy directory (no config.json)")
    return root


def make_actor(config: EvalConfig, policy_dir: Path) -> Act:
    """Observation -> actions: the acting policy of training with zero noise, or any other LeRobot policy."""
    family, kind = family_of(policy_dir), read_json(policy_dir / CONFIG_FILE).get("type")
    if config.pi0_tokenizer_path and (family is None or "pi0" not in family.types):
        given = f"pi0_tokenizer_path={config.pi0_tokenizer_path}"
        raise ConfigError(f"{given} is not read by a {kind} policy: leave it out")
    if family is None or "flow_mlp" in family.types:
        unread = [f.name for f in fields(DoorSettings) if getattr(config, f.name, f.default) != f.default]
        if unread:
            raise ConfigError(f"{', '.join(unread)} not read by a {kind} policy, which is taken as it is: leave it out")
    if family is None:
        return stock_actor(config, policy_dir)
    from reinflow.flow import ChainSpec
    from reinflow.rollout import noise_free_actor

    policy = family.load(policy_dir, config.acting)
    return noise_free_actor(policy, ChainSpec(policy.num_denoising_steps))


def stock_actor(config: EvalConfig, policy_dir: Path) -> Act:
    """Any other LeRobot policy that predicts chunks, by LeRobot's own loading and processors.

    One that draws noise (a diffusion policy) gives the same episodes again with the same number of environments only.
    """
    import torch
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    from reinflow_vla.base import lerobot_batch

    check_trusted(policy_dir)
    settings = PreTrainedConfig.from_pretrained(policy_dir, cli_overrides=[f"--device={config.acting.device}"])
    with no_remote_code():
        policy = get_policy_class(settings.type).from_pretrained(policy_dir, config=settings, strict=True).eval()
        before, after = make_pre_post_processors(settings, pretrained_path=str(policy_dir))
    steps = config.n_action_steps or settings.n_action_steps

    @torch.no_grad()
    def act(observation: Observation, seeds: Sequence[int], decision: int) -> np.ndarray:
        torch.manual_seed(seeds[0] + decision)  # LeRobot draws one batch's noise from the global generator
        batch = before(lerobot_batch(observation, observation.get("pixels", {})))
        return after(policy.predict_action_chunk(batch))[:, :steps].double().numpy()

    return act


def run_eval(config: EvalConfig) -> EvalResult:
    """Evaluate, print the table, write eval_info.json (and video.mp4)."""
    from rich.console import Console

    from reinflow.evaluate import evaluate_seeds, write_eval_info

    check_config(config)
    policy_dir, out = find_policy(config.policy_path), Path(config.output_dir)
    if config.video and gym_world(policy_dir):
        raise ConfigError("video shows the arm; the policy acts in a Gymnasium environment: leave it out")
    if config.task and gym_world(policy_dir):
        raise ConfigError(f"task={config.task} is of the arm; the policy acts in a Gymnasium environment: leave it out")
    out.mkdir(parents=True, exist_ok=True)  # where nothing can be written nothing is played
    elsewhere = gym_world(policy_dir)
    make_env = partial(make_world, elsewhere or config.env)
    try:
        print(f"task: {say_world(elsewhere)}" if elsewhere else which_task(config, policy_dir))
        act = make_actor(config, policy_dir)
        result = evaluate_seeds(act, make_env, config.seed, config.episodes, config.num_parallel_envs)
    except BaseException:
        with contextlib.suppress(OSError):
            out.rmdir()  # if it is empty
        raise
    if config.video:
        # Episodes depend on their seeds alone, so the video shows those that were counted.
        result.video_paths.append(str(record_video(config, act)))
    path = write_eval_info(
        out / "eval_info.json", result.to_lerobot_info(elsewhere.env_id if elsewhere else TASK_GROUP)
    )
    result.print(Console())
    print(f"wrote {path}")
    return result


def which_task(config: EvalConfig, policy_dir: Path) -> str:
    """What is played and why, and a warning where it shows one scene only."""
    known = known_env(policy_dir)
    if config.task or known is None:
        why = "as --task says" if config.task else f"{policy_dir} says of no task; {how_to_choose()}"
    else:
        why = f"as {known[1]} says; {how_to_choose()}"
    lines = [f"task: {describe(config.env)}; {why}"]
    own = (known[0].control_hz or 50) if known else None
    if own and own != (config.env.control_hz or 50):
        lines.append(
            f"driven at {config.env.control_hz or 50:g} control steps a second; the policy was made for {own:g}"
        )
    if shows_one_scene(config.env) and config.episodes > 1:
        lines.append(
            f"warning: all {config.episodes} seeds show the same scene, so this is the success in one scene; "
            f"--task lift draws the block's place, --env.start-noise-deg the arm's pose"
        )
    return "\n".join(lines)


def record_video(config: EvalConfig, act: Act) -> Path:
    """Play the first episodes again, rows of episodes by columns of cameras."""
    from reinflow.evaluate import evaluate
    from reinflow.video import EpisodeRecorder, write_gif, write_mp4
    from so101_sim.vector.make import make_vector_env

    num_envs = min(config.video_episodes, config.episodes)
    recorder = EpisodeRecorder(num_envs)
    seen = replace(config.env, render_images=True)  # the policy may need no images, who watches it does
    with make_vector_env(seen, num_envs) as env:
        evaluate(act, env, range(config.seed, config.seed + num_envs), recorder, VIDEO_INTERVAL)
    rate = max(1, round((config.env.control_hz or 50) / VIDEO_INTERVAL))
    if config.gif:
        write_gif(Path(config.output_dir) / "video.gif", recorder.frames[::2], fps=max(1, rate // 2))
    return write_mp4(Path(config.output_dir) / "video.mp4", recorder.frames, fps=rate)


def parse_args(argv: Sequence[str]) -> EvalConfig:
    """Flags; the environment's defaults come from the policy that --policy-path names."""
    path = flag_value(argv, "--policy-path", "--policy_path")
    task, env = flag_value(argv, "--task"), EnvConfig()
    if path and not gym_world(find_policy(path)):
        env = env_of_task(find_policy(path), task) if task else stored_env(find_policy(path))
    default = EvalConfig(policy_path=tyro.MISSING, output_dir=tyro.MISSING, env=env)
    return tyro.cli(EvalConfig, args=list(argv), default=default, description=__doc__, prog="reinflow-eval")


def main() -> None:
    """Console entry point."""
    run_command("reinflow-eval", lambda: run_eval(parse_args(sys.argv[1:])))


if __name__ == "__main__":
    main()
