"""Compare CLIP, CAMs, CAA and labels with ExCEL's released code (ExCEL, CVPR 2025)."""

import pytest
import torch
import torch.nn.functional as F

from diclip.affinity import box_mask, caa, calibration, pair_affinity, transition
from diclip.attributes import enrich
from diclip.cam import Maps, flip_max, surgery_cam
from diclip.clip import Encoded
from diclip.data import Batch
from diclip.labels import pseudo_labels, upsample, with_background
from diclip.methods.excel import ExCEL
from diclip.refine import par
from diclip.settings import load_settings
from diclip.vocabulary import Vocabulary

from .golden import Golden, error
from .rule import openai_clip

pytestmark = pytest.mark.parity
CASE = Golden("excel.npz")
ISOLATED = Golden("excel_caa.npz")  # inputs and outputs of CAA alone, at full size
SETTINGS = load_settings("voc", method="excel")
SURGERY = {"attention": SETTINGS.attention, "surgery_blocks": SETTINGS.surgery_blocks, "tokens": "aliased"}
TAU = SETTINGS.tau_box


@pytest.fixture(scope="module")
def clip():
    return openai_clip(int(CASE["weight_seed"]))


@pytest.fixture(scope="module")
def image():
    return CASE["image_u8"].permute(2, 0, 1)[None] / 255


@pytest.fixture(scope="module")
def static(clip, image):
    return clip.encode(image, **SURGERY)


@pytest.fixture(scope="module")
def grid(static):
    return static.grid


@pytest.fixture(scope="module")
def system(clip) -> ExCEL:
    """Build the whole system, from names and attributes alone."""
    words = Vocabulary(tuple(CASE["class_names"]), background=tuple(CASE["bg_names"]))
    return ExCEL(SETTINGS, clip, vocabulary=words, bank=CASE["attr_bank"].T)


@pytest.fixture(scope="module")
def rungs(system, image):
    present, size = CASE["present"].long(), (image.shape[2], image.shape[3])
    return dict(system.rungs(Batch(["image"], image, [present], [None], [size])))


def cam(encoded: Encoded) -> torch.Tensor:
    texts, classes = CASE["text_tse"], len(CASE["class_names"])
    return surgery_cam(encoded.patches, encoded.pooled, texts, num_classes=classes, pooled_is_token=True)


def stored_maps(cams: torch.Tensor, grid: tuple[int, int], case: Golden = CASE) -> Maps:
    present = case["present"].long()
    scores = cams.T[present].unflatten(1, grid)
    return Maps(scores, torch.zeros_like(present), present)


def box_union(boxes: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    mask = torch.zeros(len(boxes), *grid, dtype=torch.bool)
    for row, own in zip(mask, boxes.tolist(), strict=True):
        for x0, y0, x1, y1 in own:
            if x0 >= 0:
                row[y0:y1, x0:x1] = True
    return mask


def test_texts(system):
    assert error(system.texts, CASE["text_plain"]) < 5e-5
    assert error(system.enriched, CASE["text_tse"]) < 5e-5


def test_enrichment_of_stored_texts():
    classes, background = CASE["text_plain"].tensor_split([len(CASE["class_names"])])
    enriched = enrich(classes, CASE["attr_bank"].T, share=SETTINGS.attribute_share, weight=SETTINGS.attribute_weight)
    assert error(torch.cat([enriched, background]), CASE["text_tse"]) < 1e-6


def test_features(static):
    x = torch.cat([static.pooled[:, None], static.patches], dim=1)
    assert error((x / x.norm(dim=1, keepdim=True))[0], CASE["image_features"]) < 2e-5


def test_attention(static):
    maps = static.attention[:, 0]
    assert error(maps[:, ::8, ::8], CASE["attn_sub"]) < 1e-5
    assert error(maps.sum(-1)[:, ::8], CASE["attn_rowsum"]) < 1e-5


def test_decoder_tokens(static):
    slots = static.tokens[:, 0, 1:].transpose(1, 2)[:, ::16, ::20]
    expected = CASE["feats_decoder_sub"]
    assert max(error(*pair) for pair in zip(slots, expected, strict=True)) < 1e-5


def test_cam_from_stored_features(static):
    x = CASE["image_features"][None]
    classes = len(CASE["class_names"])
    maps = surgery_cam(x[:, 1:], x[:, 0], CASE["text_tse"], num_classes=classes, pooled_is_token=True)
    assert error(maps[0].T, CASE["cam_static"]) < 2e-5


def test_static_cam(static):
    assert error(cam(static)[0].T, CASE["cam_static"]) < 2e-5


def test_dynamic_cam(clip, image):
    maps = cam(clip.encode(image, **SURGERY, bias=calibration(CASE["fd"][None])))[0].T
    assert error(maps, CASE["cam_dynamic"]) < 5e-3
    assert (maps - CASE["cam_dynamic"]).abs().mean() < 1e-5


def test_flipped_cam(clip, image, grid):
    both = cam(clip.encode(torch.cat([image, image.flip(-1)]), **SURGERY)).unflatten(-1, grid)
    assert error(flip_max(both[0], both[1]).flatten(1).T, CASE["cam_static_flipmax"]) < 5e-5


def test_transitions(static):
    assert error(transition(static.attention)[0, ::5, ::5], CASE["transmat_static_sub"]) < 1e-5
    learned = pair_affinity(CASE["fd"][None])
    assert error(learned[0, ::5, ::5], CASE["sd_fd_sub"]) < 1e-5
    trained = transition(static.attention, affinity=learned)
    assert error(trained[0, ::5, ::5], CASE["transmat_trained_sub"]) < 1e-5


@pytest.mark.parametrize("branch", ["static", "trained"])
def test_caa(static, grid, branch):
    maps = stored_maps(CASE["cam_static" if branch == "static" else "cam_dynamic"], grid)
    boxes = box_mask(maps.scores, threshold=TAU)
    assert boxes.equal(box_union(CASE[f"boxes_{branch}"], grid))
    learned = None if branch == "static" else pair_affinity(CASE["fd"][None])
    refined = caa(maps, static.attention, threshold=TAU, affinity=learned)
    assert error(refined.scores, CASE[f"caa_{branch}"]) < 1e-5


def test_scores_with_background(grid):
    maps = stored_maps(torch.zeros(grid[0] * grid[1], len(CASE["class_names"])), grid)
    maps = maps.with_scores(CASE["caa_static"])
    size = CASE["image_u8"].shape[:2]
    scores, label = upsample(maps, 0, size)
    assert label.equal(CASE["present"].long())
    assert error(with_background(scores)[:, 4::8, 4::8], CASE["cams_up_sub"]) < 1e-6


def test_from_pixels_and_names(rungs, grid):
    present = CASE["present"].long()
    assert rungs["tse"].label.equal(present)
    assert error(rungs["tse"].scores, CASE["cam_static"].T[present].unflatten(1, grid)) < 1e-4
    assert box_mask(rungs["tse"].scores, threshold=TAU).equal(box_union(CASE["boxes_static"], grid))
    assert error(rungs["caa"].scores, CASE["caa_static"]) < 1e-5
    scores, _ = upsample(rungs["caa"], 0, tuple(CASE["image_u8"].shape[:2]))
    assert error(with_background(scores)[:, 4::8, 4::8], CASE["cams_up_sub"]) < 1e-5


@pytest.mark.parametrize("branch", ["static", "trained"])
def test_caa_alone(branch):
    attention = F.pad(ISOLATED["attn_last6"], (1, 0, 1, 0))[:, None]
    learned = None if branch == "static" else pair_affinity(ISOLATED["fd"][None])
    steps = transition(attention, affinity=learned)
    if branch == "static":
        assert error(steps[0], ISOLATED["transmat_static"]) < 1e-5
    else:
        assert error(learned[0], ISOLATED["sd_fd"]) < 1e-5
        assert error(steps[0, ::5, ::5], ISOLATED["transmat_trained_sub"]) < 1e-5
    expected = ISOLATED[f"caa_{branch}"]
    cams = ISOLATED["cam_static" if branch == "static" else "cam_dynamic"]
    maps = stored_maps(cams, tuple(expected.shape[1:]), ISOLATED)
    boxes = box_mask(maps.scores, threshold=TAU)
    assert boxes.equal(box_union(ISOLATED[f"boxes_{branch}"], tuple(expected.shape[1:])))
    refined = caa(maps, attention, threshold=TAU, affinity=learned)
    assert error(refined.scores, expected) < 1e-5


@pytest.fixture(scope="module")
def normalised(image):
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def refined_maps(maps: Maps, image: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one image's scores after PAR, and its label."""
    kept = []
    (mask,) = pseudo_labels(maps, [size], refine=lambda scores: kept.extend(par(scores, image)) or kept)
    return kept[0], mask


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("source", ["stored", "pixels"])
def test_par(static, grid, normalised, mode, source):
    expected = CASE[f"par_label_{mode}"].long()
    image = CASE["par_image_u8"].permute(2, 0, 1)[None] / 255 if mode == "train" else normalised
    maps = stored_maps(cam(static)[0].T, grid)
    maps = maps.with_scores(CASE["caa_static"]) if source == "stored" else caa(maps, static.attention, threshold=TAU)
    scores, mask = refined_maps(maps, image, tuple(expected.shape))
    assert error(scores[:, 4::8, 4::8], CASE[f"par_scores_{mode}_sub"]) < 1e-5
    assert (mask != expected).sum() <= 10


def test_par_at_another_size(grid, normalised):
    names = [name for name in CASE.arrays() if name.startswith("par_label_eval_")]
    if not names:
        pytest.skip("no label at another size")
    maps = stored_maps(torch.zeros(grid[0] * grid[1], len(CASE["class_names"])), grid)
    maps = maps.with_scores(CASE["caa_static"])
    for expected in (CASE[name].long() for name in names):
        _, mask = refined_maps(maps, normalised, tuple(expected.shape))
        assert (mask != expected).sum() <= 10
