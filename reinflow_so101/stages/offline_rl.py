"""Advantage-weighted offline RL (seeds/004, stage 2): better than its data's average, without an environment.

    reinflow-demos --output-dir runs/half --episodes 300 --noisy-share .5 --rewards --environment-state --no-images
    reinflow-sft-mlp --dataset-root runs/half --num-denoising-steps 4 --one-step-share 0 --output-dir runs/bc
    reinflow-offline-rl --policy-dir runs/bc --dataset-root runs/half --output-dir runs/aw

Without --dataset-root it records the first of these itself.

Two critics first learn what the data's own decisions were worth (the next action is the data's: SARSA), so that the
policy is not moved by values that mean nothing yet. Then policy and critics learn together; the next action is what
the moving average of the policy would do (`next_action=policy`, the document's), and every chunk of the data is
imitated with the weight of reinflow/offline.py. A shortcut policy (step_size.safetensors beside it) keeps its
self-consistency, with the same weights. The moving average is what is evaluated and written.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from reinflow import ConfigError, run_command
from reinflow.seeds import FIRST_REPORTING_SEED, FIRST_TUNING_SEED
from reinflow.settings import FRACTION, NOT_NEGATIVE, POSITIVE, RATE, SEED, Range, check_ranges
from reinflow.stage import StageDirectory, read_stage
from reinflow_so101.stages.offline_doctor import Watch
from reinflow_so101.stages.state_data import StateEpisodes, chunks_at, decision_starts, read_state_dataset
from reinflow_so101.stages.state_game import StateGame, game_of, refuse_other_sizes
from so101_sim.config import EnvConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from reinflow.flow_mlp import FlowMLP
    from reinflow.offline import Transitions
    from reinflow_so101.stages.demonstrations import DemoConfig

COMMAND = "reinflow-offline-rl"
DATA_FOLDER = "data"  # in output_dir, where no data set was named
HELD_OUT_ROWS = 2_000  # that Q is judged on: enough for a correlation, little to compute


@dataclass(frozen=True)
class OfflineRlConfig:
    """Improve a flow_mlp policy on a data set with rewards, by advantage-weighted flow matching."""

    policy_dir: Path
    """flow_mlp policy to start from, usually the supervised one of the same data: plain, reflow or shortcut."""
    output_dir: Path
    """Gets the policy, reinflow.json, stage.json, metrics.jsonl and findings.jsonl; refused if it exists."""
    dataset_root: str = ""
    """Data set of states with next.reward and next.done (reinflow-demos --rewards, reinflow-collect), or "minari:ID".
    Empty records 300 episodes of the arm's task, half of them by a noisy expert, into output_dir/data."""
    critic_steps: Annotated[int, NOT_NEGATIVE] = 1_000
    """Steps of the critics alone, at the start."""
    steps: Annotated[int, POSITIVE] = 2_000
    """Steps of policy and critics after that."""
    batch_size: Annotated[int, Range(2, 1e6)] = 128
    """Decisions per step. Q - mean Q and the weights' mean are the batch's."""
    lr: Annotated[float, RATE] = 1e-3
    """Peak of AdamW's learning rate, over all steps: warm-up, then a cosine to zero."""
    weight_decay: Annotated[float, Range(0, 10)] = 1e-4
    """AdamW's."""
    beta: Annotated[float, NOT_NEGATIVE] = 10.0
    """Sharpness of the weights (the document's); 0 is plain imitation, to compare with."""
    w_max: Annotated[float, Range(1, 1e9)] = 100.0
    """Largest weight before they are divided by their mean (the document's)."""
    reward_scale: Annotated[float, POSITIVE] = 0.1
    """Rewards are multiplied by it. beta times the spread of Q is what counts: a lift pays 9, so that it gives .9."""
    gamma: Annotated[float, FRACTION] = 0.99
    """Discount of a control step; a chunk of tau steps discounts by gamma^tau."""
    next_action: Literal["policy", "data"] = "policy"
    """What the critics' targets do next, once the policy learns: what its moving average would, or what the data
    did."""
    time_limit_is_terminal: Literal["auto", "yes", "no"] = "auto"
    """Whether nothing comes after a time limit. auto: yes where the state says how much time is left (the arm), no
    elsewhere, where the value of the last state stands for what would come."""
    num_denoising_steps: Annotated[int, NOT_NEGATIVE] = 0
    """K of the policy's own actions, of the evaluation and of what is written; 0 takes the policy's."""
    one_step_share: Annotated[float, FRACTION] = 0.5
    """Share of each batch at flow time 1, pure noise, if K is 1."""
    consistency_weight: Annotated[float, Range(0, 100)] = 0.3
    """Of a shortcut policy's self-consistency beside flow matching."""
    consistency_share: Annotated[float, FRACTION] = 0.25
    """Share of a shortcut policy's batch that it is computed on; the rest is flow matching."""
    jitter: Annotated[int, NOT_NEGATIVE] = 2
    """Train on the frames up to so many control steps after each decision as well."""
    every_frame: bool = False
    """Train on every frame, as for gaits, where a decision falls anywhere."""
    hidden_size: Annotated[int, Range(1, 65_536)] = 256
    """Width of the critics' two hidden layers."""
    target_decay: Annotated[float, Range(0, 0.999999)] = 0.995
    """Of the moving average of the critics that sets the targets. The first updates keep less, (1 + n) / (10 + n) after
    n of them, and this from the 1,800th on."""
    ema_decay: Annotated[float, Range(0, 0.999999)] = 0.999
    """Of the moving average of the policy, which is what is written. The first updates keep less, as above, and this
    from the 9,000th on."""
    held_out: Annotated[float, Range(0, 0.5)] = 0.1
    """Share of the episodes that nothing is learned from, on which Q is compared with returns."""
    eval_episodes: Annotated[int, NOT_NEGATIVE] = 200
    """Noise-free episodes before and after; 0 skips them."""
    eval_seed: Annotated[int, SEED] = FIRST_TUNING_SEED
    """First seed of these, a tuning seed: 5,000 to 9,999."""
    num_parallel_envs: Annotated[int, Range(1, 65_536)] = 32
    """Environments that act at once in the evaluation."""
    log_every: Annotated[int, POSITIVE] = 25
    """Steps between lines of metrics.jsonl."""
    save_every: Annotated[int, POSITIVE] = 250
    """Steps between savings of what --resume goes on from."""
    seed: Annotated[int, SEED] = 0
    """Of critics, batches and flow noise."""
    resume: bool = False
    """Go on with a stage that was cut off, in output_dir."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.eval_seed < FIRST_TUNING_SEED or self.eval_seed + self.eval_episodes > FIRST_REPORTING_SEED:
            raise ConfigError(
                f"eval_seed is {self.eval_seed} for {self.eval_episodes} episodes: use tuning seeds, "
                f"{FIRST_TUNING_SEED} to {FIRST_REPORTING_SEED - 1}"
            )

    @property
    def total_steps(self) -> int:
        """Of critics and policy."""
        return self.critic_steps + self.steps


# --- The data ---------------------------------------------------------------------------------------------------------


def split_episodes(count: int, held_out: float) -> tuple[set[int], set[int]]:
    """Numbers of the episodes to learn from and to judge by, the same for every training of a data set."""
    order = np.random.default_rng(0).permutation(count)
    judged = round(count * held_out)
    return set(order[judged:].tolist()), set(order[:judged].tolist())


def make_transitions(
    episodes: StateEpisodes, starts: list[tuple[int, int]], policy: FlowMLP, config: OfflineRlConfig, limit_ends: bool
) -> Transitions:
    """Decisions at (episode, frame) with what they earned and what came next, normalised by the policy's statistics.

    An episode that its time limit cut off and that would have gone on (``limit_ends`` off) lacks the state after its
    last action: its last state stands for that, one control step earlier.
    """
    import torch

    from reinflow.offline import Transitions, chunk_rewards

    assert episodes.rewards is not None
    n, gamma, rewards = policy.n_action_steps, config.gamma, episodes.rewards
    over = np.array([limit_ends or ended for ended in episodes.terminated])
    usable = np.array(episodes.ends) - ~over  # control steps with a state or an end behind them
    starts = [(episode, at) for episode, at in starts if at < usable[episode]]
    number, at = np.array(starts).reshape(-1, 2).T
    left = usable[number] - at
    steps, terminated = np.minimum(left, n), over[number] & (left <= n)
    paid = [rows[:end] * config.reward_scale for rows, end in zip(rewards, usable, strict=True)]
    chunks = np.stack([np.pad(paid[e][t : t + n], (0, n - len(paid[e][t : t + n]))) for e, t in starts])
    last = np.array([len(rows) - 1 for rows in rewards])[number]
    behind = list(zip(number.tolist(), np.minimum(at + steps, last).tolist(), strict=True))
    to_go = [discounted(rows, gamma) for rows in paid]

    def tensor(values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values), dtype=torch.float32)

    def states(where: Any) -> Tensor:
        return policy.state_context(tensor(chunks_at(episodes.states, where, 1)[:, 0]))["state"]

    def actions(where: Any, length: int) -> Tensor:
        return (tensor(chunks_at(episodes.actions, where, length)) - policy.action_mean) / policy.action_std

    return Transitions(
        states(starts), actions(starts, policy.chunk_size), chunk_rewards(tensor(chunks), tensor(steps), gamma),
        tensor(steps), tensor(terminated), states(behind), actions(behind, n), tensor([to_go[e][t] for e, t in starts]),
    )  # fmt: skip


def discounted(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """Sum of the rewards (L,) from each step on, discounted: (L,)."""
    sums, later = np.zeros(len(rewards)), 0.0
    for step in range(len(rewards) - 1, -1, -1):
        sums[step] = later = rewards[step] + gamma * later
    return sums


# --- The training -----------------------------------------------------------------------------------------------------


class OfflineLearner:
    """Policy and critics with their moving averages, on the transitions of a data set."""

    def __init__(self, config: OfflineRlConfig, policy: FlowMLP, data: Transitions, judged: Transitions) -> None:
        """``judged``: of held-out episodes."""
        import torch
        from torch import nn

        from reinflow.offline import DoubleQ
        from reinflow.step_size import MovingAverage, load_step_size

        self.config, self.policy, self.data, self.judged = config, policy, data, judged
        self.k, self.step = policy.num_denoising_steps, 0
        self.embedding = load_step_size(config.policy_dir, policy.step_size_layer)
        self.finest = finest_steps(config.policy_dir)
        if self.embedding:  # it was folded in for K steps: from here on a step's size is told again
            with torch.no_grad():
                policy.step_size_layer.bias.sub_(self.embedding.constant(self.k))
            self.embedding.attach(policy.step_size_layer)
        policy.train_only(["trunk", "head"])
        told = list(self.embedding.parameters()) if self.embedding else []
        self.learned = nn.ParameterList([*policy.policy_parameters(), *told])
        torch.manual_seed(config.seed)
        self.critic = DoubleQ(policy.state_dim, policy.n_action_steps * policy.action_dim, config.hidden_size)
        self.average = MovingAverage(list(self.learned), config.ema_decay)
        self.target = MovingAverage(list(self.critic.parameters()), config.target_decay)
        self.batches = torch.Generator().manual_seed(config.seed)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Everything that the training changes."""
        return {"learned": self.learned, "average": self.average, "critic": self.critic, "target": self.target}

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Within it the policy is its moving average, for its K steps."""
        folded = self.embedding.folded(self.policy.step_size_layer, self.k) if self.embedding else nullcontext()
        with self.average.applied(), folded:
            yield

    def velocity(self, states: Tensor, x_t: Tensor, time: Tensor, step_size: Tensor | None = None) -> Tensor:
        """(B, H, A), of a shortcut policy told (B,) step sizes."""
        told = self.embedding.of(step_size) if self.embedding and step_size is not None else nullcontext()
        with told:
            return self.policy.velocity({"state": states}, x_t, time)[0]

    def loss(self) -> tuple[Tensor, dict[str, float]]:
        """Of the critics, and after their time alone of the policy too."""
        import torch

        from reinflow.offline import advantage_weights, critic_loss

        index = torch.randint(len(self.data), (self.config.batch_size,), generator=self.batches)
        batch = self.data.rows(index)
        chunk = batch.actions[:, : self.policy.n_action_steps]
        loss, info = critic_loss(self.critic(batch.states, chunk), self.targets(batch))
        if self.step < self.config.critic_steps:
            return loss, info
        with torch.no_grad():
            weights, told = advantage_weights(
                self.critic.least(batch.states, chunk), self.config.beta, self.config.w_max
            )
        imitation, more = self.policy_loss(batch, weights)
        return loss + imitation, info | told | more

    def targets(self, batch: Transitions) -> Tensor:
        """(B,) of the critics."""
        import torch

        from reinflow.offline import chunk_targets, policy_chunk

        with torch.no_grad():
            chunk = batch.next_actions
            if self.step >= self.config.critic_steps and self.config.next_action == "policy":
                with self.acting():
                    chunk = policy_chunk(self.policy, {"state": batch.next_states}, self.k, len(chunk))
            with self.target.applied():
                values = self.critic.least(batch.next_states, chunk)
            return chunk_targets(batch.rewards, batch.steps, batch.terminated, values, self.config.gamma)

    def policy_loss(self, batch: Transitions, weights: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Weighted imitation of the batch: flow matching, and of a shortcut policy its self-consistency."""
        import torch

        from reinflow.flow_losses import sample_shortcut_times
        from reinflow.offline import weighted_consistency_loss, weighted_flow_loss

        if not self.embedding:
            share = self.config.one_step_share if self.k == 1 else 0.0
            states = batch.states
            return weighted_flow_loss(lambda x, t: self.velocity(states, x, t), batch.actions, weights, share)
        long = round(len(weights) * self.config.consistency_share)
        steps, rest = batch.rows(torch.arange(long)), batch.rows(torch.arange(long, len(weights)))

        def averaged(x_t: Tensor, time: Tensor, step_size: Tensor) -> Tensor:
            with self.average.applied():
                return self.velocity(steps.states, x_t, time, step_size)

        consistency, info = weighted_consistency_loss(
            lambda x, t, d: self.velocity(steps.states, x, t, d),
            averaged, steps.actions, weights[:long], sample_shortcut_times(long, self.finest),
        )  # fmt: skip
        finest = torch.full((len(weights) - long,), 1.0 / self.finest)
        flow, more = weighted_flow_loss(
            lambda x, t: self.velocity(rest.states, x, t, finest), rest.actions, weights[long:]
        )
        return flow + self.config.consistency_weight * consistency, info | more

    def after_step(self, step: int) -> None:
        """The moving averages."""
        self.step = step
        self.target.update()
        if step > self.config.critic_steps:
            self.average.update()

    def judge(self) -> dict[str, float]:
        """Q of the data's chunks beside their returns, where nothing was learned from."""
        import torch

        from reinflow.offline import value_figures

        number = min(HELD_OUT_ROWS, len(self.judged))
        rows = self.judged.rows(torch.linspace(0, len(self.judged) - 1, number).long())  # of all held-out episodes
        with torch.no_grad():
            values = self.critic.least(rows.states, rows.actions[:, : self.policy.n_action_steps])
        return value_figures(values, rows.returns)


def finest_steps(policy_dir: Path) -> int:
    """The most denoising steps that a shortcut policy was taught; 0 where it is none."""
    from reinflow.step_size import STEP_SIZE_FILE

    if not (policy_dir / STEP_SIZE_FILE).is_file():
        return 0
    stored = read_stage(policy_dir).get("finest_steps")
    if not isinstance(stored, int) or stored < 2:
        raise ConfigError(f"{policy_dir}/stage.json does not say finest_steps: take the directory of reinflow-shortcut")
    return stored


# --- Data of its own --------------------------------------------------------------------------------------------------


def half_noisy(config: OfflineRlConfig, game: StateGame) -> DemoConfig:
    """What is recorded where no data set was named; raises ConfigError for a policy that is not of the arm."""
    from reinflow_so101.stages.demonstrations import DemoConfig
    from so101_sim.tasks.registry import differences, nearest_task

    if not isinstance(game.world, EnvConfig):
        raise ConfigError(f"dataset_root is empty and {config.policy_dir} is not of the arm's task: name a data set")
    if other := differences(game.world, nearest_task(game.world)):
        raise ConfigError(
            f"dataset_root is empty and the task of {config.policy_dir} has a name's settings but for {sorted(other)}: "
            "record data of it with reinflow-demos and name that"
        )
    return DemoConfig(
        config.output_dir / DATA_FOLDER, task=nearest_task(game.world), first_seed=1_000, noisy_share=0.5, rewards=True,
        environment_state=True, images=False,
    )  # fmt: skip


def record_whole(recording: DemoConfig) -> None:
    """Record it, whole or not at all; nothing to do where a stage that was cut off did."""
    from reinflow_so101.stages.demonstrations import record

    if recording.output_dir.exists():
        return
    part = recording.output_dir.with_name(f"{recording.output_dir.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    record(replace(recording, output_dir=part))
    part.rename(recording.output_dir)


# --- The stage --------------------------------------------------------------------------------------------------------


def open_learner(config: OfflineRlConfig, game: StateGame) -> OfflineLearner:
    """Read policy and data; raises a UserError for what does not fit."""
    from reinflow.flow_mlp import FlowMLP

    given: dict[str, Any] = {"num_denoising_steps": config.num_denoising_steps} if config.num_denoising_steps else {}
    policy = FlowMLP.from_pretrained(config.policy_dir, **given)
    episodes = read_state_dataset(config.dataset_root or str(config.output_dir / DATA_FOLDER), rewards=True)
    refuse_other_sizes(str(config.policy_dir), policy, episodes.state_dim, episodes.action_dim)
    limit = config.time_limit_is_terminal
    limit_ends = game.state_tells_time if limit == "auto" else limit == "yes"
    every, jitter = (1, 0) if config.every_frame else (policy.n_action_steps, config.jitter)
    learn, judge = split_episodes(len(episodes.actions), config.held_out)
    starts = decision_starts(episodes, every, jitter)
    data, judged = (
        make_transitions(episodes, [s for s in starts if s[0] in part], policy, config, limit_ends)
        for part in (learn, judge or learn)
    )
    over = "an end" if limit_ends else "no end"
    print(
        f"{len(learn)} episodes to learn from, {len(data)} decisions, mean return {np.mean(episodes.returns()):.2f}; "
        f"{len(judge)} to judge Q by; a time limit is {over}",
        flush=True,
    )
    return OfflineLearner(config, policy, data, judged)


def fit_offline(config: OfflineRlConfig, learner: OfflineLearner, stage: StageDirectory) -> Watch:
    """The descent, from where it was cut off."""
    from reinflow.supervised import FitSettings, Progress, fit

    progress = Progress(stage.progress_dir, learner.modules, {"batches": learner.batches}, config.save_every)
    stage.resumed_at(progress.done)
    learner.step = progress.done
    watch = Watch(config.output_dir, vars(config), stage.metrics)
    settings = FitSettings(config.total_steps, config.lr, config.weight_decay, grad_clip_norm=10.0)
    parameters = [*learner.learned, *learner.critic.parameters()]
    for step, info in fit(parameters, learner.loss, settings, progress, "offline RL"):
        learner.after_step(step)
        if step % config.log_every == 0 or step in (config.critic_steps, config.total_steps):
            figures = {name: round(value, 6) for name, value in {**info, **learner.judge()}.items()}
            start = next((row["q_mean"] for row in watch.lines if row["step"] >= config.critic_steps), None)
            figures |= {} if start is None else {"q_growth": round(figures["q_mean"] - start, 6)}
            stage.log(step, figures)
            for finding in watch.examine(step, figures):
                print(finding, flush=True)
    return watch


def train_offline(config: OfflineRlConfig) -> dict[str, Any]:
    """Read, train, evaluate, write the policy; returns what was measured."""
    from reinflow.flow_mlp import FlowMLP, read_sizes

    read_sizes(config.policy_dir)  # refuses what is no such policy
    settings: dict[str, Any] = {name: str(v) if isinstance(v, Path) else v for name, v in vars(config).items()}
    if finest := finest_steps(config.policy_dir):
        settings["finest_steps"] = finest  # for whoever goes on from the result
    game = game_of(config.policy_dir)
    game = game if game.world or not config.dataset_root else game_of(config.dataset_root)
    recording = None if config.dataset_root else half_noisy(config, game)
    print(f"task: {game}", flush=True)
    seeds = range(config.eval_seed, config.eval_seed + config.eval_episodes)
    with StageDirectory.open(config.output_dir, settings, config.resume, COMMAND) as stage:
        if recording:
            FlowMLP.from_pretrained(config.policy_dir)  # what is wrong with it shows before minutes of recording
            record_whole(recording)
        learner = open_learner(config, game)
        record: dict[str, Any] = {}

        def evaluate(when: str) -> None:
            with learner.acting():
                result = game.evaluate(learner.policy, learner.k, seeds, config.num_parallel_envs)
            if result:
                record[when] = game.score(result)
                print(f"{when}, K={learner.k}, seeds from {config.eval_seed}: {result.summary()}", flush=True)

        evaluate("before")
        began = time.perf_counter()
        watch = fit_offline(config, learner, stage)
        record["seconds"] = round(time.perf_counter() - began, 1)
        evaluate("after")
        names = ("weight_entropy", "weight_clipped", "weight_effective_share", "q_correlation", "q_bias", "q_growth")
        record |= {name: watch.lines[-1][name] for name in names if name in watch.lines[-1]}
        record["findings"] = sorted(watch.shown)
        with learner.acting():
            learner.policy.save_pretrained(config.output_dir)
            if learner.embedding:
                learner.embedding.save(config.output_dir)
        game.write_card(config.output_dir)
        stage.finish(record)
    print(f"wrote {config.output_dir}")
    return record


def main() -> None:
    """reinflow-offline-rl."""
    import tyro

    config = tyro.cli(OfflineRlConfig, description=OfflineRlConfig.__doc__)
    run_command(COMMAND, lambda: train_offline(config))


if __name__ == "__main__":
    main()
