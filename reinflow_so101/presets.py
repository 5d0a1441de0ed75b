"""What the presets of train_reinflow.py set: fields of its TrainingConfig by name. What is left out is its default.

`tiny` is what was measured to learn (notes/results); `three-stage` and the `paper` presets have their documents'
values, and notes/hyperparameters.md says where they differ and why.
"""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "pretrained_path": "tiny",
    "task": "lift",
    "num_episodes": 9_216,
    "num_threads": 2,
    "num_parallel_envs": 64,
    "episodes_per_iteration": 192,
    "cameras": ("camera_up", "wrist_camera"),
    "image_size": 96,
    "randomize_block": True,
    "reward_mode": "staged",
    "starting_position": (0.06, -100.21, 89.95, 66.46, -84.04, 1.0),
    "num_denoising_steps": 1,
    "noise_basis": "dct",
    "log_prob_reduction": "dim",
    "sigma_min": 0.15,
    "sigma_max": 0.15,
    "policy_optimizer": "natural",
    "natural_momentum": 0.7,
    "num_ppo_epochs": 1,
    "num_critic_epochs": 40,
    "critic_lr": 1e-3,
    "clip_epsilon": 0.2,
    "value_clip_epsilon": 0.0,
    "target_kl": 0.015,
    "gae_lambda": 0.7,
    "time_limit_is_terminal": True,
    "grad_clip_norm": 1.0,
    "minibatch_size": 96,
    "gradient_accumulation_steps": 6,
    "lr_warmup_iterations": 0,
    "lr_decay_ratio": 0.2,
    "critic_warmup_iters": 1,
    "eval_interval": 8,
    "eval_episodes": 200,
    "save_interval": 1_536,
}

# What was measured to learn, for a policy of one's own: all that is the policy's to say is left to it.
FINETUNE: dict[str, Any] = {
    **{name: value for name, value in TINY.items() if name not in ("pretrained_path", "num_threads", "cameras")},
    "num_episodes": 20_000,
    "heads_first": 0.4,  # at 450 M the expert's update is half of an iteration (notes/scaling.md)
    "minibatch_size": 8,  # 450 M within 24 GB
    "gradient_accumulation_steps": 72,
    "image_size": 0,
    "chunk_size": 0,
    "n_action_steps": 0,
    "chunks_per_episode": 0,
    "num_denoising_steps": 0,
}

_ELSEWHERE = {name: value for name, value in TINY.items() if name != "pretrained_path"}  # another family on its task

# A random Pi0: every stage of Pi0 in minutes on a 2-core CPU.
TINY_PI0: dict[str, Any] = {
    **_ELSEWHERE,
    "model_type": "pi0",
    "pi0_pretrained_path": "tiny",
    "pi0_vlm_dtype": "float32",
    "num_episodes": 64,
    "num_parallel_envs": 8,
    "episodes_per_iteration": 8,
    "minibatch_size": 12,
    "gradient_accumulation_steps": 2,
    "policy_optimizer": "adam",
    "policy_lr": 1e-4,
    "num_ppo_epochs": 2,
    "num_critic_epochs": 2,
    "critic_warmup_iters": 0,
    "eval_interval": 2,
    "eval_episodes": 8,
    "report_episodes": 8,
    "save_interval": 16,
}

# The algorithm of "tiny" on its task, without pixels: what is learned about one should hold for the other.
FLOW_MLP: dict[str, Any] = {**_ELSEWHERE, "model_type": "flow_mlp", "num_episodes": 4_224}

# Stage 3 of the three-stage pipeline (seeds/004) on the state-based lift task: K 8, 16 actions of which 8 act, PPO on
# the summed log-prob. 1 M control steps are some 6,600 episodes; its 128 decisions of 16 environments are a rollout.
THREE_STAGE: dict[str, Any] = {
    "model_type": "flow_mlp",
    "task": "lift",
    "randomize_block": True,
    "reward_mode": "staged",
    "starting_position": TINY["starting_position"],
    "cameras": TINY["cameras"],
    "num_threads": 2,
    "total_timesteps": 1_000_000,
    "num_parallel_envs": 16,
    "rollout_steps": 128,
    "chunk_size": 16,
    "n_action_steps": 8,
    "chunks_per_episode": 0,  # as many as reach the task's 150 control steps: 19, which are 152
    "num_denoising_steps": 8,
    "policy_lr": 3e-5,
    "critic_lr": 1e-4,
    "num_ppo_epochs": 4,
    "num_critic_epochs": 4,
    "minibatch_size": 64,
    "gradient_accumulation_steps": 1,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "clip_epsilon": 0.2,
    "value_clip_epsilon": 0.0,
    "entropy_coeff": 0.01,
    "grad_clip_norm": 0.5,
    "target_kl": 0.0,
    "lr_warmup_iterations": 0,
    "critic_warmup_iters": 2,
    "sigma_min": 0.01,
    "sigma_max": 0.3,
    "noise_schedule": "linear",
    "noise_decay_end": 0.5,
    "log_prob_reduction": "chunk",
    "eval_interval": 32,
    "eval_episodes": 200,
    "save_interval": 1_000,
}

# The paper's legged locomotion (arXiv 2505.22094, Hopper's row; HalfCheetah has it too): 40 environments x 500 chunks
# of 4 actions an iteration, its mean log-prob, one optimiser step an epoch.
PAPER_STATE: dict[str, Any] = {
    "model_type": "flow_mlp",
    "env_id": "Hopper-v5",
    "total_timesteps": 80_000_000,
    "num_parallel_envs": 40,
    "rollout_steps": 500,
    "episodes_per_iteration": 40,
    "chunk_size": 4,
    "n_action_steps": 4,
    "chunks_per_episode": 250,
    "max_steps_per_episode": 1_000,
    "num_denoising_steps": 4,
    "policy_lr": 4.5e-5,
    "lr_decay_ratio": 0.44,
    "critic_lr": 6.5e-4,
    "num_ppo_epochs": 5,
    "num_critic_epochs": 5,
    "minibatch_size": 5_000,
    "gradient_accumulation_steps": 4,
    "gamma": 0.99,
    "discount_per": "chunk",
    "gae_lambda": 0.95,
    "clip_epsilon": 0.01,
    "value_clip_epsilon": 0.0,
    "target_kl": 1.0,
    "entropy_coeff": 0.03,
    "grad_clip_norm": 10.0,
    "lr_warmup_iterations": 0,
    "critic_warmup_iters": 0,
    "sigma_min": 0.10,
    "sigma_max": 0.24,
    "noise_decay_start": 0.35,
    "noise_decay_ratio": 0.825,
    "log_prob_reduction": "mean",
    "eval_interval": 10,
    "eval_episodes": 40,
    "report_episodes": 100,
    "save_interval": 1_000,
}
PAPER_WALKER2D: dict[str, Any] = {
    **PAPER_STATE,
    "env_id": "Walker2d-v5",
    "policy_lr": 4e-4,
    "critic_lr": 4e-3,
    "lr_decay_ratio": 1.0,
    "critic_warmup_iters": 5,
}

# The paper's manipulation from pixels (its row of Can): K 1, 50 environments x 300 chunks of 4, batches of 500 x 15.
PAPER_IMAGE: dict[str, Any] = {
    "pretrained_path": "tiny",
    "task": "lift",
    "randomize_block": True,
    "reward_mode": "staged",  # the task's; the paper's pays success alone: --reward-mode sparse
    "starting_position": TINY["starting_position"],
    "cameras": TINY["cameras"],
    "image_size": 96,
    "num_episodes": 755_000,
    "num_parallel_envs": 50,
    "episodes_per_iteration": 5_000,
    "num_denoising_steps": 1,
    "policy_lr": 2e-5,
    "lr_decay_ratio": 0.5,
    "critic_lr": 6.5e-4,
    "num_ppo_epochs": 10,
    "num_critic_epochs": 10,
    "minibatch_size": 500,
    "gradient_accumulation_steps": 15,
    "gamma": 0.99,
    "discount_per": "chunk",
    "gae_lambda": 0.95,
    "clip_epsilon": 0.01,
    "value_clip_epsilon": 0.0,
    "target_kl": 0.01,
    "entropy_coeff": 0.01,
    "grad_clip_norm": 10.0,
    "lr_warmup_iterations": 0,
    "critic_warmup_iters": 2,
    "sigma_min": 0.08,
    "sigma_max": 0.14,
    "noise_schedule": "constant",
    "log_prob_reduction": "mean",
    "time_limit_is_terminal": True,
    "save_interval": 2_500,
    "eval_interval": 1,
    "eval_episodes": 200,
}

PRESET_VALUES: dict[str, dict[str, Any]] = {
    "smolvla": {},
    "pi0": {"model_type": "pi0"},
    "tiny": TINY,
    "finetune": FINETUNE,
    "tiny-pi0": TINY_PI0,
    "flow_mlp": FLOW_MLP,
    "three-stage": THREE_STAGE,
    "paper-state": PAPER_STATE,
    "paper-walker2d": PAPER_WALKER2D,
    "paper-image": PAPER_IMAGE,
}
"""By name; the first is what a training without --preset starts from."""
