"""The optimizer of the mini models: Muon where it applies, AdamW elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn


def parameter_groups(parameters: Iterable[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Split parameters into those with weight decay (matrices) and those without (gains, biases, scalars)."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


class MuonAdamW:
    """Step the `inside` matrices with Muon and all else of a model with AdamW, behind one optimizer's interface.

    Muon (Jordan et al., 2024) makes the update of a matrix orthogonal: a mini CLIP needs a third of the steps.
    Kernels of convolutions count as matrices of one row an output channel. `ratio` is Muon's learning rate over
    AdamW's; a schedule multiplies by a group's `ratio` where it has one. `scaling` says what that rate is of:

    - "rms": an update's root mean square is a fifth of it, as AdamW's is about (Liu et al., 2025);
    - "spectral": its largest singular value is it, times the root of rows over columns where that is below 1
      (Bernstein, 2025). Kernels have many columns, which all carry a part of the same mean activation; with "rms"
      their outputs become constants within a few hundred steps, and the inner levels of a U-Net die.

    `iterations` are Newton and Schulz's: five make an update orthogonal to a few per cent, three are cheaper.
    """

    def __init__(
        self,
        model: nn.Module,
        inside: Iterable[nn.Parameter],
        *,
        lr: float,
        decay: float = 0.1,
        ratio: float = 3.0,
        scaling: Literal["rms", "spectral"] = "rms",
        iterations: int = 5,
    ) -> None:
        self.inside = list(inside)
        self.matrices = [nn.Parameter(p.detach().flatten(1)) for p in self.inside]  # views: they share the memory
        assert all(m.data_ptr() == p.data_ptr() for m, p in zip(self.matrices, self.inside, strict=True))
        taken = {id(p) for p in self.inside}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
        groups: dict[float, list[nn.Parameter]] = {}
        for matrix in self.matrices:  # torch's "original" takes care of matrices with more rows than columns
            part = 1.0 if scaling == "rms" else (min(matrix.shape) / max(matrix.shape)) ** 0.5
            groups.setdefault(ratio * part, []).append(matrix)
        self.muon = torch.optim.Muon(
            [{"params": own, "ratio": each, "lr": lr * each} for each, own in groups.items()],
            lr=lr * ratio,
            weight_decay=decay / ratio,
            ns_steps=iterations,
            adjust_lr_fn="match_rms_adamw" if scaling == "rms" else "original",
        )
        self.adamw = torch.optim.AdamW(parameter_groups(rest, decay), lr=lr, betas=(0.9, 0.98))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.muon.param_groups + self.adamw.param_groups

    def zero_grad(self) -> None:
        for p in self.inside:
            p.grad = None
        self.adamw.zero_grad()

    def step(self) -> None:
        for matrix, p in zip(self.matrices, self.inside, strict=True):
            matrix.grad = None if p.grad is None else p.grad.flatten(1)
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
