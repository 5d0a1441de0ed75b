"""Two processes of one run: what they exchange, and that their update is the one of a single process.

One pair of gloo processes answers for the whole module. Rollouts are recorded by one process and cut by columns.
"""

import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.utils._pytree import tree_leaves

from reinflow import ConfigError, UserError, distributed
from reinflow.flow import ChainSpec, sample_chain
from reinflow.flow_mlp import FlowMLP
from reinflow.heads import ReinFlowCritic, RunningNorm
from reinflow.learner import LearnerSettings, PPOLearner, RatioGuardError
from reinflow.natural import NaturalGradient
from reinflow.rollout import RolloutBuffer
from tests.fakes import STATE_DIM
from tests.reinflow.test_learner import SETTINGS, Loop

RANKS, ENVS, STEPS = 2, 5, 6  # 2 and 3 environments
ADAM = replace(
    SETTINGS, minibatch_size=7, gradient_accumulation_steps=2, num_ppo_epochs=2, num_critic_epochs=2,
    entropy_coeff=0.01, anchor_coeff=0.1,
)  # fmt: skip
NATURAL = replace(  # damped so that solving does not amplify rounding: one process by other minibatches differs by 3e-6
    SETTINGS, policy_optimizer="natural", natural_damping=1.0, natural_momentum=0.5, target_kl=0.02, minibatch_size=7,
    gradient_accumulation_steps=2, num_critic_epochs=2, entropy_coeff=0.01,
)  # fmt: skip
TWO_STEPS = ChainSpec(2, "action")


class HeadAlone(FlowMLP):
    """Only a linear head learns; a rollout keeps what it read."""

    keeps_head_inputs = True

    def velocity(self, context, x_t, time):
        _, features = super().velocity(context, x_t, time)
        return self.head_velocity(features), features

    def head_velocity(self, features):
        return self.head(features)[..., : self.action_dim]


@dataclass(frozen=True)
class Case:
    """An update that must not depend on who plays which environments."""

    settings: LearnerSettings
    spec: ChainSpec = TWO_STEPS
    envs: int = ENVS
    broken: tuple[int, ...] = ()  # environments of the first rollout that count for nothing
    warm_up: bool = False  # the first update is the critic's alone
    rescore: bool = False
    head_alone: bool = False
    terminate_at: int | None = None
    fixed_noise: bool = False
    bound: float = 1e-5  # more where a gradient is the small rest of large sums, as of the noise by natural steps

    def loop(self) -> Loop:
        """Policy, learner and the environments of all ranks."""
        loop = Loop(self.spec, self.settings, self.envs, terminate_at=self.terminate_at)
        if self.head_alone:
            torch.manual_seed(0)
            loop.policy = HeadAlone(STATE_DIM, 2, 4, hidden_size=32, sigma_min=0.1, sigma_max=0.3).eval()
            loop.policy.train_only(("head", "noise_mlp", "critic"))
        torch.manual_seed(1)
        torch.nn.init.normal_(loop.policy.noise_mlp.mlp[-1].weight, std=0.3)  # so that its other layers learn at once
        loop.policy.noise_mlp.requires_grad_(not self.fixed_noise)
        if self.settings.credit == "control_step":
            loop.policy.critic = ReinFlowCritic(STATE_DIM, 32, running=True)
        loop.learner = PPOLearner(loop.policy, self.spec, self.settings, 0, rescore_log_probs=self.rescore)
        return loop

    def damage(self, buffer: RolloutBuffer) -> RolloutBuffer:
        """The rollout with its broken environments."""
        return replace(buffer, active=buffer.active.index_fill(1, torch.tensor(self.broken, dtype=torch.int64), False))


CASES = {
    "adam": Case(ADAM),
    "adam, a row at a time": Case(replace(ADAM, minibatch_size=1, gradient_accumulation_steps=5), warm_up=True),
    "undone": Case(replace(ADAM, policy_lr=0.3, target_kl=1e-3, undo_overshoot=True)),
    "stopped": Case(replace(ADAM, target_kl=1e-4)),
    "broken": Case(ADAM, broken=(1, 3), terminate_at=3),
    "one rank's all broken": Case(NATURAL, ChainSpec(1, "dim"), envs=3, broken=(0,), bound=1e-4),
    "natural": Case(NATURAL, ChainSpec(1, "dim", "dct", 2), fixed_noise=True),
    "by control step": Case(replace(NATURAL, credit="control_step"), terminate_at=3, fixed_noise=True),
    "adam by control step": Case(replace(ADAM, credit="control_step"), ChainSpec(2, "mean"), broken=(4,)),
    "a noisy step for each": Case(ADAM, ChainSpec(3, "chunk", chain_noise="flow_sde"), rescore=True),
    "head alone": Case(replace(NATURAL, entropy_coeff=0.0), head_alone=True, warm_up=True),
}


def part(buffer: RolloutBuffer, columns: range) -> RolloutBuffer:
    """What the rank holds that plays these environments."""
    tensors = {name: value for name, value in vars(buffer).items() if isinstance(value, torch.Tensor)}
    cut = {name: value[:, columns.start : columns.stop] for name, value in tensors.items()}
    context = {name: value[:, columns.start : columns.stop] for name, value in buffer.context.items()}
    return replace(buffer, context=context, **cut)


def update_all(case: Case, buffers: list[RolloutBuffer]):
    """Metrics of two updates, and what a checkpoint would keep after them."""
    loop = case.loop()
    metrics = [
        loop.learner.update(part(buffer, distributed.share(case.envs)), critic_only=case.warm_up and number == 0)
        for number, buffer in enumerate(buffers)
    ]
    return metrics, state_of(loop)


def state_of(loop: Loop):
    """Weights and what else a checkpoint keeps."""
    leaves = tree_leaves([loop.policy.trainable_state(), loop.learner.state_dict()])
    return [torch.as_tensor(leaf).clone() for leaf in leaves if leaf is not None]


def record(case: Case):
    """The rollouts of two iterations in one process, and what its updates of them gave."""
    loop, buffers, metrics = case.loop(), [], []
    for number in range(2):
        buffer = loop.rollout(STEPS)[0]
        buffers.append(case.damage(buffer) if number == 0 else buffer)
        metrics.append(loop.learner.update(buffers[-1], critic_only=case.warm_up and number == 0))
    return buffers, (metrics, state_of(loop))


# --- In the two processes ---------------------------------------------------------------------------------------------


def raised(work) -> str:
    """Class and text of what ``work`` raises."""
    try:
        work()
    except (UserError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def exchanges() -> dict[str, object]:
    """What the functions of reinflow/distributed.py give on this rank."""
    rank = distributed.rank()
    tensors = [torch.full((3,), 1.0 + rank), torch.full((2, 2), 10.0 * rank), torch.tensor(rank)]
    distributed.add_up(tensors)
    learns = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    learns[rank].grad = torch.ones(2)
    distributed.add_gradients(learns)
    rows = torch.arange(10.0).reshape(5, 2) ** 2
    norm = RunningNorm(2)
    for batch in (
        rows[: 5 * rank],
        rows[distributed.share(5).start : distributed.share(5).stop],
    ):  # first none on rank 0
        norm.update(batch)
    return {
        "sums": tensors,
        "gradients": [p.grad for p in learns],
        "largest": distributed.largest(1.0 - rank, -rank, float("nan") if rank else 5.0),
        "gathered": distributed.gather({"rank": rank}),
        "joined": distributed.join_rows(torch.full((1 + rank, 2), rank), 0),
        "part": distributed.total(distributed.part(torch.tensor(rank).float(), 0.25 + 0.5 * rank)),
        "norm": norm.state_dict(),
        "writer": raised(lambda: distributed.from_writer(fail)),
        "natural": natural_bytes(),
    }


def natural_bytes() -> int:
    """What a natural step sums where the second rank alone has rows, and one of two layers took part in them."""
    before = distributed.TRAFFIC.summed
    layers = torch.nn.ModuleList([torch.nn.Linear(3, 2), torch.nn.Linear(50, 40)])
    optimizer = NaturalGradient(layers, layers.parameters(), 0.1, 0.0)
    if distributed.rank() == 1:
        layers[0](torch.ones(4, 3)).sum().backward()
    distributed.add_gradients(list(layers.parameters()))
    optimizer.add_up()
    assert [bool(direction.any()) for direction in optimizer.directions()] == [True, False]
    return distributed.TRAFFIC.summed - before


def fail():
    raise ConfigError("only the writer met this")


def refusals(buffer: RolloutBuffer) -> dict[str, str]:
    """What both ranks say where only the second has a reason."""
    found, second, case = {}, distributed.rank() == 1, CASES["adam"]

    def update(settings=case.settings, log_prob=0.0, head=0.0):
        loop, own = case.loop(), part(buffer, distributed.share(case.envs))
        loop.learner.settings = settings
        with torch.no_grad():
            loop.policy.critic.mlp[-1].bias += head * second
        loop.learner.update(replace(own, log_prob=own.log_prob + log_prob * second))

    found["guard"] = raised(lambda: update(log_prob=0.01))
    found["not finite"] = raised(lambda: update(log_prob=float("nan")))
    found["too few"] = raised(lambda: update(replace(case.settings, minibatch_size=16)))
    found["just enough"] = raised(lambda: update(replace(case.settings, minibatch_size=15)))
    found["other weights"] = raised(lambda: update(head=1e-6))
    return found


def messages(case: Case, buffer: RolloutBuffer) -> list[int]:
    """Of one update of a rollout, and of one of three times as many decisions."""
    counts = []
    for times in (1, 3):
        longer = replace(
            buffer,
            context={name: torch.cat([value] * times) for name, value in buffer.context.items()},
            **{n: torch.cat([v] * times) for n, v in vars(buffer).items() if isinstance(v, torch.Tensor)},
        )
        loop, before = case.loop(), distributed.TRAFFIC.messages
        loop.learner.settings = replace(loop.learner.settings, gradient_accumulation_steps=2 * times)
        loop.learner.update(part(longer, distributed.share(case.envs)))
        counts.append(distributed.TRAFFIC.messages - before)
    return counts


def join_launch(rank: int, port: int) -> None:
    """What a launcher does for a process."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)


def answer(rank: int, directory: Path, port: int) -> None:
    """All that the tests ask of a rank, into a file."""
    join_launch(rank, port)
    recorded = torch.load(directory / "recorded.pt", weights_only=False)
    with distributed.joined():
        answers = {name: update_all(CASES[name], buffers) for name, buffers in recorded.items()}
        answers["exchanges"] = exchanges()
        answers["refusals"] = refusals(recorded["adam"][0])
        answers["messages"] = {name: messages(CASES[name], recorded[name][0]) for name in ("adam", "natural")}
        torch.save(answers, directory / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one process found, and what each of two did."""
    directory = tmp_path_factory.mktemp("ranks")
    recorded = {name: record(case) for name, case in CASES.items()}
    torch.save({name: buffers for name, (buffers, _) in recorded.items()}, directory / "recorded.pt")
    start_ranks(answer, directory)
    ranks = [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]
    return {name: alone for name, (_, alone) in recorded.items()}, ranks


def start_ranks(work, directory: Path) -> None:
    """Run ``work(rank, directory, port)`` in RANKS processes, to their end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (directory, port), nprocs=RANKS)


# --- What they answered -----------------------------------------------------------------------------------------------


def assert_same(alone, together, bound: float) -> None:
    """Metrics, weights and learner state of two ranks are those of one process, up to rounding."""
    for expected, found in zip(alone[0], together[0], strict=True):
        assert {n for n in found if not n.startswith("time/")} == {n for n in expected if not n.startswith("time/")}
        for name in expected.keys() - {"time/update"}:
            assert found[name] == pytest.approx(expected[name], rel=bound, abs=bound, nan_ok=True), name
    for expected, found in zip(alone[1], together[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_update_as_one_process(runs, name):
    alone, ranks = runs
    first, second = alone[name][0]
    assert second["ppo/optimizer_steps"] >= 1 and first["loss/value"] > 0
    for rank in ranks:
        assert_same(alone[name], rank[name], CASES[name].bound)
    for a, b in zip(ranks[0][name][1], ranks[1][name][1], strict=True):
        assert torch.equal(a, b)


def test_the_cases_are_what_they_are_called(runs):
    """So that none of them compares an update that did nothing."""
    metrics = {name: found[0] for name, found in runs[0].items()}
    assert metrics["undone"][0]["ppo/steps_undone"] == 1 and metrics["stopped"][0]["ppo/early_stopped"] == 1
    assert metrics["adam"][0]["ppo/optimizer_steps"] == 4 and "loss/policy" not in metrics["head alone"][0]
    assert all(row["ppo/approx_kl"] > 1e-3 for name in ("natural", "by control step") for row in metrics[name])


def test_sums_gathers_and_moments(runs):
    rows = torch.arange(10.0).reshape(5, 2) ** 2
    norm = RunningNorm(2)
    norm.update(rows)
    norm.update(rows)
    for rank in (run["exchanges"] for run in runs[1]):
        assert [t.tolist() for t in rank["sums"]] == [[3.0] * 3, [[10.0] * 2] * 2, 1]
        assert [None if g is None else g.tolist() for g in rank["gradients"]] == [[1.0, 1.0], [1.0, 1.0], None]
        assert rank["largest"][:2] == [1.0, 0.0] and rank["largest"][2] != rank["largest"][2]
        assert rank["gathered"] == [{"rank": 0}, {"rank": 1}] and rank["part"] == [0.75]
        assert rank["joined"].tolist() == [[0, 0], [1, 1], [1, 1]]
        assert rank["writer"] == "ConfigError: only the writer met this"
        for name, value in norm.state_dict().items():
            torch.testing.assert_close(rank["norm"][name], value)


def test_all_ranks_refuse_for_the_reason_of_one(runs):
    first, second = (run["refusals"] for run in runs[1])
    assert first == second
    assert first["guard"].startswith(f"{RatioGuardError.__name__}: ratio is off 1 by 9.95e-03")
    assert "not finite" in first["not finite"]
    assert "exceeds the 30 decisions of a rollout" in first["too few"] and first["just enough"] == ""
    assert first["other weights"].startswith("UserError: ranks [1] do not hold the weights of rank 0 (critic.")


def test_a_natural_step_sums_only_what_took_part(runs):
    gradient, covariances, direction = 2 * 3 + 2, 4 * 4 + 2 * 2, 2 * 4
    assert [run["exchanges"]["natural"] for run in runs[1]] == [4 * (gradient + covariances + direction)] * 2


def test_messages_do_not_grow_with_decisions(runs):
    for run in runs[1]:
        (few, many), natural = run["messages"]["adam"], run["messages"]["natural"]
        assert few == many and natural[0] == natural[1] < 30


# --- A vision-language-action policy ----------------------------------------------------------------------------------

EXPERT = replace(NATURAL, minibatch_size=3, gradient_accumulation_steps=2, natural_momentum=0.0, entropy_coeff=0.0)
ACTIONS = ChainSpec(1, "action")


def small_vla(directory: Path):
    """A tiny SmolVLA, its whole expert learning, with noise that is fixed."""
    from tests.policies import load  # LeRobot, which the other tests' processes need not load

    policy = load("smolvla", directory, 1, n_action_steps=4)
    policy.noise_mlp.requires_grad_(False)
    return policy, PPOLearner(policy, ACTIONS, EXPERT, 0)


def made_up_rollout(policy) -> RolloutBuffer:
    """Two decisions of three environments, with rewards from nowhere."""
    from tests.policies import explore, observe

    context = policy.encode(policy.preprocess(observe(policy, 6)))
    generator = torch.Generator().manual_seed(3)
    x_0 = torch.randn(6, policy.denoised_steps, policy.padded_action_dim, generator=generator)
    sample = sample_chain(policy, context, ACTIONS, x_0, explore(policy, ACTIONS, 6))
    reward, never = torch.rand(2, 3, generator=generator), torch.zeros(2, 3, dtype=torch.bool)
    rows = {"chain": sample.chain, "log_prob": sample.log_prob, "noisy": sample.noisy, "value": policy.value(context)}
    return RolloutBuffer(
        context={name: value.unflatten(0, (2, 3)) for name, value in policy.to_buffer(context).items()},
        active=torch.ones(2, 3, 4, dtype=torch.bool), next_value=reward, reward=reward,
        discount=torch.full((2, 3), 0.99), terminated=never, truncated=never,
        **{name: value.detach().unflatten(0, (2, 3)) for name, value in rows.items()},
    )  # fmt: skip


def update_vla(rank: int, directory: Path, port: int) -> None:
    """A rank's part of one update of the recorded rollout."""
    join_launch(rank, port)
    policy, learner = small_vla(Path((directory / "policy").read_text()))
    buffer = torch.load(directory / "buffer.pt", weights_only=False)
    with distributed.joined():
        metrics = learner.update(part(buffer, distributed.share(3)))
        torch.save(([metrics], [*policy.trainable_state().values()]), directory / f"rank{rank}.pt")


@pytest.mark.slow
def test_two_ranks_make_one_natural_step_of_a_smolvla(tiny_policy_dir, tmp_path):
    policy, learner = small_vla(tiny_policy_dir)
    before = [p.detach().clone() for p in policy.policy_parameters()]
    buffer = made_up_rollout(policy)
    torch.save(buffer, tmp_path / "buffer.pt")
    (tmp_path / "policy").write_text(str(tiny_policy_dir))
    start_ranks(update_vla, tmp_path)
    metrics = learner.update(buffer)
    assert metrics["ppo/approx_kl"] > 0.01
    assert sum(not torch.equal(a, b) for a, b in zip(before, policy.policy_parameters(), strict=True)) > 20
    for rank in range(RANKS):
        together = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        assert_same(([metrics], [*policy.trainable_state().values()]), together, 1e-5)
