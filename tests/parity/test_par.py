"""Compare PAR's three variants with its released code (AFA, CVPR 2022)."""

import re

import pytest
import torch

from diclip.refine import par

from .golden import Golden, error

pytestmark = pytest.mark.parity
CASE = Golden("par.npz")


def photograph() -> torch.Tensor:
    return CASE["image_u8"].permute(2, 0, 1) / 255


def rounds(case: str) -> list[tuple[str, int]]:
    """Return the names of a case's results that say their number of iterations, and that number."""
    found = [(name, int(hit[1])) for name in CASE.arrays() if (hit := re.match(rf"{case}_out_T(\d+)", name))]
    return found or pytest.skip(f"no {case}_out_T… in {CASE.path}")


def test_scores_brought_to_the_image_s_size():
    (scores,) = par([CASE["A_masks"]], [photograph()], iterations=10, resize="scores")
    assert error(scores, CASE["A_out"]) < 2e-5


@pytest.mark.parametrize("case", ["B", "C"])  # C: the image is brought to the scores' size
def test_one_image(case):
    masks = CASE[f"{case}_masks"]
    for name, iterations in rounds(case):
        (scores,) = par([masks], [photograph()], iterations=iterations)
        assert error(scores, CASE[name]) < 2e-5


def test_constant_image():
    for name, iterations in rounds("D"):
        expected = CASE[name]
        (scores,) = par(
            torch.ones(1, *expected.shape), torch.full((1, 3, *expected.shape[1:]), 0.3), iterations=iterations
        )
        assert error(scores, expected) < 2e-6


@pytest.mark.parametrize("held", [1, 2**24])  # one image at a time, both together
def test_two_images(held):
    images = torch.stack([CASE["image_u8"].float(), CASE["E_image2"]]).permute(0, 3, 1, 2) / 255
    assert rounds("E")
    for name, iterations in rounds("E"):
        scores = torch.stack(par(CASE["E_masks"], images, iterations=iterations, held=held))
        assert error(scores[:, :, ::3, ::3], CASE[name]) < 2e-5
