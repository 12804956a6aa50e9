"""Test that the adapter starts as its memory, and its dropout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diclip.adapter import KVAdapter, dropout
from diclip.memory import Memory


def memory(count: int = 9, width: int = 5, classes: int = 3, *, seed: int = 0) -> Memory:
    keys = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return Memory(keys, torch.eye(1 + classes)[torch.arange(count) % (1 + classes)], tuple("abcdefgh"[:classes]))


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000))
def test_without_slots_and_biases_it_retrieves_from_the_memory(count, width, classes, seed):
    own = memory(count, width, classes, seed=seed)
    adapter = KVAdapter(own, slots=0)
    torch.nn.init.zeros_(adapter.keys.bias)
    torch.nn.init.zeros_(adapter.values.bias)
    patches = torch.randn(2, 4, width, generator=torch.Generator().manual_seed(seed))
    expected = (patches @ own.keys.T).relu() @ own.values
    torch.testing.assert_close(adapter.eval()(patches), expected.transpose(1, 2))


def test_free_slots_follow_the_memory():
    own = memory()
    adapter = KVAdapter(own, slots=500, spread=0.5)
    assert adapter.keys.weight[:9].equal(own.keys) and adapter.values.weight[:, :9].equal(own.values.T)
    for free in (adapter.keys.weight[9:], adapter.values.weight[:, 9:]):
        assert free.abs().max() <= 1 and free.std().item() == pytest.approx(0.5 * 0.88, rel=0.05)
    assert not KVAdapter(own, slots=3, spread=0).keys.weight[9:].any()


@pytest.mark.parametrize(("keys", "classes", "expected"), [(225, 20, 166_629), (425, 80, 304_209)])
def test_published_sizes(keys, classes, expected):
    values = torch.eye(1 + classes)[torch.arange(keys) % (1 + classes)]
    adapter = KVAdapter(Memory(torch.zeros(keys, 512), values, tuple(str(c) for c in range(classes))))
    assert sum(weight.numel() for weight in adapter.parameters()) == expected


def test_dropout_keeps_the_mean_and_belongs_to_its_generator():
    x = torch.ones(4, 50, 100)
    once, again = (dropout(x, 0.2, torch.Generator().manual_seed(3)) for _ in range(2))
    assert once.equal(again) and once.mean().item() == pytest.approx(1, abs=0.02)
    assert set(once.unique().tolist()) == {0.0, 1.25}
    assert (once == 0).float().mean().item() == pytest.approx(0.2, abs=0.02)
    channels = dropout(x, 0.5, torch.Generator().manual_seed(0), whole_channels=True)
    assert set(channels.sum(2).unique().tolist()) == {0.0, 200.0}
    assert dropout(x, 0.2, None) is x and dropout(x, 0.0, torch.Generator()) is x


def test_the_adapter_drops_in_training_only():
    adapter, patches = KVAdapter(memory(), rate=0.5), torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(0))
    draws = [adapter(patches, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2]) and (draws[0] == 0).any()
    kept = adapter(patches)
    assert (kept != 0).all() and adapter.eval()(patches, generator=torch.Generator()).equal(kept)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_that_is_no_share_is_refused(rate):
    with pytest.raises(ValueError, match=f"dropout rate is {rate}, expected 0 to 1"):
        dropout(torch.ones(1, 1), rate, None)
