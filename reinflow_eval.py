"""reinflow-eval: noise-free success of a policy on fixed seeds.

    reinflow-eval --policy-path model/tiny_smolvla --episodes 200 --seed 10000 --output-dir outputs/eval

Works on a run directory or a checkpoint of train_reinflow.py (its best checkpoint, else its last) and on any stock
LeRobot policy directory whose cameras and joints match. A SmolVLA, a Pi0 or Pi0.5 and a flow_mlp (the small MLP on
simulator state) go through the same policy object as in training.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from reinflow import UserError, run_command
from so101_gym_env import EnvConfig

if TYPE_CHECKING:
    from reinflow.evaluate import EvalResult
    from reinflow_vla import ReinFlowVLA
    from so101_vector_env import ChunkVectorEnv

EMBEDDED = {"tiny": "tiny_smolvla", "tiny-pi0": "tiny_pi0", "flow_mlp": "flow_mlp"}
VIDEO_INTERVAL = 2  # control steps per frame: 25 frames a second


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a policy noise-free on fixed seeds."""

    policy_path: str
    """Run directory, checkpoint, or policy directory; "tiny", "tiny-pi0" and "flow_mlp" name the embedded policies."""
    output_dir: str
    """Where eval_info.json (LeRobot's shape) and the video go; refused if it holds an evaluation."""
    episodes: int = 200
    """Episodes; episode i uses seed + i."""
    seed: int = 10_000
    """First seed. From 10,000 up they are for reporting, below for tuning."""
    num_parallel_envs: int = 32
    """Environments that act at once."""
    num_denoising_steps: int = 0
    """K; 0 takes what is stored with the policy."""
    n_action_steps: int = 0
    """Executed actions per chunk; 0 takes what is stored with the policy."""
    video: bool = False
    """Write an mp4 grid of the first episodes, all cameras of the environment side by side."""
    gif: bool = False
    """With video: write it as video.gif too, for a README."""
    video_episodes: int = 4
    """Episodes in the video."""
    device: str = "cpu"
    """Where the policy runs."""
    pi0_tokenizer_path: str = ""
    """Folder with PaliGemma's tokenizer, for a Pi0 whose stored tokenizer cannot be had."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """The environment; defaults come from reinflow.json beside the policy, if there is one."""


class EvalError(UserError, ValueError):
    """The evaluation cannot start; the message names the field and the remedy."""


def check_config(config: EvalConfig) -> None:
    """Raise an EvalError for what cannot work."""
    for name in ("episodes", "num_parallel_envs", "video_episodes"):
        if getattr(config, name) < 1:
            raise EvalError(f"{name} must be at least 1, got {getattr(config, name)}")
    if (Path(config.output_dir) / "eval_info.json").exists():
        raise EvalError(f"output_dir={config.output_dir} holds an evaluation already: choose another directory")


def find_policy(path: str) -> Path:
    """Policy directory behind a run, a checkpoint or a policy directory; raises EvalError."""
    from reinflow.checkpoint import BEST, CHECKPOINTS, resolve_checkpoint
    from so101_mujoco_utils import model_dir

    if path in EMBEDDED:
        return model_dir() / EMBEDDED[path]
    root = Path(path)
    best = root / CHECKPOINTS / BEST
    if (root / CHECKPOINTS).is_dir() or (root / "pretrained_model").is_dir():
        return resolve_checkpoint(best if best.exists() else root) / "pretrained_model"
    if not (root / "config.json").is_file():
        raise EvalError(f"policy_path={path} is no run, checkpoint or policy directory (no config.json)")
    return root


def stored_settings(policy_dir: Path) -> dict[str, Any]:
    """reinflow.json of a policy directory: environment and chain it was trained with; {} for other policies."""
    path = policy_dir / "reinflow.json"
    return json.loads(path.read_text()) if path.exists() else {}


def stored_env(policy_dir: Path) -> EnvConfig:
    """The policy's own environment, or the default one with the policy's cameras and image size."""
    stored = stored_settings(policy_dir).get("env")
    if stored:
        known = {f.name for f in fields(EnvConfig)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in known}
        return EnvConfig(**values)
    features = json.loads((policy_dir / "config.json").read_text()).get("input_features", {})
    images = {k.split(".")[-1]: f["shape"] for k, f in features.items() if f.get("type") == "VISUAL"}
    if not images:
        return EnvConfig(render_images=False, environment_state=True)
    return EnvConfig(cameras=tuple(images), image_size=next(iter(images.values()))[-1])


def vla_family(kind: str) -> type[ReinFlowVLA]:
    """The adapter of a LeRobot policy type."""
    if kind == "smolvla":
        from reinflow_smolvla import ReinFlowSmolVLA

        return ReinFlowSmolVLA
    from pi0_adapter import ReinFlowPi0

    return ReinFlowPi0


def vla_actor(config: EvalConfig, policy_dir: Path) -> Callable[[dict[str, Any]], np.ndarray]:
    """The acting policy of training with zero noise, which is LeRobot's own sampler."""
    import torch

    from reinflow.flow import ChainSpec
    from reinflow.rollout import noise_free_actor
    from reinflow_vla import TrainableGroups

    stored = json.loads((policy_dir / "config.json").read_text())
    family = vla_family(stored["type"])
    steps = config.num_denoising_steps or stored[family.num_steps_field]
    options = {"tokenizer": config.pi0_tokenizer_path} if config.pi0_tokenizer_path else {}
    policy = family.from_pretrained(
        policy_dir, config.device, num_denoising_steps=steps,
        n_action_steps=config.n_action_steps or stored["n_action_steps"],
        sigma_min=0.1, sigma_max=0.1, groups=TrainableGroups(False, False, False, False, False),
        critic_hidden_size=8, **options,
    )  # fmt: skip
    torch.manual_seed(config.seed)
    return noise_free_actor(policy, ChainSpec(steps), config.seed, config.device)


def flow_mlp_actor(config: EvalConfig, policy_dir: Path) -> Callable[[dict[str, Any]], np.ndarray]:
    """The state-based policy of training with zero noise."""
    from reinflow.flow import ChainSpec
    from reinflow.policy import FlowMLP
    from reinflow.rollout import noise_free_actor

    policy = FlowMLP.from_pretrained(policy_dir, config.device)
    if config.n_action_steps not in (0, policy.n_action_steps):
        raise EvalError(
            f"n_action_steps={config.n_action_steps}, but the layers of {policy_dir} are {policy.n_action_steps} steps "
            "wide: leave it out"
        )
    spec = ChainSpec(config.num_denoising_steps or policy.num_denoising_steps)
    return noise_free_actor(policy, spec, config.seed, config.device)


def stock_actor(config: EvalConfig, policy_dir: Path) -> Callable[[dict[str, Any]], np.ndarray]:
    """Any other LeRobot policy that predicts chunks, by LeRobot's own loading and processors."""
    import torch
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    from reinflow_vla import OBS_IMAGES_PREFIX

    settings = PreTrainedConfig.from_pretrained(policy_dir, cli_overrides=[f"--device={config.device}"])
    policy = get_policy_class(settings.type).from_pretrained(policy_dir, config=settings, strict=True).eval()
    before, after = make_pre_post_processors(settings, pretrained_path=str(policy_dir))
    steps = config.n_action_steps or settings.n_action_steps

    def act(observation: dict[str, Any]) -> np.ndarray:
        batch = {"observation.state": torch.as_tensor(observation["agent_pos"]), "task": observation["task"]}
        for name, images in observation.get("pixels", {}).items():
            batch[OBS_IMAGES_PREFIX + name] = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 255
        return after(policy.predict_action_chunk(before(batch)))[:, :steps].double().numpy()

    return act


def run_eval(config: EvalConfig) -> EvalResult:
    """Evaluate, print the table, write eval_info.json (and video.mp4)."""
    import torch
    from rich.console import Console

    from reinflow.evaluate import evaluate, even_batch, write_eval_info
    from so101_vector_env import make_vector_env
    from training_run import TASK_GROUP

    check_config(config)
    policy_dir, out = find_policy(config.policy_path), Path(config.output_dir)
    kind = json.loads((policy_dir / "config.json").read_text())["type"]
    if config.pi0_tokenizer_path and kind not in ("pi0", "pi05"):
        raise EvalError(f"pi0_tokenizer_path={config.pi0_tokenizer_path} is not read by a {kind} policy: leave it out")
    vla = dict.fromkeys(("smolvla", "pi0", "pi05"), vla_actor)
    make_actor = (vla | {"flow_mlp": flow_mlp_actor}).get(kind, stock_actor)
    env = make_vector_env(config.env, even_batch(config.episodes, config.num_parallel_envs), autoreset=False)
    try:
        with torch.inference_mode():
            result = evaluate(make_actor(config, policy_dir), env, range(config.seed, config.seed + config.episodes))
            if config.video:
                # A fresh actor draws the same x_0 again, so that the video shows the episodes that were counted.
                result.video_paths.append(str(record_video(config, make_actor(config, policy_dir), env)))
    finally:
        env.close()
    path = write_eval_info(out / "eval_info.json", result.to_lerobot_info(TASK_GROUP))
    result.print(Console())
    print(f"wrote {path}")
    return result


def record_video(config: EvalConfig, act: Callable[[dict[str, Any]], np.ndarray], env: ChunkVectorEnv) -> Path:
    """Play the first episodes again, rows of episodes by columns of cameras."""
    from reinflow.evaluate import evaluate
    from reinflow.video import EpisodeRecorder, write_gif, write_mp4

    count = min(config.video_episodes, env.num_envs)
    if not env.config.render_images:  # the policy needs no images, who watches it does
        from so101_vector_env import make_vector_env

        with make_vector_env(replace(env.config, render_images=True), count, autoreset=False) as rendering:
            return record_video(config, act, rendering)
    recorder = EpisodeRecorder(count)
    evaluate(act, env, range(config.seed, config.seed + env.num_envs), recorder, VIDEO_INTERVAL)
    if config.gif:
        write_gif(Path(config.output_dir) / "video.gif", recorder.frames[::2], fps=25 // VIDEO_INTERVAL)
    return write_mp4(Path(config.output_dir) / "video.mp4", recorder.frames, fps=50 // VIDEO_INTERVAL)


def main() -> None:
    """Console entry point."""
    run_command("reinflow-eval", lambda: run_eval(parse_args(sys.argv[1:])))


def parse_args(argv: Sequence[str]) -> EvalConfig:
    """Flags; the environment's defaults come from the policy that --policy-path names."""
    from training_checks import flag_value

    path = flag_value(argv, "--policy-path", "--policy_path")
    env = stored_env(find_policy(path)) if path else EnvConfig()
    default = EvalConfig(policy_path=tyro.MISSING, output_dir=tyro.MISSING, env=env)
    return tyro.cli(EvalConfig, args=list(argv), default=default, description=__doc__)


if __name__ == "__main__":
    main()
