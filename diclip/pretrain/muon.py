"""The optimizer of the mini models: Muon where it applies, AdamW elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class MuonAdamW:
    """Step the `inside` matrices with Muon and everything else with AdamW, behind one optimizer's interface.

    Muon (Jordan et al., 2024) makes the update of a matrix orthogonal: a mini CLIP needs a third of the steps.
    `ratio` is its learning rate over AdamW's, after the scaling that gives both updates the same root mean square
    (Liu et al., 2025). A schedule multiplies by a group's `ratio` where it has one.
    """

    def __init__(
        self, inside: list[nn.Parameter], others: list[dict[str, Any]], *, lr: float, decay: float, ratio: float = 3.0
    ) -> None:
        self.muon = torch.optim.Muon(
            [{"params": inside, "ratio": ratio}],
            lr=lr * ratio,
            weight_decay=decay / ratio,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.muon.param_groups + self.adamw.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def step(self) -> None:
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
