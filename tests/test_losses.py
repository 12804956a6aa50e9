"""Test the losses against loops over pixels and pairs, and halves of a batch in two processes against the whole."""

from math import log

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from diclip.affinity import pair_affinity
from diclip.losses import balanced_cross_entropy, diversity_loss, pair_targets

ROOM = dict(B=st.integers(1, 3), h=st.integers(1, 5), w=st.integers(1, 5), seed=st.integers(0, 10**6))


def drawn(B: int, h: int, w: int, seed: int, *, values: tuple[int, ...] = (0, 1, 2, 255)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(values)[torch.randint(len(values), (B, h, w), generator=generator)]


@given(**ROOM, values=st.sampled_from([(0, 1, 2, 255), (0,), (2, 255), (255,)]))
def test_balanced_cross_entropy_is_the_mean_of_two_means(B, h, w, seed, values):
    labels = drawn(B, h, w, seed, values=values)
    logits = torch.randn(B, 3, h, w, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    sets: dict[bool, list[float]] = {True: [], False: []}
    for b, y, x in labels.ne(255).nonzero().tolist():
        label, scores = labels[b, y, x].item(), logits[b, :, y, x]
        sets[label == 0].append((scores.exp().sum().log() - scores[label]).item())
    expected = sum(sum(own) / len(own) / 2 for own in sets.values() if own)  # a set without pixels adds nothing
    loss = balanced_cross_entropy(logits, labels)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    loss.backward()
    assert logits.grad.isfinite().all() and (logits.grad.abs().sum() > 0) == bool((labels != 255).any())


def test_logits_are_brought_to_the_labels_size():
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1, :, 1] = 4.0
    labels = torch.ones(1, 2, 8, dtype=torch.long)
    ramp = torch.tensor([0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4])  # half-pixel centres: 4 cells of a pixel, edges repeated
    assert balanced_cross_entropy(logits, labels).item() == pytest.approx(((-ramp).exp() + 1).log().mean() / 2)


@given(**ROOM, radius=st.integers(0, 4), cell=st.integers(1, 3))
def test_pair_targets_by_a_loop(B, h, w, seed, radius, cell):
    labels = drawn(B, h * cell, w * cell, seed)
    found = pair_targets(labels, (h, w), radius=radius)
    assert found.dtype == torch.uint8 and found.equal(found.transpose(1, 2))
    for b in range(B):
        for i in range(h * w):
            for j in range(h * w):
                (y, x), (v, u) = divmod(i, w), divmod(j, w)
                one, other = labels[b, y * cell, x * cell], labels[b, v * cell, u * cell]
                far = max(abs(y - v), abs(x - u)) > radius
                asked = not far and 255 not in (one, other)
                assert found[b, i, j] == (int(one == other) if asked else 255)


@given(**ROOM)
def test_diversity_by_a_loop_and_its_bounds(B, h, w, seed):
    targets = pair_targets(drawn(B, h, w, seed), (h, w), radius=2)
    affinity = torch.rand(targets.shape, generator=torch.Generator().manual_seed(seed))
    alike = [1 - a for a, t in zip(affinity.flatten().tolist(), targets.flatten().tolist(), strict=True) if t == 1]
    other = [a for a, t in zip(affinity.flatten().tolist(), targets.flatten().tolist(), strict=True) if t == 0]
    expected = sum(sum(own) / (len(own) + 1) / 2 for own in (alike, other))
    assert diversity_loss(affinity, targets).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert diversity_loss((targets == 1).float(), targets) == 0
    assert 0 <= diversity_loss((targets != 1).float(), targets) < 1
    assert diversity_loss(affinity, torch.full_like(targets, 255)) == 0


def test_a_decoder_that_knows_nothing_and_one_that_knows_all():
    labels = drawn(2, 4, 4, 0)
    assert balanced_cross_entropy(torch.zeros(2, 3, 4, 4), labels).item() == pytest.approx(log(3), abs=1e-5)
    sure = 50 * torch.nn.functional.one_hot(labels.masked_fill(labels == 255, 0), 3).permute(0, 3, 1, 2).float()
    assert balanced_cross_entropy(sure, labels) < 1e-6


def test_what_does_not_fit_is_said_in_one_line():
    logits, labels = torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.long)
    for call, message in (
        (lambda: balanced_cross_entropy(logits[0], labels), r"\(3, 4, 4\) and \(2, 8, 8\), expected"),
        (lambda: balanced_cross_entropy(logits, labels[:1]), r"\(2, 3, 4, 4\) and \(1, 8, 8\), expected"),
        (lambda: pair_targets(labels[0], (4, 4)), r"\(8, 8\), expected \(B, H, W\)"),
        (lambda: diversity_loss(torch.zeros(2, 16, 16), pair_targets(labels, (2, 2))), "expected one"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def objective(features: torch.Tensor, labels: torch.Tensor, *, together: bool) -> torch.Tensor:
    from diclip.losses import over_processes

    total = {"total": over_processes} if together else {}
    affinity = pair_affinity(features, mean="batch", **total)
    pairs = pair_targets(labels, tuple(features.shape[2:]), radius=2)
    return balanced_cross_entropy(features[:, :3], labels) + diversity_loss(affinity, pairs)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    labels = drawn(3, 8, 8, 0)
    labels[0] = 0  # the first process sees no object
    return torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(1)), labels


def _process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    own = slice(0, 1) if rank == 0 else slice(1, 3)
    features, labels = (x[own] for x in data())
    features.requires_grad_()
    loss = objective(features, labels, together=True)
    loss.backward()
    torch.save((loss.detach(), features.grad), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_loss_and_gradient_of_one(tmp_path):
    features, labels = data()
    features.requires_grad_()
    loss = objective(features, labels, together=False)
    loss.backward()
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for own, _ in found:
        torch.testing.assert_close(own, loss.detach())
    # Gradients are averaged over processes, as DistributedDataParallel does.
    torch.testing.assert_close(torch.cat([gradient for _, gradient in found]) / 2, features.grad)
