"""Reflow: a student learns the straight line from each noise to the action that the teacher's ODE makes of it, so that
few denoising steps, or one, do what the teacher needs ten for (Liu et al., arXiv 2209.03003).

    reinflow-reflow --policy-dir POLICY --output-dir runs/reflow --preset tiny
    reinflow-reflow --policy-dir runs/reflow --output-dir runs/reflow2 --preset tiny --round 2

Works on SmolVLA, Pi0 and flow_mlp. The teacher plays, every observation at which it decided is encoded once, and pairs
(x_0, x_1) are made there before the first step; teacher and student share the encoding, the frozen prefix. The student
starts as the teacher, so the teacher's own figures are those before the first step (step 0 of metrics.jsonl).
The line runs over the padded dims as well: they enter the network, and a sampler of several steps would leave the line
if they went elsewhere. A flow_mlp is not shown its noise at flow time 1, so its student of one step gives the mean of
the teacher's actions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from reinflow import ConfigError, run_command
from reinflow.progress import spinner
from reinflow.seeds import FIRST_REPORTING_SEED, FIRST_TUNING_SEED
from reinflow.settings import FRACTION, NOT_NEGATIVE, POSITIVE, RATE, SEED, Range, check_ranges
from reinflow.stage import STAGE_FILE
from reinflow_so101.command_line import flag_value, pick_device
from reinflow_so101.commands.evaluate import find_policy
from reinflow_so101.policies import EMBEDDED, PolicySettings, build_policy, family_of
from reinflow_so101.policy_card import env_of_task, known_env, stored_env, write_card
from reinflow_so101.worlds import gym_world
from reinflow_vla.directory import CONFIG_FILE, locate_policy, read_json, weights_file
from so101_sim.config import EnvConfig
from so101_sim.tasks.registry import describe, how_to_choose, named

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from reinflow.policy import FlowPolicy
    from reinflow.stage import StageDirectory
    from reinflow.supervised import FitSettings
    from reinflow_so101.stages.observations import Pairs
    from reinflow_vla.base import ReinFlowVLA

COMMAND = "reinflow-reflow"
ROUND_SHARES = (0.5, 0.25, 0.1)  # of the teacher's rate: round 1, 2, and from 3 on
SWEEP_SHARES = (0.1, 0.2, 0.5, 0.7, 1.0)
PAIRS_FILE = "pairs.safetensors"


@dataclass(frozen=True)
class ReflowConfig:
    """Straighten the flow of a policy, so that it acts in one denoising step as it did in ten."""

    policy_dir: str
    """The teacher: policy directory, run, checkpoint or hub id; "tiny", "tiny-pi0" and "flow_mlp" name the embedded
    policies."""
    output_dir: Path
    """Gets the student as a stock policy, stage.json and metrics.jsonl; refused if it exists."""
    preset: Literal["published", "tiny"] = "published"
    """Values for policies of the published sizes, those of the reflow guide, or for the small ones here."""
    round: Annotated[int, Range(1, 100)] = 1
    """Which reflow of the policy this is. Each makes the flow straighter, so the rate falls: a half, a quarter, from
    the third on a tenth of teacher_lr."""
    teacher_lr: Annotated[float, RATE] = 1e-4
    """Peak rate at which such a policy is trained from demonstrations. The tiny ones learn at 1e-3, ten times the
    published ones' rate, and so do their students."""
    lr: Annotated[float, Range(0, 10)] = 0.0
    """Peak of AdamW's learning rate; 0 takes the round's. A student that starts as a good policy forgets at its
    teacher's rate: such a one is refused."""
    allow_large_lr: bool = False
    """Take a rate of teacher_lr or more."""
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 500
    """Steps until the peak; a cosine to zero follows."""
    steps: Annotated[int, POSITIVE] = 15_000
    """Optimiser steps."""
    batch_size: Annotated[int, POSITIVE] = 32
    """Pairs per step."""
    grad_clip: Annotated[float, NOT_NEGATIVE] = 10.0
    """Longest gradient; 0 is off."""
    one_step_share: Annotated[float, FRACTION] = 0.3
    """Share of each batch at flow time 1, where every sampler starts and one with a single step ends. The guide draws
    all times uniformly: 0."""
    num_denoising_steps: Annotated[int, Range(1, 1_000)] = 1
    """K, stored with the student."""
    teacher_steps: Annotated[int, Range(1, 1_000)] = 10
    """Denoising steps of the teacher's ODE."""
    episodes: Annotated[int, POSITIVE] = 1_500
    """Episodes that the teacher plays noise-free, on training seeds from 0 on, for observations."""
    dataset_root: str = ""
    """LeRobotDataset to take the observations from instead, near the decisions; of a SmolVLA or Pi0."""
    repo_id: str = "local/so101_pick"
    """Name of the dataset."""
    jitter: Annotated[int, Range(0, 1_000)] = 2
    """Frames of the dataset so near to a decision are taken."""
    num_pairs: Annotated[int, POSITIVE] = 32_000
    """Pairs of noise and action, made before the first step, several for each observation."""
    num_held_out: Annotated[int, POSITIVE] = 128
    """Pairs of other observations, a tenth of all, that loss, straightness and errors are measured on."""
    task: str = ""
    """Named task to play, such as lift or lift_wide; empty takes the one that the policy was made for."""
    measure_every: Annotated[int, POSITIVE] = 500
    """Steps between measurements on the held-out pairs."""
    save_every: Annotated[int, POSITIVE] = 500
    """Steps between what a killed stage goes on from."""
    eval_steps_k: tuple[int, ...] = (1, 2, 4, 10)
    """Numbers of denoising steps whose actions are compared with the teacher's, and whose success is counted."""
    eval_episodes: Annotated[int, NOT_NEGATIVE] = 200
    """Noise-free episodes at each of these, of the teacher before and of the student after; 0 skips them."""
    eval_seed: Annotated[int, SEED] = FIRST_TUNING_SEED
    """First seed of these, a tuning seed: 5,000 to 9,999."""
    num_parallel_envs: Annotated[int, Range(1, 65_536)] = 32
    """Environments that act at once."""
    sweep_lr: bool = False
    """Try five rates, teacher_lr times .1, .2, .5, .7 and 1, for sweep_steps each on the same pairs, recommend one, and
    write no policy."""
    sweep_steps: Annotated[int, POSITIVE] = 1_000
    """Steps of each of these."""
    pi0_tokenizer_path: str = ""
    """Folder with PaliGemma's tokenizer, for a Pi0 whose stored tokenizer cannot be had."""
    seed: Annotated[int, SEED] = 0
    """Of pairs, batches and flow times."""
    num_threads: Annotated[int, NOT_NEGATIVE] = 0
    """Torch's; 0 leaves them."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the policy runs."""
    resume: bool = False
    """Go on with the stage in output_dir that was cut off."""

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return self.lr or self.teacher_lr * ROUND_SHARES[min(self.round, len(ROUND_SHARES)) - 1]


SIZES: dict[str, dict[str, Any]] = {
    "published": {},
    "tiny": {
        "preset": "tiny", "teacher_lr": 1e-3, "warmup_steps": 100, "steps": 4_000, "num_pairs": 12_000,
        "episodes": 1_200, "num_threads": 1, "device": "cpu",
    },
}  # fmt: skip


def check_config(config: ReflowConfig) -> None:
    """Raise a ConfigError for what cannot work."""
    check_ranges(config)
    if config.task:
        named(config.task)
    if not config.sweep_lr and config.rate >= config.teacher_lr and not config.allow_large_lr:
        raise ConfigError(
            f"lr={config.rate:g} is at least teacher_lr={config.teacher_lr:g}, the rate of a training from "
            "demonstrations: the student starts as a good policy and would forget it. Lower --lr (round "
            f"{config.round}: {replace(config, lr=0.0).rate:g}), or add --allow-large-lr"
        )
    if not config.eval_steps_k or min(config.eval_steps_k) < 1:
        raise ConfigError(f"eval_steps_k is {config.eval_steps_k}: name at least one number of denoising steps")
    if not FIRST_TUNING_SEED <= config.eval_seed <= FIRST_REPORTING_SEED - config.eval_episodes:
        raise ConfigError(
            f"eval_seed is {config.eval_seed} for {config.eval_episodes} episodes: use tuning seeds, "
            f"{FIRST_TUNING_SEED} to {FIRST_REPORTING_SEED - 1}"
        )
    if not config.dataset_root and config.episodes > FIRST_TUNING_SEED:
        raise ConfigError(f"episodes is {config.episodes}: the teacher plays seeds below {FIRST_TUNING_SEED}")


# --- The teacher ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """The teacher's directory and what it was made for."""

    directory: Path
    family: str
    env: EnvConfig
    executed: int  # actions of a chunk
    known: bool  # whether something says which task it is for
    chunk_size: int

    @classmethod
    def of(cls, config: ReflowConfig) -> Source:
        """Raises ConfigError or PolicyDirectoryError for what is no such policy."""
        from reinflow.step_size import STEP_SIZE_FILE

        local = config.policy_dir in EMBEDDED or Path(config.policy_dir).is_dir()
        directory = find_policy(config.policy_dir) if local else locate_policy(config.policy_dir)
        family, stored = family_of(directory), read_json(directory / CONFIG_FILE)
        if family is None:
            raise ConfigError(
                f"policy_dir={config.policy_dir} is of type {stored.get('type')}: reflow needs a flow policy"
            )
        if (directory / STEP_SIZE_FILE).is_file():
            raise ConfigError(f"policy_dir={config.policy_dir} is a shortcut policy, which takes long steps already")
        if elsewhere := gym_world(directory):
            raise ConfigError(
                f"policy_dir={config.policy_dir} acts in {elsewhere.env_id}: reflow is of the arm's policies"
            )
        name = "pi0" if "pi0" in family.types else family.types[0]
        if name == "flow_mlp" and config.dataset_root:
            raise ConfigError(
                "dataset_root is for policies with cameras: leave it out, a flow_mlp plays for its states"
            )
        env = env_of_task(directory, config.task) if config.task else stored_env(directory)
        chunk = int(stored.get("chunk_size") or 0)
        executed = int(stored.get("n_action_steps") or chunk)
        return cls(directory, name, env, executed, bool(config.task or known_env(directory)), chunk)


def load_teacher(config: ReflowConfig, source: Source, decisions: int) -> FlowPolicy:
    """The teacher, all but its frozen prefix ready to learn; it denoises whole chunks."""
    settings = PolicySettings(
        model_type=source.family, policy_path=str(source.directory), chunk_size=source.chunk_size,
        n_action_steps=source.executed if source.family == "flow_mlp" else source.chunk_size,
        num_denoising_steps=config.teacher_steps, sigma_min=0.1, sigma_max=0.1, train_action_head=True,
        train_time_mlp=True, train_full_expert=True, train_noise_head=False, train_critic=False,
        critic_input="features", critic_hidden_size=8, seed=config.seed, prefix_cache="auto", prefix_cache_gb=0.0,
        compile_expert=False, pi0_tokenizer_path=config.pi0_tokenizer_path, pi0_vlm_dtype="bfloat16",
        pi0_gradient_checkpointing=False, peft_rank=0,
    )  # fmt: skip
    return build_policy(settings, source.env, decisions, pick_device(config.device))


@contextmanager
def executing(policy: FlowPolicy, n_action_steps: int) -> Iterator[None]:
    """Within it only ``n_action_steps`` of a chunk are executed, as the teacher does."""
    whole = policy.n_action_steps
    policy.n_action_steps = n_action_steps
    try:
        yield
    finally:
        policy.n_action_steps = whole


def prepare_pairs(config: ReflowConfig, source: Source, policy: FlowPolicy, file: Path) -> Pairs:
    """The pairs in ``file``, or new ones that go into it."""
    from reinflow.flow import ChainSpec
    from reinflow_so101.stages.observations import Pairs, make_pairs, play, read_frames
    from so101_sim.vector.make import make_vector_env

    if file.is_file():
        return Pairs.load(file)
    spec = ChainSpec(config.teacher_steps)
    if config.dataset_root:
        root, control_hz = Path(config.dataset_root), source.env.control_hz
        contexts = read_frames(
            cast("ReinFlowVLA", policy), root, config.repo_id, config.jitter, source.executed, control_hz
        )
    else:
        make_env = partial(make_vector_env, source.env)
        with executing(policy, source.executed):
            contexts, success = play(policy, make_env, range(config.episodes), config.num_parallel_envs, spec)
        print(f"the teacher at K={config.teacher_steps}: {100 * success:.1f} % of {config.episodes} training seeds")
    total = len(next(iter(contexts.values())))
    print(f"{total} observations, {config.num_pairs} pairs", flush=True)
    pairs = make_pairs(policy, contexts, config.num_pairs, config.num_held_out, spec, config.seed)
    pairs.save(file)
    return pairs


# --- The student ------------------------------------------------------------------------------------------------------


def batch_loss(
    policy: FlowPolicy, pairs: Pairs, config: ReflowConfig, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """The loss of pairs drawn at random, a share of them at flow time 1."""
    import torch

    from reinflow_so101.stages.straightness import reflow_loss

    rows = torch.randint(pairs.num_training, (config.batch_size,), generator=generator)
    time = 1 - torch.rand(config.batch_size, generator=generator)  # never 0, where a velocity has no meaning
    time[torch.rand(config.batch_size, generator=generator) < config.one_step_share] = 1.0
    context, x_0, x_1 = pairs.batch(policy, rows)
    return reflow_loss(policy, context, x_0, x_1, time.to(policy.device))[0], {}


def success(config: ReflowConfig, source: Source, policy: FlowPolicy) -> dict[str, float]:
    """Noise-free success on the tuning seeds, "success_K1" and so on; empty without episodes."""
    from reinflow.evaluate import evaluate_seeds
    from reinflow.flow import ChainSpec
    from reinflow.rollout import noise_free_actor
    from so101_sim.vector.make import make_vector_env

    found: dict[str, float] = {}
    for k in config.eval_steps_k if config.eval_episodes else ():
        with executing(policy, source.executed):
            result = evaluate_seeds(
                noise_free_actor(policy, ChainSpec(k)), partial(make_vector_env, source.env),
                config.eval_seed, config.eval_episodes, config.num_parallel_envs,
            )  # fmt: skip
        found[f"success_K{k}"] = result.success_rate
    return found


def fit_settings(config: ReflowConfig, lr: float, steps: int) -> FitSettings:
    """The descent; betas and decay are LeRobot's for these policies."""
    from reinflow.supervised import FitSettings

    warmup = min(config.warmup_steps, steps // 2)
    return FitSettings(steps, lr, 1e-10, (0.9, 0.95), warmup, config.grad_clip)


class Averages:
    """Means of what every step reports, between two measurements."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def take(self) -> dict[str, float]:
        """The means since the last call."""
        rows, self.rows = self.rows, []
        return {name: sum(row[name] for row in rows) / len(rows) for name in ("loss", "grad_norm", "lr")}


def train(config: ReflowConfig, policy: FlowPolicy, pairs: Pairs, stage: StageDirectory) -> dict[str, float]:
    """Descend, measure, warn; returns the last measurement."""
    import torch

    from reinflow.supervised import Progress, fit
    from reinflow_so101.stages.straightness import measure, summary, trouble

    parameters = policy.policy_parameters()
    generator = torch.Generator().manual_seed(config.seed)
    # What is frozen is left out: it is the teacher's.
    learns = {"learns": torch.nn.ParameterList(parameters)}
    progress = Progress(stage.progress_dir, learns, {"batches": generator}, config.save_every)
    stage.resumed_at(progress.done)
    history = [row for row in stage.metrics if "held_out_loss" in row]
    warned, since = bool(trouble(history, config.rate)), Averages()
    steps = fit(
        parameters, lambda: batch_loss(policy, pairs, config, generator),
        fit_settings(config, config.rate, config.steps), progress, "reflow",
    )  # fmt: skip
    for step, info in steps:
        since.rows.append(info)
        if step % config.measure_every and step != config.steps:
            continue
        row = since.take() | measure(policy, pairs, config.eval_steps_k)
        row["teacher_loss"] = history[0]["held_out_loss"]
        stage.log(step, row)
        history.append({"step": step, **row})
        print(summary(step, row, history[0]), flush=True)
        if not warned and (said := trouble(history, config.rate)):
            warned = True
            print(f"warning: {said}", flush=True)
    return history[-1]


def sweep(config: ReflowConfig, policy: FlowPolicy, pairs: Pairs, stage: StageDirectory) -> float:
    """The guide's grid search: short descents from the teacher on the same batches; returns the recommended rate."""
    import torch

    from reinflow.supervised import FitError, fit
    from reinflow_so101.stages.straightness import measure

    parameters = policy.policy_parameters()
    teacher = [parameter.detach().clone() for parameter in parameters]
    done = {row["lr"]: row for row in stage.metrics if "grad_norm_max" in row}
    for share in SWEEP_SHARES:
        lr = share * config.teacher_lr
        if lr in done:
            continue
        with torch.no_grad():
            for parameter, start in zip(parameters, teacher, strict=True):
                parameter.copy_(start)
        generator = torch.Generator().manual_seed(config.seed)
        steps = fit(
            parameters, partial(batch_loss, policy, pairs, config, generator),
            fit_settings(config, lr, config.sweep_steps), label=f"lr {lr:g}",
        )  # fmt: skip
        try:
            norms = [info["grad_norm"] for _, info in steps]
            figures = {"lr": lr, "grad_norm": sum(norms) / len(norms), "grad_norm_max": max(norms)}
            done[lr] = figures | measure(policy, pairs, config.eval_steps_k)
        except FitError as error:
            print(f"lr {lr:g}: {error}", flush=True)
            continue
        stage.log(config.sweep_steps, done[lr])
        print(
            f"lr {lr:<8g} held-out loss {done[lr]['held_out_loss']:.5f}  gradient {done[lr]['grad_norm']:.3f}, at most "
            f"{done[lr]['grad_norm_max']:.3f}  straightness {done[lr]['straightness']:.5f}", flush=True,
        )  # fmt: skip
    if not done:
        raise FitError("no rate of the sweep gave a finite loss: lower --teacher-lr")
    best = min(done, key=lambda lr: done[lr]["held_out_loss"])
    print(f"recommended: --lr {best:g}, by the held-out loss after {config.sweep_steps} steps")
    return best


def export(config: ReflowConfig, source: Source, policy: FlowPolicy) -> None:
    """Write the student as a stock policy, of num_denoising_steps and of what the teacher executes."""
    policy.num_denoising_steps, policy.n_action_steps = config.num_denoising_steps, source.executed
    if source.family != "flow_mlp":
        library = cast("ReinFlowVLA", policy)
        setattr(library.vla.config, library.num_steps_field, config.num_denoising_steps)
        library.vla.config.n_action_steps = source.executed
    policy.save_pretrained(config.output_dir)
    if source.known:
        write_card(config.output_dir, source.env)


def reflow(config: ReflowConfig) -> dict[str, Any]:
    """Play, make pairs, train, evaluate, save; returns what was measured.

    Raises:
        UserError: a setting, the policy or the data does not fit; each with its remedy.
    """
    import torch

    from reinflow.checksums import sha256
    from reinflow.stage import StageDirectory
    from reinflow_so101.stages.straightness import measure

    check_config(config)
    source = Source.of(config)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    settings: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(config)}
    settings |= {"output_dir": str(config.output_dir), "teacher_weights": sha256(weights_file(source.directory))}
    why = "" if source.known else f"; nothing says so: {how_to_choose()}"
    print(f"task: {describe(source.env)}{why}", flush=True)
    if (made := _round_of(source.directory)) and config.round <= made:
        print(f"the teacher is the student of round {made}: --round {made + 1} takes the rate of the next")
    with StageDirectory.open(config.output_dir, settings, config.resume, COMMAND) as stage:
        per_episode = -(-source.env.max_steps_per_episode // source.executed)
        with spinner("loading the teacher"):
            policy = load_teacher(config, source, config.episodes * per_episode)
        pairs = prepare_pairs(config, source, policy, stage.progress_dir / PAIRS_FILE)
        if config.sweep_lr:
            record: dict[str, Any] = {"recommended_lr": sweep(config, policy, pairs, stage)}
            stage.finish(record)
            return record
        if not any(row["step"] == 0 for row in stage.metrics):  # the student is the teacher still
            stage.log(0, measure(policy, pairs, config.eval_steps_k) | success(config, source, policy))
        teacher = next(row for row in stage.metrics if row["step"] == 0)
        last = train(config, policy, pairs, stage)
        record = {"lr": config.rate, "teacher": teacher, "student": last | success(config, source, policy)}
        export(config, source, policy)
        stage.finish(record)
    _report(record, config)
    return record


def _round_of(directory: Path) -> int:
    """The round whose student a policy is; 0 for other policies."""
    stage = read_json(directory / STAGE_FILE) if (directory / STAGE_FILE).is_file() else {}
    return int(stage["round"]) if stage.get("command") == COMMAND else 0


def _report(record: dict[str, Any], config: ReflowConfig) -> None:
    teacher, student = record["teacher"], record["student"]
    for k in config.eval_steps_k:
        counted = "".join(
            f", success {100 * who[f'success_K{k}']:.1f} %" if f"success_K{k}" in who else ""
            for who in (teacher, student)
        )
        print(
            f"K={k}: action error {teacher[f'action_error_K{k}']:.4f} (teacher) {student[f'action_error_K{k}']:.4f} "
            f"(student){counted}"
        )
    print(f"wrote {config.output_dir}, K={config.num_denoising_steps}")


def parse_args(argv: Sequence[str]) -> ReflowConfig:
    """Flags over the preset's values. Raises ConfigError."""
    import tyro

    name = flag_value(argv, "--preset") or "published"
    given = SIZES.get(name, {})  # tyro names the known ones
    default = replace(ReflowConfig(policy_dir=tyro.MISSING, output_dir=tyro.MISSING), **given)
    return tyro.cli(ReflowConfig, args=list(argv), default=default, description=__doc__, prog=COMMAND)


def main() -> None:
    """reinflow-reflow."""
    run_command(COMMAND, lambda: reflow(parse_args(sys.argv[1:])))


if __name__ == "__main__":
    main()
