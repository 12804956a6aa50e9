"""Compare the losses with those of WeCLIP's and ExCEL's released code (CVPR 2024, CVPR 2025)."""

from math import isqrt

import pytest
import torch

from diclip.losses import balanced_cross_entropy, diversity_loss, pair_targets

from .golden import Golden, error
from .rule import openai_clip
from .segmenters import released

pytestmark = pytest.mark.parity
CASE, HEAD = Golden("losses.npz"), Golden("weclip_head.npz")
METHODS = ("weclip", "excel")


def targets():
    return pair_targets(CASE["labels"].long(), (isqrt(CASE["aff_pred_f16"].shape[-1]),) * 2)


@pytest.mark.parametrize("method", METHODS)
def test_segmentation_loss(method):
    loss = balanced_cross_entropy(CASE["logits"], CASE["labels"].long())
    assert error(loss[None], CASE[f"seg_loss_{method}"]) < 2e-6


def test_segmentation_loss_without_background():
    """ExCEL's is half the other term, where WeCLIP's is not a number."""
    labels = CASE["labels"].long()
    loss = balanced_cross_entropy(CASE["logits"], labels.masked_fill(labels == 0, 1))
    assert error(loss[None], CASE["seg_loss_excel_foreground_only"]) < 2e-6
    assert CASE["seg_loss_weclip_foreground_only_isnan"].item() == 1 and loss.isfinite()


@pytest.mark.parametrize("method", METHODS)
def test_pair_targets(method):
    assert targets()[0].equal(CASE[f"aff_label_{method}"])
    empty = pair_targets(0 * CASE["labels"][:1].long(), (isqrt(CASE["aff_pred_f16"].shape[-1]),) * 2)[0]
    assert (empty == 1).sum() == CASE[f"radius_mask_sum_{method}"].item()
    if method == "weclip":
        assert (empty == 1)[::7, ::7].equal(CASE["radius_mask_weclip_sub"].bool())


@pytest.mark.parametrize("method", METHODS)
def test_pair_loss(method):
    counts = CASE["aff_counts"].view(2, 2)[METHODS.index(method)].tolist()
    assert [(targets() == 1).sum().item() + 1, (targets() == 0).sum().item() + 1] == counts
    loss = diversity_loss(CASE["aff_pred_f16"].float(), targets())
    assert error(loss[None], CASE[f"aff_loss_{method}"]) < 2e-6


def test_weclips_own():
    """WeCLIP's head: another label image, and an affinity without scale."""
    labels, features = HEAD["label"].long()[None], HEAD["F_u"]
    loss = balanced_cross_entropy(HEAD["seg_logits_from_Fu"][None], labels)
    assert error(loss[None], HEAD["seg_loss"]) < 2e-6
    pairs = pair_targets(labels, tuple(features.shape[1:]))
    assert pairs[0, ::5, ::5].equal(HEAD["aff_label_sub"])
    counts = [(pairs == kind).sum().item() + 1 for kind in (1, 0)]
    assert counts == [HEAD["aff_pos_count"].item(), HEAD["aff_neg_count"].item()]
    flat = features.flatten(1)
    assert error(diversity_loss((flat.T @ flat).sigmoid()[None], pairs)[None], HEAD["aff_loss"]) < 2e-6


def test_weclips_decoder():
    """The same fusion head and decoder, on the outputs of 11 blocks."""
    seed, features = int(Golden("weclip.npz")["weight_seed"]), HEAD["F_u"][None]
    segmenter = released(seed, len(HEAD["seg_logits_from_Fu"]) - 1, blocks=11)
    image = Golden("weclip.npz")["image_u8"].permute(2, 0, 1)[None] / 255
    encoded = openai_clip(seed).encode(image, surgery_blocks=0, need_attention=False)
    with torch.no_grad():
        assert error(segmenter.decoder(features)[0], HEAD["seg_logits_from_Fu"]) < 1e-4
        fused, logits = segmenter(encoded.tokens[:11], encoded.grid)
    assert error(fused[0], HEAD["fuse_out"]) < 1e-5
    assert error(logits[0], HEAD["seg_logits_full"]) < 5e-5
