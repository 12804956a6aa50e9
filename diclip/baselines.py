"""What simple image processing reaches: the nulls that an idea has to beat."""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def colour_texture_features(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Describe each patch by colour and texture: Lab mean and spread, and energy of the gradient by direction.

    Args:
        images: `(B, 3, H, W)` float32 in [0, 1].
        grid: patches down and across.

    Returns:
        `(B, N, 14)`, each feature with zero mean and unit deviation inside its image.
    """
    batch, _, height, width = images.shape
    lab = np.stack(
        [cv2.cvtColor(np.ascontiguousarray(x), cv2.COLOR_RGB2LAB) for x in images.permute(0, 2, 3, 1).cpu().numpy()]
    )
    lab = torch.from_numpy(lab).permute(0, 3, 1, 2).to(images.device)  # (B, 3, H, W)
    grey = lab[:, :1]
    dx, dy = F.pad(grey[..., 2:] - grey[..., :-2], (1, 1)), F.pad(grey[..., 2:, :] - grey[..., :-2, :], (0, 0, 1, 1))
    angles = torch.arange(8, device=images.device) * torch.pi / 8
    energy = (dx * angles.cos().view(1, 8, 1, 1) + dy * angles.sin().view(1, 8, 1, 1)).abs()
    mean = F.adaptive_avg_pool2d(lab, grid)
    spread = (F.adaptive_avg_pool2d(lab**2, grid) - mean**2).clamp_min(0).sqrt()
    features = torch.cat([mean, spread, F.adaptive_avg_pool2d(energy, grid)], 1).flatten(2).transpose(1, 2)
    return (features - features.mean(1, keepdim=True)) / (features.std(1, keepdim=True) + 1e-6)


def colour_texture_affinity(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Compare patches by colour and texture: `(B, N, N)` in (0, 1], 1 on the diagonal.

    The width of the Gaussian is the median distance inside each image.
    """
    features = colour_texture_features(images, grid)
    weights = features.new_tensor([1.0] * 3 + [0.7] * 3 + [0.35] * 8)
    distance = torch.cdist(features * weights, features * weights) ** 2
    scale = distance.flatten(1).median(1).values.clamp_min(1e-6).view(-1, 1, 1)
    return torch.exp(-distance / scale)


def saliency(image: np.ndarray) -> np.ndarray:
    """Rate how much each pixel differs from the border of the picture, `(H, W)` in [0, 1].

    The distance is Mahalanobis in blurred Lab colour, weighted towards the centre.
    """
    lab = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(np.float32), (0, 0), 2)
    height, width = lab.shape[:2]
    band = max(min(height, width) // 10, 2)
    edges = (lab[:band], lab[-band:], lab[:, :band], lab[:, -band:])
    border = np.concatenate([edge.reshape(-1, 3) for edge in edges])
    inverse = np.linalg.inv(np.cov(border.T) + 4 * np.eye(3))
    delta = lab - border.mean(0)
    distance = np.sqrt(np.einsum("hwi,ij,hwj->hw", delta, inverse, delta))
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    rated = distance * np.exp(-(x**2 + y**2) / 1.5)
    return (rated - rated.min()) / max(float(np.ptp(rated)), 1e-6)


def grabcut(image: np.ndarray, tags: list[int], *, rng: np.random.Generator) -> np.ndarray:
    """Segment a picture from its tags alone, without any learning: saliency, GrabCut, k-means.

    The foreground is split into as many clusters of place and colour as there are tags, which are dealt out
    at random: nothing here knows what a class looks like.

    Args:
        image: `(H, W, 3)` uint8, RGB.
        tags: 0-based class indices.

    Returns:
        `(H, W)` uint8, 0 for background and 1 + class index.
    """
    from sklearn.cluster import KMeans

    rated = saliency(image)
    seeds = np.full(rated.shape, cv2.GC_PR_BGD, np.uint8)
    seeds[rated > np.quantile(rated, 0.60)] = cv2.GC_PR_FGD
    seeds[rated > np.quantile(rated, 0.92)] = cv2.GC_FGD
    seeds[rated < np.quantile(rated, 0.15)] = cv2.GC_BGD
    labels = np.zeros(rated.shape, np.uint8)
    if not tags or not np.isin(seeds, (cv2.GC_FGD, cv2.GC_PR_FGD)).any():  # an even picture has no foreground
        return labels
    cv2.setRNGSeed(int(rng.integers(2**31)))
    cv2.grabCut(image, seeds, None, np.zeros((1, 65)), np.zeros((1, 65)), 3, cv2.GC_INIT_WITH_MASK)
    front = (seeds == cv2.GC_FGD) | (seeds == cv2.GC_PR_FGD)
    if front.sum() < len(tags):
        return labels
    ys, xs = np.nonzero(front)
    colour = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)[front].astype(np.float32) / 255
    points = np.column_stack([ys / image.shape[0], xs / image.shape[1], 0.7 * colour])
    cluster = KMeans(len(tags), n_init=1, max_iter=20, random_state=int(rng.integers(2**31))).fit_predict(points)
    labels[front] = 1 + rng.permutation(np.array(tags))[cluster]
    return labels


def place_affinity(grid: tuple[int, int], *, width: float = 2.0) -> Tensor:
    """Compare patches by their distance alone, `(1, N, N)` with rows that sum to 1: a Gaussian of `width` patches.

    As a bias it blurs maps, and knows nothing of the picture.
    """
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack([y, x], -1).flatten(0, 1).float()
    return torch.softmax(-(torch.cdist(places, places) ** 2) / (2 * width**2), -1)[None]
