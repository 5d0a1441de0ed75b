"""Shortcut flow matching (Frans et al., arXiv 2410.12557): a policy that is told how far its steps go, so that few do.

    reinflow-shortcut --output-dir runs/shortcut                                # a flow_mlp, scripted demonstrations
    reinflow-shortcut --policy-dir tiny-base --dataset-root runs/demos --output-dir runs/shortcut         # a SmolVLA
    reinflow-eval --policy-path runs/shortcut --num-denoising-steps 4 --seed 5000 --output-dir runs/shortcut/eval4

Most of a batch learns by flow matching, told the finest step; the rest that one step of size d does what two of d / 2
do, by the moving average of the policy (reinflow/flow_losses.py). The result is a stock policy for the first of
``num_steps``; step_size.safetensors beside it is what reinflow-eval and train_reinflow.py turn it by into one for
another number of steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from reinflow import ConfigError, run_command
from reinflow.seeds import FIRST_REPORTING_SEED, FIRST_TUNING_SEED
from reinflow.settings import FRACTION, NOT_NEGATIVE, POSITIVE, RATE, SEED, Range, check_ranges, cut
from reinflow.stage import StageDirectory
from reinflow_so101.policies import EMBEDDED, FAMILIES
from reinflow_so101.policy_card import write_card
from reinflow_so101.stages.demonstrations import DECISION_STEPS
from reinflow_so101.stages.sft_flow_mlp import FlowMlpSftConfig
from reinflow_so101.stages.sft_smolvla import SftConfig
from reinflow_vla.directory import CONFIG_FILE, read_json
from so101_sim.tasks.registry import named

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from reinflow.policy import Context, FlowPolicy
    from reinflow.step_size import MovingAverage, StepSizeEmbedding

COMMAND = "reinflow-shortcut"
SCRIPTED_TASK, SCRIPTED_EPISODES = "lift", 30
LOG_EVERY = 10  # steps
OF_A_NEW_ONE = ("hidden_size", "chunk_size", "n_action_steps")
OF_SCRIPTED = ("first_seed",)
OF_A_SMOLVLA = ("repo_id", "decision_share", "rename_map", "control_hz")


@dataclass(frozen=True)
class ShortcutConfig:
    """Train a shortcut policy: a small MLP on simulator state, or a SmolVLA."""

    output_dir: Path
    """Gets the policy, reinflow.json (its environment), stage.json and metrics.jsonl; refused if it exists."""
    policy_dir: str = ""
    """Policy to start from: a SmolVLA ("tiny-base" and "tiny" name embedded ones) or a flow_mlp; empty builds a
    flow_mlp."""
    dataset_root: str = ""
    """Data to learn from: for a SmolVLA a LeRobotDataset with images; for a flow_mlp one of states (reinflow-demos
    --environment-state, reinflow-collect), or empty for scripted demonstrations in memory."""
    repo_id: str = "local/so101_pick"
    """Name of a SmolVLA's data set."""
    task: str = ""
    """Named task such as lift or lift_wide. Empty: lift for scripted demonstrations, else what the data says; data of
    states brings its own."""
    episodes: Annotated[int, NOT_NEGATIVE] = 0
    """Demonstrations; 0 is 30 scripted ones, or all of a data set."""
    first_seed: int = 1_000
    """Scripted episode i tried uses environment seed first_seed + i; all stay below the tuning seeds."""
    steps: Annotated[int, POSITIVE] = 1_000
    """Optimiser steps."""
    batch_size: Annotated[int, Range(2, 1e6)] = 128
    """Decisions per step."""
    lr: Annotated[float, RATE] = 1e-3
    """Peak of AdamW's learning rate; 50 steps of warm-up, then a cosine to zero."""
    weight_decay: Annotated[float, Range(0, 10)] = 1e-4
    """AdamW's."""
    finest_steps: int = 8
    """The most denoising steps that it learns, a power of two: flow matching is told 1 / finest_steps."""
    num_steps: tuple[int, ...] = (1, 2, 4, 8)
    """Denoising steps to evaluate with; the first is stored in the policy."""
    consistency_share: Annotated[float, FRACTION] = 0.25
    """Share of each batch that learns to take long steps; the rest is flow matching."""
    consistency_weight: Annotated[float, Range(0, 100)] = 1.0
    """Of the long steps' mean loss beside that of flow matching."""
    ema_decay: Annotated[float, Range(0, 0.999999)] = 0.999
    """Of the moving average that sets the targets, and that is what is evaluated and written. The first updates keep
    less, (1 + n) / (10 + n) after n of them, and this from the 9,000th on."""
    hidden_size: Annotated[int, Range(1, 65_536)] = 256
    """Width of a new flow_mlp's three hidden layers."""
    chunk_size: Annotated[int, Range(1, 1_000)] = 50
    """Actions that a new flow_mlp predicts."""
    n_action_steps: Annotated[int, Range(0, 1_000)] = 0
    """How many of them it executes; 0 is all."""
    jitter: Annotated[int, Range(0, 1_000)] = 2
    """Train on the frames up to so many control steps around each decision (a flow_mlp: after it) as well."""
    every_frame: bool = False
    """Train a flow_mlp on every frame of the data set, as for gaits, where a decision falls anywhere."""
    decision_share: Annotated[float, FRACTION] = 0.75
    """Share of a SmolVLA's batch near the frames at which a policy decides; the rest is spread over the episode."""
    rename_map: str = ""
    """Which recorded camera is which of a SmolVLA's, as in reinflow-sft."""
    control_hz: Annotated[float, Range(1, 1_000, or_zero=True)] = 0.0
    """Frames a second of a SmolVLA's data set, where they are not 50."""
    save_every: Annotated[int, POSITIVE] = 250
    """Steps between savings of what --resume goes on from."""
    eval_episodes: Annotated[int, NOT_NEGATIVE] = 200
    """Noise-free episodes at the end for each of num_steps; 0 skips them."""
    eval_seed: Annotated[int, SEED] = FIRST_TUNING_SEED
    """First seed of these, a tuning seed: 5,000 to 9,999."""
    num_parallel_envs: Annotated[int, Range(1, 65_536)] = 32
    """Environments that act at once in the evaluation."""
    seed: Annotated[int, SEED] = 0
    """Of weights, batches and flow noise."""
    resume: bool = False
    """Go on with a stage that was cut off, in output_dir."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.finest_steps < 2 or self.finest_steps & (self.finest_steps - 1):
            raise ConfigError(f"finest_steps is {self.finest_steps}: use a power of two, 2 or more")
        if not self.num_steps or min(self.num_steps) < 1 or max(self.num_steps) > self.finest_steps:
            raise ConfigError(
                f"num_steps is {self.num_steps}: name numbers of denoising steps from 1 to "
                f"finest_steps={self.finest_steps}, or raise that"
            )
        if not 1 <= self.consistency_rows < self.batch_size:
            raise ConfigError(
                f"consistency_share={self.consistency_share} is {self.consistency_rows} of batch_size="
                f"{self.batch_size} rows: leave one or more to each of the two losses"
            )
        if self.eval_seed < FIRST_TUNING_SEED or self.eval_seed + self.eval_episodes > FIRST_REPORTING_SEED:
            raise ConfigError(
                f"eval_seed is {self.eval_seed} for {self.eval_episodes} episodes: use tuning seeds, "
                f"{FIRST_TUNING_SEED} to {FIRST_REPORTING_SEED - 1}"
            )
        if self.task:
            named(self.task)
        if not self.policy_dir:
            self.of_flow_mlp()  # refuses what that stage would
        self.refuse_unread(OF_A_NEW_ONE, bool(self.policy_dir), "of a new policy", "policy_dir")
        self.refuse_unread(OF_SCRIPTED, bool(self.dataset_root), "of scripted demonstrations", "dataset_root")
        self.refuse_unread(OF_A_SMOLVLA, not self.policy_dir, "of a SmolVLA", "no policy_dir")
        self.refuse_unread(("every_frame",), not self.dataset_root, "of a data set", "no dataset_root")

    def refuse_unread(self, names: tuple[str, ...], unread: bool, what: str, given: str) -> None:
        """Raise ConfigError for settings that would not be read."""
        defaults = {name: type(self).__dataclass_fields__[name].default for name in names}
        found = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) != defaults[name]]
        if unread and found:
            raise ConfigError(f"{', '.join(found)} is {what}, and {given} is given: leave it out")

    @property
    def consistency_rows(self) -> int:
        """Of a batch."""
        return round(self.batch_size * self.consistency_share)

    def of_flow_mlp(self) -> FlowMlpSftConfig:
        """What reinflow-sft-mlp's functions take."""
        scripted = {"episodes": self.episodes or SCRIPTED_EPISODES, "first_seed": self.first_seed}
        if self.dataset_root:  # which says them itself
            scripted = {"episodes": SCRIPTED_EPISODES, "first_seed": FlowMlpSftConfig.first_seed}
        return cut(
            self, FlowMlpSftConfig, task=self.task or SCRIPTED_TASK, **scripted,
            dataset_episodes=self.episodes, one_step_share=0.0, num_denoising_steps=self.num_steps[0],
        )  # fmt: skip

    def of_smolvla(self, num_denoising_steps: int) -> SftConfig:
        """What reinflow-sft's functions take."""
        return cut(
            self, SftConfig, policy_dir=Path(self.policy_dir), dataset_root=Path(self.dataset_root), held_out=0,
            num_steps=(num_denoising_steps,),
        )  # fmt: skip


# --- One step of the training -----------------------------------------------------------------------------------------


@dataclass
class Batch:
    """B decisions."""

    context: Context
    action: Tensor  # (B, H, D) normalised
    counts: Tensor | None = None  # bool, broadcast to (B, H, D): what has an error; None: everything


@dataclass
class Student:
    """A policy that is to learn, of whichever family, and what the training asks of it."""

    policy: FlowPolicy
    batch: Callable[[], Batch]
    flow_time: Callable[[int], Tensor]  # for flow matching, (B,) in (0, 1]
    weight: Callable[[Tensor], Tensor] | None  # of a row's velocity error at flow times (B,)
    generators: dict[str, torch.Generator | np.random.Generator]
    success: Callable[[int], dict[str, Any]]  # noise-free, with so many steps folded in; {} where nothing is played
    write: Callable[[Path], None]  # the stock policy and what it is for


class Shortcut:
    """A student with its step-size embedding and the moving average of both."""

    def __init__(self, config: ShortcutConfig, student: Student) -> None:
        from torch import nn

        from reinflow.step_size import MovingAverage, StepSizeEmbedding

        self.config, self.student = config, student
        self.layer = student.policy.step_size_layer
        self.embedding: StepSizeEmbedding = StepSizeEmbedding(self.layer.out_features, config.finest_steps).to(
            student.policy.device
        )
        self.embedding.attach(self.layer)
        self.parameters = nn.ParameterList([*student.policy.policy_parameters(), *self.embedding.parameters()])
        self.average: MovingAverage = MovingAverage(list(self.parameters), config.ema_decay)

    def velocity(self, context: Context, x_t: Tensor, time: Tensor, step_size: Tensor) -> Tensor:
        """(B, H, D) of the student, told (B,) step sizes."""
        with self.embedding.of(step_size):
            return self.student.policy.velocity(context, x_t, time)[0]

    def averaged_velocity(self, context: Context, x_t: Tensor, time: Tensor, step_size: Tensor) -> Tensor:
        """The same of the moving average, which sets the targets."""
        with self.average.applied():
            return self.velocity(context, x_t, time, step_size)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Self-consistency on the first rows of a batch, flow matching on the rest."""
        import torch

        from reinflow.flow_losses import flow_matching_loss, sample_shortcut_times, shortcut_loss

        config, student = self.config, self.student
        rows, long = len(batch.action), config.consistency_rows
        noise = torch.randn(batch.action.shape).to(batch.action.device)
        time, step_size = (x.to(noise.device) for x in sample_shortcut_times(long, config.finest_steps))
        steps, flow = _rows(batch, slice(0, long)), _rows(batch, slice(long, rows))
        consistency, info = shortcut_loss(
            lambda x_t, t, d: self.velocity(steps.context, x_t, t, d),
            lambda x_t, t, d: self.averaged_velocity(steps.context, x_t, t, d),
            steps.action, noise[:long], time, step_size,
            student.weight(time) if student.weight else None, steps.counts,
        )  # fmt: skip
        flow_time = student.flow_time(rows - long).to(noise.device)
        finest = torch.full_like(flow_time, 1.0 / config.finest_steps)
        matching, more = flow_matching_loss(
            lambda x_t, t: self.velocity(flow.context, x_t, t, finest),
            flow.action, noise[long:], flow_time,
            student.weight(flow_time) if student.weight else None, flow.counts,
        )  # fmt: skip
        return matching + config.consistency_weight * consistency, info | more

    @contextmanager
    def stock(self, num_denoising_steps: int) -> Iterator[None]:
        """Within it the policy is the one that is written for so many steps, and needs no embedding."""
        with self.average.applied(), self.embedding.folded(self.layer, num_denoising_steps):
            yield

    def write(self, directory: Path) -> None:
        """The stock policy for the first of ``num_steps``, and the embedding beside it."""
        with self.stock(self.config.num_steps[0]):
            self.student.write(directory)
            self.embedding.save(directory)


def _rows(batch: Batch, rows: slice) -> Batch:
    context = {name: tensor[rows] for name, tensor in batch.context.items()}
    return Batch(context, batch.action[rows], None if batch.counts is None else batch.counts[rows])


# --- The state-based policy -------------------------------------------------------------------------------------------


def flow_mlp_student(config: ShortcutConfig, start: Path | None) -> Student:
    """A new flow_mlp, or the one in a directory, on decisions of scripted demonstrations or of a data set."""
    import torch

    from reinflow.flow_losses import action_weight
    from reinflow.flow_mlp import FlowMLP
    from reinflow_so101.stages.sft_flow_mlp import collect, decision_samples, game_to_learn, read_samples
    from reinflow_so101.stages.state_game import refuse_other_sizes

    torch.manual_seed(config.seed)
    old = FlowMLP.from_pretrained(start) if start else None
    asked = config.of_flow_mlp()
    if old:
        asked = replace(asked, chunk_size=old.chunk_size, n_action_steps=old.n_action_steps)
    game = game_to_learn(asked)
    print(game, flush=True)
    if config.dataset_root:
        samples = read_samples(asked)
    else:
        samples = decision_samples(collect(asked), asked.chunk_size, asked.jitter, asked.decides_every)
    states, actions = map(torch.from_numpy, samples)
    dims = states.shape[1], actions.shape[2]
    policy = old or FlowMLP(*dims, asked.chunk_size, hidden_size=asked.hidden_size, n_action_steps=asked.n_action_steps)
    refuse_other_sizes(config.policy_dir, policy, *dims)
    if not old:
        policy.set_statistics(states, actions, torch.tensor(game.least_state_std(dims[0])))
    policy.train_only(["trunk", "head"])
    context, target = policy.state_context(states), (actions - policy.action_mean) / policy.action_std
    rows = torch.Generator().manual_seed(config.seed)

    def batch() -> Batch:
        drawn = torch.randint(len(target), (config.batch_size,), generator=rows)
        return Batch({name: tensor[drawn] for name, tensor in context.items()}, target[drawn])

    def success(steps: int) -> dict[str, Any]:
        seeds = range(config.eval_seed, config.eval_seed + config.eval_episodes)
        result = game.evaluate(policy, steps, seeds, config.num_parallel_envs)
        return game.score(result) if result else {}

    def write(directory: Path) -> None:
        policy.num_denoising_steps = config.num_steps[0]
        policy.save_pretrained(directory)
        game.write_card(directory)

    return Student(policy, batch, lambda n: 1 - torch.rand(n), action_weight, {"rows": rows}, success, write)


# --- SmolVLA ----------------------------------------------------------------------------------------------------------


def smolvla_student(config: ShortcutConfig, start: Path) -> Student:
    """A SmolVLA on a data set with images: the frozen prefix once a batch, every pass runs the action expert alone."""
    import torch

    from reinflow.evaluate import wilson_interval
    from reinflow_smolvla import ReinFlowSmolVLA
    from reinflow_so101.stages import sft_smolvla as sft
    from reinflow_so101.stages.batches import TrainingBatches
    from reinflow_vla.base import TrainableGroups
    from reinflow_vla.smolvla_directory import load_smolvla

    asked = config.of_smolvla(config.num_steps[0])
    every = int(read_json(start / CONFIG_FILE).get("n_action_steps") or DECISION_STEPS)
    data = sft.whole_data(asked, start, every)
    episodes = config.episodes or len(data.state)
    game = sft.played(asked, start, int(np.median(data.lengths)), every)
    print(f"{episodes} episodes, {len(data.images)} cameras\n{game.summary()}", flush=True)
    torch.manual_seed(config.seed)
    stock, before, _ = load_smolvla(start, num_steps=config.num_steps[0])
    processors = sft.with_action_statistics(stock, before, data)
    policy = ReinFlowSmolVLA(
        stock, *processors, num_denoising_steps=config.num_steps[0], n_action_steps=stock.config.chunk_size,
        sigma_min=0.1, sigma_max=0.1, groups=TrainableGroups(True, True, True, False, False), critic_hidden_size=8,
    )  # fmt: skip
    stock.config.n_action_steps = every
    batches = TrainingBatches(data, stock, processors[0], cache=True)
    frames = np.random.default_rng(config.seed)

    def batch() -> Batch:
        drawn = sft.draw_frames(frames, asked, data, episodes, every)
        inputs = batches.batch(*drawn)
        with batches.vision(stock, *drawn):
            context = policy.encode(inputs)
        counts = (~inputs["action_is_pad"])[:, :, None] & (torch.arange(policy.padded_action_dim) < policy.action_dim)
        return Batch(context, stock.prepare_action(inputs), counts)

    def success(steps: int) -> dict[str, Any]:
        found = sft.evaluate_success(stock, *processors, config.of_smolvla(steps), game)
        stock.config.num_steps = config.num_steps[0]
        if not found:
            return {}
        rate, n = found[f"K{steps}"], config.eval_episodes
        return {"success": rate, "success_ci95": [round(x, 4) for x in wilson_interval(round(rate * n), n)]}

    def write(directory: Path) -> None:
        policy.save_pretrained(directory)
        if game.known:
            write_card(directory, game.env)

    return Student(
        policy, batch, lambda n: stock.model.sample_time(n, policy.device), None, {"frames": frames}, success, write
    )


# --- The stage --------------------------------------------------------------------------------------------------------


def starting_point(config: ShortcutConfig) -> tuple[str, Path | None]:
    """Family and directory of what is started from; raises ConfigError for what cannot learn step sizes."""
    from reinflow.step_size import STEP_SIZE_FILE

    if not config.policy_dir:
        return "flow_mlp", None
    embedded, local = EMBEDDED.get(config.policy_dir), Path(config.policy_dir)
    if embedded:
        directory = embedded.embedded
    elif (local / CONFIG_FILE).is_file() and read_json(local / CONFIG_FILE).get("type") == "flow_mlp":
        directory = local
    else:
        directory = FAMILIES["smolvla"].directory(config.policy_dir)
    family = str(read_json(directory / CONFIG_FILE).get("type"))
    if family not in ("flow_mlp", "smolvla"):
        raise ConfigError(f"policy_dir={config.policy_dir} is a {family}: step sizes are for a flow_mlp or a SmolVLA")
    if (directory / STEP_SIZE_FILE).is_file():
        raise ConfigError(f"policy_dir={config.policy_dir} is a shortcut policy already: take one that is none")
    if family == "smolvla" and not config.dataset_root:
        raise ConfigError(
            f"policy_dir={config.policy_dir} is a SmolVLA: it needs --dataset-root with images (reinflow-demos)"
        )
    return family, directory


def train_shortcut(config: ShortcutConfig) -> dict[str, Any]:
    """Train, evaluate with every number of steps, write the policy; returns what was measured."""
    family, start = starting_point(config)
    if family == "flow_mlp":
        config.refuse_unread(OF_A_SMOLVLA, True, "of a SmolVLA", "a flow_mlp")
        config.refuse_unread(("task",), bool(config.dataset_root), "of scripted demonstrations", "dataset_root")
    else:
        config.refuse_unread(("every_frame",), True, "of a flow_mlp", "a SmolVLA")
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(config).items()}
    with StageDirectory.open(config.output_dir, settings, config.resume, COMMAND) as stage:
        if family == "smolvla" and start:
            shortcut = Shortcut(config, smolvla_student(config, start))
        else:
            shortcut = Shortcut(config, flow_mlp_student(config, start))
        record: dict[str, Any] = {"seconds": fit_shortcut(config, shortcut, stage)}
        record |= success_by_steps(config, shortcut)
        shortcut.write(config.output_dir)
        stage.finish(record)
    print(f"wrote {config.output_dir}")
    return record


def fit_shortcut(config: ShortcutConfig, shortcut: Shortcut, stage: StageDirectory) -> float:
    """The descent, from where it was cut off; returns the seconds that it took now."""
    from reinflow.supervised import FitSettings, Progress, fit

    modules = {"learned": shortcut.parameters, "average": shortcut.average}
    progress = Progress(stage.progress_dir, modules, shortcut.student.generators, config.save_every)
    stage.resumed_at(progress.done)
    settings = FitSettings(config.steps, config.lr, config.weight_decay)
    began = time.perf_counter()
    parameters, draw = list(shortcut.parameters), shortcut.student.batch
    for step, info in fit(parameters, lambda: shortcut.loss(draw()), settings, progress, "shortcut"):
        shortcut.average.update()
        if step % LOG_EVERY == 0 or step == config.steps:
            stage.log(step, {name: round(value, 6) for name, value in info.items()})
    return round(time.perf_counter() - began, 1)


def success_by_steps(config: ShortcutConfig, shortcut: Shortcut) -> dict[str, Any]:
    """Noise-free figures on the tuning seeds, by number of denoising steps."""
    record: dict[str, Any] = {}
    for steps in config.num_steps if config.eval_episodes else ():
        with shortcut.stock(steps):
            record[f"K{steps}"] = shortcut.student.success(steps)
        print(f"K={steps}, {config.eval_episodes} seeds from {config.eval_seed}: {record[f'K{steps}']}", flush=True)
    return record


def main() -> None:
    """reinflow-shortcut."""
    import tyro

    config = tyro.cli(ShortcutConfig, description=ShortcutConfig.__doc__)
    run_command(COMMAND, lambda: train_shortcut(config))


if __name__ == "__main__":
    main()
