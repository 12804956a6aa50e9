"""Test the dense CRF: what it keeps, what it moves, several processes, bad input, and a missing package."""

import subprocess
import sys

import pytest
import torch

from diclip.crf import CRF, PRESETS, dense_crf
from diclip.labels import to_labels
from diclip.settings import ROOT


@pytest.fixture
def crf():
    """Skip where the optional package is not installed."""
    pytest.importorskip("pydensecrf", reason="the dense CRF's package is not installed (pydensecrf2)")
    return dense_crf


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("K", [1, 2, 5])
def test_without_potentials_scores_stay(crf, K):
    scores, image = 0.01 + some(K, 9, 13), some(3, 9, 13, seed=1)
    (posterior,) = crf([scores], [image], preset=CRF(1, 0, 67, 3, 0))
    torch.testing.assert_close(posterior, scores / scores.sum(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_labels_move_to_the_edge_in_the_image(crf, preset):
    image = torch.full((3, 40, 50), 0.2)
    image[:, :, 30:] = 0.9
    scores = torch.full((2, 40, 50), 0.3)
    scores[0, :, :25], scores[1, :, 25:] = 0.7, 0.7  # five columns off
    (posterior,) = crf([scores], [image], preset=preset)
    torch.testing.assert_close(posterior.sum(0), torch.ones(40, 50))
    mask = to_labels(posterior, torch.tensor([6]))
    assert mask.dtype == torch.int64
    assert mask.equal(torch.where(torch.arange(50) >= 30, 7, 0).expand(40, 50))


def test_rows_and_columns_are_not_mixed_up(crf):
    scores, image = 0.01 + some(3, 12, 20), some(3, 12, 20, seed=1)
    (posterior,) = crf([scores], [image])
    for moved in (lambda x: x.transpose(1, 2), lambda x: x.flip(2)):
        (other,) = crf([moved(scores)], [moved(image)])
        assert (other - moved(posterior)).abs().mean() < 0.02  # its filters are approximate


def test_processes_share_a_stream_in_order(crf):
    shapes = [(2, 8, 9), (3, 11, 7), (1, 8, 8), (4, 9, 9), (2, 10, 10), (2, 8, 8), (3, 8, 8)]
    drawn = []

    def scores():
        for seed, shape in enumerate(shapes):
            drawn.append(seed)
            yield some(*shape, seed=seed)

    images = [some(3, *shape[1:], seed=9) for shape in shapes]
    alone = list(crf(scores(), images))
    drawn.clear()
    stream = crf(scores(), images, workers=2)
    together = [next(stream)]
    assert len(drawn) <= 5  # the rest is not held in memory yet
    together.extend(stream)
    assert len(alone) == len(together) == len(shapes) and all(map(torch.equal, alone, together))


def test_bad_input_is_said_in_one_line(crf):
    scores, image = some(2, 8, 9), some(3, 8, 9)
    broken = scores.clone()
    broken[0, 0, 0] = torch.nan
    for call, message in (
        (lambda: crf([scores], [image], preset="sharp"), "'sharp' is unknown, choose one of clip-es, afa"),
        (lambda: crf([scores], [image], workers=-1), "-1, expected 0"),
        (lambda: crf([scores], [image[:, :, :8]]), r"image 0: found scores \(2, 8, 9\) and image \(3, 8, 8\)"),
        (lambda: crf([scores], [image[:1]]), r"expected \(K, H, W\) and \(3, H, W\)"),
        (lambda: crf([scores[:0]], [image]), r"found scores \(0, 8, 9\)"),
        (lambda: crf([scores], [2 * image - 1]), "found pixels from -[01]"),
        (lambda: crf([scores], [255 * image]), "expected 0 to 1"),
        (lambda: crf([scores - 1], [image]), "found scores from -"),
        (lambda: crf([broken], [image]), "found scores from nan"),
        (lambda: crf([scores, scores], [image]), "found 1 images and more scores, expected as many of both"),
        (lambda: crf([scores], [image, image]), "found 1 scores and more images"),
        (lambda: CRF(1, 3, 0, 3, 4), "above 0"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            list(call())
        assert "\n" not in str(error.value)


def test_a_missing_package_is_said_before_anything_is_read(monkeypatch):
    monkeypatch.setattr("diclip.crf.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install -e") as error:
        dense_crf(iter([]), iter([]))
    assert "\n" not in str(error.value)


def test_workers_start_without_torch():
    """It would cost each of them seconds and hundreds of megabytes."""
    code = "import sys, diclip.crf; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
