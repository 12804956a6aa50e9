"""Read the golden cases and compare with them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(os.environ.get("DICLIP_GOLDEN") or Path(__file__).parents[1] / "golden")


class Golden:
    """Give a file's arrays as tensors (names as lists); a file or an array that is absent skips the test."""

    def __init__(self, name: str) -> None:
        self.path = FOLDER / name

    def __getitem__(self, array: str) -> torch.Tensor | list[str]:
        if not self.path.is_file():
            pytest.skip(f"no golden file {self.path}")
        with np.load(self.path) as arrays:
            if array not in arrays:
                pytest.skip(f"{self.path} has no array {array}")
            value = arrays[array]
        return value.tolist() if value.dtype.kind == "U" else torch.from_numpy(value)

    def arrays(self) -> list[str]:
        """Return the names of the file's arrays, none without a file."""
        if not self.path.is_file():
            return []
        with np.load(self.path) as arrays:
            return arrays.files


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference over the largest expected magnitude; shapes must be equal."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    return ((actual - expected).abs().max() / expected.abs().max()).item()
