"""Measure each idea against the simplest things that could explain it: what `diclip effects` does.

Whatever a null can choose (how strong it is, which block it reads) is chosen for it on `tune`, as it is for the idea.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from diclip.baselines import colour_texture_affinity
from diclip.cam import normalise, surgery_scores
from diclip.correlation import alike
from diclip.data import Batch, minivoc, open_dataset, squash
from diclip.data.images import VOID
from diclip.data.minivoc.backgrounds import COMPANION, PLACES
from diclip.data.voc import part_ids
from diclip.difficulty import majority, same_object_aucs
from diclip.evaluate import Progress, count_grabcut, loader, silent, swept, tune_sweeps
from diclip.labels import pseudo_labels
from diclip.methods import build_method
from diclip.methods.clip import PlainCLIP
from diclip.methods.diclip import DiCLIP
from diclip.methods.excel import ExCEL
from diclip.nulls import NULLS, RAW, Beside, enrichments, shuffled, untrained
from diclip.remember import remember_crops
from diclip.report import protocol
from diclip.runs import environment
from diclip.score import Metric, boundary_counts, image_counts, mean, miou, paired_interval, part_counts
from diclip.settings import Settings, for_method

Counted = NDArray[Any]
PARTS = ("intra", "vce", "vce colour", "vce place")
BOUNDARIES = ("tsa", "caa", "rar", "clip caa", "clip rar")


def measure_effects(settings: Settings, progress: Progress = silent) -> dict[str, dict[str, Any]]:
    """Return for each idea what it is worth on the settings' split, ready for JSON.

    An effect holds `metric`, its value `with` the idea, `without` it and at its strongest `null`, the 95 % paired
    bootstrap `interval` of with minus null (without a null: minus without), every null by name in `nulls`, and of
    what it was measured. With the method `excel` it is what needs no diffusion model. Raises ValueError for a dataset
    without parts and objects, and what `build_method` raises.
    """
    if settings.scales != (1.0,) or settings.flip or settings.refine != "none":
        found = "scales, flip or refine is set"
        raise ValueError(f"{found}, but effects are of maps at a single scale, before any pixels: leave them out")
    if settings.method == "excel":
        return text_enrichment(settings, progress)
    if settings.dataset != "minivoc":
        raise ValueError(
            f"dataset is {settings.dataset!r}, expected minivoc: effects need its masks of parts and objects"
        )
    settings = for_method(settings, "diclip")
    method = build_method(settings)
    assert isinstance(method, DiCLIP)
    memories = {
        "shuffled": shuffled(method.memory, seed=settings.seed),
        "true crops": remember_crops(method, progress=progress),
    }
    beside = Beside(method, untrained(method.diffusion, seed=settings.seed), memories)
    background = tune_nulls(settings, beside, progress)
    scored, parts, boundaries, tags = count(settings, beside, background, progress)
    scored["grabcut"] = count_grabcut(settings, progress)
    about = told(settings, len(tags))

    def effect(
        metric: str, found: Mapping[str, Counted], *names: str, value: Metric = miou, **more: Any
    ) -> dict[str, Any]:
        chosen = {name: found[name] for name in names}
        return compare(metric, chosen, value=value, seed=settings.seed) | about | more

    several = {name: counts[tags > 1] for name, counts in scored.items()}
    vce = ("vce", "intra", "vce colour", "vce colour clustered", "vce place", "vce untrained")
    strengths = {"strengths": {"vce": settings.bias_strength} | {k: v[0] for k, v in beside.strengths.items()}}
    recall = {f"{name} {part}": parts[name][:, index] for name in PARTS for index, part in enumerate(("part", "body"))}
    effects = {
        "intra-correlation": effect("mIoU of raw maps", scored, "intra", "clip", "identity"),
        "visual correlation enhancement": effect("mIoU of raw maps", scored, *vce, **strengths),
        "the same at its published strength": effect("mIoU of raw maps", scored, "vce published", "intra"),
        "the same in scenes of several tags": effect("mIoU of raw maps", several, *vce, images=int((tags > 1).sum())),
        "attention clustering refinement": effect("mIoU of raw maps", scored, "vce clusters", "vce no clusters"),
        "key-value memory": effect("mIoU of raw maps", scored, "tsa", "vce", "tsa shuffled"),
        "class-aware affinity": effect("mIoU, one minus max", scored, "caa", "tsa at 1 - max", "clip caa"),
        "recursive affinity refinement": effect("mIoU, one minus max", scored, "rar", "caa", "clip rar", "grabcut"),
    }
    for part in ("part", "body"):
        names = [f"{name} {part}" for name in ("vce", "intra", "vce colour", "vce place")]
        effects[f"partial activation: recall on the {part}"] = effect("recall of pixels", recall, *names, value=share)
    for name, before in (("class-aware affinity", "tsa"), ("recursive affinity refinement", "caa")):
        own = "caa" if before == "tsa" else "rar"
        effects[f"{name}: boundaries"] = effect("boundary IoU", boundaries, own, before, f"clip {own}")
    ceiling = effect("mIoU of raw maps", scored, "tsa true crops", "vce")
    effects["key-value memory"]["ceiling"] = {"value": ceiling["with"], "over_without": ceiling["over_without"]}
    return (
        effects
        | co_occurrence(settings, method, background["intra"], progress)
        | knowledge(settings, beside, about, progress)
        | text_enrichment(settings, progress)
    )


def told(settings: Settings, images: int) -> dict[str, Any]:
    """Return what stands beside each effect."""
    about = {"split": settings.split, "images": images, "seed": settings.seed, "unit": "per cent"}
    return about | {"protocol": protocol(settings, environment(), images=images)}


def share(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of counts (..., 2) in per cent."""
    return 100 * mean(counts)


def compare(metric: str, found: Mapping[str, Counted], *, value: Metric, seed: int) -> dict[str, Any]:
    """Lay out one effect; `found` names counts: first with the idea, then without it, then those of nulls."""
    (_, own), (without, before), *nulls = found.items()

    def single(counts: Counted) -> float:
        return float(value(counts.sum(0).astype(float)[None])[0])

    def gain(base: Counted) -> list[float]:
        spread = paired_interval(base, own, generator=np.random.default_rng(seed), metric=value)
        return [round(spread.low, 2), round(spread.high, 2)]

    others = {name: {"value": round(single(x), 2), "interval": gain(x)} for name, x in nulls}
    strongest = max(others, key=lambda name: others[name]["value"], default=None)
    return {
        "metric": metric,
        "with": round(single(own), 2),
        "without": round(single(before), 2),
        "without_is": without,
        "null": others[strongest]["value"] if strongest else None,
        "null_is": strongest,
        "interval": others[strongest]["interval"] if strongest else gain(before),
        "over_without": gain(before),
        "nulls": others,
    }


def tune_nulls(settings: Settings, beside: Beside, progress: Progress = silent) -> dict[str, float]:
    """Leave each null its best strength on `tune`, in `beside`, and return each map's best background there."""
    found = {name: (sweep, swept(sweep)) for name, sweep in tune_sweeps(settings, beside, progress).items()}
    for null in NULLS:
        best = max(beside.strengths[null], key=lambda strength: found[beside.title(null, strength)][1].max())
        found[f"vce {null}"] = found[beside.title(null, best)]
        beside.strengths[null] = (best,)
    return {name: round(float(sweep.scores[int(score.argmax())]), 4) for name, (sweep, score) in found.items()}


def count(
    settings: Settings, beside: Beside, background: Mapping[str, float], progress: Progress = silent
) -> tuple[dict[str, Counted], dict[str, Counted], dict[str, Counted], NDArray[np.int64]]:
    """Count all maps on the settings' split: pixels, pixels of part and body, pixels near boundaries, and tags."""
    dataset = open_dataset(settings)
    kinds: tuple[dict[str, list[Counted]], ...] = ({}, {}, {})
    tags = []
    for batch in progress(loader(dataset, settings), desc=f"nulls on {settings.split}"):
        tags += [len(each) for each in batch.tags]
        parts = [part_ids(dataset, name) for name in batch.names]
        for name, maps in beside.rungs(batch):
            rules = [(name, "fixed" if name in RAW else "one_minus_max")]
            rules += [("tsa at 1 - max", "one_minus_max")] if name == "tsa" else []
            for title, rule in rules:
                masks = pseudo_labels(maps, batch.sizes, rule=rule, score=background[name], restretch=beside.restretch)
                pairs = list(zip(masks, batch.masks, parts, strict=True))
                classes = {"num_classes": len(dataset.class_names)}
                kinds[0].setdefault(title, []).extend(image_counts(m, t, **classes) for m, t, _ in pairs)
                if title in PARTS:
                    kinds[1].setdefault(title, []).extend(part_counts(*pair) for pair in pairs)
                if title in BOUNDARIES and rule == "one_minus_max" or title == "tsa at 1 - max":
                    near = [boundary_counts(m, t, **classes) for m, t, _ in pairs]
                    kinds[2].setdefault(title.removesuffix(" at 1 - max"), []).extend(near)
    scored, parts, boundaries = ({name: np.stack(counts) for name, counts in kind.items()} for kind in kinds)
    return scored, parts, boundaries, np.array(tags)


def co_occurrence(
    settings: Settings, method: DiCLIP, background: float, progress: Progress = silent, *, scenes: int = 300
) -> dict[str, Any]:
    """Measure how much of a background is taken for an object on a class's companion place and on another.

    The first scenes of the settings' split are drawn again on both, everything else alike; with the background words
    in the texts and without. Maps are those of `intra` with its background score of `tune`.
    """
    count = min(scenes, len(open_dataset(settings, masks=False)))
    systems = {
        "": PlainCLIP(settings, method.clip),
        ", no background words": PlainCLIP(settings, method.clip, vocabulary=replace(method.vocabulary, background=())),
    }
    wrong: dict[str, dict[str, list[Counted]]] = {name: {} for name in systems}
    for index in progress(range(count), desc="scenes on two places"):
        scene = minivoc.scene_of(settings.split, index, seed=settings.minivoc_seed)
        companion = COMPANION[scene.tags[0]]
        other = np.random.default_rng([settings.seed, index]).choice([p for p in PLACES if p != companion])
        for kind, place in (("companion place", companion), ("another place", str(other))):
            drawn = minivoc.render(minivoc.on_place(scene, place))
            image = torch.from_numpy(drawn.image).permute(2, 0, 1).float() / 255
            tags = torch.tensor(method.vocabulary.indices(scene.tags))
            batch = Batch(
                [str(index)], squash(image, settings.image_size)[None], [tags], [None], [tuple(image.shape[1:])]
            )
            empty = torch.from_numpy(drawn.classes == 0)
            for name, system in systems.items():
                maps = dict(system.rungs(batch))["intra"]
                (mask,) = pseudo_labels(maps, batch.sizes, rule="fixed", score=background)
                found = np.array([int((mask[empty] > 0).sum()), int(empty.sum())])
                wrong[name].setdefault(kind, []).append(found)
    counts = {name: {kind: np.stack(found) for kind, found in kinds.items()} for name, kinds in wrong.items()}
    return {
        f"co-occurrence{name}": compare("background taken for an object", kinds, value=share, seed=settings.seed)
        | told(settings, count)
        for name, kinds in counts.items()
    }


def affinities(beside: Beside, batch: Batch, blocks: Iterable[int]) -> dict[str, Tensor]:
    """Return what could tell objects, (B, N, N) each, by name: as it is, then the likeness of its rows."""
    method = beside.method
    coarse, blank = method.walked(batch)[0], method.walked(batch, diffusion=beside.untrained)[0]
    attention = method.clip.encode(batch.images, surgery_blocks=0, tokens=None).attention  # (L, B, 1 + N, 1 + N)
    found = {
        "diffusion": coarse,
        "diffusion, clustered": method.clustered(coarse, method.grid(batch)),
        "untrained": blank,
        "untrained, clustered": method.clustered(blank, method.grid(batch)),
        "colour": colour_texture_affinity(batch.images, method.grid(batch)),
        **{f"CLIP's q-k, block {block}": attention[block, :, 1:, 1:] for block in blocks},
    }
    return found | {f"rows of {name}": alike(affinity) for name, affinity in found.items()}


def knowledge(settings: Settings, beside: Beside, about: dict[str, Any], progress: Progress = silent) -> dict[str, Any]:
    """Measure what the correlation knows of objects, and how patches of CLIP grow alike."""
    method = beside.method
    tune = settings.model_copy(update={"split": settings.tune_split, "limit": 0})
    blocks = range(len(method.clip.blocks))
    on_tune = same_object_aucs(tune, lambda batch: affinities(beside, batch, blocks), progress)
    scores = {name: float(mean(counts.sum(0))) for name, counts in on_tune.items()}
    chosen = {max(blocks, key=lambda block: scores[f"{of}CLIP's q-k, block {block}"]) for of in ("", "rows of ")}
    auc = same_object_aucs(settings, lambda batch: affinities(beside, batch, sorted(chosen)), progress)
    ours = {name: scores[name] for name in auc if "diffusion" in name}
    own = max(ours, key=ours.__getitem__)
    other = own.removesuffix(", clustered") if own.endswith(", clustered") else f"{own}, clustered"
    every = {name: round(float(share(counts.sum(0))), 2) for name, counts in auc.items()}
    nulls = {name: counts for name, counts in auc.items() if name not in ours}
    tokens = smoothness(settings, method, progress)
    both = {"diffusion, clustered": auc["diffusion, clustered"], "diffusion": auc["diffusion"]}
    how = {"value": share, "seed": settings.seed}
    return {
        "diffusion correlation": compare("AUC of same object", {own: auc[own], other: auc[other], **nulls}, **how)
        | about
        | {"is": own, "all": every},
        "attention clustering refinement: objects": compare("AUC of same object", both, **how) | about,
        "over-smoothing": compare("cosine of patch tokens", {"last block": tokens[:, -1], "first": tokens[:, 0]}, **how)
        | about,
    }


def text_enrichment(settings: Settings, progress: Progress = silent) -> dict[str, Any]:
    """Measure how often a patch inside an object is most like its own class's text, of all classes, no tags given.

    Features are those of ExCEL's surgery path, without a diffusion model; texts are enriched, plain, and of nulls.
    """
    settings = for_method(settings, "excel")
    method = build_method(settings)
    assert isinstance(method, ExCEL)
    texts = enrichments(method, seed=settings.seed)
    found: dict[str, list[Counted]] = {name: [] for name in texts}
    for batch in progress(loader(open_dataset(settings), settings), desc="patches and texts"):
        encoded = method.encode(batch, need_attention=False)
        how = {"pooled_is_token": method.clip.pooled_is_token, "norm_dim": settings.norm_dim}
        features = normalise(encoded.patches, encoded.pooled, **how)
        truth = torch.stack([majority(mask, encoded.grid).flatten() for mask in batch.masks]).to(features[0].device)
        inside = (truth > 0) & (truth != VOID)  # (B, N)
        for name, own in texts.items():
            best = surgery_scores(*features, own)[0][..., : len(method.vocabulary.classes)].argmax(-1) + 1
            counts = torch.stack([((best == truth) & inside).sum(1), inside.sum(1)], 1)
            found[name].append(counts.cpu().numpy())
    counts = {name: np.concatenate(each) for name, each in found.items()}
    about = told(settings, len(counts["enriched"]))
    about["attributes"] = f"{len(method.bank)} for {len(method.vocabulary.classes)} classes"
    return {"text enrichment": compare("patch-text accuracy", counts, value=share, seed=settings.seed) | about}


def smoothness(settings: Settings, method: DiCLIP, progress: Progress = silent) -> NDArray[np.float64]:
    """Count how alike patches are after each block, (images, blocks, 2): mean cosine over pairs, and 1."""
    found = []
    for batch in progress(loader(open_dataset(settings), settings), desc="likeness of patches"):
        tokens = method.clip.encode(batch.images, need_attention=False).tokens[:, :, 1:]  # (L, B, N, D)
        unit = F.normalize(tokens, dim=-1)
        n = unit.shape[2]
        cosine = (unit.sum(2).square().sum(-1) - n) / (n * (n - 1))  # (L, B), pairs of two
        found.append(torch.stack([cosine.T, torch.ones_like(cosine.T)], -1).cpu().double().numpy())
    return np.concatenate(found)
