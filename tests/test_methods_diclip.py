"""Test the system DiCLIP on tiny random models: each rung against its parts, put together by hand."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diclip.affinity import caa
from diclip.baselines import colour_texture_affinity
from diclip.cam import Maps, minmax, pack, surgery_cam
from diclip.clip import load_clip
from diclip.correlation import acr, cluster, correlate, walk
from diclip.data import Batch
from diclip.diffusion import load_diffusion
from diclip.memory import Memory, fuse, retrieve
from diclip.methods import build_method
from diclip.methods.clip import PlainCLIP
from diclip.methods.diclip import DiCLIP, image_generator
from diclip.refine import rar
from diclip.settings import Settings, load_settings
from diclip.vocabulary import VOC, VOC_CLASSES

GRID = (8, 8)
LADDER = ["clip", "intra", "vce", "tsa", "caa", "rar"]
ABLATION = ["without_vce", "without_tsa", "without_caa", "without_rar"]
TAGS = ((2, 7), (), (19,))


@pytest.fixture(scope="module")
def parts(tiny_clip, tiny_diffusion, tiny_memory):
    return load_clip(tiny_clip), load_diffusion(tiny_diffusion), Memory.load(tiny_memory)


def batch(*, tags: tuple[tuple[int, ...], ...] = TAGS) -> Batch:
    images = torch.rand(len(tags), 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images[:, 0, 16:48, 24:56] += 0.8  # something to see
    tensors = [torch.tensor(tag, dtype=torch.long) for tag in tags]
    names = [f"image{index}" for index in range(len(tags))]
    return Batch(names, images.clamp(0, 1), tensors, [None] * len(tags), [(50, 70)] * len(tags))


def chosen(given: Batch, indices: list[int]) -> Batch:
    names, tags, masks, sizes = (
        [each[i] for i in indices] for each in (given.names, given.tags, given.masks, given.sizes)
    )
    return Batch(names, given.images[indices], tags, masks, sizes)


def rungs(parts, given: Batch, **settings) -> dict[str, Maps]:
    return dict(DiCLIP(load_settings(**{"ablate": True} | settings), *parts).rungs(given))


def seen(settings: Settings, diffusion, image: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return correlation and fine attention of one image (1, 3, H, W), a draw of noise after the other."""
    generator, coarse, fine = image_generator(settings.seed, name), [], []
    for timestep in settings.diffusion_timesteps:
        for _ in range(settings.diffusion_draws):
            taps = diffusion.capture(
                image,
                timestep=timestep,
                coarse=settings.coarse_layer,
                fine=settings.fine_layer,
                fine_heads=settings.fine_heads,
                generator=generator,
                prompt=settings.diffusion_prompt,
            )
            how = {"heads": settings.coarse_heads, "threshold": settings.correlation_threshold}
            how["softmax"] = settings.correlation_softmax
            coarse.append(correlate(taps.coarse_q, taps.coarse_k, source=taps.coarse_grid, grid=GRID, **how))
            fine.append(taps.fine)
    assert taps.fine_grid == (16, 16)
    correlation = torch.stack(coarse).mean(0)
    if settings.correlation == "colour":
        colour = colour_texture_affinity(image, GRID)
        correlation = walk(torch.stack([colour] * len(settings.coarse_heads), 1), threshold=how["threshold"])
    if settings.acr:
        correlation = acr(correlation, cluster(correlation, grid=GRID))
    return correlation, torch.stack(fine).mean(0)


def by_hand(settings: Settings, parts, image: Tensor, name: str, tags: Tensor) -> dict[str, Tensor]:
    """Make the maps of one image (1, 3, H, W) step by step."""
    clip, diffusion, memory = parts
    correlation, fine = seen(settings, diffusion, image, name)
    how = {"attention": settings.attention, "surgery_blocks": settings.surgery_blocks}
    plain, biased = clip.encode(image, **how), clip.encode(image, bias=settings.bias_strength * correlation, **how)
    texts = clip.encode_text(VOC.prompts())
    norm = {"pooled_is_token": clip.pooled_is_token, "norm_dim": settings.norm_dim}

    def cam(patches: Tensor) -> Tensor:
        return surgery_cam(patches, plain.pooled, texts, num_classes=20, **norm)

    def tsa(patches: Tensor) -> Tensor:
        modes = {"value_mode": settings.value_mode, "affinity": settings.memory_affinity}
        found = retrieve(patches, plain.pooled, memory, texts, **norm, **modes)
        return fuse(cam(patches), found, weight=settings.memory_weight)

    def packed(maps: Tensor) -> Maps:
        return pack(maps.unflatten(-1, GRID), [tags])

    def spread(maps: Maps) -> Maps:
        layers = min(settings.caa_layers, 4)
        return caa(maps, plain.attention, threshold=settings.tau_box, layers=layers)

    def diffuse(maps: Maps) -> Maps:
        return rar(maps, fine, rounds=settings.rar_rounds, grid=(16, 16))

    clip_cam, intra, vce = (packed(cam(x)) for x in (plain.plain_patches, plain.patches, biased.patches))
    with_memory, intra_with_memory = packed(tsa(biased.patches)), packed(tsa(plain.patches))
    made = {
        "clip": clip_cam,
        "intra": intra,
        "vce": vce,
        "tsa": with_memory,
        "caa": spread(with_memory),
        "rar": diffuse(spread(with_memory)),
        "clip_rar": diffuse(spread(clip_cam)),
        "without_vce": diffuse(spread(intra_with_memory)),
        "without_tsa": diffuse(spread(vce)),
        "without_caa": diffuse(with_memory),
        "without_rar": spread(with_memory),
    }
    return {rung: maps.scores for rung, maps in made.items()}


INNER = "up_blocks.0.attentions.1.transformer_blocks.0.attn1"  # four heads, as coarse as the paper's layer
PUBLISHED = {"coarse_layer": INNER, "correlation_softmax": False}
# What is set, and the first rung that it has to change.
CASES = {
    "default": ({}, None),
    "correlation": ({"acr": False, "correlation_threshold": 0.4, "coarse_layer": INNER, "coarse_heads": "2,3"}, "vce"),
    "published": (PUBLISHED, "vce"),
    "strength": ({"bias_strength": 3}, "vce"),
    "draws": (
        PUBLISHED | {"diffusion_timesteps": "51,401", "diffusion_draws": 2, "seed": 5, "diffusion_prompt": "a cat"},
        "vce",
    ),
    "colour": ({"correlation": "colour"}, "vce"),
    "other layers": (
        {"coarse_layer": "down_blocks.2.attentions.0.transformer_blocks.0.attn1", "fine_heads": "1"},
        "vce",
    ),
    "surgery": ({"attention": "vv", "surgery_blocks": 1}, "intra"),
    "norm": ({"norm_dim": "channel"}, "clip"),
    "memory": ({"memory_affinity": "exp", "value_mode": "onehot", "memory_weight": 2.0}, "tsa"),
    "refinement": ({"caa_layers": 2, "tau_box": 0.5, "rar_rounds": 3}, "caa"),
}


@pytest.mark.parametrize("case", CASES)
def test_rungs_by_hand(parts, case):
    options, first = CASES[case]
    given, settings = batch(), load_settings(**options)
    found = rungs(parts, given, **options)
    assert list(found) == [*LADDER, "clip_rar", *ABLATION]
    for index, (name, tags) in enumerate(zip(given.names, given.tags, strict=True)):
        expected = by_hand(settings, parts, given.images[index : index + 1], name, tags)
        own = {rung: found[rung].of(index)[0] for rung in expected}
        torch.testing.assert_close(own, expected, atol=1e-3, rtol=0)
    if first:
        default = rungs(parts, given)
        changes = {rung: (found[rung].scores - default[rung].scores).abs().max() for rung in LADDER}
        assert max([0, *(changes[rung] for rung in LADDER[: LADDER.index(first)])]) < 1e-3 < 0.01 < changes[first]


def test_rungs_are_built_from_the_settings(tiny_clip, tiny_diffusion, tiny_memory, parts):
    models = {"clip_model": str(tiny_clip), "diffusion_model": str(tiny_diffusion), "memory": str(tiny_memory)}
    method = build_method(load_settings(method="diclip", device="cpu", **models))
    assert isinstance(method, DiCLIP) and method.restretch
    found = list(method.rungs(batch()))
    assert [name for name, _ in found] == [*LADDER, "clip_rar"] == [*method.raw, *method.refined, *method.baselines]
    assert list(method.ablations) == ABLATION
    again = rungs(parts, batch(), method="diclip")
    for name, maps in found:
        size = 512 if name.endswith("rar") else 8
        assert maps.scores.shape == (3, size, size) and maps.scores.equal(again[name].scores)
        assert maps.image.tolist() == [0, 0, 2] and maps.label.tolist() == [2, 7, 19]
        assert maps.scores.min() >= 0 and maps.scores.amax((1, 2)).min() > 0


def test_the_base_is_plain_clip(parts):
    given, options = batch(), {"attention": "vv", "surgery_blocks": 1}
    base = dict(PlainCLIP(load_settings(**options), parts[0]).rungs(given))
    found = rungs(parts, given, **options)
    assert found["clip"].scores.equal(base["clip"].scores) and found["intra"].scores.equal(base["intra"].scores)


def test_parts_without_weight_do_nothing(parts):
    given = batch()
    found = rungs(parts, given, bias_strength=0, memory_weight=0)
    torch.testing.assert_close(found["vce"].scores, found["intra"].scores, atol=1e-5, rtol=0)
    assert found["tsa"].scores.equal(minmax(found["vce"].scores, (-2, -1)))
    torch.testing.assert_close(found["without_vce"].scores, found["rar"].scores, atol=1e-3, rtol=0)
    assert found["without_rar"].scores.equal(found["caa"].scores)


def test_noise_is_the_images_own(parts):
    """A batch equals its images, in whatever order; another seed or name is another draw."""
    given = batch(tags=((2, 7), (5,), (19,)))
    together = rungs(parts, given)
    for part in ([2, 0], [1]):
        for rung, maps in rungs(parts, chosen(given, part)).items():
            for place, index in enumerate(part):
                scores = maps.of(place)[0]
                torch.testing.assert_close(scores, together[rung].of(index)[0], atol=1e-3, rtol=0)
    renamed = rungs(parts, replace(given, names=["image0", "other", "image2"]))["vce"]
    reseeded = rungs(parts, given, seed=1)["vce"]
    for index, changed in ((0, False), (1, True), (2, False)):
        before = together["vce"].of(index)[0]
        assert ((renamed.of(index)[0] - before).abs().max() > 1e-3) == changed
        assert (reseeded.of(index)[0] - before).abs().max() > 1e-3


def test_noise_stays_what_results_were_made_with():
    draws = [image_generator(seed, name) for seed, name in ((0, "val_00000"), (0, "val_00001"), (1, "val_00000"))]
    assert [draw.initial_seed() for draw in draws] == [3515799808778940538, 5431850887085892580, 3752044913375561168]


def test_without_tags_there_are_no_maps(parts):
    for name, maps in rungs(parts, batch(tags=((), ()))).items():
        size = 8 if name in (*LADDER[:5], "without_rar") else 512
        assert maps.scores.shape == (0, size, size)


def test_what_does_not_fit_is_said_in_one_line(parts, tiny_clip, tmp_path):
    clip, diffusion, memory = parts
    other = Memory(memory.keys, memory.values, ("zebra", *VOC_CLASSES[1:]))
    turned = Memory(memory.keys, memory.values, VOC_CLASSES[::-1])
    forgetful = DiCLIP(load_settings(), clip, diffusion, None)
    narrow = Memory(memory.keys[:, :100], memory.values, VOC_CLASSES)
    settings = {"method": "diclip", "clip_model": str(tiny_clip), "device": "cpu"}
    for call, message in (
        (lambda: DiCLIP(load_settings(), clip, diffusion, other), r"other classes \(aeroplane, zebra …\): build one"),
        (lambda: DiCLIP(load_settings(), clip, diffusion, turned), "the classes in another order: build one"),
        (lambda: rungs((clip, diffusion, narrow), batch()), "all of one width"),
        (lambda: forgetful.map(forgetful.look(batch()), batch()), "no memory to retrieve from: build one"),
        (lambda: rungs(parts, batch(), coarse_heads="4"), "0 to 1"),
        (lambda: rungs(parts, batch(), fine_layer="mid_block"), "no self-attention"),
        (lambda: rungs(parts, batch(), diffusion_timesteps="1000"), "0 to 999"),
        (lambda: build_method(load_settings(memory=str(tmp_path / "m"), **settings)), "there is no memory at"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_without_a_memory_it_is_what_is_left(parts, tiny_clip, tiny_diffusion, tiny_memory):
    clip, diffusion, memory = parts
    own, whole = rungs((clip, diffusion, None), batch()), rungs(parts, batch())
    assert set(whole) - set(own) == {"tsa", "without_tsa"}
    for name in ("vce", "clip_rar", "without_vce"):
        theirs = {"without_vce": load_settings(memory_weight=0)}.get(name)
        expected = whole[name] if theirs is None else rungs(parts, batch(), memory_weight=0)[name]
        torch.testing.assert_close(own[name].scores, expected.scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(own["rar"].scores, whole["without_tsa"].scores, atol=1e-5, rtol=1e-4)


def test_classes_of_ones_own_have_no_memory(tiny_clip, tiny_diffusion, tiny_memory):
    models = {"clip_model": str(tiny_clip), "diffusion_model": str(tiny_diffusion), "memory": str(tiny_memory)}
    settings = load_settings(method="diclip", device="cpu", **models)
    own = build_method(settings, vocabulary=settings.vocabulary(("lamb", "boat")))
    assert own.vocabulary.classes == ("lamb", "boat") and own.raw == ("clip", "intra", "vce") and own.memory is None
    assert build_method(settings, vocabulary=settings.vocabulary()).raw[-1] == "tsa"
