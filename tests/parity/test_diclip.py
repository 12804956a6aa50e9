"""Compare DiCLIP's training-free chain with its released code: correlation, ACR, TSA, CAA, RAR (DiCLIP, TIP 2026)."""

from math import isqrt

import pytest
import torch

from diclip.affinity import box_mask, caa
from diclip.cam import Maps, surgery_cam
from diclip.clip import Encoded
from diclip.correlation import acr, cluster, correlate, likeness
from diclip.labels import pseudo_labels, upsample, with_background
from diclip.memory import Memory, fuse, retrieve
from diclip.refine import rar
from diclip.surgery import attend
from diclip.vocabulary import Vocabulary

from .golden import Golden, error
from .rule import openai_clip
from .test_excel import box_union

pytestmark = pytest.mark.parity
CASE, RAR = Golden("diclip.npz"), Golden("diclip_rar.npz")
SURGERY = {"attention": "qq+2kk", "surgery_blocks": 3, "tokens": "aliased"}
HEADS = (1, 2)
TAU = 0.88


@pytest.fixture(scope="module")
def clip():
    return openai_clip(int(CASE["weight_seed"]))


@pytest.fixture(scope="module")
def texts(clip):
    words = Vocabulary(tuple(CASE["class_names"]), background=tuple(CASE["bg_names"]))
    return clip.encode_text(words.prompts())


@pytest.fixture(scope="module")
def encoded(clip):
    return clip.encode(image(), **SURGERY, bias=CASE["D_tilde"][None])


def image() -> torch.Tensor:
    return CASE["image_u8"].permute(2, 0, 1)[None] / 255


def grid() -> tuple[int, int]:
    height, width = CASE["image_u8"].shape[:2]
    return height // 16, width // 16


def queries_and_keys(case: Golden, number: int) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """Return q and k (1, heads, n, d) and their square grid."""
    q, k = (case[f"{name}{number}"].transpose(0, 1)[None] for name in "qk")
    return q, k, (isqrt(q.shape[2]),) * 2


def correlation() -> torch.Tensor:
    q, k, source = queries_and_keys(CASE, 10)
    return correlate(q, k, source=source, grid=grid(), heads=HEADS)


def retrieved(patches: torch.Tensor, pooled: torch.Tensor, texts: torch.Tensor, **options: str) -> torch.Tensor:
    memory = Memory(CASE["kv_keys"], CASE["kv_values"], tuple(CASE["class_names"]))
    return retrieve(patches, pooled, memory, texts, pooled_is_token=True, **options)


def static_cam(patches: torch.Tensor, pooled: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    classes = len(CASE["class_names"])
    cam = surgery_cam(patches, pooled, texts, num_classes=classes, pooled_is_token=True)
    return fuse(cam, retrieved(patches, pooled, texts))


def present_maps(cams: torch.Tensor) -> Maps:
    """Pack maps (C, N) of the tags."""
    present = CASE["present"].long()
    return Maps(cams[present].unflatten(1, grid()), torch.zeros_like(present), present)


def fine_attention() -> tuple[torch.Tensor, tuple[int, int]]:
    """Return the chosen heads' attention (2, M, M) between fine tokens, and their grid."""
    q, k, fine = queries_and_keys(RAR, 40)
    return attend(q[:, HEADS], k[:, HEADS])[0], fine


def test_correlation():
    q, k, source = queries_and_keys(CASE, 10)
    like = likeness(q, k, source=source, grid=grid(), heads=HEADS)
    assert error(like[0, :, ::5, ::5], CASE["corr_raw_heads12_sub"]) < 1e-5
    assert error(correlation()[0], CASE["D"]) < 1e-5


def test_clusters():
    assert cluster(CASE["D"][None], grid=grid())[0].equal(CASE["cluster_id"].long())


def test_mean_rows():
    assert error(acr(CASE["D"][None], CASE["cluster_id"].long()[None])[0], CASE["D_tilde"]) < 1e-5


def test_texts(texts):
    assert error(texts, CASE["text_plain"]) < 5e-5


def test_features(encoded: Encoded):
    x = torch.cat([encoded.pooled[:, None], encoded.patches], dim=1)
    assert error((x / x.norm(dim=1, keepdim=True))[0], CASE["image_features"]) < 1e-5


def test_attention(encoded):
    assert error(encoded.attention[:, 0, ::8, ::8], CASE["attn_sub"]) < 1e-5


def test_decoder_tokens(encoded):
    slots = encoded.tokens[:, 0, 1:].transpose(1, 2)[:, ::16, ::20]
    expected = CASE["feats_decoder_sub"]
    assert max(error(*pair) for pair in zip(slots, expected, strict=True)) < 1e-5


def test_retrieval():
    x = CASE["image_features"][None]
    expected = CASE["tsa_static_fg"]
    assert error(retrieved(x[:, 1:], x[:, 0], CASE["text_plain"])[0].T, expected) < 2e-5
    alike = error(retrieved(x[:, 1:], x[:, 0], CASE["text_plain"], value_mode="onehot")[0].T, expected)
    assert 1e-3 < alike < 0.1  # close, but not the same


def test_static_cam():
    x = CASE["image_features"][None]
    assert error(static_cam(x[:, 1:], x[:, 0], CASE["text_plain"])[0].T, CASE["cam_static"]) < 1e-4


@pytest.mark.parametrize(("name", "threshold"), [("boxes_088", TAU), ("boxes_079", 0.79)])
def test_boxes(name, threshold):
    mask = box_mask(present_maps(CASE["cam_static"].T).scores, threshold=threshold)
    assert mask.equal(box_union(CASE[name], grid()))


def test_caa(encoded):
    refined = caa(present_maps(CASE["cam_static"].T), encoded.attention, threshold=TAU)
    assert error(refined.scores, CASE["caa_static_088"]) < 2e-5


def test_fine_attention():
    attention, _ = fine_attention()
    for head, own in zip(HEADS, attention, strict=True):
        assert error(own[::20, ::20], RAR[f"attn40_head{head}_sub"]) < 1e-5


@pytest.mark.parametrize(("rounds", "scores", "labels"), [(10, "lam10", "label10"), (5, "lam5", "label5")])
def test_rar(rounds, scores, labels):
    suffix = "" if rounds == 10 else "_240x360"
    present, expected = RAR["present"].long(), RAR[labels + suffix].long()
    attention, fine = fine_attention()
    maps = Maps(RAR["cam_in"], torch.zeros_like(present), present)
    refined = rar(maps, attention.mean(0, keepdim=True), rounds=rounds, grid=fine)
    lam, label = upsample(refined, 0, tuple(expected.shape), restretch=True)
    assert label.equal(present)
    assert error(with_background(lam)[:, 4::8, 4::8], RAR[f"{scores}{suffix}_sub"]) < 1e-5
    (found,) = pseudo_labels(refined, [tuple(expected.shape)], restretch=True)
    assert (found != expected).sum() <= 10


def test_from_queries_to_labels(clip, texts):
    """Feed each stage with the one before: only inputs come from the files."""
    diffusion = correlation()
    encoded = clip.encode(image(), **SURGERY, bias=acr(diffusion, cluster(diffusion, grid=grid())))
    cam = static_cam(encoded.patches, encoded.pooled, texts)
    assert error(cam[0].T, CASE["cam_static"]) < 1e-4
    refined = caa(present_maps(cam[0]), encoded.attention, threshold=TAU)
    assert error(refined.scores, CASE["caa_static_088"]) < 2e-5
    attention, fine = fine_attention()
    refined = rar(refined, attention.mean(0, keepdim=True), rounds=10, grid=fine)
    (found,) = pseudo_labels(refined, [tuple(RAR["label10"].shape)], restretch=True)
    assert (found != RAR["label10"].long()).sum() <= 10
