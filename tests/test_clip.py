"""Test the frozen CLIP on tiny random models: its own path, the surgery path, loading."""

import json
from types import SimpleNamespace

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diclip.clip import DenseCLIP, load_clip
from diclip.surgery import ATTENTIONS, head_sum, resize_positions

HEADS, LAYERS = 12, 4
VISION = {"image_size": 32, "patch_size": 8, "width": 48, "head_width": 4, "layers": LAYERS}
TEXT = {"context_length": 16, "width": 8, "heads": 2, "layers": 1}


def tiny(**vision) -> DenseCLIP:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(embed_dim=16, vision_cfg=VISION | vision, text_cfg=TEXT, quick_gelu=True)
    return DenseCLIP(model, open_clip.SimpleTokenizer(context_length=16))


@pytest.fixture(scope="module")
def clip() -> DenseCLIP:
    return tiny()


def images(batch: int = 2, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


POOLS = [
    {"pool_type": "tok"},
    {"pool_type": "avg"},
    {"pool_type": "avg", "final_ln_after_pool": True},
    {"pool_type": "tok", "no_ln_pre": True, "ls_init_value": 0.5},
]


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: "-".join(map(str, pool.values())))
@pytest.mark.parametrize("need_attention", [True, False])
def test_own_path_is_open_clips(pool, need_attention):
    clip, x = tiny(**pool), images()
    encoded = clip.encode(x, attention="qk", surgery_blocks=0, need_attention=need_attention)
    normalised = (x - clip.mean) / clip.std
    with torch.no_grad():
        torch.testing.assert_close(encoded.pooled, clip.model.encode_image(normalised))
        blocks = clip.model.visual.forward_intermediates(normalised, output_fmt="NLC")["image_intermediates"]
    torch.testing.assert_close(encoded.tokens[:, :, 1:], torch.stack(blocks))
    assert encoded.patches.equal(encoded.plain_patches)
    assert clip.pooled_is_token == (pool["pool_type"] == "tok")


@pytest.mark.parametrize(
    ("attention", "mass"),
    [
        *(("qk", 12), ("qq", 12), ("kk", 12), ("vv", 12)),
        *(("qkv", 12), ("qq+2kk", 36), ("identity", 12), ("3identity", 36), ("bias", 0)),
    ],
)
def test_row_masses(attention, mass):
    q, k, v = torch.randn(3, 2, HEADS, 7, 4, generator=torch.Generator().manual_seed(0))
    bias = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    plain = head_sum(q, k, v, attention=attention).sum(-1)
    biased = head_sum(q, k, v, attention=attention, bias=bias).sum(-1)
    torch.testing.assert_close(plain, torch.full_like(plain, mass))
    torch.testing.assert_close(biased[:, 0], plain[:, 0])  # the class token gets no bias
    torch.testing.assert_close(biased[:, 1:], plain[:, 1:] + HEADS)


@pytest.mark.parametrize("attention", ["identity", "3identity"])
def test_identity_leaves_each_token_its_own_value(attention):
    q, k, v = torch.randn(3, 2, HEADS, 7, 4, generator=torch.Generator().manual_seed(0))
    shared = head_sum(q, k, v, attention=attention)
    torch.testing.assert_close(shared, shared.diagonal(dim1=1, dim2=2).diag_embed())


def test_every_attention_has_a_mass_test():
    cases = test_row_masses.pytestmark[0].args[1]
    assert {name for name, _ in cases} == set(ATTENTIONS)


def test_surgery_path_head_by_head(clip):
    x, bias = images(), torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(2))
    encoded = clip.encode(x, attention="qq+2kk", surgery_blocks=2, bias=bias)
    with torch.no_grad():
        z = encoded.tokens[LAYERS - 3]
        for index in (LAYERS - 2, LAYERS - 1):
            block = clip.blocks[index]
            h = block.ln_1(encoded.tokens[index - 1])
            qkv = h @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
            q, k, v = (part.split(4, dim=-1) for part in qkv.split(48, dim=-1))
            shared = torch.zeros(2, 17, 17)
            for head in range(HEADS):
                shared += (q[head] @ q[head].mT / 2).softmax(-1) + 2 * (k[head] @ k[head].mT / 2).softmax(-1)
                shared[:, 1:, 1:] += bias
            z = z + block.attn.out_proj(torch.cat([shared @ v[head] for head in range(HEADS)], dim=-1))
        patches = clip.head(z)[0]
    torch.testing.assert_close(encoded.patches, patches)


def test_surgery_leaves_own_path_alone(clip):
    x = images()
    plain = clip.encode(x, surgery_blocks=0)
    other = clip.encode(x, surgery_blocks=3, bias=torch.ones(2, 16, 16))
    assert other.plain_patches.equal(plain.plain_patches) and other.pooled.equal(plain.pooled)
    assert other.tokens.equal(plain.tokens)
    assert not torch.allclose(other.patches, plain.patches, atol=1e-2)


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: "-".join(map(str, pool.values())))
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_bias_is_one_product(pool, blocks):
    """A bias put in afterwards is one that was there from the start, and another adds to it."""
    clip, x = tiny(**pool), images()
    first, second = torch.rand(2, 2, 16, 16, generator=torch.Generator().manual_seed(2)).softmax(-1)
    how = {"attention": "qkv", "surgery_blocks": blocks}
    encoded = clip.encode(x, need_pull=True, **how)
    torch.testing.assert_close(clip.biased(encoded, first), clip.encode(x, bias=first, **how).patches)
    once = clip.encode(x, bias=first, need_pull=True, **how)
    both = clip.encode(x, bias=first + second, **how).patches
    torch.testing.assert_close(clip.biased(once, second), both, atol=1e-4, rtol=1e-4)
    assert (clip.biased(encoded, first) - encoded.patches).abs().max() > 1e-2
    for bad, message in (
        (clip.encode(x, **how), "need_pull=True"),
        (encoded, r"\(2, 16, 15\), expected \(2, 16, 16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            clip.biased(bad, first[..., :15])


def test_attention_mean_then_sum(clip):
    encoded = clip.encode(images(), surgery_blocks=3)
    assert encoded.attention.shape == (LAYERS, 2, 17, 17)
    mass = encoded.attention.sum(-1)
    torch.testing.assert_close(mass[0], torch.ones_like(mass[0]))
    torch.testing.assert_close(mass[1:], torch.full_like(mass[1:], HEADS))


def test_keeps_only_what_is_asked_for(clip):
    full, bare = clip.encode(images()), clip.encode(images(), tokens=None, need_attention=False)
    assert bare.tokens is None and bare.attention is None
    torch.testing.assert_close(bare.patches, full.patches)
    torch.testing.assert_close(bare.pooled, full.pooled)


def test_aliased_tokens(clip):
    x, surgery = images(), 2
    clean = clip.encode(x, surgery_blocks=surgery)
    slots = clip.encode(x, surgery_blocks=surgery, tokens="aliased").tokens
    last_plain = LAYERS - 1 - surgery
    assert slots[:last_plain].equal(clean.tokens[:last_plain]) and slots[-1].equal(clean.tokens[-1])
    with torch.no_grad():
        torch.testing.assert_close(clip.head(slots[last_plain])[0], clean.patches)
        for index in range(last_plain + 1, LAYERS - 1):
            block = clip.blocks[index + 1]
            after = slots[index] + block.mlp(block.ln_2(slots[index]))
            torch.testing.assert_close(after, clean.tokens[index + 1])


def test_non_square_grid(clip):
    encoded = clip.encode(images(height=24, width=40), bias=torch.zeros(2, 15, 15))
    assert encoded.grid == (3, 5)
    assert encoded.patches.shape == (2, 15, 16) and encoded.attention.shape[2:] == (16, 16)


def test_positions_follow_rows_and_columns():
    row, column = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    positions = torch.stack([row.flatten(), column.flatten()], dim=1)
    positions = torch.cat([torch.tensor([[7.0, 9.0]]), positions])
    resized = resize_positions(positions, (4, 4), (2, 4))
    assert resized[0].tolist() == [7, 9]
    assert resized[1:, 0].view(2, 4).tolist() == [[0.5] * 4, [2.5] * 4]
    assert resized[1:, 1].view(2, 4).tolist() == [[0, 1, 2, 3]] * 2
    assert resize_positions(positions, (4, 4), (4, 4)).equal(positions)


def test_batch_equals_loop(clip):
    x, bias = images(3, 24, 32), torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(3))
    together = clip.encode(x, bias=bias)
    for i in range(3):
        alone = clip.encode(x[i : i + 1], bias=bias[i : i + 1])
        torch.testing.assert_close(together.patches[i], alone.patches[0])
        torch.testing.assert_close(together.attention[:, i], alone.attention[:, 0])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"images": torch.zeros(3, 32, 32)}, "expected float"),
        ({"images": torch.zeros(1, 1, 32, 32)}, "expected float"),
        ({"images": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, "divide by 255"),
        ({"images": torch.zeros(1, 3, 32, 30)}, "multiples of 8x8"),
        ({"attention": "kq"}, "qq\\+2kk"),
        ({"tokens": "all"}, "aliased"),
        ({"surgery_blocks": LAYERS + 1}, "0 to 4"),
        ({"bias": torch.zeros(1, 17, 17)}, "\\(1, 16, 16\\)"),
        ({"attention": "bias"}, "bias is None"),
    ],
)
def test_bad_arguments_say_so_in_one_line(clip, bad, message):
    with pytest.raises(ValueError, match=message) as error:
        clip.encode(**{"images": images(1)} | bad)
    assert "\n" not in str(error.value)


def test_texts_in_chunks(clip):
    prompts = ["a clean origami cat.", "a clean origami dog.", "sky"]
    features = clip.encode_text(prompts)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(clip.encode_text(prompts, batch_size=2), features)
    with pytest.raises(ValueError, match="no prompts"):
        clip.encode_text([])


def test_model_is_frozen(clip):
    assert not clip.model.training and not any(p.requires_grad for p in clip.model.parameters())


def test_other_towers_are_refused():
    with pytest.raises(ValueError, match="image tower is Identity"):
        DenseCLIP(SimpleNamespace(visual=nn.Identity()), list)
    with pytest.raises(ValueError, match="pools by attention"):
        tiny(attentional_pool=True, attn_pooler_heads=4)


@pytest.fixture
def folder(clip, tmp_path):
    weights = {name: weight.half() for name, weight in clip.model.state_dict().items()}
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    model = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}
    config = {"model_cfg": model, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    return tmp_path


def test_load_from_folder(clip, folder):
    loaded = load_clip(folder)
    assert loaded.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert loaded.model.visual.proj.dtype == torch.float32
    parity = load_clip(folder, pixel_norm="imagenet")
    pooled = [model.encode(images()).pooled for model in (parity, clip)]
    torch.testing.assert_close(*pooled, atol=0.02, rtol=0.02)  # stored in half precision
    assert loaded.tokenizer(["cat"]).equal(clip.tokenizer(["cat"]))


@pytest.mark.parametrize("file", ["open_clip_config.json", "open_clip_model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damaged_folder_says_what_to_do(folder, file, damage):
    path = folder / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="git checkout|diclip pretrain") as error:
        load_clip(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("no/such/folder", None, "neither a folder nor"),
        ("ViT-B-16-quickgelu", None, "expected a tag \\(openai"),
        ("ViT-B-16-quickgelu", "no_such_tag", "or a checkpoint file"),
        ("ViT-B-16", "openai", "use ViT-B-16-quickgelu"),
    ],
)
def test_unknown_weights(model, pretrained, message):
    with pytest.raises(ValueError, match=message) as error:
        load_clip(model, pretrained=pretrained)
    assert "\n" not in str(error.value)
