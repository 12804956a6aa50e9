"""Let a loss see the whole batch where several processes hold a part of it each."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def total(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, with gradients; a single process gets it back as it is.

    A loss that is made of totals alone (a sum of errors over a number of pixels) is the same number in every process,
    and its gradients, averaged over the processes as data parallelism does, are those of one process that holds
    the whole batch. Counts need no gradient: pass them detached.
    """
    if not dist.is_available() or not dist.is_initialized():
        return values
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(values)
