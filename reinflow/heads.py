"""The two heads that ReinFlow adds to a policy: exploration noise and value. Neither is deployed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reinflow.distributed import mean_and_var


class NoiseHead(nn.Module):
    """Std of the exploration noise per action dim, bounded to [sigma_min, sigma_max] (seeds' noise_mlp).

    ``std = sigma_min + (sigma_max - sigma_min) * (tanh(mlp(features)) + 1) / 2``. The last layer starts at zero
    weight, so that training begins at the middle of the range for every observation. Equal bounds mean fixed noise.
    """

    sigma_min: Tensor
    sigma_max: Tensor

    def __init__(self, feature_dim: int, action_dim: int, sigma_min: float, sigma_max: float):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(feature_dim, 256), nn.SiLU(), nn.Linear(256, 128), nn.SiLU(), nn.Linear(128, action_dim)
        )
        nn.init.zeros_(self.mlp[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.mlp[-1].bias)  # type: ignore[arg-type]
        self.register_buffer("sigma_min", torch.tensor(float(sigma_min)))
        self.register_buffer("sigma_max", torch.tensor(float(sigma_max)))

    def set_bounds(self, sigma_min: float, sigma_max: float) -> None:
        """Set both bounds; raises ValueError unless 0 < sigma_min <= sigma_max."""
        if not 0 < sigma_min <= sigma_max:
            raise ValueError(f"noise bounds need 0 < sigma_min <= sigma_max, got [{sigma_min}, {sigma_max}]")
        self.sigma_min.fill_(sigma_min)
        self.sigma_max.fill_(sigma_max)

    def forward(self, features: Tensor) -> Tensor:
        """(..., F) -> (..., A), fp32."""
        squashed = (torch.tanh(self.mlp(features.float())) + 1) / 2
        return self.sigma_min + (self.sigma_max - self.sigma_min) * squashed


class RunningNorm(nn.Module):
    """Each dim to zero mean and unit variance over everything seen by ``update``; the identity before that."""

    count: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Add rows (..., dim) of all ranks (Chan et al.'s parallel update)."""
        added, mean, var = mean_and_var(rows.detach().flatten(0, -2).float())
        old, total = self.count, self.count + added
        delta, share = mean - self.mean, added / total
        self.var.copy_((1 - share) * self.var * (old > 0) + share * var + share * (1 - share) * delta**2 * (old > 0))
        self.mean.add_(share * delta)
        self.count.copy_(total)

    def forward(self, rows: Tensor) -> Tensor:
        # A dim that never moved (a force before any contact) may start to: its scale is unknown, not zero.
        return ((rows - self.mean) / (self.var.sqrt() + 1e-2)).clamp(-10, 10)


class ReinFlowCritic(nn.Module):
    """State value from observation features: Linear(F, 512) -> ReLU -> Linear(512, 256) -> ReLU -> Linear(256, 1).

    Network features are layer-normalised: a language model's hidden state has a few dims far larger than the rest.
    A simulator state mixes units, so its dims are normalised one by one (``running``).
    """

    def __init__(self, feature_dim: int, hidden_size: int = 512, running: bool = False):
        super().__init__()
        self.norm: RunningNorm | nn.LayerNorm = RunningNorm(feature_dim) if running else nn.LayerNorm(feature_dim)
        self.mlp = nn.Sequential(
            nn.Linear(feature_dim, hidden_size), nn.ReLU(),
            nn.Linear(hidden_size, hidden_size // 2), nn.ReLU(),
            nn.Linear(hidden_size // 2, 1),
        )  # fmt: skip
        nn.init.zeros_(self.mlp[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.mlp[-1].bias)  # type: ignore[arg-type]

    def observe(self, features: Tensor) -> None:
        """Add (..., F) to the running statistics, if there are any."""
        if isinstance(self.norm, RunningNorm):
            self.norm.update(features)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) -> (B,), fp32."""
        return self.mlp(self.norm(features.float())).squeeze(-1)
