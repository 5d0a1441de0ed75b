"""Fine-tune a SmolVLA policy on the SO-101 lift task by ReinFlow: PPO over the noisy denoising chain.

    python train_reinflow.py --preset tiny          the embedded policy, a 2-core CPU, minutes
    python train_reinflow.py --preset flow_mlp      a small MLP on simulator state, to judge an algorithm change
    python train_reinflow.py --preset finetune --pretrained-path DIR   your own SmolVLA, with what learns here
    python train_reinflow.py --pretrained-path DIR  the same with the document's defaults
    python train_reinflow.py --preset tiny-pi0      a tiny Pi0 with random weights: it runs, it does not learn
    python train_reinflow.py --preset three-stage --flow-mlp-pretrained-path DIR   stage three of notes/stages.md
    python train_reinflow.py --preset paper-state --flow-mlp-pretrained-path DIR   Gymnasium's Hopper, as in the paper
    python train_reinflow.py --help                 every field

This file holds the configuration (``TrainingConfig``, the one place of defaults) and the training loop with its verbs:
rollout, update, evaluate. The algorithm's rooms are in reinflow/, the arm is in so101_sim/.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from reinflow import run_command
from reinflow.ranks import in_ranks
from reinflow.schedules import in_critic_warmup, linear_decay, noise_bounds, warmup_lr
from reinflow.settings import (
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    RATE,
    SEED,
    Range,
    cut,
)
from reinflow_gym.config import GymConfig
from reinflow_so101.checks import check_config
from reinflow_so101.command_line import PATH_FIELDS, ThisStart, parse_flags, starting_point
from reinflow_so101.dashboard import keep_results, show_report
from reinflow_so101.opening import check_start, make_policy, make_run, open_run  # noqa: F401 - for those who build on it
from reinflow_so101.presets import PRESET_VALUES
from so101_sim.config import EnvConfig
from so101_sim.tasks.registry import DEFAULT_TASK

if TYPE_CHECKING:  # torch and LeRobot are loaded when a training starts: --help takes half a second
    from reinflow.evaluate import EvalResult
    from reinflow.flow import ChainSpec
    from reinflow.learner import LearnerSettings
    from reinflow.rollout import RolloutBuffer, RolloutSettings
    from reinflow.run import Run, RunSettings
    from reinflow_so101.policies import PolicySettings

PI = 3.141592653589793
SIGMA, ENVIRONMENTS = Range(0, 100, low_included=False), Range(1, 65_536)


@dataclass(frozen=True)
class TrainingConfig:
    """Every setting of a training run. Names follow notes/hyperparameters.md, which gives the reasons at length."""

    # --- What is trained -------------------------------------------------------------------------------------------
    preset: Literal[
        "smolvla", "pi0", "finetune", "tiny", "tiny-pi0", "flow_mlp",
        "three-stage", "paper-state", "paper-walker2d", "paper-image",
    ] = "smolvla"  # fmt: skip
    """Which set of defaults the other flags start from; they stand in reinflow_so101/presets.py."""
    model_type: Literal["smolvla", "pi0", "flow_mlp"] = "smolvla"
    """Policy family. pi0 is Pi0 or Pi0.5, as the policy says; flow_mlp sees the simulator's state and no images."""
    pretrained_path: str = "lerobot/smolvla_base"
    """SmolVLA to start from: a policy directory or a hub id. "tiny" names the embedded policy."""
    pi0_pretrained_path: str = "lerobot/pi0"
    """Pi0 or Pi0.5 to start from: a policy directory or a hub id. "tiny" names the embedded policy."""
    pi0_tokenizer_path: str = ""
    """Folder with PaliGemma's tokenizer, which is gated on the hub; empty takes the place stored with the policy."""
    pi0_vlm_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of Pi0's frozen language model; vision tower and all that learns are fp32."""
    pi0_gradient_checkpointing: bool = True
    """Recompute the activations of Pi0's expert in the backward pass, so that it fits in 24 GB."""
    peft_rank: Annotated[int, NOT_NEGATIVE] = 0
    """R > 0 trains adapters of rank R (LoRA) beside the linear layers of Pi0's expert instead of the layers; exports
    merge them."""
    rename_map: str = ""
    """Which camera of the scene is which of the policy's, in LeRobot's form, environment -> policy:
    '{"observation.images.camera_up": "observation.images.front"}'. Empty: by name; camera1, camera2 by position."""
    normalization: str = "auto"
    """Statistics of joints and actions: policy (its own), the name of a data set that it keeps some for, or
    dataset:PATH of a LeRobotDataset. auto: its own, else those of so100."""
    joint_frame: Literal["auto", "lerobot", "lerobot_m100_100", "so100_legacy"] = "auto"
    """Units of those statistics: LeRobot's degrees, its -100..100, or the older degrees of SO-100 data. auto takes what
    fits the joint limits, LeRobot's degrees first. Exports are in LeRobot's degrees."""
    calibration: str = ""
    """LeRobot's calibration file of one's own arm, for lerobot_m100_100; empty takes the middle of the ranges."""
    flow_mlp_pretrained_path: str = "embedded"
    """State-based MLP to start from, a directory of reinflow-sft-mlp or a checkpoint's pretrained_model; "embedded"
    names the one that comes with the package."""
    train_action_head: bool = True
    """Train action_out_proj, the velocity head."""
    train_time_mlp: bool = True
    """Train action_time_mlp_in and action_time_mlp_out, which embed action and flow time."""
    train_full_expert: bool = True
    """Train the whole action expert and action_in_proj (98 M parameters in SmolVLA); False leaves the heads."""
    heads_first: Annotated[float, FRACTION] = 0.0
    """Share of training during which the heads alone learn, whatever else does from then on: an update then runs
    neither vision tower nor language model nor action expert. 0 is off."""
    train_noise_head: bool = True
    """Train the noise head; False keeps the noise in the middle of [sigma_min, sigma_max]."""
    train_critic: bool = True
    """Train the critic; without it advantages are plain returns."""
    critic_input: Literal["features", "state"] = "features"
    """What the critic reads: the policy's prefix features, or the simulator's privileged state (an asymmetric
    actor-critic; the critic is not deployed)."""
    critic_hidden_size: Annotated[int, Range(2, 65_536)] = 512
    """Width of the critic's first hidden layer; the second is half of it."""

    # --- How much --------------------------------------------------------------------------------------------------
    num_episodes: Annotated[int, POSITIVE, tyro.conf.arg(aliases=["--episodes"])] = 20_000
    """Training episodes in all."""
    total_timesteps: Annotated[int, NOT_NEGATIVE] = 0
    """Training control steps in all, instead of num_episodes, where episodes have any length; 0 counts episodes."""
    max_minutes: Annotated[float, NOT_NEGATIVE] = 0.0
    """The run saves and stops when an iteration ends after that long, and --resume goes on; 0 is no limit."""
    num_parallel_envs: Annotated[int, ENVIRONMENTS, tyro.conf.arg(aliases=["--parallel-envs", "--num-envs"])] = 1
    """Environments that act at once; one forward pass serves them all. 1 is the sequential mode."""
    rollout_backend: Literal["local", "ray"] = "local"
    """Who plays the rollouts: this process, or workers on Ray with copies of the policy (docs/cluster.md)."""
    num_rollout_workers: Annotated[int, Range(1, 4_096)] = 1
    """Workers of rollout_backend=ray, which share num_parallel_envs."""
    rollout_worker_cpus: Annotated[int, Range(1, 1_024)] = 1
    """CPUs that each of them asks Ray for, and threads that it uses."""
    rollout_worker_gpus: Annotated[float, NOT_NEGATIVE] = 0.0
    """GPUs likewise, such as .25 for four workers on one; 0 acts on the CPU."""
    episodes_per_iteration: Annotated[int, POSITIVE] = 40
    """Episodes per rollout. 40 x 3 decisions fill one optimiser batch of the seed settings (8 x 15)."""
    rollout_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Decisions per environment and rollout instead of whole episodes; 0 is as many as episodes_per_iteration take."""
    seed: Annotated[int, SEED] = 0
    """Of weights, noise, shuffling and training blocks. Seeds from 10,000 up are for reporting only."""

    # --- PPO -------------------------------------------------------------------------------------------------------
    policy_optimizer: Literal["adam", "natural"] = "adam"
    """adam, or natural: one K-FAC step per rollout, scaled until its KL is target_kl; policy_lr is then not used."""
    natural_damping: Annotated[float, POSITIVE] = 0.1
    """Damping of K-FAC's covariances, as a share of their mean diagonal."""
    natural_momentum: Annotated[float, FRACTION] = 0.5
    """Share of gradient and covariances that K-FAC keeps from one update to the next."""
    policy_lr: Annotated[float, RATE] = 3e-6
    """Adam's learning rate of the policy. A step's KL grows with lr^2 x D / sigma^2: D = 300 needs a small one."""
    critic_lr: Annotated[float, RATE] = 1e-4
    """Adam's learning rate of the critic; it moves no action, so it can be larger."""
    clip_epsilon: Annotated[float, POSITIVE] = 0.15
    """PPO clip of the ratio."""
    target_kl: Annotated[float, Range(0, 100)] = 0.1
    """Stop an iteration's policy steps once the KL, measured after a step, exceeds this; 0 never stops."""
    undo_overshoot: bool = False
    """Take back a step whose KL exceeds 1.5 x target_kl and halve the rate, which recovers while KL stays low."""
    num_ppo_epochs: Annotated[int, POSITIVE] = 5
    """Passes of the policy over a rollout."""
    num_critic_epochs: Annotated[int, POSITIVE] = 5
    """Passes of the critic over a rollout."""
    minibatch_size: Annotated[int, POSITIVE] = 8
    """Decisions per forward and backward pass; a matter of memory."""
    gradient_accumulation_steps: Annotated[int, POSITIVE] = 15
    """Minibatches per optimiser step; the effective batch is minibatch_size x this."""
    gamma: Annotated[float, FRACTION] = 0.999
    """Discount."""
    discount_per: Literal["control_step", "chunk"] = "control_step"
    """What gamma counts: control steps (a chunk of tau steps discounts gamma^tau) or chunks, as in the paper's code."""
    time_limit_is_terminal: bool = False
    """Whether the time limit belongs to the task. False adds V(final observation) where it struck, which nothing trains
    when every episode starts at step 0 and ends at the limit: the critic then feeds on itself."""
    gae_lambda: Annotated[float, FRACTION] = 0.95
    """Bias against variance in the advantage; counts decisions, or control steps with credit=control_step."""
    credit: Literal["decision", "control_step"] = "decision"
    """What has a value of its own: decisions, or every control step by the simulator's state, so that each executed
    action has its own advantage (with white noise; a cosine takes that of the chunk's first step)."""
    value_clip_epsilon: Annotated[float, Range(0, 1e6)] = 0.2
    """Clip of the value update, in standard deviations of the return; 0 is off."""
    entropy_coeff: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of the noise's entropy."""
    anchor_coeff: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of the squared distance to the starting policy's denoising steps, on the rollout's own noise; 0 is off."""
    grad_clip_norm: Annotated[float, POSITIVE] = 0.25
    """Largest gradient norm, policy and critic each."""
    rescore_log_probs: bool = False
    """Score a rollout's actions again by the update's own minibatches instead of taking the log-probs of acting: the
    remedy where bf16 or TF32 rounds by the shape of a batch. Costs a pass over the rollout."""
    lr_warmup_iterations: Annotated[int, NOT_NEGATIVE] = 10
    """Iterations over which policy_lr rises linearly."""
    lr_decay_ratio: Annotated[float, FRACTION] = 1.0
    """Final policy_lr (with natural: target_kl) as a fraction of the first; it falls linearly over num_episodes."""
    critic_warmup_iters: Annotated[int, NOT_NEGATIVE] = 30
    """First iterations that train the critic alone, on the same targets."""

    # --- The noisy denoising chain ---------------------------------------------------------------------------------
    num_denoising_steps: Annotated[int, Range(0, 1_000)] = 1
    """K, Euler steps from noise to action; evaluation and export use the same. 0 takes the policy's own."""
    sigma_min: Annotated[float, SIGMA] = 0.25
    """Smallest std of the exploration noise, in normalised action units."""
    sigma_max: Annotated[float, SIGMA] = 0.50
    """Largest std of the exploration noise, as noise_schedule lets it fall."""
    noise_schedule: Literal["hold_cosine", "constant", "linear", "exponential"] = "hold_cosine"
    """How sigma_max falls over training."""
    noise_decay_start: Annotated[float, FRACTION] = 1.0
    """Fraction of training before hold_cosine starts to fall; 1 never."""
    noise_decay_ratio: Annotated[float, FRACTION] = 0.7
    """Final sigma_max as a fraction of the first."""
    noise_decay_end: Annotated[float, Range(0, 1, low_included=False)] = 1.0
    """Fraction of training after which linear and exponential have fallen, to sigma_min or near it."""
    chain_noise: Literal["reinflow", "flow_sde"] = "reinflow"
    """Noise of the chain: reinflow in every step, of the noise head's std; flow_sde (pi_RL) in one step of a decision,
    drawn at random, which alone is updated: sigma_max is its level a, std sqrt(dt) a sqrt(t / (1 - t))."""
    auto_scale: bool = False
    """Take sigma_min, sigma_max, policy_lr and target_kl as the paper's, for D = 28, and scale them to this D."""
    log_prob_reduction: Literal["chunk", "action", "dim", "mean"] = "chunk"
    """Ratios per decision: one for the chunk, one per control step, one per noise coordinate, or the paper's mean."""
    noise_basis: Literal["white", "dct"] = "white"
    """Noise on every action, or only on the lowest cosines of the chunk's time axis (smooth exploration)."""
    num_noise_coefficients: Annotated[int, POSITIVE] = 5
    """Cosines per joint with noise_basis=dct."""
    noise_last_step_only: bool = False
    """Draw noise in the last of the K denoising steps only."""

    # --- Chunks and episodes ---------------------------------------------------------------------------------------
    chunk_size: Annotated[int, NOT_NEGATIVE] = 50
    """Actions the policy predicts; fixed by the pretrained model and checked against it. 0 takes the policy's own."""
    n_action_steps: Annotated[int, NOT_NEGATIVE] = 50
    """Actions of a chunk that are executed before the next observation; 0 takes the policy's own."""
    chunks_per_episode: Annotated[int, NOT_NEGATIVE] = 3
    """Decisions per episode; times n_action_steps it must be max_steps_per_episode. 0 takes as many as reach it."""
    max_steps_per_episode: Annotated[int, POSITIVE] = 150
    """Control steps before an episode is truncated."""

    # --- Environment -----------------------------------------------------------------------------------------------
    env_id: str = ""
    """A Gymnasium environment with Box actions, such as Hopper-v5, for a flow_mlp that was made for it; empty is the
    SO-101 arm. It is seen by its state alone; max_steps_per_episode is its time limit."""
    task: str = DEFAULT_TASK
    """Named task that the fields below start from, such as lift or lift_wide: the one given here, else the one that the
    policy was made for, else the preset's. Other flags override it; what a run plays is in its own fields."""
    model_path: str = "model/scene.xml"
    """MJCF scene; the default is the shipped one, wherever the command runs."""
    instruction: str = "pick up the block"
    """Task given to the policy."""
    steps_per_action: Annotated[int, POSITIVE] = 10
    """Physics substeps of 2 ms per control step."""
    control_hz: Annotated[float, Range(1, 1_000, or_zero=True)] = 0.0
    """Control steps a second, for a policy of other data than 50 Hz; the substeps follow. 0: as steps_per_action."""
    starting_position: tuple[float, float, float, float, float, float] = (0.06, -100.21, 89.95, 66.46, 5.96, 1.0)
    """Joint angles at reset in MuJoCo degrees; clipped to the limits."""
    start_noise_deg: Annotated[float, NOT_NEGATIVE] = 0.0
    """Uniform perturbation of every joint at reset, up to so many degrees to either side."""
    block_pos: tuple[float, float, float] = (0.0, 0.3, 0.0125)
    """Block position at reset in metres, unless randomize_block."""
    randomize_block: bool = False
    """Draw the block's position and yaw at every reset."""
    block_radius_range: tuple[float, float] = (0.20, 0.28)
    """Distance of a random block from the arm's base, metres."""
    block_angle_deg: float = 30.0
    """A random block lies within +- this about straight ahead."""
    block_yaw_deg: float = 0.4 * 180 / PI
    """A random block is turned by up to +- this."""
    cameras: tuple[str, ...] = ("camera_up", "wrist_camera", "camera_side")
    """Cameras to render; the policy's must be among them."""
    image_size: Annotated[int, Range(8, 4_096, or_zero=True)] = 256
    """Height and width of every image; 0 takes the policy's own."""
    lift_threshold: Annotated[float, POSITIVE] = 0.08
    """Block height in metres that counts as lifted."""
    reward_mode: Literal["seed", "staged", "sparse"] = "seed"
    """seed: -distance + bonuses; staged: reach, grasp, lift and success terms; sparse: success alone (table in
    so101_mujoco_utils.py)."""
    contact_bonus: float = 0.1
    """Seed reward per control step in contact."""
    height_alignment_bonus: float = 0.05
    """Seed reward per control step with the tool above the block."""
    use_subproc_env: bool = False
    """Worker processes instead of mujoco.batch for num_parallel_envs > 1: the same as vector=subproc."""
    vector: Literal["auto", "sequential", "subproc", "batched", "warp"] = "auto"
    """Form of the rollouts' environments: auto is sequential for one, batched for more; these and subproc give the same
    numbers. warp simulates and draws them by MuJoCo Warp on the policy's device, in fp32; evaluations stay on auto."""
    render: bool = False
    """Open the MuJoCo viewer on the first environment; needs a display and num_parallel_envs 1."""
    headless: bool = False
    """Never open a window; contradicts render."""

    # --- Evaluation ------------------------------------------------------------------------------------------------
    eval_interval: Annotated[int, NOT_NEGATIVE] = 10
    """Iterations between noise-free evaluations on tuning seeds; 0 never. They choose the best checkpoint: the last one
    within a standard error of the highest success."""
    eval_episodes: Annotated[int, POSITIVE] = 100
    """Episodes of one such evaluation."""
    eval_seed: Annotated[int, SEED] = 5_000
    """First tuning seed; below 10,000."""
    report_episodes: Annotated[int, NOT_NEGATIVE] = 200
    """Episodes of the evaluation before and after training, on seeds from report_seed; report.html comes with it, a
    page of charts and films. 0 leaves both out; reinflow-report makes the page of any run."""
    report_seed: Annotated[int, SEED] = 10_000
    """First reporting seed; nothing is ever chosen by these."""

    # --- Run directory and tracking --------------------------------------------------------------------------------
    output_dir: str = ""
    """Run directory; empty makes outputs/train/<date>_<preset>. An existing run is never overwritten."""
    checkpoint_path: str = "reinflow_checkpoint.pt"
    """What --resume continues: a run or checkpoint directory. If there is none of that name, output_dir is meant."""
    resume: bool = False
    """Continue a run from its last checkpoint, with its own config.json."""
    save_interval: Annotated[int, POSITIVE] = 10
    """Episodes between checkpoints (rounded up to whole iterations)."""
    keep_checkpoints: Annotated[int, POSITIVE] = 3
    """Newest checkpoints to keep, besides last and best."""
    log_interval: Annotated[int, POSITIVE] = 1
    """Episodes between log lines (rounded up to whole iterations)."""
    wandb_enabled: Annotated[bool, tyro.conf.arg(aliases=["--wandb"])] = True
    """Log to Weights & Biases."""
    wandb_mode: Literal["auto", "online", "offline"] = "auto"
    """offline writes to the run directory, `wandb sync` sends it later; auto is what WANDB_MODE says, else online where
    a key is known and the server answers, else offline."""
    wandb_project: str = "reinflow-smolvla"
    """Project on Weights & Biases."""
    prefix_cache: Literal["auto", "heads", "kv", "embeddings", "none"] = "auto"
    """What a rollout keeps of the frozen part: heads (where they alone learn, what they read: an update runs nothing
    else), kv (an update runs the action expert), embeddings (and the language model), none (and the vision tower);
    auto takes the first that fits, on CUDA in host memory if need be."""
    prefix_cache_gb: Annotated[float, Range(0, 1e6)] = 0.0
    """Memory for it on the policy's device in GiB; 0 takes half of what is free at the start."""
    compile_expert: bool = False
    """Gradients of the action expert by torch.compile: on a CPU 1.2 to 1.7 times as fast with Adam, after a minute or
    two of compiling in the first update. Acting stays as it is. Not for natural steps."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the policy runs; auto takes cuda, then mps, then cpu."""
    num_threads: Annotated[int, Range(0, 1_024)] = 0
    """Threads of torch; 0 is its own choice. MuJoCo always takes all cores. The last digits of the results depend on
    this number."""

    def __post_init__(self) -> None:
        check_config(self)

    # What each room takes of it

    def world(self) -> EnvConfig | GymConfig:
        """Where it acts."""
        return GymConfig(self.env_id, self.max_steps_per_episode) if self.env_id else self.env()

    def env(self) -> EnvConfig:
        """The arm's environment; with env_id, whose time limit is its own, the one that is not played."""
        blind = self.model_type == "flow_mlp"  # it sees the simulator's state and no pixels
        privileged = blind or self.critic_input == "state"
        given = {"max_steps_per_episode": EnvConfig.max_steps_per_episode} if self.env_id else {}
        return cut(
            self, EnvConfig, joint_frame="lerobot", render_images=not blind, environment_state=privileged, **given
        )

    def policy(self) -> PolicySettings:
        """Which policy, and what of it learns."""
        from reinflow_so101.policies import PolicySettings

        return cut(self, PolicySettings, policy_path=self.policy_path)

    def chain(self) -> ChainSpec:
        """The denoising chain."""
        from reinflow.flow import ChainSpec

        return cut(self, ChainSpec, reduction=self.log_prob_reduction)

    def rollout(self) -> RolloutSettings:
        """How rewards inside a chunk count."""
        from reinflow.rollout import RolloutSettings

        return cut(self, RolloutSettings)

    def learner(self) -> LearnerSettings:
        """The update."""
        from reinflow.learner import LearnerSettings

        return cut(self, LearnerSettings)

    def run(self) -> RunSettings:
        """How long, and what is left behind."""
        from reinflow.run import RunSettings

        return cut(self, RunSettings, wandb_mode=self.wandb_mode if self.wandb_enabled else "off")

    # What follows from it

    @property
    def decisions_per_iteration(self) -> int:
        """B of one rollout."""
        return self.chunk_steps_per_rollout * self.num_parallel_envs

    @property
    def chunk_steps_per_rollout(self) -> int:
        """T: whole episodes per environment, or rollout_steps."""
        whole = -(-self.episodes_per_iteration // self.num_parallel_envs) * self.chunks_per_episode
        return self.rollout_steps or whole

    @property
    def policy_path(self) -> str:
        """The policy that model_type asks for."""
        return str(getattr(self, PATH_FIELDS[self.model_type]))


PRESETS = {name: TrainingConfig(preset=name, **values) for name, values in PRESET_VALUES.items()}  # type: ignore[arg-type]


# --- The loop ---------------------------------------------------------------------------------------------------------


def train(config: TrainingConfig) -> None:
    """Run (or continue) a training; the loop of the algorithm."""
    config, run = open_run(config)
    with run:
        report(run, config, "before")
        for iteration in run.iterations():
            update(run, config, rollout(run, config))  # no name: the next must not find this one still in memory
            if config.eval_interval and iteration % config.eval_interval == 0:
                evaluate(run, config)
            run.log()
            run.save_if_due()
        run.finish()
        report(run, config, "after")
        keep_results(run)


def rollout(run: Run, config: TrainingConfig) -> RolloutBuffer:
    """Act with exploration noise for whole episodes, here or on workers."""
    from reinflow.distributed import total
    from reinflow.playing import of_all_ranks
    from reinflow.rollout import collect_rollout
    from reinflow.rollout_workers import RolloutWorkers

    sigma_min, sigma_max = noise_bounds(
        run.progress, config.sigma_min, config.sigma_max,
        config.noise_schedule, config.noise_decay_start, config.noise_decay_ratio, config.noise_decay_end,
    )  # fmt: skip
    run.policy.set_noise_bounds(sigma_min, sigma_max)
    run.policy.learn_heads_alone(run.progress < config.heads_first)
    workers = run.env if isinstance(run.env, RolloutWorkers) else None
    collect = workers.collect_rollout if workers else partial(collect_rollout, run.policy, run.env)
    with run.rollout_bar(config.chunk_steps_per_rollout * run.env.num_envs) as after_chunk:
        buffer, info, run.current = collect(
            run.current, config.chunk_steps_per_rollout,
            config.chain(), config.rollout(), run.learner.normalizer, run.seeds, after_chunk,
        )  # fmt: skip
    info = of_all_ranks(info, run.env)
    run.count(info.episodes, int(total(float(buffer.active.sum()))[0]))
    run.metrics |= info.metrics() | {"noise/sigma_min": sigma_min, "noise/sigma_max": sigma_max}
    return buffer


def update(run: Run, config: TrainingConfig, buffer: RolloutBuffer) -> None:
    """Advantages, then steps of the policy within its KL limit, then of the critic; at first of the critic alone."""
    done = run.iteration - 1
    warmup = warmup_lr(max(done - config.critic_warmup_iters, 0), config.lr_warmup_iterations)
    run.metrics |= run.learner.update(
        buffer,
        lr_factor=warmup * linear_decay(run.progress, config.lr_decay_ratio),
        critic_only=in_critic_warmup(done, config.critic_warmup_iters),
    )


def evaluate(run: Run, config: TrainingConfig) -> None:
    """Noise-free success on tuning seeds, which chooses the best checkpoint."""
    if result := play(run, config, config.eval_seed, config.eval_episodes):
        run.metrics |= result.metrics()
        run.keep_if_best(result)


def report(run: Run, config: TrainingConfig, when: Literal["before", "after"]) -> None:
    """Noise-free success on reporting seeds, before training and of the best checkpoint after; it chooses nothing."""
    from reinflow.distributed import is_writer
    from reinflow.evaluate import write_eval_info
    from reinflow.paired import change_since
    from reinflow_so101.policy_card import TASK_GROUP
    from reinflow_so101.report.after import played_policy, write_page

    if config.report_episodes == 0 or run.stopping() or (when == "before" and run.iteration > 0):
        return
    if when == "after":
        run.load_best()
    result = play(run, config, config.report_seed, config.report_episodes)
    if result and is_writer():
        info = result.to_lerobot_info(config.env_id or TASK_GROUP) | {"policy": played_policy(run, when)}
        write_eval_info(run.run_dir / f"eval_{when}.json", info)
        run.tracker.message(f"{when} training, seeds from {config.report_seed}: {result.summary()}")
        if when == "after" and (change := change_since(run.run_dir / "eval_before.json", result)):
            run.tracker.message(change)
        show_report(run, config, when, result)
        if when == "after":
            write_page(run, config)


def play(run: Run, config: TrainingConfig, first_seed: int, episodes: int) -> EvalResult | None:
    """Noise-free episodes on ``episodes`` seeds, by the policy object that acts in rollouts; None after a signal."""
    from reinflow.evaluate import EvaluationStopped, evaluate_seeds
    from reinflow.rollout import ROW_TILE, noise_free_actor
    from reinflow_so101.worlds import make_world

    act = run.unless_stopped(noise_free_actor(run.policy, config.chain()))
    make_env = partial(make_world, config.world())
    try:
        return evaluate_seeds(act, make_env, first_seed, episodes, max(config.num_parallel_envs, ROW_TILE))
    except EvaluationStopped:
        return None


# --- Commands ---------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str]) -> TrainingConfig:
    """Flags over the chosen preset, over a file (--config), or over the saved config.json with --resume."""
    return start_of(argv)[0]


def start_of(argv: Sequence[str]) -> tuple[TrainingConfig, ThisStart]:
    """The settings of a training, and what this start of it is for."""
    return parse_flags(argv, starting_point(argv, PRESETS), __doc__, ThisStart())


def start(argv: Sequence[str]) -> None:
    """Train, or with --check see whether it would."""
    config, this = start_of(argv)
    print(f"{'checking' if this.check else 'starting'} {config.preset}: loading the libraries and {config.policy_path}")
    if this.check:
        check_start(config)
    else:
        train(config)


def main() -> None:
    """train_reinflow.py, reinflow-train."""
    run_command("train_reinflow", lambda: in_ranks(lambda: start(sys.argv[1:])))


def sweep_main() -> None:
    """reinflow-sweep: many trainings, and what their settings did."""
    from reinflow_so101.commands.sweep import command

    run_command("reinflow-sweep", lambda: command(sys.argv[1:], PRESETS))


def memory_main() -> None:
    """reinflow-memory: every flag of a training, and what it needs of memory."""
    from reinflow_so101.memory_planner.plan import command

    run_command("reinflow-memory", lambda: command(sys.argv[1:], PRESETS))


if __name__ == "__main__":
    main()
