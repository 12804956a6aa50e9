"""Call a function many times at once, as Ray tasks: on this machine's cores and GPUs, or on a cluster's."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

K = TypeVar("K", bound=Hashable)
Outcome = tuple[str, str | None]


def check_ray() -> None:
    """Raise ValueError, in one line with the remedy, if Ray is not installed."""
    try:
        import ray  # noqa: F401
    except ImportError:
        raise ValueError("found no Ray to run a sweep on a cluster: pip install -e '.[cluster]'") from None


def as_tasks(
    call: Callable[..., Outcome], jobs: Mapping[K, tuple[Any, ...]], *, gpu_share: float = 1.0
) -> Iterator[tuple[K, Outcome]]:
    """Yield each job's key and what `call(*job)` returns, a state and a reason, in the order in which they end.

    Each has a CPU and, where there are GPUs, `gpu_share` of one (CUDA_VISIBLE_DEVICES names it). What `ray.init()`
    finds is used, a cluster that RAY_ADDRESS names or that this machine belongs to, and else this machine alone.
    A worker that dies is tried again twice; then, or if the call raises, the state is "failed". Raises ValueError,
    in one line with the remedy, if Ray is not installed.
    """
    check_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    import ray

    own = not ray.is_initialized()
    if own:
        ray.init(log_to_driver=False, logging_level="warning")
    try:
        share = gpu_share if ray.cluster_resources().get("GPU") else 0
        task = ray.remote(call).options(num_cpus=1, num_gpus=share, max_retries=2)
        running = {task.remote(*job): key for key, job in jobs.items()}
        while running:
            (done, *_), _ = ray.wait(list(running))
            try:
                outcome = ray.get(done)
            except ray.exceptions.RayError as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                outcome = ("failed", f"Ray said {lines[-1].strip()!r}")
            yield running.pop(done), outcome
    finally:
        if own:
            ray.shutdown()
