"""The patch explorer: rows and scores by hand, what is computed anew, wrong patches."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from diclip.cam import minmax
from diclip.explorers.core import Pick, Studio
from diclip.explorers.patch import KINDS, PatchChoice, PatchExplorer, listening
from diclip.surgery import attend, head_sum, project

widgets = pytest.importorskip("ipywidgets")


def passes(studio: Studio) -> int:
    return sum(studio.memo.made[stage] for stage in ("clip", "hidden", "diffusion", "latents"))


# Patches


def by_hand(studio, choice: PatchChoice, kind: str) -> torch.Tensor:
    photo = studio.photo(choice.pick)
    batch = studio.batch(photo, (), studio.classes)
    tokens = studio.frozen.encode(batch.images, surgery_blocks=0).tokens[1]  # after the second of four blocks
    block = studio.frozen.blocks[2]
    q, k, v = (x[:, 1:2] for x in project(block, block.ln_1(tokens)))  # the second head
    if kind == "intra":
        attention = head_sum(q, k, v, attention="qq+2kk")
    else:
        attention = attend(*({"q": q, "k": k, "v": v}[letter] for letter in kind))[:, 0]
    spot = 5 * 16 + 9
    row = attention[0, 1 + spot, 1:].clone()
    row[spot] = row.median()
    return minmax(row, 0).view(16, 16)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "biased"])
def test_a_patchs_row_is_the_attentions(studio, kind):
    choice = PatchChoice(Pick(index=1), row=5, column=9, kind=kind, block=3, head=2)
    photo = studio.photo(choice.pick)
    title, found = PatchExplorer(studio).clip_row(choice, studio.batch(photo, (), studio.classes), (16, 16))
    torch.testing.assert_close(found, by_hand(studio, choice, KINDS[kind]), atol=1e-5, rtol=0)
    assert title == f"block 3, head 2: {kind}"


def test_another_thread_is_not_heard(studio):
    modules, images = [block.ln_1 for block in studio.clip.blocks], torch.rand(1, 3, 128, 128)
    with ThreadPoolExecutor(1) as other, listening(modules) as heard:
        other.submit(studio.frozen.encode, images).result()
        assert heard == []
        studio.frozen.encode(images, surgery_blocks=0)
    assert len(heard) == len(modules)


def test_the_diffusions_row_is_its_attention(full_studio):
    explorer, choice = PatchExplorer(full_studio), PatchChoice(row=15, column=0, seed=4, layer_head=2)
    photo = full_studio.photo(choice.pick)
    batch = full_studio.batch(photo, (), full_studio.classes)
    title, found = explorer.diffusion_row(choice, batch, (16, 16))
    settings = full_studio.settings
    taps = full_studio.diffusion._diffusion.capture(
        batch.images,
        timestep=101,
        coarse=settings.coarse_layer,
        fine=None,
        generator=torch.Generator().manual_seed(4),
    )
    (h, w), spot = taps.coarse_grid, 0
    spot = int(15.5 / 16 * h) * w + int(0.5 / 16 * w)
    row = attend(taps.coarse_q[:, 1:2], taps.coarse_k[:, 1:2])[0, 0, spot].clone()
    row[spot] = row.median()
    torch.testing.assert_close(found, minmax(row, 0).view(h, w), atol=1e-5, rtol=0)
    assert title == f"diffusion at 101, head 2: {h}×{w}"


@pytest.mark.parametrize(
    ("change", "dreams"),
    [({"timestep": 501}, 1), ({"seed": 3}, 1), ({"row": 2}, 0), ({"kind": "biased"}, 0), ({"layer_head": 1}, 0)],
    ids=str,
)
def test_a_diffusion_step_is_made_where_noise_changes(full_studio, change, dreams):
    explorer = PatchExplorer(full_studio)
    first = explorer.view(PatchChoice())
    made = explorer.studio.memo.made
    before = made["diffusion"]
    assert not np.array_equal(explorer.view(replace(PatchChoice(), **change)).pixels, first.pixels)
    assert bool(made["diffusion"] - before) == bool(dreams)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": 16}, r"there is no patch \(16, 8\), expected up to \(15, 15\)"),
        ({"kind": "kv"}, "found 'kv' in block 4"),
        ({"block": 9}, "in block 9, expected .* 1 to 4"),
        ({"head": 99}, "head is 99, expected 1 to"),
    ],
)
def test_wrong_patches_get_one_line(studio, change, message):
    with pytest.raises(ValueError, match=message):
        PatchExplorer(studio).view(replace(PatchChoice(), **change))
