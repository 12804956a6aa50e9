"""Test the mini models' optimizer against torch's own Muon and AdamW, on matrices and kernels of convolutions."""

import torch
from torch import nn

from diclip.pretrain.loop import Schedule, train
from diclip.pretrain.muon import MuonAdamW


def small(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        convolutions = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16, 6), nn.LayerNorm(6), nn.Linear(6, 2))


def inside(model: nn.Sequential) -> list[nn.Parameter]:
    return [model[0].weight, model[3].weight]  # one kernel and one matrix of two


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
        if p.ndim == 4:  # as convolutions of channels_last pictures return them
            p.grad = p.grad.contiguous(memory_format=torch.channels_last)


def go(model: nn.Module, optimizer: MuonAdamW, steps: range) -> None:
    for step in steps:
        give_gradients(model, step)
        optimizer.step()


def test_matrices_and_kernels_follow_muon_and_all_else_adamw():
    model = small()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = MuonAdamW(model, inside(model), lr=0.01, decay=0.2, ratio=3.0)
    chosen = {id(p) for p in inside(model)}
    twins = [
        nn.Parameter(p.detach().clone().flatten(1) if id(p) in chosen else p.detach().clone())
        for p in model.parameters()
    ]
    pairs = list(zip(model.parameters(), twins, strict=True))
    rest = [twin for p, twin in pairs if id(p) not in chosen]
    muon = torch.optim.Muon(
        [twin for p, twin in pairs if id(p) in chosen], lr=1, weight_decay=0.2 / 3, adjust_lr_fn="match_rms_adamw"
    )
    groups = [
        {"params": [t for t in rest if t.ndim > 1], "weight_decay": 0.2},
        {"params": [t for t in rest if t.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1, betas=(0.9, 0.98))
    assert len(rest) == 8 and len(groups[0]["params"]) == 2
    for step, rate in enumerate((0.01, 0.02, 0.005)):
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("ratio", 1)
        muon.param_groups[0]["lr"] = 3 * rate
        for group in adamw.param_groups:
            group["lr"] = rate
        give_gradients(model, step)
        for p, twin in pairs:
            twin.grad = p.grad.reshape(twin.shape)
        for each in (optimizer, muon, adamw):
            each.step()
    for (p, twin), old in zip(pairs, before, strict=True):
        assert p.flatten(1).equal(twin) if id(p) in chosen else p.equal(twin)
        assert (p - old).abs().mean() > 1e-3


def test_gradients_are_forgotten():
    model = small()
    optimizer = MuonAdamW(model, inside(model), lr=0.01)
    go(model, optimizer, range(2))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert all(p.equal(before[name]) for name, p in model.state_dict().items())


def test_without_gradients_matrices_decay_alike():
    """The decay is one share of the learning rate, whoever makes the steps; gains and biases have none."""
    model = small()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = MuonAdamW(model, inside(model), lr=0.1, decay=0.2, ratio=5.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old * (1 - 0.1 * 0.2) if p.ndim > 1 else old)


def test_a_restored_optimizer_goes_on_exactly(tmp_path):
    model = small()
    optimizer = MuonAdamW(model, inside(model), lr=0.01)
    go(model, optimizer, range(2))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    go(model, optimizer, range(2, 5))
    other = small(seed=1)
    restored = MuonAdamW(other, inside(other), lr=0.5, ratio=2.0)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(state["model"])
    restored.load_state_dict(state["optimizer"])
    assert [m.data_ptr() for m in restored.matrices] == [p.data_ptr() for p in inside(other)]
    go(other, restored, range(2, 5))
    assert all(a.equal(b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_loop_keeps_the_ratio(tmp_path):
    model, target = small(), torch.tensor([[1.0, -1.0]])
    optimizer = MuonAdamW(model, inside(model), lr=1.0, ratio=2.5)
    seen, losses = [], []

    def loss(step: int) -> dict[str, torch.Tensor]:
        images = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        losses.append((model(images) - target).square().mean())
        return {"loss": losses[-1]}

    def watch() -> None:
        seen.append([group["lr"] for group in optimizer.param_groups])

    schedule = Schedule(60, 0.02, warmup=5)
    train(model, loss, folder=tmp_path, schedule=schedule, optimizer=optimizer, after_step=watch)
    assert seen == [[2.5 * schedule(step), schedule(step), schedule(step)] for step in range(60)]
    assert losses[-1] < 0.2 * losses[0]


def test_spectral_scaling_bounds_what_an_update_does_to_any_input():
    model = nn.Sequential(nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(8, 32))
    chosen = [model[0].weight, model[2].weight]  # 8 x 144, and more rows than columns: 32 x 8
    optimizer = MuonAdamW(model, chosen, lr=0.01, decay=0.0, ratio=6.0, scaling="spectral")
    before = [p.detach().clone() for p in chosen]
    give_gradients(model, 0)
    optimizer.step()
    largest = [torch.linalg.matrix_norm((p.detach() - b).flatten(1), 2) for p, b in zip(chosen, before, strict=True)]
    for found, rate in zip(largest, (0.06 * (8 / 144) ** 0.5, 0.06), strict=True):
        assert 0.6 < found / rate < 1.3  # Muon's orthogonal matrices are not exactly so
    rates = {group["ratio"] for group in optimizer.param_groups if "ratio" in group}
    assert rates == {6.0 * (8 / 144) ** 0.5, 6.0 * (8 / 32) ** 0.5}
