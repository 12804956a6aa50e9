"""Test the systems on a tiny random CLIP: which rungs, in what order, made of what."""

import pytest
import torch

from diclip.affinity import caa
from diclip.cam import pack, surgery_cam
from diclip.clip import DenseCLIP, load_clip
from diclip.data import Batch
from diclip.methods import build_method
from diclip.methods.clip import PlainCLIP
from diclip.settings import load_settings
from diclip.vocabulary import COCO_CLASSES, VOC, Vocabulary


@pytest.fixture(scope="module")
def clip(tiny_clip) -> DenseCLIP:
    return load_clip(tiny_clip)


def batch(*, size: int = 64, tags: tuple[tuple[int, ...], ...] = ((2, 7), (), (19,))) -> Batch:
    images = torch.rand(len(tags), 3, size, size, generator=torch.Generator().manual_seed(0))
    return Batch(
        names=[f"image{index}" for index in range(len(tags))],
        images=images,
        tags=[torch.tensor(tag, dtype=torch.long) for tag in tags],
        masks=[None] * len(tags),
        sizes=[(50, 70)] * len(tags),
    )


def rungs(clip: DenseCLIP, given: Batch, **settings) -> dict:
    return dict(PlainCLIP(load_settings(**settings), clip).rungs(given))


def test_rungs_come_in_order_with_one_map_a_tag(clip):
    method = build_method(load_settings(), clip)
    assert isinstance(method, PlainCLIP) and method.clip is clip
    found = list(method.rungs(batch()))
    assert [name for name, _ in found] == ["clip", "intra", "caa"] == [*method.raw, *method.refined]
    for _, maps in found:
        assert maps.scores.shape == (3, 8, 8) and maps.scores.isfinite().all()
        assert maps.image.tolist() == [0, 0, 2] and maps.label.tolist() == [2, 7, 19]
        assert maps.scores.min() >= 0 and maps.scores.amax((1, 2)).min() > 0
    for _, maps in found[:2]:
        assert maps.scores.max() <= 1


def test_without_tags_there_are_no_maps(clip):
    for maps in rungs(clip, batch(tags=((), ()))).values():
        assert maps.scores.shape == (0, 8, 8)


def test_prompts_are_the_classes_and_then_the_background(clip):
    method = PlainCLIP(load_settings(background_words="sky,grass"), clip)
    assert method.texts.shape == (22, 128)
    torch.testing.assert_close(method.texts, clip.encode_text([*VOC.prompts()[:20], *method.vocabulary.prompts()[20:]]))
    assert method.vocabulary.prompts()[20:] == ["a clean origami sky.", "a clean origami grass."]
    own = PlainCLIP(load_settings(), clip, vocabulary=Vocabulary(("cat", "dog"), ("sky",)))
    assert own.texts.shape == (3, 128)


def test_classes_are_those_of_the_dataset(clip, tmp_path):
    coco = build_method(load_settings(dataset="coco", data_root=str(tmp_path)), clip)
    assert coco.vocabulary.classes == COCO_CLASSES and coco.texts.shape == (80 + 25, 128)
    (tmp_path / "VOCdevkit/VOC2012").mkdir(parents=True)
    (tmp_path / "VOCdevkit/VOC2012/classes.txt").write_text("sofa\npolar bear\n")
    own = build_method(load_settings(dataset="voc", data_root=str(tmp_path)), clip)
    assert own.vocabulary.classes == ("sofa", "polar bear")
    assert dict(own.rungs(batch(tags=((1,),))))["intra"].scores.shape == (1, 8, 8)


def test_clip_rung_is_clips_own_path_whatever_the_surgery(clip):
    given = batch()
    encoded = clip.encode(given.images, attention="qk", surgery_blocks=0)
    texts = clip.encode_text(VOC.prompts())
    cam = surgery_cam(encoded.patches, encoded.pooled, texts, num_classes=20, pooled_is_token=clip.pooled_is_token)
    expected = pack(cam.unflatten(-1, (8, 8)), given.tags).scores
    for settings in ({"attention": "qk"}, {"attention": "qq+2kk"}, {"surgery_blocks": 1}):
        torch.testing.assert_close(rungs(clip, given, **settings)["clip"].scores, expected, atol=1e-4, rtol=0)


def test_intra_rung_follows_attention_and_blocks(clip):
    given = batch()
    found = []
    for settings in ({}, {"attention": "qk"}, {"attention": "identity"}, {"surgery_blocks": 1}):
        found.append(rungs(clip, given, **settings)["intra"].scores)
        options = {"attention": "qq+2kk", "surgery_blocks": 3} | settings
        encoded = clip.encode(given.images, **options)
        cam = surgery_cam(
            encoded.patches,
            encoded.pooled,
            clip.encode_text(VOC.prompts()),
            num_classes=20,
            pooled_is_token=clip.pooled_is_token,
        )
        torch.testing.assert_close(found[-1], pack(cam.unflatten(-1, (8, 8)), given.tags).scores, atol=1e-4, rtol=0)
    for index, scores in enumerate(found):
        assert all((scores - other).abs().max() > 0.01 for other in found[:index])


def test_norm_dim_reaches_the_maps(clip):
    found = [rungs(clip, batch(), norm_dim=dim)["clip"].scores for dim in ("token", "channel")]
    assert (found[0] - found[1]).abs().max() > 0.01


@pytest.mark.parametrize(("asked", "averaged"), [(1, 1), (3, 3), (4, 4), (9, 4)])
def test_caa_spreads_intra_along_the_last_blocks(clip, asked, averaged):
    given = batch()
    found = rungs(clip, given, caa_layers=asked, tau_box=0.6)
    attention = clip.encode(given.images, surgery_blocks=3).attention
    expected = caa(found["intra"], attention, threshold=0.6, layers=averaged)
    torch.testing.assert_close(found["caa"].scores, expected.scores, atol=1e-4, rtol=1e-3)
    other = caa(found["intra"], attention, threshold=0.6, layers=averaged % 4 + 1)
    assert not torch.allclose(found["caa"].scores, other.scores, atol=1e-4)


def test_a_batch_equals_its_images(clip):
    given = batch()
    together = rungs(clip, given)
    for index in range(3):
        part = slice(index, index + 1)
        alone = rungs(clip, Batch(given.names[part], given.images[part], given.tags[part], [None], given.sizes[part]))
        for name, maps in alone.items():
            torch.testing.assert_close(maps.scores, together[name].of(index)[0], atol=1e-4, rtol=1e-3)


def test_other_grids(clip):
    given = batch()
    wide = Batch(given.names, given.images[:, :, :32], given.tags, given.masks, given.sizes)
    assert {maps.scores.shape for maps in rungs(clip, wide).values()} == {(3, 4, 8)}


def test_build_loads_the_settings_clip(tiny_clip, tmp_path):
    method = build_method(load_settings(clip_model=str(tiny_clip), device="cpu"))
    assert method.clip.pooled_is_token and method.settings.method == "clip"
    with pytest.raises(ValueError, match="neither a folder nor"):
        build_method(load_settings(clip_model=str(tmp_path / "none"), device="cpu"))
    with pytest.raises(ValueError, match="device 'cuda:77' is not on this machine"):
        build_method(load_settings(clip_model=str(tiny_clip), device="cuda:77"))
