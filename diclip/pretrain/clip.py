"""Train the mini CLIP: an open_clip model, contrastive on captions, with most patches dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diclip.pretrain.data import Pictures, augment, candidate_prompts, truths, write_captions
from diclip.pretrain.loop import Schedule, train
from diclip.pretrain.muon import MuonAdamW
from diclip.pretrain.tokenizer import CONTEXT_LENGTH, build_tokenizer
from diclip.runs import replacing, write_json
from diclip.surgery import attend, merge, project, resize_positions

PIXEL_MEAN, PIXEL_STD = (0.48, 0.46, 0.44), (0.24, 0.23, 0.24)


@dataclass(frozen=True)
class Phase:
    """A stretch of the training, until `until` (share of all steps)."""

    until: float
    size: int  # pixels that a crop is shown at
    crop: tuple[float, float]  # side of a crop, as a share of the picture's 128 pixels
    drop: float  # share of the patches that are left out
    single: float  # share of the pictures that are drawn from those with one tag
    pool: str  # what stands for a picture: "avg", the mean of its patches, or "tok", the class token, as in CLIP


# First small and cheap, one thing at a time: crops of half a picture keep its own scale even at 64 pixels, and the mean
# of the patches learns quickest. Then the class token takes over, and patches need not speak for the picture any more.
PHASES = (
    Phase(0.15, 64, (0.5, 1.0), 0.5, 0.7, "avg"),
    Phase(0.30, 128, (0.6, 1.0), 0.8, 0.2, "avg"),
    Phase(0.90, 128, (0.7, 1.0), 0.8, 0.0, "tok"),
    Phase(1.00, 128, (0.8, 1.0), 0.65, 0.0, "tok"),
)
STEPS = 5_000
SPLITS = {"pretrain": 1.0}  # of the settings' number of pictures
CAPTIONS = 48  # captions of a batch that all its pictures are compared with


def phase_of(step: int, steps: int) -> Phase:
    """Return the phase that a step (counted from 0) of a training of `steps` belongs to."""
    return next(phase for phase in PHASES if step < phase.until * steps or phase is PHASES[-1])


def model_config(*, vocab_size: int, pool: str = "tok", width: int = 160, layers: int = 6) -> dict:
    """Return the open_clip configuration of the mini model: patch 8, a 16 x 16 grid, two text layers."""
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": 128, "patch_size": 8, "width": width, "layers": layers, "head_width": 32, "pool_type": pool,
        },
        "text_cfg": {
            "context_length": CONTEXT_LENGTH, "vocab_size": vocab_size, "width": 128, "heads": 4, "layers": 2,
            "hf_tokenizer_name": "mini",
        },
    }  # fmt: skip


def build_model(config: dict) -> nn.Module:
    """Build an `open_clip.CLIP` with its text tower's usual initialisation."""
    import open_clip

    text = {k: v for k, v in config["text_cfg"].items() if k != "hf_tokenizer_name"}
    return open_clip.CLIP(config["embed_dim"], config["vision_cfg"], text)


def encode_dropped(visual: nn.Module, images: Tensor, *, drop: float, pool: str, generator: torch.Generator) -> Tensor:
    """Encode images `(B, 3, H, W)` from a random `1 - drop` share of their patches: features `(B, E)`."""
    side = visual.conv1.kernel_size[0]
    grid = (images.shape[2] // side, images.shape[3] // side)
    patches = F.unfold(images, side, stride=side).transpose(1, 2)  # (B, N, 3 * side * side)
    keep = max(round(patches.shape[1] * (1 - drop)), 1)
    chosen = torch.rand(patches.shape[:2], generator=generator).argsort(1)[:, :keep].to(images.device)
    patches = patches.gather(1, chosen[..., None].expand(-1, -1, patches.shape[2]))
    positions = resize_positions(visual.positional_embedding, visual.grid_size, grid)
    x = F.linear(patches, visual.conv1.weight.flatten(1)) + positions[1:][chosen]  # (B, keep, D)
    first = (visual.class_embedding + positions[0]).expand(len(x), 1, -1)
    x = visual.ln_pre(torch.cat([first, x], 1))
    for block in visual.transformer.resblocks:  # on a CPU far cheaper than the fused attention's backward pass
        q, k, v = project(block, block.ln_1(x))
        x = x + block.attn.out_proj(merge(attend(q, k) @ v))
        x = x + block.mlp(block.ln_2(x))
    x = visual.ln_post(x)
    return (x[:, 0] if pool == "tok" else x[:, 1:].mean(1)) @ visual.proj


def encode_short(model: nn.Module, ids: Tensor) -> Tensor:
    """Encode token ids `(T, n)` of any length up to the context: features `(T, E)`; the end token's output counts."""
    n = ids.shape[1]
    x = model.token_embedding(ids) + model.positional_embedding[:n]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:n, :n]))
    return x[torch.arange(len(x)), ids.argmax(-1)] @ model.text_projection


def caption_loss(images: Tensor, texts: Tensor, scale: Tensor, true: Tensor, known: Tensor) -> Tensor:
    """Contrast images `(B, E)` with texts `(T, E)`, both ways, where each may have several true partners.

    Each row's target is shared among its true partners; pairs that are not `known` are left out.
    """
    logits = (scale * images @ texts.T).masked_fill(~known, -1e4)

    def side(logits: Tensor, true: Tensor) -> Tensor:
        weight = true.float()
        rows = weight.sum(1)
        return -(weight * logits.log_softmax(1)).sum(1)[rows > 0].div(rows[rows > 0]).mean()

    return 0.5 * (side(logits, true) + side(logits.T, true.T))


def pretrain_clip(
    folder: Path,
    pictures: Pictures,
    *,
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    width: int = 192,
    layers: int = 7,
    seed: int = 0,
    max_minutes: float = 0,
    half: bool = True,
    device: str = "cpu",
    evaluate: Callable[[Path], dict[str, float]] | None = None,
    evaluate_every: int = 400,
    progress: Callable[[range], object] = lambda steps: steps,
) -> Path:
    """Train the mini CLIP, resuming what `folder` holds, and export it to `folder/model` when the time is over.

    `half` computes matrix products in bfloat16. Every step draws from generators seeded by `seed` and its own number.
    """
    from transformers import CLIPTokenizer

    if not (folder / "checkpoint.pt").exists():  # what has been learned is tied to the tokenizer it was learned with
        build_tokenizer(folder / "model")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "model")
    config = model_config(vocab_size=len(tokenizer), width=width, layers=layers)
    torch.manual_seed(seed)
    model = build_model(config).to(device).train()
    inside = (p for name, p in model.named_parameters() if "resblocks" in name and p.ndim == 2)
    optimizer = MuonAdamW(model, inside, lr=learning_rate)
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (PIXEL_MEAN, PIXEL_STD))

    def loss(step: int) -> dict[str, Tensor]:
        rng, generator = np.random.default_rng([seed, step]), torch.Generator().manual_seed(seed * 10**9 + step)
        phase = phase_of(step, steps)
        rows = pictures.draw(batch_size, single=phase.single, rng=rng)
        images = augment(pictures.take(rows), size=phase.size, crop=phase.crop, generator=generator).to(device)
        tags, places = pictures.tags[rows], pictures.places[rows]
        captions = write_captions(tags[:CAPTIONS], places[:CAPTIONS], rng) + candidate_prompts(rng)
        true, known = (x.to(device) for x in truths(captions, tags, places, rng))
        ids = tokenizer(
            [c.text for c in captions], padding=True, truncation=True, max_length=CONTEXT_LENGTH, return_tensors="pt"
        ).input_ids.to(device)
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
            image = encode_dropped(
                model.visual, (images - mean) / std, drop=phase.drop, pool=phase.pool, generator=generator
            )
            text = encode_short(model, ids)
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        return {
            "loss": caption_loss(image, text, model.logit_scale.exp(), true, known),
            "scale": model.logit_scale.exp(),
        }

    def cap_scale() -> None:
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))

    def export_and_evaluate(step: int) -> dict[str, float]:
        config["vision_cfg"]["pool_type"] = phase_of(step - 1, steps).pool
        target = export(model, config, folder / "model")
        return evaluate(target) if evaluate else {}

    train(
        model, loss, folder=folder, schedule=Schedule(steps, learning_rate), optimizer=optimizer, after_step=cap_scale,
        evaluate=export_and_evaluate, evaluate_every=evaluate_every, max_minutes=max_minutes, progress=progress,
    )  # fmt: skip
    return folder / "model"


def export(model: nn.Module, config: dict, folder: Path) -> Path:
    """Write the model as an open_clip folder, weights in half precision; the tokenizer lies there already."""
    from safetensors.torch import save_file

    weights = {name: tensor.detach().half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(folder / "open_clip_model.safetensors") as scratch:
        save_file(weights, scratch)
        scratch.chmod(0o644)  # safetensors writes for the owner alone
    preprocess = {
        "mean": list(PIXEL_MEAN),
        "std": list(PIXEL_STD),
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess})
    return folder
