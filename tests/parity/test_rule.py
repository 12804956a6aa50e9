"""Check the weight rule against its published values (seed 0 unless said otherwise)."""

import pytest

from .rule import state, tensor

pytestmark = pytest.mark.parity

BLOCK = "visual.transformer.resblocks.0."
VALUES = [
    ("visual.conv1.weight", (768, 3, 16, 16), (-0.0349121094, -0.03125, 0.0247192383), 2.762879),
    ("visual.class_embedding", (768,), (-1.19628906, 0.708984375, 0.115905762), 11.517299),
    ("visual.ln_pre.weight", (768,), (1.06640625, 0.966796875, 1.00585938), 767.690918),
    ("visual.ln_pre.bias", (768,), (0.0404968262, 0.98828125, -0.114868164), 16.285608),
    (BLOCK + "attn.in_proj_weight", (2304, 768), (-0.00221633911, 0.0540161133, -0.0243835449), -211.201334),
    (BLOCK + "attn.in_proj_bias", (2304,), (0.0365905762, -0.0154495239, -0.0386657715), -0.038190),
    (BLOCK + "attn.out_proj.weight", (768, 768), (-0.00453186035, -0.0035610199, -0.00975036621), 18.685888),
    (BLOCK + "ln_1.bias", (768,), (0.0688476562, -0.0587158203, 0.0745239258), 2.313361),
    ("visual.proj", (768, 512), (0.0769042969, 0.0276489258, 0.00144767761), -3.885737),
    (
        "transformer.resblocks.0.attn.in_proj_weight",
        (1536, 512),
        (-0.00716400146, -0.159790039, -0.0692749023),
        -109.334192,
    ),
    ("text_projection", (512, 512), (0.0498657227, -0.0671386719, 0.038269043), 11.647035),
    (
        "decoder.transformer.resblocks.0.attn.in_proj_weight",
        (768, 256),
        (0.0310516357, -0.249755859, -0.0657348633),
        -96.963363,
    ),
    ("decoder.linear_pred.weight", (21, 256, 1, 1), (0.0604553223, 0.0370178223, 0.0609436035), -10.408881),
]


@pytest.mark.parametrize(("name", "shape", "first", "total"), VALUES, ids=[row[0] for row in VALUES])
def test_values(name, shape, first, total):
    norm = name.replace("bias", "weight")
    shapes = {name: shape, norm: shape[:1]} if name.endswith(("ln_1.bias", "ln_pre.bias")) else {name: shape}
    value = state(shapes, seed=0)[name]
    assert value.flatten()[:3].tolist() == pytest.approx(first, rel=1e-8)
    assert value.double().sum().item() == pytest.approx(total, abs=2e-6)


def test_query_key_value_thirds():
    weight = tensor(BLOCK + "attn.in_proj_weight", (2304, 768), seed=0)
    assert weight[768, :3].tolist() == pytest.approx((0.0703735352, 0.0468444824, -0.035949707), abs=1e-9)
    assert weight[1536, :3].tolist() == pytest.approx((0.044342041, -0.0135192871, -0.0598144531), abs=1e-9)


def test_seed_and_scalar():
    first = tensor("visual.conv1.weight", (768, 3, 16, 16), seed=7).flatten()[:3]
    assert first.tolist() == pytest.approx((-0.0604248047, 0.0183868408, 0.0262145996), abs=1e-9)
    assert tensor("logit_scale", (), seed=7).exp().item() == pytest.approx(100, rel=1e-6)
