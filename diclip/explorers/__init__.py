"""Widgets to explore with: each a function from a choice to a picture, and a thin layer of ipywidgets around it."""

from diclip.explorers.cam import CamChoice, CamExplorer
from diclip.explorers.cam_board import explore_cams
from diclip.explorers.composer import Piece, SceneChoice, SceneExplorer
from diclip.explorers.composer_board import explore_scenes
from diclip.explorers.core import Pick, Studio
from diclip.explorers.diffusion import DiffusionChoice, DiffusionExplorer
from diclip.explorers.diffusion_board import explore_diffusion
from diclip.explorers.patch import PatchChoice, PatchExplorer
from diclip.explorers.patch_board import explore_patches
from diclip.explorers.runs import RunChoice, RunExplorer, find_runs
from diclip.explorers.runs_board import explore_runs

__all__ = [
    "CamChoice",
    "CamExplorer",
    "DiffusionChoice",
    "DiffusionExplorer",
    "PatchChoice",
    "PatchExplorer",
    "Pick",
    "Piece",
    "RunChoice",
    "RunExplorer",
    "SceneChoice",
    "SceneExplorer",
    "Studio",
    "explore_cams",
    "explore_diffusion",
    "explore_patches",
    "explore_runs",
    "explore_scenes",
    "find_runs",
]
