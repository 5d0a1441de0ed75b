"""The step size: it reaches the network, it is folded away exactly, and its moving average."""

import copy

import pytest
import torch

from reinflow.flow_mlp import FlowMLP
from reinflow.policy import PolicyError
from reinflow.step_size import STEP_SIZE_FILE, MovingAverage, StepSizeEmbedding, load_step_size


@pytest.fixture
def policy() -> FlowMLP:
    torch.manual_seed(0)
    return FlowMLP(state_dim=3, action_dim=2, chunk_size=4, hidden_size=32)


@pytest.fixture
def embedding(policy) -> StepSizeEmbedding:
    """Of random weights, attached."""
    embedding = StepSizeEmbedding(policy.step_size_layer.out_features)
    torch.nn.init.normal_(embedding.project.weight)
    embedding.attach(policy.step_size_layer)
    return embedding


def velocity(policy, *, num_steps: int = 0, embedding=None) -> torch.Tensor:
    """At one place of five rows, told a step size or not."""
    generator = torch.Generator().manual_seed(1)
    context = {"state": torch.randn(5, 3, generator=generator)}
    x_t, time = torch.randn(5, 4, 2, generator=generator), torch.full((5,), 0.5)
    if not num_steps:
        return policy.velocity(context, x_t, time)[0]
    with embedding.of(torch.full((5,), 1 / num_steps)):
        return policy.velocity(context, x_t, time)[0]


def test_a_new_embedding_changes_nothing(policy):
    embedding = StepSizeEmbedding(32)
    embedding.attach(policy.step_size_layer)
    assert torch.equal(velocity(policy), velocity(policy, num_steps=4, embedding=embedding))


def fit_two_targets(policy, embedding) -> float:
    """Same observation, x_t and flow time; actions of +1 for a step of 1 and -1 for one of 1/8. The last error."""
    context = {"state": torch.zeros(2, 3)}
    x_t, time, step = torch.ones(2, 4, 2), torch.ones(2), torch.tensor([1.0, 0.125])
    target = x_t - torch.tensor([1.0, -1.0])[:, None, None]  # velocities: (x_t - action) / 1
    optimizer = torch.optim.Adam([*policy.parameters(), *embedding.parameters()], lr=1e-2)
    for _ in range(150):
        with embedding.of(step):
            loss = ((policy.velocity(context, x_t, time)[0] - target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_the_step_size_alone_can_explain_a_target(policy):
    deaf = copy.deepcopy(policy)
    embedding = StepSizeEmbedding(32)
    assert fit_two_targets(deaf, embedding) == pytest.approx(1.0, abs=1e-3)  # not attached: the mean is all there is
    embedding.attach(policy.step_size_layer)
    assert fit_two_targets(policy, embedding) < 1e-3


@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_folding_is_the_same_as_telling(policy, embedding, num_steps):
    told, before = velocity(policy, num_steps=num_steps, embedding=embedding), policy.step_size_layer.bias.clone()
    with embedding.folded(policy.step_size_layer, num_steps):
        assert torch.allclose(velocity(policy), told, atol=1e-5)
    assert torch.equal(policy.step_size_layer.bias, before)
    assert (velocity(policy) - told).abs().max() > 1e-2


def test_an_export_is_had_for_another_number_of_steps(policy, embedding, tmp_path):
    with embedding.folded(policy.step_size_layer, 1):
        policy.save_pretrained(tmp_path)
    embedding.save(tmp_path)
    for num_steps in (1, 4):
        loaded = FlowMLP.from_pretrained(tmp_path, num_denoising_steps=num_steps)
        told = velocity(policy, num_steps=num_steps, embedding=embedding)
        assert torch.allclose(velocity(loaded), told, atol=1e-5)
    with pytest.raises(PolicyError, match=r"num_denoising_steps=256.*128 at most"):
        FlowMLP.from_pretrained(tmp_path, num_denoising_steps=256)
    assert load_step_size(tmp_path / "elsewhere", policy.step_size_layer) is None
    StepSizeEmbedding(16).save(tmp_path)
    with pytest.raises(ValueError, match=STEP_SIZE_FILE):
        FlowMLP.from_pretrained(tmp_path, num_denoising_steps=4)
    (tmp_path / STEP_SIZE_FILE).write_bytes(b"no tensors")
    with pytest.raises(PolicyError, match=f"{STEP_SIZE_FILE} cannot be read"):
        FlowMLP.from_pretrained(tmp_path, num_denoising_steps=4)


# --- The moving average ---------------------------------------------------------------------------------------------


def test_the_average_follows_its_formula_and_forgets_its_start():
    weight = torch.nn.Parameter(torch.tensor([0.0]))
    average, expected = MovingAverage([weight], 0.5), 0.0
    for n in range(1, 21):
        weight.data = torch.tensor([float(n)])
        average.update()
        keep = min(0.5, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * n
        assert float(average.averages[0]) == pytest.approx(expected, rel=1e-5)
    resumed = MovingAverage([weight], 0.5)
    resumed.load_state_dict(average.state_dict())
    for each in (average, resumed):
        each.update()
    assert torch.equal(average.averages[0], resumed.averages[0])


def test_within_it_the_average_acts_and_the_graph_before_it_is_untouched():
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    average = MovingAverage([weight], 0.9)
    weight.data = torch.tensor([3.0])
    square = weight**2
    with average.applied():
        assert weight.item() == 2.0
    assert weight.item() == 3.0
    square.backward()
    assert float(weight.grad) == 6.0
