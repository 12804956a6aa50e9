"""Train the real systems on small random models: two processes do what one does."""

import json
import multiprocessing

import pytest
from toy_training import run_together

from diclip.settings import load_settings
from diclip.train import train
from diclip.vocabulary import VOC_CLASSES


@pytest.fixture(scope="module")
def small(tiny_clip, tiny_diffusion, tiny_memory, tmp_path_factory):
    """Return settings of a training of tiny models on six pictures, without dropout, all switch points within it."""
    from diclip.data.minivoc import write_minivoc

    root = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diclip.data.minivoc.dataset.SPLITS", {"train": 6, "tune": 2, "val": 3})
        write_minivoc(root, workers=1)
    (root / "one.yaml").write_text("".join(f"{name}: [it is number {i}.]\n" for i, name in enumerate(VOC_CLASSES)))
    models = {"clip_model": tiny_clip, "diffusion_model": [str(tiny_diffusion)], "memory": tiny_memory}
    decoder = {"decoder_width": 16, "decoder_heads": 2, "decoder_layers": 1, "par_rounds": 2, "attribute_clusters": 5}
    switches = {"affinity_from": 0.5, "dynamic_from": 0.25, "own_labels_from": 0.75}
    still = {"decoder_dropout": 0, "adapter_dropout": 0, "device": "cpu"}
    often = {"max_iters": 8, "warmup_iters": 2, "log_every": 1, "validate_every": 4, "train_batch": 4}
    files = {"data_root": root, "attributes": root / "one.yaml"}
    return {**{name: str(path) if name != "diffusion_model" else path for name, path in (models | files).items()},
            **decoder, **switches, **still, **often}  # fmt: skip


@pytest.mark.parametrize(("method", "mean"), [("excel", "batch"), ("diclip", "image")])
def test_two_processes_learn_what_one_does(small, method, mean, tmp_path):
    """With pairs compared with the mean of the batch, this is the batch of both processes."""
    given = small | {"method": method, "pair_mean": mean}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy_training", "accelerate", "torch._dynamo"])
    train(load_settings(**given, run_dir=str(tmp_path / "one")))
    assert run_together(context, {**given, "run_dir": str(tmp_path / "two")}, build=None) == [0, 0]
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 8 and one[0]["loss"] != pytest.approx(one[-1]["loss"], abs=0.01)
    for alone, both in zip(one, two, strict=True):
        for name in set(alone) - {"seconds", "tune_miou"}:
            assert both[name] == pytest.approx(alone[name], abs=1e-4), (alone["step"], name)
