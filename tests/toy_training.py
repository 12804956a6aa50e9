"""A small real network to train: what the tests of the loop run, here and in other processes."""

import os
import socket
import sys

import torch
from torch import nn

from diclip.cam import pack
from diclip.losses import over_processes
from diclip.settings import Settings, load_settings
from diclip.train import train


class Toy(nn.Module):
    """Colours and where they are to classes, learned from true masks; half of it may drop out."""

    def __init__(self, settings: Settings, *, dropout: float = 0.2) -> None:
        super().__init__()
        self.settings = settings
        self.net = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4, padding=2), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Conv2d(8, 21, 1)
        self.later = nn.Conv2d(8, 21, 1)  # no part of the loss at first

    def logits(self, images):
        features = self.net(images - 0.5)
        return self.head(features) + (self.later(features) if self.training and self.step >= 3 else 0)

    def loss(self, batch, *, step, generator):
        self.step = step
        masks = torch.stack(batch.masks)[:, ::4, ::4]
        errors = nn.functional.cross_entropy(self.logits(batch.images), masks, reduction="none", ignore_index=255)
        sums = [over_processes(torch.stack([errors[x].sum(), x.sum().float()])) for x in (masks == 0, masks % 255 > 0)]
        back, front = (error / (count + 1e-6) for error, count in sums)
        return {"loss": (back + front) / 2, "back": back, "noise": torch.rand((), generator=generator)}

    def segment(self, images):
        return self.logits(images)

    def cam(self, batch):
        return pack(self.logits(batch.images)[:, 1:].sigmoid(), batch.tags)

    def compared_labels(self, batch, step):
        own = self.logits(batch.images).argmax(1).repeat_interleave(4, 1).repeat_interleave(4, 2)
        return {"training-free labels": own.clamp(max=1), "pseudo labels": own}


def plain(settings: Settings) -> Toy:
    return Toy(settings, dropout=0)


def run(settings: dict, *, build=Toy, environment: dict | None = None) -> None:
    """Train in a process of its own, which tells what went wrong by its exit code; without `build` a real system."""
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    train(load_settings(**settings), resume=True, build=build)


def run_together(processes, settings: dict, *, build, count: int = 2) -> list[int]:
    """Train in processes of a multiprocessing context that share the work; return their exit codes."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    started = []
    for rank in map(str, range(count)):
        own = place | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": str(count)}
        started.append(processes.Process(target=run, args=(settings,), kwargs={"build": build, "environment": own}))
        started[-1].start()
    for process in started:
        process.join()
    return [process.exitcode for process in started]


if __name__ == "__main__":
    run(dict(pair.split("=", 1) for pair in sys.argv[1:]))
