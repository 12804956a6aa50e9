"""Compare softmax Grad-CAM and CAA with CLIP-ES's released code (CLIP-ES, CVPR 2023)."""

import open_clip
import pytest
import torch
import torch.nn.functional as F

from diclip.affinity import box_mask, propagate, transition
from diclip.cam import Maps
from diclip.clip import DenseCLIP
from diclip.data import Batch
from diclip.gradcam import softmax_gradcam
from diclip.labels import upsample
from diclip.methods.clip_es import CLIPES
from diclip.settings import load_settings
from diclip.vocabulary import Vocabulary

from .golden import Golden, error
from .rule import openai_clip
from .test_excel import box_union

pytestmark = pytest.mark.parity
CASE = Golden("clipes.npz")
SETTINGS = load_settings("voc", method="clip-es")


@pytest.fixture(scope="module")
def clip():
    plain = openai_clip(int(CASE["weight_seed"]))
    colours = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    return DenseCLIP(plain.model, plain.tokenizer, **colours)


@pytest.fixture(scope="module")
def image():
    return CASE["image_u8"].permute(2, 0, 1)[None] / 255


@pytest.fixture(scope="module")
def encoded(clip, image):
    return clip.encode(image, surgery_blocks=0)


def words() -> Vocabulary:
    return Vocabulary(tuple(CASE["class_names"]), background=tuple(CASE["bg_names"]))


@pytest.fixture(scope="module")
def explained(clip, encoded):
    return softmax_gradcam(
        clip,
        encoded.tokens[-2],
        torch.cat([CASE["text_fg"], CASE["text_bg"]]),
        [CASE["present"].long()],
        num_classes=len(CASE["class_names"]),
        grid=encoded.grid,
        pool=SETTINGS.gradcam_pool,
    )


def stored(name: str) -> Maps:
    present = CASE["present"].long()
    return Maps(CASE[name], torch.zeros_like(present), present)


def test_texts(clip):
    classes = len(CASE["class_names"])
    texts = clip.encode_text(words().prompts())
    assert error(texts[:classes], CASE["text_fg"]) < 5e-5
    assert error(texts[classes:], CASE["text_bg"]) < 5e-5


def test_last_block_s_input(clip, encoded):
    tokens = encoded.tokens[-2, 0]
    assert error(tokens[::4, ::8], CASE["feat_block11"]) < 5e-6
    activation = clip.blocks[-1].ln_1(tokens)[1:].T.unflatten(1, encoded.grid)
    assert error(activation[::16], CASE["act_patch_sub"]) < 1e-5


def test_attention(encoded):
    assert error(encoded.attention[:, 0, ::8, ::8], CASE["attn_sub"]) < 5e-6
    last = encoded.attention[-SETTINGS.caa_layers :, 0, 1:, 1:]
    assert error(last.mean(0), CASE["attn_mean8"]) < 5e-6


def test_gradcam_from_stored_texts(explained):
    present, classes = CASE["present"].long(), len(CASE["class_names"])
    for row in explained.probabilities:
        assert error(torch.cat([row[present], row[classes:]]), CASE["prob"]) < 2e-5
    assert error(explained.weights, CASE["chan_weights"]) < 2e-5
    assert error(explained.maps.scores, CASE["gradcam"]) < 3e-5
    assert explained.maps.label.equal(CASE["keys"].long())


def test_boxes_from_stored_maps():
    maps = CASE["gradcam"]
    expected = box_union(CASE["boxes"], tuple(maps.shape[1:]))
    assert box_mask(maps, threshold=SETTINGS.tau_box).equal(expected)


def test_caa_from_stored_maps():
    attention = F.pad(CASE["attn_mean8"], (1, 0, 1, 0))[None, None]
    steps = transition(attention, layers=1)
    refined = propagate(stored("gradcam"), steps, threshold=SETTINGS.tau_box)
    assert error(refined.scores, CASE["caa"]) < 5e-6


def test_scores_at_the_photograph_s_size():
    scores, label = upsample(stored("caa"), 0, CASE["image_u8"].shape[:2])
    assert error(scores[:, 4::8, 4::8], CASE["caa_highres_sub"]) < 5e-6
    assert label.equal(CASE["keys"].long())


def test_end_to_end(clip, image):
    batch = Batch(["photograph"], image, [CASE["present"].long()], [None], [tuple(image.shape[2:])])
    rungs = dict(CLIPES(SETTINGS, clip, vocabulary=words()).rungs(batch))
    assert error(rungs["gradcam"].scores, CASE["gradcam"]) < 5e-4
    assert error(rungs["caa"].scores, CASE["caa"]) < 2e-4
    scores, label = upsample(rungs["caa"], 0, batch.sizes[0])
    assert error(scores[:, 4::8, 4::8], CASE["caa_highres_sub"]) < 2e-4
    assert label.equal(CASE["keys"].long())
