"""Compare decoder, adapter, trained maps and losses with the released code of DiCLIP (TIP 2026) and ExCEL (CVPR 2025).

Weights are the rule's; `diclip.methods.trained` is run whole, with the released code's quirks.
"""

from functools import lru_cache

import pytest
import torch

from diclip.adapter import KVAdapter
from diclip.affinity import caa, calibration, pair_affinity, pair_logits
from diclip.cam import normalise, surgery_cam
from diclip.data import Batch
from diclip.diffusion import Taps
from diclip.losses import balanced_cross_entropy, diversity_loss, pair_targets
from diclip.memory import Memory, fuse
from diclip.methods.diclip import DiCLIP
from diclip.methods.excel import ExCEL
from diclip.methods.teachers import DiCLIPTeacher, ExCELTeacher, Learned, View, truncated
from diclip.methods.trained import System
from diclip.presets import QUIRKS
from diclip.settings import load_settings
from diclip.vocabulary import Vocabulary

from .golden import Golden, error
from .rule import openai_clip
from .segmenters import released
from .test_diclip import HEADS, RAR, fine_attention, present_maps, queries_and_keys

pytestmark = pytest.mark.parity
EXCEL, DICLIP = Golden("excel.npz"), Golden("diclip.npz")
CASES = {"excel": EXCEL, "diclip": DICLIP}


def settings(method: str):
    return load_settings("voc", method=method, **QUIRKS)


def vocabulary(case: Golden) -> Vocabulary:
    return Vocabulary(tuple(case["class_names"]), background=tuple(case["bg_names"]))


def batch(case: Golden) -> Batch:
    image = case["image_u8"].permute(2, 0, 1)[None] / 255
    return Batch(["image"], image, [case["present"].long()], [None], [tuple(image.shape[2:])])


def stored_adapter() -> KVAdapter:
    memory = Memory(DICLIP["kv_keys"], DICLIP["kv_values"], tuple(DICLIP["class_names"]))
    adapter = KVAdapter(memory, slots=len(DICLIP["adapter_fc1_bias"]) - len(memory.keys)).eval()
    names = {"keys": "fc1", "values": "fc2"}
    state = {f"{ours}.{kind}": DICLIP[f"adapter_{theirs}_{kind}"] for ours, theirs in names.items()
             for kind in ("weight", "bias")}  # fmt: skip
    for name, count in (("keys.weight", (slice(len(memory.keys)),)), ("values.weight", (..., slice(len(memory.keys))))):
        assert adapter.state_dict()[name][count].equal(state[name][count])  # they start as the memory
    adapter.load_state_dict(state)
    return adapter


class StoredDiffusion:
    """Give the stored queries and keys in the place of a diffusion model's."""

    factor = 8

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def capture(self, images: torch.Tensor, **options: object) -> Taps:
        q, k, grid = queries_and_keys(DICLIP, 10)
        attention, fine = fine_attention()
        return Taps(q, k, grid, attention.mean(0, keepdim=True), fine)


@pytest.fixture(scope="module")
def systems():
    """Build both systems as `build_system` does, from names, seeds and stored arrays alone."""

    def excel() -> System:
        clip = openai_clip(int(EXCEL["weight_seed"]))
        method = ExCEL(settings("excel"), clip, vocabulary=vocabulary(EXCEL), bank=EXCEL["attr_bank"].T)
        segmenter = released(int(EXCEL["weight_seed"]), len(EXCEL["class_names"]))
        return System(settings("excel"), clip, segmenter, ExCELTeacher(settings("excel"), method)).eval()

    def diclip() -> System:
        clip, chosen = openai_clip(int(DICLIP["weight_seed"])), settings("diclip")
        chosen = chosen.model_copy(update={"tau_box": 0.88, "train_rar_rounds": 10, "dynamic_from": 0.5})
        memory = Memory(DICLIP["kv_keys"], DICLIP["kv_values"], tuple(DICLIP["class_names"]))
        method = DiCLIP(chosen, clip, StoredDiffusion(), memory, vocabulary=vocabulary(DICLIP))
        segmenter = released(int(DICLIP["weight_seed"]), len(DICLIP["class_names"]), adapter=stored_adapter())
        return System(chosen, clip, segmenter, DiCLIPTeacher(chosen, method)).eval()

    return lru_cache(lambda name: {"excel": excel, "diclip": diclip}[name]())


@pytest.fixture(scope="module")
def views(systems):
    """Look at each case's image once; DiCLIP's bias is the stored one."""

    @lru_cache
    def look(name: str):
        system = systems(name)
        if name == "excel":
            return system.teacher.look(batch(EXCEL), step=0)
        bias = DICLIP["D_tilde"][None]
        encoded = system.teacher.method.encode(batch(DICLIP), bias=bias, tokens="aliased")
        return View(encoded, encoded)

    return look


@pytest.fixture(scope="module")
def decoded(systems, views):
    @lru_cache
    @torch.no_grad()
    def decode(name: str):
        return systems(name)._decode(views(name))

    return decode


@pytest.mark.parametrize(("name", "tolerance"), [("excel", 5e-5), ("diclip", 1e-5)])
def test_decoder(decoded, name, tolerance):
    assert error(decoded(name).logits[0], CASES[name]["seg_logits"]) < tolerance
    assert error(decoded(name).affinity[0, ::5, ::5], CASES[name]["sd_decoder_sub"]) < 1e-5


def test_fusion(systems, views):
    encoded = views("excel").encoded
    with torch.no_grad():
        features = systems("excel").segmenter.fusion(encoded.tokens, encoded.grid)
    assert error(features[0], EXCEL["fuse_out"]) < 5e-5


def test_decoder_of_stored_features(systems):
    with torch.no_grad():
        logits = systems("excel").segmenter.decoder(EXCEL["fuse_out"][None])
    assert error(logits[0], EXCEL["seg_logits"]) < 5e-5


def test_segmentation_without_tags_and_diffusion(systems):
    assert error(systems("excel").segment(batch(EXCEL).images)[0], EXCEL["seg_logits"]) < 5e-5
    assert error(systems("diclip").segment(batch(DICLIP).images)[0], DICLIP["seg_logits_eval_nobias"]) < 1e-5


def test_adapter(decoded):
    x = DICLIP["image_features"][None]
    patches, _ = normalise(x[:, 1:], x[:, 0], pooled_is_token=True)
    with torch.no_grad():
        adapted = stored_adapter()(patches)
    assert error(adapted[0].reshape(DICLIP["adapter_out"].shape), DICLIP["adapter_out"]) < 1e-5
    assert error(decoded("diclip").adapted[0], DICLIP["adapter_out"]) < 1e-5


def test_adapted_maps_of_stored_features():
    x, classes = DICLIP["image_features"][None], len(DICLIP["class_names"])
    cam = surgery_cam(x[:, 1:], x[:, 0], DICLIP["text_plain"], num_classes=classes, pooled_is_token=True)
    adapted = DICLIP["adapter_out"][None, 1:].relu().flatten(2)
    strength = settings("diclip").adapter_strength
    assert error(fuse(cam, adapted, weight=strength)[0].T, DICLIP["cam_dynamic"]) < 1e-4


@pytest.mark.parametrize("name", list(CASES))
def test_trained_maps(systems, views, decoded, name):
    """ExCEL's stored maps are of a stored feature, DiCLIP's of the adapter."""
    case, system = CASES[name], systems(name)
    expected = case["cam_dynamic"].T[case["present"].long()]
    pairs = pair_logits(case["fd"][None]) if name == "excel" else None
    learned = Learned(pairs, decoded(name).adapted, None)
    _, maps = next(system.teacher.rungs(batch(case), views(name), learned))
    assert maps.label.equal(case["present"].long())
    found = maps.scores.flatten(1)
    assert error(found, expected) < (5e-3 if name == "excel" else 1e-4)
    assert (found - expected).abs().mean() < 1e-5


def test_calibration_is_a_second_pass(views, systems):
    """A bias needs one product where the released code encodes the image again."""
    view, clip, bias = views("excel"), systems("excel").clip, calibration(EXCEL["fd"][None])
    how = {"attention": "qkv", "surgery_blocks": 5, "need_attention": False, "tokens": None}
    again = clip.encode(batch(EXCEL).images, bias=bias, **how).patches
    assert error(clip.biased(view.encoded, bias), again) < 1e-5


def test_trained_caa(views, decoded):
    affinity = decoded("diclip").affinity
    refined = caa(present_maps(DICLIP["cam_static"].T), views("diclip").encoded.attention, affinity=affinity)
    assert error(refined.scores, DICLIP["caa_sd_079"]) < 2e-5


def test_losses():
    labels = EXCEL["par_label_train"].long()[None]
    assert error(balanced_cross_entropy(EXCEL["seg_logits"][None], labels)[None], EXCEL["seg_loss"]) < 1e-6
    pairs = pair_targets(labels, tuple(EXCEL["fd"].shape[1:]), radius=settings("excel").pair_radius)
    counts = [(pairs == kind).sum().item() + 1 for kind in (1, 0)]
    assert counts == [EXCEL["div_pos_count"].item(), EXCEL["div_neg_count"].item()]
    assert error(diversity_loss(pair_affinity(EXCEL["fd"][None]), pairs)[None], EXCEL["div_loss"]) < 1e-6


def test_a_training_step_of_excel(systems):
    """From pixels, names and tags: the labels of the first step and the loss on them."""
    expected = EXCEL["par_label_train"].long()
    found = systems("excel").pseudo_labels(batch(EXCEL), 0)[0]
    assert (found != expected).sum() <= 10
    loss = systems("excel").loss(batch(EXCEL), step=0)
    assert loss["seg"].item() == pytest.approx(EXCEL["seg_loss"].item(), rel=1e-3)  # ten pixels may differ


def test_truncated_pixels():
    found = truncated(batch(EXCEL).images)[0].permute(1, 2, 0)
    assert (found * 255).round().byte().equal(EXCEL["par_image_u8"])


def test_labels_of_diclip(systems):
    """From pixels, names, tags, memory and the diffusion's queries and keys: the first step's labels."""
    expected = RAR["label10"].long()
    assert RAR["present"].equal(DICLIP["present"]) and HEADS == tuple(systems("diclip").settings.coarse_heads)
    found = systems("diclip").pseudo_labels(batch(DICLIP), 0)[0]
    assert found.shape == expected.shape and (found != expected).sum() <= 10
