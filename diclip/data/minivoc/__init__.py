"""MiniVOC: a small drawn world with PASCAL VOC's classes and with what makes weak supervision hard."""

from diclip.data.minivoc.dataset import (
    SPLITS,
    minivoc_folder,
    palette,
    save_mask,
    scene_of,
    write_minivoc,
    write_pretrain,
)
from diclip.data.minivoc.render import Rendered, render
from diclip.data.minivoc.scene import (
    CLASSES,
    Scene,
    Thing,
    in_material,
    in_studio,
    on_place,
    sample_scene,
    with_distractor,
    without_part,
)

__all__ = [
    "CLASSES",
    "SPLITS",
    "Rendered",
    "Scene",
    "Thing",
    "in_material",
    "in_studio",
    "minivoc_folder",
    "on_place",
    "palette",
    "render",
    "sample_scene",
    "save_mask",
    "scene_of",
    "with_distractor",
    "without_part",
    "write_minivoc",
    "write_pretrain",
]
