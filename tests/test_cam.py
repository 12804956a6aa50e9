"""Test the closed-form CAM against its definition, and packed maps."""

import pytest
import torch
import torch.nn.functional as F

from diclip.cam import Maps, by_image, flip_max, minmax, normalise, pack, surgery_cam, surgery_scores


def features(batch=2, n=12, e=8, texts=7):
    g = torch.Generator().manual_seed(0)
    patches, pooled = torch.randn(batch, n, e, generator=g), torch.randn(batch, e, generator=g)
    return patches, pooled, F.normalize(torch.randn(texts, e, generator=g), dim=-1)


def four_dimensional_cam(patches, pooled, texts, *, num_classes, pooled_is_token, norm_dim):
    """Compute the CAM as it is defined: products by channel, less their mean over the texts, then summed."""
    x = torch.cat([pooled[:, None], patches], dim=1)
    counted = x if pooled_is_token else x[:, 1:]
    x = x / (counted.norm(dim=1, keepdim=True) if norm_dim == "token" else x.norm(dim=2, keepdim=True))
    weight = (2 * x[:, :1] @ texts.T).softmax(-1)
    weight = weight / weight.mean(-1, keepdim=True)
    products = x[:, :, None, :] * texts[None, None] * weight[..., None]  # (B, 1 + N, n, E)
    scores = (products - products.mean(2, keepdim=True)).sum(-1)
    scores = scores if pooled_is_token else scores[:, 1:]
    low, high = scores.min(1, keepdim=True).values, scores.max(1, keepdim=True).values
    return ((scores - low) / (high - low))[:, -patches.shape[1] :, :num_classes].transpose(1, 2)


@pytest.mark.parametrize("norm_dim", ["token", "channel"])
@pytest.mark.parametrize("pooled_is_token", [True, False])
def test_closed_form_equals_definition(norm_dim, pooled_is_token):
    options = {"num_classes": 4, "pooled_is_token": pooled_is_token, "norm_dim": norm_dim}
    cam = surgery_cam(*features(), **options)
    assert cam.shape == (2, 4, 12)
    torch.testing.assert_close(cam, four_dimensional_cam(*features(), **options), atol=1e-5, rtol=0)


def test_extremes_over_patches_or_over_class_token_too():
    patches, pooled, texts = features()
    averaged = surgery_cam(patches, pooled, texts, num_classes=4, pooled_is_token=False)
    assert (averaged.amin(-1) == 0).all() and (averaged.amax(-1) == 1).all()
    token = surgery_cam(patches, 9 * pooled, texts, num_classes=4, pooled_is_token=True)
    assert (token.amin(-1) > 0).any() or (token.amax(-1) < 1).any()


def test_scores_have_no_shared_part_and_batch_equals_loop():
    patches, pooled, texts = features()
    scores = surgery_scores(patches, pooled, texts)
    for all_of_them, some in zip(scores, surgery_scores(patches, pooled, texts, first=3), strict=True):
        torch.testing.assert_close(some, all_of_them[..., :3])
    for score in scores:
        torch.testing.assert_close(score.mean(-1), torch.zeros(score.shape[:-1]), atol=1e-6, rtol=0)
    alone = surgery_scores(patches[1:], pooled[1:], texts)
    torch.testing.assert_close(scores[0][1:], alone[0])
    torch.testing.assert_close(scores[1][1:], alone[1])


@pytest.mark.parametrize("norm_dim", ["token", "channel"])
def test_normalising_twice_changes_nothing(norm_dim):
    patches, pooled, _ = features()
    once = normalise(patches, pooled, pooled_is_token=True, norm_dim=norm_dim)
    twice = normalise(*once, pooled_is_token=True, norm_dim=norm_dim)
    torch.testing.assert_close(once, twice)


def test_minmax():
    x = torch.tensor([[1.0, 2.0, 5.0], [3.0, 3.0, 3.0]])
    assert minmax(x, 1).tolist() == [[0, 0.25, 1], [0, 0, 0]]
    assert minmax(x, 1, eps=4.0).tolist() == [[0, 0.125, 0.5], [0, 0, 0]]
    assert minmax(1e-20 * x, 1)[0].tolist() == pytest.approx([0, 0.25, 1])


def test_constant_features_give_zero_maps():
    patches, pooled = torch.ones(1, 6, 4), torch.ones(1, 4)
    cam = surgery_cam(patches, pooled, torch.eye(4), num_classes=2, pooled_is_token=True)
    assert cam.equal(torch.zeros(1, 2, 6))


def test_flip_max_is_symmetric_in_its_views():
    maps = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    both = flip_max(maps, maps.flip(-1) / 2)
    torch.testing.assert_close(both, minmax(maps, (-2, -1), eps=1e-5))
    torch.testing.assert_close(flip_max(maps.flip(-1), maps), minmax(maps.flip(-1), (-2, -1), eps=1e-5))


def test_pack_and_unpack():
    dense = torch.rand(3, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    maps = pack(dense, [torch.tensor([1, 3]), torch.tensor([], dtype=torch.long), torch.tensor([0])])
    assert len(maps) == 3 and maps.image.tolist() == [0, 0, 2] and maps.label.tolist() == [1, 3, 0]
    assert maps.of(0)[0].equal(dense[0, [1, 3]]) and len(maps.of(1)[0]) == 0
    restored = maps.dense(3, 4)
    assert restored[2, 0].equal(dense[2, 0]) and restored[1].count_nonzero() == 0
    assert restored.count_nonzero() == 3 * 6
    assert maps.with_scores(torch.zeros(3, 5, 5)).dense(3, 4).shape == (3, 4, 5, 5)


@pytest.mark.parametrize("tags", [[], [[], []]])
def test_no_tags_no_maps(tags):
    maps = pack(torch.rand(len(tags), 4, 2, 3), [torch.tensor(t, dtype=torch.long) for t in tags])
    assert isinstance(maps, Maps) and maps.scores.shape == (0, 2, 3)
    assert maps.dense(2, 4).equal(torch.zeros(2, 4, 2, 3))


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
def test_maps_by_image_keep_their_order(device):
    image = torch.tensor([2, 0, 2, 3], device=device)
    maps = Maps(torch.rand(4, 2, 3, device=device), image, torch.tensor([1, 0, 3, 2], device=device))
    gain = torch.tensor([1.0, 10.0, 100.0, 1000.0], device=device)
    scaled = by_image(maps, 4, lambda own, images: own.scores.sum(2) * gain[images][own.image][:, None])
    torch.testing.assert_close(scaled.scores, maps.scores.sum(2) * gain[image][:, None])
    assert scaled.image is maps.image and scaled.label is maps.label


def test_maps_of_an_image_that_is_not_there():
    maps = Maps(torch.rand(2, 2, 3), torch.tensor([0, 2]), torch.tensor([1, 0]))
    assert "0 to 2, expected 0 to 1" in one_line(by_image, maps, 2, lambda own, images: own.scores)


def one_line(call, *args, **options):
    with pytest.raises(ValueError) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_shapes():
    patches, pooled, texts = features()
    options = {"num_classes": 4, "pooled_is_token": True}
    assert "(B, N, E)" in one_line(surgery_cam, patches[0], pooled, texts, **options)
    assert "(n, E)" in one_line(surgery_cam, patches, pooled, texts[:, :3], **options)
    assert "1 to the number of texts, 7" in one_line(
        surgery_cam, patches, pooled, texts, num_classes=8, pooled_is_token=True
    )
    assert "token or channel" in one_line(surgery_cam, patches, pooled, texts, norm_dim="patch", **options)
    assert "for 1 images" in one_line(pack, torch.zeros(2, 3, 4, 4), [torch.tensor([0])])
    assert "expected 0 to 2" in one_line(pack, torch.zeros(1, 3, 4, 4), [torch.tensor([3])])
