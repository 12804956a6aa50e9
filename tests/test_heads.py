"""Test the decoder against a plain one, patch by patch and head by head, and its published size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diclip.heads import Decoder, FusionHead, Segmenter, from_released, quick_gelu

TOKENS = torch.randn(3, 2, 7, 10, generator=torch.Generator().manual_seed(0))  # 3 blocks, 2 images, 1 + 2 x 3 patches
GRID = (2, 3)


def parameters(*modules: torch.nn.Module) -> int:
    return sum(weight.numel() for module in modules for weight in module.parameters())


@pytest.mark.parametrize(("classes", "expected"), [(20, 6_313_237), (80, 6_328_657)])
def test_published_sizes(classes, expected):
    with torch.device("meta"):
        assert parameters(Segmenter(12, 768, classes)) == expected


def test_fusion_patch_by_patch():
    head = FusionHead(3, 10, 4).eval()
    found = head(TOKENS, GRID)
    assert found.shape == (2, 4, *GRID)
    for image in range(2):
        for index in range(6):
            levels = []
            for own, block in zip(TOKENS, head.levels, strict=True):
                first, _, second = block
                hidden = (first.weight @ own[image, 1 + index] + first.bias).clamp_min(0)
                levels.append(second.weight @ hidden + second.bias)
            expected = head.mix.weight @ torch.cat(levels) + head.mix.bias
            torch.testing.assert_close(found[image, :, index // 3, index % 3], expected)


def test_decoder_head_by_head():
    dim, heads, size = 8, 2, 4
    decoder = Decoder(dim, 5, layers=2, heads=heads).eval()
    features = torch.randn(1, dim, *GRID, generator=torch.Generator().manual_seed(1))
    x = features[0].flatten(1).T  # (N, dim)
    for block in decoder.blocks:
        attention = block.self_attn
        hidden = torch.nn.functional.layer_norm(x, (dim,), block.norm1.weight, block.norm1.bias)
        q, k, v = (hidden @ attention.in_proj_weight.T + attention.in_proj_bias).split(dim, dim=1)
        mixed = []
        for own in (slice(head * size, (head + 1) * size) for head in range(heads)):
            mixed.append((q[:, own] @ k[:, own].T / size**0.5).softmax(1) @ v[:, own])
        x = x + torch.cat(mixed, 1) @ attention.out_proj.weight.T + attention.out_proj.bias
        hidden = torch.nn.functional.layer_norm(x, (dim,), block.norm2.weight, block.norm2.bias)
        hidden = hidden @ block.linear1.weight.T + block.linear1.bias
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        x = x + hidden @ block.linear2.weight.T + block.linear2.bias
    expected = x @ decoder.classify.weight.T + decoder.classify.bias
    torch.testing.assert_close(decoder(features)[0].flatten(1).T, expected)


@given(st.permutations(range(6)))
def test_the_decoder_knows_no_places(order):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = Decoder(8, 3, layers=1, heads=2).eval()
    features = torch.randn(1, 8, *GRID, generator=torch.Generator().manual_seed(2))
    moved = features.flatten(2)[..., order].view_as(features)
    torch.testing.assert_close(decoder(moved).flatten(2), decoder(features).flatten(2)[..., order])


def test_whole_channels_are_dropped_in_training_only():
    head = FusionHead(3, 10, 64, rate=0.5)
    kept = head(TOKENS, GRID)
    once, again = (head(TOKENS, GRID, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0))
    other = head(TOKENS, GRID, generator=torch.Generator().manual_seed(1))
    assert once.equal(again) and not once.equal(other)
    zero = (once == 0).flatten(2)
    assert zero.all(2).equal(zero.any(2)) and 0.3 < zero.float().mean() < 0.7
    assert once[~zero.view_as(once)].allclose(2 * kept[~zero.view_as(once)])
    assert head.eval()(TOKENS, GRID, generator=torch.Generator()).equal(kept)


def test_quick_gelu():
    x = torch.tensor([-2.0, 0.0, 1.0])
    assert quick_gelu(x).tolist() == pytest.approx([-0.064336, 0.0, 0.845795], abs=1e-5)


def test_released_names():
    """Each of our weights has a released name, and a frozen CLIP beside them is left out."""
    ours = Segmenter(2, 10, 3, dim=8, layers=1, heads=2).state_dict()
    block, level = "decoder.transformer.resblocks.0.", "decoder_fts_fuse.linears_modulelist.1."
    state = {
        level + "proj_2.bias": ours["fusion.levels.1.2.bias"],
        "decoder_fts_fuse.linear_fuse.weight": ours["fusion.mix.weight"][..., None, None],
        block + "attn.in_proj_weight": ours["decoder.blocks.0.self_attn.in_proj_weight"],
        block + "attn.out_proj.weight": ours["decoder.blocks.0.self_attn.out_proj.weight"],
        block + "mlp.c_proj.weight": ours["decoder.blocks.0.linear2.weight"],
        block + "ln_2.bias": ours["decoder.blocks.0.norm2.bias"],
        "decoder.linear_pred.weight": ours["decoder.classify.weight"][..., None, None],
    }
    found = from_released(state | {"encoder.visual.proj": torch.zeros(3, 3)})
    assert len(found) == len(state) and all(ours[name].equal(value) for name, value in found.items())


def test_what_does_not_fit_is_said_in_one_line():
    segmenter = Segmenter(3, 10, 3, dim=8, layers=1, heads=2)
    for call, message in (
        (lambda: segmenter(TOKENS[:2], GRID), r"tokens are \(2, 2, 7, 10\), expected \(3, 2, 7, 10\)"),
        (lambda: segmenter(TOKENS, (3, 3)), r"expected \(3, 2, 10, 10\) for 3x3 patches"),
        (lambda: from_released({"visual.proj": TOKENS}), "found 1 weights, none of a decoder"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
