"""Muon for matrices and Adam for the rest.

Muon: momentum, then the update is replaced by the nearest semi-orthogonal matrix, found by a quintic
Newton-Schulz iteration (Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks",
2024).
"""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Push the singular values of each matrix [N, R, C] towards one, by products in a dtype."""
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay; matrices of one shape are handled together."""

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        decay: float = 0.02,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append((parameter, parameter.grad))
            for shape, members in shapes.items():
                updates = []
                for parameter, gradient in members:
                    state = self.state[parameter]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(parameter)
                    moving = state["momentum"]
                    moving.lerp_(gradient, 1 - group["momentum"])
                    updates.append(gradient.lerp(moving, group["momentum"]))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                moved = orthogonalize(torch.stack(updates), dtype=self.dtype)
                for (parameter, _), update in zip(members, moved, strict=True):
                    parameter.mul_(1 - group["lr"] * group["decay"])
                    parameter.add_(update, alpha=-group["lr"] * scale)


def make_optimizers(model: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, its products in a dtype; Adam for embedding, head and norms."""
    matrices, embedding, head, norms = [], [], [], []
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            embedding.append(parameter)
        elif "lm_head" in name:
            head.append(parameter)
        else:
            (matrices if parameter.ndim == 2 else norms).append(parameter)
    groups = [
        {"params": embedding, "lr": 5e-3},
        {"params": head, "lr": 1.5e-3},
        {"params": norms, "lr": 3e-3},
    ]
    optimizers = [Muon(matrices, lr=0.01, dtype=dtype), torch.optim.Adam(groups, betas=(0.9, 0.97), eps=1e-8)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers
