"""Test the diffusion correlation and its clustering against slow, obvious references."""

from math import log

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from diclip.correlation import acr, alike, cluster, correlate, likeness

SOURCE, GRID = (3, 4), (5, 6)
SIZES = {"source": SOURCE, "grid": GRID}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def correlation():
    """Correlate three images, alike where tokens are near; nothing attends to token 9."""
    q, k = random(3, 2, 12, 6, seed=18), random(3, 2, 12, 6, seed=19)
    found = correlate(q, k, **SIZES, heads=(0, 1))
    found[:, :, 9] = 0
    return found


def slow_correlation(q, k, heads, threshold, softmax=False):
    """Correlate one image, entry by entry, as a list of rows."""
    n = GRID[0] * GRID[1]
    product = torch.eye(n)
    for head in heads:
        small = [x[head].T.unflatten(1, SOURCE)[None] for x in (q, k)]  # (1, d, h, w)
        big = [F.interpolate(x, size=GRID, mode="bilinear", align_corners=False)[0].flatten(1).T for x in small]
        rows = [[float(big[0][i] @ big[1][j]) for j in range(n)] for i in range(n)]
        if softmax:
            rows = [torch.tensor([x / 5**0.5 for x in row]).softmax(0).tolist() for row in rows]
        peaks = [max(row[j] for row in rows) for j in range(n)]
        rows = [[row[j] / (peaks[j] + 1e-5) if peaks[j] > 0 else 0.0 for j in range(n)] for row in rows]
        rows = [[value if value >= threshold else 0.0 for value in row] for row in rows]
        product = product @ torch.tensor([[value / (sum(row) + 1e-5) for value in row] for row in rows])
    return product


@pytest.mark.parametrize(("heads", "threshold"), [((2,), 0.2), ((2, 0), 0.2), ((0, 2, 1), 0.55)])
def test_correlation_entry_by_entry(heads, threshold):
    q, k = random(2, 3, 12, 5), random(2, 3, 12, 5, seed=1)
    found = correlate(q, k, **SIZES, heads=heads, threshold=threshold)
    for image in range(2):
        expected = slow_correlation(q[image], k[image], heads, threshold)
        torch.testing.assert_close(found[image], expected, atol=1e-5, rtol=0)
    found = correlate(q, k, **SIZES, heads=heads, threshold=threshold, softmax=True)
    for image in range(2):
        expected = slow_correlation(q[image], k[image], heads, threshold, softmax=True)
        torch.testing.assert_close(found[image], expected, atol=1e-5, rtol=0)


@given(st.integers(0, 1000), st.sampled_from([0.0, 1e-3, 1.0, 30.0]), st.sampled_from([-1, 0, 1]))
def test_rows_are_shares(seed, scale, sign):
    """Whatever the queries, equal and opposite keys among them."""
    q = scale * random(1, 2, 12, 4, seed=seed)
    k = sign * q if sign else scale * random(1, 2, 12, 4, seed=seed + 1)
    found = correlate(q, k, **SIZES, heads=(1, 0))
    assert found.isfinite().all() and (found >= 0).all() and (found.sum(-1) <= 1 + 1e-5).all()


def test_constant_input_and_keys_that_nothing_resembles():
    same = torch.ones(1, 1, 12, 4)
    uniform = correlate(same, same, **SIZES, heads=(0,))
    torch.testing.assert_close(uniform, torch.full((1, 30, 30), 1 / 30), atol=1e-6, rtol=0)
    assert correlate(same, -same, **SIZES, heads=(0,)).count_nonzero() == 0
    keys = torch.ones(1, 1, 12, 4)
    keys[..., :2, :] = -1  # the first two of SOURCE
    found = correlate(same, keys, source=SOURCE, grid=SOURCE, heads=(0,))[0]
    assert found[:, :2].count_nonzero() == 0
    torch.testing.assert_close(found[:, 2:], torch.full((12, 10), 0.1), atol=1e-5, rtol=0)


def test_half_precision_is_read_as_float32():
    q, k = random(1, 2, 12, 5).half(), random(1, 2, 12, 5, seed=1).half()
    found = correlate(q, k, **SIZES, heads=(0,))
    assert found.dtype == torch.float32 and found.equal(correlate(q.float(), k.float(), **SIZES, heads=(0,)))


def slow_clusters(correlation, grid, anchors, rounds):
    """Cluster one image's columns, token by token, in double precision."""
    h, w = grid
    columns = [[value or 1e-6 for value in column] for column in correlation.T.double().tolist()]
    centres = [columns[y * w + x] for y in range(0, h, h // anchors) for x in range(0, w, w // anchors)]
    for _ in range(rounds):
        gaps = [
            [
                sum((a - r) * (log(a + 1e-5) - log(r + 1e-5)) for a, r in zip(centre, column, strict=True))
                for centre in centres
            ]
            for column in columns
        ]
        owner = [gap.index(min(gap)) for gap in gaps]
        members = [[c for c, o in zip(columns, owner, strict=True) if o == k] for k in range(len(centres))]
        centres = [[sum(v) / len(own) for v in zip(*own, strict=True)] for own in members if own]
    seen = list(dict.fromkeys(owner))
    return [seen.index(o) for o in owner]


def test_clusters_token_by_token(correlation):
    found = {rounds: cluster(correlation, grid=GRID, rounds=rounds) for rounds in (1, 2, 5)}
    for rounds, ids in found.items():
        assert ids.tolist() == [slow_clusters(one, GRID, 3, rounds) for one in correlation]
    assert not found[2].equal(found[5])
    assert found[1].amax(1).tolist() == [14, 14, 14]
    assert found[5].amax(1).tolist() == [13, 14, 14]  # a cluster of the first image lost all members


@pytest.mark.parametrize(("grid", "count"), [((20, 20), 16), ((24, 12), 9), ((10, 12), 12), ((2, 2), 4)])
def test_first_clusters_are_the_anchors(grid, count):
    """Where all columns differ, each anchor is nearest to itself."""
    n = grid[0] * grid[1]
    correlation = random(1, n, n).softmax(-1)
    ids = cluster(correlation, grid=grid, rounds=1)[0]
    assert len(ids.unique()) == count
    assert list(dict.fromkeys(ids.tolist())) == list(range(count))


def test_without_structure_there_is_one_cluster():
    for value in (0.0, 1 / 30):
        assert cluster(torch.full((2, 30, 30), value), grid=GRID).count_nonzero() == 0


def test_mean_rows(correlation):
    ids = cluster(correlation, grid=GRID)
    averaged = acr(correlation, ids)
    for image in range(2):
        for token in range(30):
            own = correlation[image][ids[image] == ids[image, token]]
            torch.testing.assert_close(averaged[image, token], own.mean(0))
    torch.testing.assert_close(acr(averaged, ids), averaged)
    assert (averaged.sum(-1) <= 1 + 1e-5).all()


def test_what_does_not_fit_is_said_in_one_line():
    q, square = random(1, 2, 12, 4), torch.ones(1, 30, 30)
    for call, message in (
        (lambda: likeness(q, q, source=(3, 5), grid=GRID, heads=(0,)), "15, d\\) for 3x5"),
        (lambda: correlate(q, q[:, :1], **SIZES, heads=(0,)), "queries and keys"),
        (lambda: correlate(q, q, **SIZES, heads=()), "\\[\\], expected one or more of 0 to 1"),
        (lambda: correlate(q, q, **SIZES, heads=(0, 2)), "\\[0, 2\\], expected one or more of 0 to 1"),
        (lambda: correlate(q, q, **SIZES, heads=(0,), threshold=1.5), "1.5, expected 0 to 1"),
        (lambda: cluster(square, grid=(4, 5)), "20, 20\\) for 4x5"),
        (lambda: cluster(square, grid=GRID, rounds=0), "3 and 0"),
        (lambda: acr(square, torch.zeros(1, 20, dtype=torch.long)), "\\(B, N\\)"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3])
def test_clusters_of_nearly_equal_columns_keep_their_digits(spread):
    correlation = 1 + spread * random(2, 256, 256).sigmoid()
    correlation = correlation / correlation.sum(-1, keepdim=True)
    ids = cluster(correlation, grid=(16, 16), rounds=1)
    columns = correlation.double().transpose(1, 2) + 1e-5
    rows = torch.arange(0, 16, 5)
    anchors = columns[:, (rows[:, None] * 16 + rows).flatten()]
    gap, ratio = (anchors[:, :, None] - columns[:, None]), anchors[:, :, None].log() - columns[:, None].log()
    owner = (gap * ratio).sum(-1).argmin(1)
    together = owner[:, :, None] == owner[:, None]
    assert (together == (ids[:, :, None] == ids[:, None])).double().mean() > 0.99


def test_rows_are_compared_whatever_their_sum(correlation):
    found, scaled = alike(correlation), alike(correlation * torch.rand(3, 30, 1) * 5)
    torch.testing.assert_close(found, scaled)
    expected = F.cosine_similarity(correlation[:, :, None], correlation[:, None], dim=-1, eps=1e-12)
    torch.testing.assert_close(found, expected)
    correlation[1, 4] = 0
    assert alike(correlation)[1, 4].count_nonzero() == 0
