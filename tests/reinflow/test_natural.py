"""K-FAC directions against the exact natural gradient of a linear-Gaussian policy."""

import pytest
import torch
from torch import nn

from reinflow.natural import NaturalGradient


def gradients(layer: nn.Linear, inputs: torch.Tensor, scores: torch.Tensor) -> None:
    """Backward pass of sum(scores * outputs): ``scores`` are the output gradients."""
    (layer(inputs) * scores).sum().backward()


@pytest.mark.parametrize("bias", [True, False])
def test_direction_is_the_exact_natural_gradient_when_inputs_and_scores_are_independent(bias):
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=bias).double()
    inputs, scores = (
        torch.randn(400, 3).double() @ torch.diag(torch.tensor([1.0, 5.0, 0.2]).double()),
        torch.randn(400, 2),
    )
    optimizer = NaturalGradient(layer, layer.parameters(), damping=1e-6, momentum=0.0)
    optimizer.zero_grad()
    gradients(layer, inputs, scores.double())
    direction = optimizer.directions()[0].double()
    a = torch.cat([inputs, torch.ones(400, 1)], 1) if bias else inputs
    g = scores.double()
    fisher = torch.kron(g.T @ g, a.T @ a)
    exact = torch.linalg.solve(fisher, (g.T @ a).flatten()).view_as(direction)
    assert torch.allclose(direction, exact, rtol=1e-3, atol=1e-6)


def test_move_goes_down_and_back():
    layer = nn.Linear(3, 2)
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = NaturalGradient(layer, layer.parameters(), damping=0.1, momentum=0.0)
    inputs, target = torch.randn(50, 3), torch.randn(50, 2)
    optimizer.zero_grad()
    loss = ((layer(inputs) - target) ** 2).mean()
    loss.backward()
    directions = optimizer.directions()
    optimizer.move(directions, 1e-4)
    assert ((layer(inputs) - target) ** 2).mean() < loss
    optimizer.move(directions, -1e-4)
    for parameter, old in zip(layer.parameters(), before, strict=True):
        assert torch.allclose(parameter, old, atol=1e-6)


def test_momentum_keeps_its_share_and_travels_in_the_state():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = NaturalGradient(layer, layer.parameters(), damping=0.1, momentum=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        gradients(layer, torch.randn(20, 3), torch.randn(20, 2))
        optimizer.directions()
    again = NaturalGradient(layer, layer.parameters(), damping=0.1, momentum=0.5)
    again.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(
        again.state[layer.weight]["gradient"], optimizer.state[layer.weight]["gradient"], rtol=0, atol=0
    )


def test_frozen_layers_and_silent_layers_stay():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    optimizer = NaturalGradient(net, net[2].parameters(), damping=0.1, momentum=0.0)
    assert optimizer.layers == [net[2]]
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="backward"):
        optimizer.directions()
    (net(torch.randn(5, 3)) * 0.0).sum().backward()
    assert not optimizer.directions()[0].any()


def test_without_a_trainable_linear_layer_it_refuses():
    with pytest.raises(ValueError, match="no linear layer"):
        NaturalGradient(nn.LayerNorm(3), nn.LayerNorm(3).parameters(), 0.1, 0.5)
