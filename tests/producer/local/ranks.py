"""A function run on each rank of a process group over gloo; what one of them raises is raised."""

from __future__ import annotations

import socket
from typing import Any, Callable

import torch

__all__ = ["on_ranks"]


def on_ranks(function: Callable[..., None], world: int, *given: Any) -> None:
    """Runs ``function(rank, world, *given)``, which must be importable, on each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    spawn: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]
    spawn(_rank, args=(world, port, function, given), nprocs=world)


def _rank(rank: int, world: int, port: int, function: Callable[..., None], given: Any) -> None:
    torch.set_num_threads(1)
    distributed: Any = torch.distributed
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    try:
        function(rank, world, *given)
    finally:
        distributed.destroy_process_group()
