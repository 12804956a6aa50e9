"""Test checkpoints: equal files for equal weights, pairs that belong together whatever is killed."""

import json

import pytest
import torch
from safetensors import safe_open

from diclip import checkpoints
from diclip.checkpoints import forget, load_checkpoint, load_weights, save_checkpoint, save_weights


def weights(value: float) -> dict:
    return {"b": torch.full((3, 2), value), "a": torch.arange(4).half()}


def test_equal_weights_are_equal_files_with_one_key(tmp_path):
    about = {"step": 3, "method": "diclip", "classes": 20}
    save_weights(tmp_path / "one/model.safetensors", weights(1), about)
    turned = {name: value.t().contiguous().t() if value.ndim > 1 else value for name, value in weights(1).items()}
    save_weights(tmp_path / "two.safetensors", dict(reversed(turned.items())), dict(reversed(about.items())))
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    with safe_open(tmp_path / "two.safetensors", framework="pt") as file:
        assert list(file.metadata()) == ["diclip"]
    found, read = load_weights(tmp_path / "two.safetensors")
    assert read == about and all(found[name].equal(value) for name, value in weights(1).items())


@pytest.mark.parametrize("content", [b"", b"junk" * 30, None])
def test_what_is_no_weights_is_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    error, message = (FileNotFoundError, "no such file") if content is None else (ValueError, "holds no weights")
    with pytest.raises(error, match=message) as raised:
        load_weights(path)
    assert "\n" not in str(raised.value)


def test_foreign_weights_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file(weights(0), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no weights of a training"):
        load_weights(tmp_path / "model.safetensors")


def test_a_checkpoint_is_a_pair_at_every_moment(tmp_path, monkeypatch):
    """Stop at each write of a second checkpoint: what loads is the first pair or the second, never a mixture."""
    assert load_checkpoint(tmp_path) is None

    class Stop(BaseException):
        pass

    def stop(*_, **__):
        raise Stop

    for broken in ("save_weights", "sweep_up"):
        folder = tmp_path / broken
        save_checkpoint(folder, weights(1), {"step": 1}, {"at": torch.tensor(1)})
        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(checkpoints, broken, stop)
            save_checkpoint(folder, weights(2), {"step": 2}, {"at": torch.tensor(2)})
        found, state = load_checkpoint(folder)
        assert found["b"][0, 0] == state["at"] == {"save_weights": 1, "sweep_up": 2}[broken]
        (folder / ".model.safetensors.123").write_bytes(b"half")
        (folder / ".state-2.pt.123").write_bytes(b"half")
        save_checkpoint(folder, weights(3), {"step": 3}, {"at": torch.tensor(3)})
        assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "state-3.pt"]


@pytest.mark.parametrize("content", [None, b"", b"PK junk"])
def test_a_state_that_is_damaged_is_refused(tmp_path, content):
    save_checkpoint(tmp_path, weights(1), {"step": 1}, {})
    (tmp_path / "state-1.pt").unlink()
    if content is not None:
        (tmp_path / "state-1.pt").write_bytes(content)
    with pytest.raises(ValueError, match="state-1.pt is missing or damaged: choose another run_dir"):
        load_checkpoint(tmp_path)


def test_what_a_kill_undid_is_forgotten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    forget(path, after=3)
    assert not path.exists()
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"step": 2, "lo')
    forget(path, after=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
