"""Who this process is in its job: rank, world size, and a run id that all ranks share.

Read from torch.distributed where it is initialised, else from the launcher's environment (torchrun,
Slurm, Open MPI, MPICH). No collective is called: a run id comes from what all ranks see alike.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import sys
import time
from typing import Any, List, Mapping, NamedTuple, Optional

from plarv.exceptions import ArgusConfigurationError

__all__ = ["Identity", "discover", "validate_run_id"]

_RANK = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_WORLD = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_LOCAL_RANK = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
_LOCAL_WORLD = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")

_TASKS = re.compile(r"^(\d+)(?:\(x(\d+)\))?$")
_RUN_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


class Identity(NamedTuple):
    """One process of a job."""

    run_id: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    restart_count: Optional[int]  # of the launcher, where it counts


def discover(run_id: Optional[str], environment: Optional[Mapping[str, str]] = None) -> Identity:
    """This process's identity. ``run_id`` wins over whatever the launcher says."""
    env = os.environ if environment is None else environment
    distributed = _torch_distributed() if environment is None else None
    if distributed is not None:
        rank, world_size = int(distributed.get_rank()), int(distributed.get_world_size())
    else:
        rank, world_size = _first(env, _RANK, 0), _first(env, _WORLD, 1)
        others = [name for name in _RANK if not name.startswith("SLURM") and name in env]
        if env.get("SLURM_STEP_ID") is None and not others:
            # In a batch script outside `srun` the variables describe the job, not this process.
            rank, world_size = _first(env, ("RANK",), 0), _first(env, ("WORLD_SIZE",), 1)
    world_size = max(1, world_size)
    local_rank = _first(env, _LOCAL_RANK, rank)
    local_world_size = _first(env, _LOCAL_WORLD, _slurm_tasks_here(env))
    if local_world_size == 0:
        local_world_size = world_size if local_rank == rank else 1
    local_world_size = max(1, min(local_world_size, world_size))
    restarts = env.get("TORCHELASTIC_RESTART_COUNT", "")
    return Identity(
        run_id=run_id or _shared_run_id(env, world_size, local_world_size, distributed),
        rank=rank if 0 <= rank < world_size else 0,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        restart_count=int(restarts) if restarts.isdigit() else None,
    )


def validate_run_id(run_id: str, parameter: str = "run_id") -> str:
    """``run_id`` itself, where it can name a folder; else ArgusConfigurationError."""
    if not _RUN_ID.match(run_id):
        raise ArgusConfigurationError(
            parameter, "must be 1 to 128 letters, digits, '.', '_' or '-', not begun by '.'", run_id
        )
    return run_id


def _shared_run_id(
    env: Mapping[str, str], world_size: int, local_world_size: int, distributed: Any
) -> str:
    if world_size == 1:
        return time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3)
    launcher = env.get("TORCHELASTIC_RUN_ID", "none")
    if launcher != "none":
        return _clean(f"torchrun-{launcher}")
    if "SLURM_JOB_ID" in env:
        return _clean(f"slurm-{env['SLURM_JOB_ID']}-{env.get('SLURM_STEP_ID', '0')}")
    for name in ("OMPI_MCA_ess_base_jobid", "PMI_JOBID", "PMIX_NAMESPACE"):
        if name in env:
            return _clean(f"mpi-{env[name]}")
    # On one node all ranks have one parent, the launcher. torchrun's agent lives through a restart,
    # which gives the ranks a fresh store, and may give them another port.
    if "TORCHELASTIC_RESTART_COUNT" in env and local_world_size == world_size:
        return _job_id(os.uname().nodename)
    agreed = _agree_by_store(distributed)
    if agreed is not None:
        return agreed
    return _job_id(env.get("MASTER_ADDR", ""), env.get("MASTER_PORT", ""))


def _job_id(*names: str) -> str:
    seen = (*names, os.getppid(), _parent_start())
    return "job-" + hashlib.blake2b(repr(seen).encode(), digest_size=5).hexdigest()


def _agree_by_store(distributed: Any) -> Optional[str]:
    """The first id that a rank proposed in torch.distributed's key-value store; no collective."""
    if distributed is None:
        return None
    try:
        store = distributed.distributed_c10d._get_default_store()
        mine = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3)
        agreed = store.compare_set("argus/run_id", "", mine)
        return _clean(agreed.decode() if isinstance(agreed, bytes) else str(agreed))
    except (AttributeError, RuntimeError, ValueError):
        return None


def _torch_distributed() -> Any:
    """torch.distributed where it is initialised, else None. Never imports torch."""
    torch = sys.modules.get("torch")
    distributed: Any = getattr(torch, "distributed", None)
    try:
        if distributed is None or not distributed.is_available():
            return None
        return distributed if distributed.is_initialized() else None
    except (AttributeError, RuntimeError):
        return None


def _parent_start() -> str:
    """When the parent process started, in clock ticks since boot; '' where that is not told."""
    try:
        with open(f"/proc/{os.getppid()}/stat", "rb") as file:
            return file.read().rsplit(b")", 1)[1].split()[19].decode()
    except (OSError, IndexError):
        return ""


def _slurm_tasks_here(env: Mapping[str, str]) -> int:
    """Tasks of the job step on this node, out of a list such as ``4(x2),3``; 0: not told."""
    if "SLURM_STEP_ID" not in env:
        return 0
    counts: List[int] = []
    for item in env.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = _TASKS.match(item)
        if match is None:
            return 0
        counts.extend([int(match[1])] * int(match[2] or 1))
    node = _first(env, ("SLURM_NODEID",), 0)
    return counts[node] if node < len(counts) else 0


def _first(env: Mapping[str, str], names: Any, default: int) -> int:
    for name in names:
        value = env.get(name, "")
        if value.isdigit():
            return int(value)
    return default


def _clean(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)[:128]
