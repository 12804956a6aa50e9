"""Compare CLIP, CAMs, CAA and labels with ExCEL's released code (ExCEL, CVPR 2025)."""

import pytest
import torch
import torch.nn.functional as F

from diclip.affinity import box_mask, caa, transition
from diclip.cam import Maps, flip_max, surgery_cam
from diclip.clip import Encoded
from diclip.labels import pseudo_labels, upsample, with_background
from diclip.refine import par
from diclip.vocabulary import Vocabulary

from .golden import Golden, error
from .rule import openai_clip

pytestmark = pytest.mark.parity
CASE = Golden("excel.npz")
SURGERY = {"attention": "qkv", "surgery_blocks": 5, "tokens": "aliased"}
TAU = 0.79


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


def cam(encoded: Encoded) -> torch.Tensor:
    texts, classes = CASE["text_tse"], len(CASE["class_names"])
    return surgery_cam(encoded.patches, encoded.pooled, texts, num_classes=classes, pooled_is_token=True)


def centred_cosine() -> torch.Tensor:
    """Return 3 (cos - mean cos) of the stored decoder feature, (1, N, N)."""
    feature = F.normalize(CASE["fd"].flatten(1).T[None], dim=-1)
    cosine = feature @ feature.transpose(1, 2)
    return 3 * (cosine - cosine.mean())


def stored_maps(cams: torch.Tensor, grid: tuple[int, int]) -> Maps:
    present = CASE["present"].long()
    scores = cams.T[present].unflatten(1, grid)
    return Maps(scores, torch.zeros_like(present), present)


def box_union(boxes: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    mask = torch.zeros(len(boxes), *grid, dtype=torch.bool)
    for row, own in zip(mask, boxes.tolist(), strict=True):
        for x0, y0, x1, y1 in own:
            if x0 >= 0:
                row[y0:y1, x0:x1] = True
    return mask


def test_texts(clip):
    words = Vocabulary(tuple(CASE["class_names"]), background=tuple(CASE["bg_names"]))
    assert error(clip.encode_text(words.prompts()), CASE["text_plain"]) < 5e-5


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
    centred = centred_cosine()
    bias = centred.masked_fill(centred < 0, -torch.inf).softmax(-1)
    maps = cam(clip.encode(image, **SURGERY, bias=bias))[0].T
    assert error(maps, CASE["cam_dynamic"]) < 5e-3
    assert (maps - CASE["cam_dynamic"]).abs().mean() < 1e-5


def test_flipped_cam(clip, image, grid):
    both = cam(clip.encode(torch.cat([image, image.flip(-1)]), **SURGERY)).unflatten(-1, grid)
    assert error(flip_max(both[0], both[1]).flatten(1).T, CASE["cam_static_flipmax"]) < 5e-5


def test_transitions(static):
    assert error(transition(static.attention)[0, ::5, ::5], CASE["transmat_static_sub"]) < 1e-5
    learned = centred_cosine().sigmoid()
    assert error(learned[0, ::5, ::5], CASE["sd_fd_sub"]) < 1e-5
    trained = transition(static.attention, affinity=learned)
    assert error(trained[0, ::5, ::5], CASE["transmat_trained_sub"]) < 1e-5


@pytest.mark.parametrize("branch", ["static", "trained"])
def test_caa(static, grid, branch):
    maps = stored_maps(CASE["cam_static" if branch == "static" else "cam_dynamic"], grid)
    boxes = box_mask(maps.scores, threshold=TAU)
    assert boxes.equal(box_union(CASE[f"boxes_{branch}"], grid))
    learned = None if branch == "static" else centred_cosine().sigmoid()
    refined = caa(maps, static.attention, threshold=TAU, affinity=learned)
    assert error(refined.scores, CASE[f"caa_{branch}"]) < 1e-5


def test_scores_with_background(grid):
    maps = stored_maps(torch.zeros(grid[0] * grid[1], len(CASE["class_names"])), grid)
    maps = maps.with_scores(CASE["caa_static"])
    size = CASE["image_u8"].shape[:2]
    scores, label = upsample(maps, 0, size)
    assert label.equal(CASE["present"].long())
    assert error(with_background(scores)[:, 4::8, 4::8], CASE["cams_up_sub"]) < 1e-6


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
