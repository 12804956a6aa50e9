"""Score patches against texts: closed-form class activation maps, and how maps are packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Maps:
    """Hold one map for each class that is present in each image of a batch, and nothing for the others.

    `scores` (P, h, w) are in the method's own scale; map p belongs to image `image[p]` and class `label[p]`,
    both long (P,), in the order of the images and of their tags. P = 0 is allowed.
    """

    scores: Tensor
    image: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.scores)

    def of(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the scores (n, h, w) and the class indices (n,) of one image."""
        mine = self.image == index
        return self.scores[mine], self.label[mine]

    def with_scores(self, scores: Tensor) -> Maps:
        """Return the same maps with other scores (P, any h, any w)."""
        return replace(self, scores=scores)

    def dense(self, batch: int, num_classes: int) -> Tensor:
        """Return (batch, num_classes, h, w) with zeros for the classes that are absent."""
        maps = self.scores.new_zeros(batch, num_classes, *self.scores.shape[1:])
        maps[self.image, self.label] = self.scores
        return maps


def resize(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (P, h, w) to (P, *size): bilinear, half-pixel centres."""
    return F.interpolate(scores[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def by_image(maps: Maps, batch: int, refine: Callable[[Maps, slice], Tensor]) -> Maps:
    """Give maps of `batch` images new scores: on a GPU all at once, on a CPU an image at a time.

    `refine` gets maps, which count their images from 0, and which images they are; it returns their scores. A CPU is
    faster with matrices (N, N) of one image, which stay in its cache, and needs less memory. Raises ValueError for
    maps of other images.
    """
    if maps.scores.device.type != "cpu" or not len(maps):
        return maps.with_scores(refine(maps, slice(None)))
    if not 0 <= maps.image.min() <= maps.image.max() < batch:
        raise ValueError(f"maps are of images {maps.image.min()} to {maps.image.max()}, expected 0 to {batch - 1}")
    scores = None
    for image in maps.image.unique().tolist():
        own = (maps.image == image).nonzero()[:, 0]
        found = refine(Maps(maps.scores[own], torch.zeros_like(own), maps.label[own]), slice(image, image + 1))
        scores = found.new_empty(len(maps), *found.shape[1:]) if scores is None else scores
        scores[own] = found
    return maps.with_scores(scores)


def packed(tags: Sequence[Tensor], num_classes: int) -> tuple[Tensor, Tensor]:
    """Return image and class (P,), int64, of each of B images' tags, 0-based class indices, in their order.

    Raises ValueError if a tag is not below `num_classes`.
    """
    counts = torch.tensor([len(tag) for tag in tags], dtype=torch.long)
    image = torch.arange(len(tags)).repeat_interleave(counts)
    label = torch.cat([torch.as_tensor(tag, dtype=torch.long).cpu() for tag in tags] or [image])
    if len(label) and not 0 <= label.min() <= label.max() < num_classes:
        raise ValueError(f"tags are {label.min()} to {label.max()}, expected 0 to {num_classes - 1}")
    return image, label


def pack(dense: Tensor, tags: Sequence[Tensor]) -> Maps:
    """Keep of dense maps (B, C, h, w) those of each image's tags, 0-based class indices; no tags, no maps.

    Raises ValueError if there are not B lists of tags or a tag is not below C.
    """
    if dense.ndim != 4 or len(tags) != len(dense):
        raise ValueError(f"maps are {tuple(dense.shape)} for {len(tags)} images, expected (B, C, h, w) for B")
    image, label = (index.to(dense.device) for index in packed(tags, dense.shape[1]))
    return Maps(dense[image, label], image, label)


def minmax(x: Tensor, dim: int | tuple[int, ...], *, eps: float = 0.0) -> Tensor:
    """Stretch x to [0, 1] along `dim`: less the minimum, over (maximum + eps). A constant gives 0."""
    x = x - x.amin(dim, keepdim=True)
    return x / (x.amax(dim, keepdim=True) + eps).clamp_min(torch.finfo(x.dtype).tiny)


def normalise(
    patches: Tensor,
    pooled: Tensor,
    *,
    pooled_is_token: bool,
    norm_dim: Literal["token", "channel"] = "token",
) -> tuple[Tensor, Tensor]:
    """Divide features (B, N, E), (B, E) by their L2 norm over the tokens or over the channels.

    "token" is what ExCEL and DiCLIP compute: every channel has unit norm over an image's tokens, the class
    token among them where the model pools by it. "channel" is the cosine similarity's. Raises ValueError for
    another `norm_dim`.
    """
    if norm_dim == "channel":
        return F.normalize(patches, dim=-1), F.normalize(pooled, dim=-1)
    if norm_dim != "token":
        raise ValueError(f"norm_dim is {norm_dim!r}, expected token or channel")
    total = patches.square().sum(1)  # a tenth of the time of patches.norm(dim=1)
    total = total + pooled.square() if pooled_is_token else total
    norm = total.sqrt().clamp_min(torch.finfo(total.dtype).tiny)  # (B, E)
    return patches / norm[:, None], pooled / norm


def surgery_scores(
    patches: Tensor, pooled: Tensor, texts: Tensor, *, first: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the likeness of patches and pooled feature to texts (n, E), less what all texts share.

    Features come from `normalise`; results are (B, N, n) and (B, n), unbounded, or only those of the `first`
    texts. This closed form is equal to CLIP Surgery's feature surgery, which builds a (B, 1 + N, n, E) tensor:
    what is shared is taken from the texts, before patches meet them.
    """
    weight = (2 * pooled @ texts.T).softmax(-1)  # (B, n)
    weighted = (weight / weight.mean(-1, keepdim=True))[..., None] * texts  # (B, n, E)
    own = (weighted[:, :first] - weighted.mean(1, keepdim=True)).transpose(1, 2)
    return patches @ own, (pooled[:, None] @ own)[:, 0]


def surgery_cam(
    patches: Tensor,
    pooled: Tensor,
    texts: Tensor,
    *,
    num_classes: int,
    pooled_is_token: bool,
    norm_dim: Literal["token", "channel"] = "token",
) -> Tensor:
    """Return class activation maps (B, C, N) in [0, 1] of the first `num_classes` texts.

    `patches` (B, N, E) and `pooled` (B, E) are an `Encoded`'s, `texts` (n, E) unit rows: classes first,
    background words after; all n take part in the weights and in the shared part (ExCEL, CVPR 2025; DiCLIP).
    A class's minimum and maximum run over the patches and, with `pooled_is_token`, over the class token, so
    that a map need not reach 0 and 1. Raises ValueError for shapes that do not fit.
    """
    if patches.ndim != 3 or pooled.shape != patches[:, 0].shape or texts.shape[1:] != pooled.shape[1:]:
        found = ", ".join(str(tuple(x.shape)) for x in (patches, pooled, texts))
        raise ValueError(f"patches, pooled and texts are {found}, expected (B, N, E), (B, E) and (n, E)")
    if not 0 < num_classes <= len(texts):
        raise ValueError(f"num_classes is {num_classes}, expected 1 to the number of texts, {len(texts)}")
    patches, pooled = normalise(patches, pooled, pooled_is_token=pooled_is_token, norm_dim=norm_dim)
    scores, pooled_scores = surgery_scores(patches, pooled, texts, first=num_classes)
    rows = torch.cat([pooled_scores[:, None], scores], dim=1) if pooled_is_token else scores
    return minmax(rows, 1)[:, int(pooled_is_token) :].transpose(1, 2)


def flip_max(maps: Tensor, mirrored: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Join maps (..., h, w) of images with those of their mirror images: larger value, then min-max a map."""
    return minmax(torch.maximum(maps, mirrored.flip(-1)), (-2, -1), eps=eps)
