"""Test softmax Grad-CAM on tiny random models against a loop over images and tags through open_clip's own forward."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from diclip.clip import DenseCLIP
from diclip.gradcam import GradCAM, softmax_gradcam

CLASSES, GRID = 5, (4, 4)
TAGS = [[3, 0, 4], [], [1], [2, 3]]
POOLS = [{"pool_type": "tok"}, {"pool_type": "avg"}, {"pool_type": "avg", "final_ln_after_pool": True}]
TEXTS = F.normalize(torch.randn(9, 16, generator=torch.Generator().manual_seed(2)), dim=-1)
IMAGES = torch.rand(len(TAGS), 3, 32, 32, generator=torch.Generator().manual_seed(1))


def tiny(**vision) -> DenseCLIP:
    vision = {"image_size": 32, "patch_size": 8, "width": 48, "head_width": 12, "layers": 3, **vision}
    text = {"context_length": 16, "width": 8, "heads": 2, "layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, quick_gelu=True)
        for block in model.visual.transformer.resblocks:  # the initial ones are too small to tell mistakes
            torch.nn.init.normal_(block.attn.in_proj_weight, std=0.3)
    return DenseCLIP(model, open_clip.SimpleTokenizer(context_length=16))


@pytest.fixture(scope="module")
def clip() -> DenseCLIP:
    return tiny()


def explain(clip: DenseCLIP, tags=TAGS, *, images=IMAGES, texts=TEXTS, **options) -> GradCAM:
    tokens = clip.encode(images, surgery_blocks=0).tokens[-2]
    tags = [torch.tensor(tag, dtype=torch.long) for tag in tags]
    return softmax_gradcam(clip, tokens, texts, tags, num_classes=CLASSES, grid=GRID, **options)


def slow(clip: DenseCLIP, image: torch.Tensor, tags: list[int], tag: int, *, pool: str) -> tuple:
    """Return map (h, w), weights (D,) and probabilities of one tag of one image (3, H, W)."""
    visual, seen = clip.model.visual, {}

    def start(module, arguments, output):
        seen["activation"] = output.detach().requires_grad_()
        return seen["activation"]

    def keep(module, arguments, output):
        seen["last"] = output

    hooks = [clip.blocks[-1].ln_1.register_forward_hook(start), clip.blocks[-1].register_forward_hook(keep)]
    own = visual(((image - clip.mean) / clip.std)[None])[0]
    for hook in hooks:
        hook.remove()
    patches = visual.ln_post(seen["last"][0, 1:]).mean(0) @ visual.proj
    feature = F.normalize(patches if pool == "patches" else own, dim=0)
    texts = [*tags, *range(CLASSES, len(TEXTS))]
    probability = (clip.model.logit_scale.exp() * TEXTS[texts] @ feature).softmax(0)
    (gradient,) = torch.autograd.grad(probability[tags.index(tag)], seen["activation"])
    weights = gradient[0, 1:].mean(0)
    cam = (seen["activation"].detach()[0, 1:] @ weights).relu().view(GRID)
    for _ in range(2):
        cam = (cam - cam.min()) / (1e-7 + (cam - cam.min()).max())
    return cam, weights, torch.zeros(len(TEXTS)).index_put((torch.tensor(texts),), probability.detach())


@pytest.mark.parametrize("pool", ["patches", "model"])
@pytest.mark.parametrize("vision", POOLS, ids=lambda vision: "-".join(map(str, vision.values())))
def test_equals_a_loop_over_tags(vision, pool):
    clip = tiny(**vision)
    found = explain(clip, pool=pool, chunk=4)
    pairs = [(index, tag) for index, tags in enumerate(TAGS) for tag in tags]
    assert list(zip(found.maps.image.tolist(), found.maps.label.tolist(), strict=True)) == pairs
    for row, (index, tag) in enumerate(pairs):
        cam, weights, probabilities = slow(clip, IMAGES[index], TAGS[index], tag, pool=pool)
        torch.testing.assert_close(found.probabilities[row], probabilities, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(found.weights[row], weights, atol=1e-4 * weights.abs().max().item(), rtol=1e-4)
        torch.testing.assert_close(found.maps.scores[row], cam, atol=1e-3, rtol=0)
    if vision != {"pool_type": "avg"}:  # where the model itself averages its patches, there is but one pooling
        other = explain(clip, pool="model" if pool == "patches" else "patches").maps.scores
        assert (found.maps.scores - other).abs().max() > 0.1


@given(st.permutations(range(4)), st.integers(1, 7))
def test_neither_batches_nor_chunks_nor_order_matter(clip, order, chunk):
    whole = explain(clip)
    found = explain(clip, [TAGS[i] for i in order], images=IMAGES[list(order)], chunk=chunk)
    for place, index in enumerate(order):
        (scores, label), (expected, known) = found.maps.of(place), whole.maps.of(index)
        assert label.equal(known)
        torch.testing.assert_close(scores, expected, atol=1e-3, rtol=0)


@given(st.permutations(TAGS[0]))
def test_maps_follow_the_order_of_the_tags(clip, tags):
    whole, found = explain(clip, [TAGS[0]], images=IMAGES[:1]), explain(clip, [tags], images=IMAGES[:1])
    assert found.maps.label.tolist() == tags
    rows = [TAGS[0].index(tag) for tag in tags]
    torch.testing.assert_close(found.maps.scores, whole.maps.scores[rows], atol=1e-3, rtol=0)


def test_background_words_and_other_tags_take_probability(clip):
    alone, crowd = explain(clip, [[1]] * 4), explain(clip, [[1, 2]] * 4)
    assert (alone.probabilities[:, 1] > crowd.probabilities[::2, 1]).all()
    certain = explain(clip, [[1]] * 4, texts=TEXTS[:CLASSES])  # one tag and no background: nothing to explain
    assert certain.probabilities[:, 1].eq(1).all() and not certain.maps.scores.any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_nothing_is_left_behind(clip, mode):
    with mode():
        found = explain(clip)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    tensors = (found.maps.scores, found.weights, found.probabilities)
    assert not any(x.requires_grad for x in tensors)
    assert not any(weight.requires_grad or weight.grad is not None for weight in clip.model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in clip.model.modules())


def test_without_tags_there_are_no_maps(clip):
    found = explain(clip, [[], [], [], []])
    assert found.maps.scores.shape == (0, *GRID)
    assert found.weights.shape == (0, 48) and found.probabilities.shape == (0, len(TEXTS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tags": TAGS[:2]}, r"tokens are \(4, 17, 48\) for 2 images of 4x4 patches, expected"),
        ({"images": torch.rand(4, 3, 32, 40)}, r"tokens are \(4, 21, 48\) for 4 images of 4x4 patches, expected"),
        ({"tags": [[5], [], [], []]}, "tags are 5 to 5, expected 0 to 4"),
        ({"texts": TEXTS[:3]}, "num_classes is 5 and pool 'patches', expected 1 to the number of texts, 3"),
        ({"pool": "cls"}, "pool 'cls', expected 1 to the number of texts, 9, and patches or model"),
    ],
)
def test_faults_are_one_line(clip, change, message):
    with pytest.raises(ValueError, match=message) as fault:
        explain(clip, **change)
    assert "\n" not in str(fault.value)
