"""A run's ring of checkpoints, where one is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Mapping, Optional

from plarv import settings
from plarv.checkpoints.contents import Training
from plarv.checkpoints.parts import folder_of
from plarv.checkpoints.ring import CheckpointRing
from plarv.checkpoints.slots import Slots
from plarv.faults import Faults
from plarv.identity import Identity
from plarv.tensors import loaded_torch
from plarv_schemas.journal_writer import JournalWriter

__all__ = ["open_ring"]


def open_ring(
    given: Mapping[str, Any],
    identity: Identity,
    writer: JournalWriter,
    say: Callable[[str], None],
    faults: Faults,
) -> Optional[CheckpointRing]:
    """The ring of ``checkpoint_dir``; None: none was asked for, or the folder cannot be had.
    ``scaler`` is a function that gives it.

    Of replicas rank 0 writes; of a sharded model each rank its part, in a folder of its own.
    """
    asked: Any = given["checkpoint_dir"]
    where = settings.text("ARGUS_CHECKPOINT_DIR", None if asked is None else str(Path(asked)))
    model = given["model"]
    if not where:
        return None
    torch: Any = loaded_torch()
    if torch is None or not isinstance(model, torch.nn.Module):
        say("checkpoint_dir keeps nothing without a torch model: give model=")
        return None
    sharded = identity.world_size > 1 and _is_sharded(model)
    folder = Path(where).absolute()
    if sharded:
        folder = folder_of(folder, identity.rank)
    about = {
        "run_id": identity.run_id,
        "session": writer.session,
        "part": identity.rank if sharded else 0,
        "parts": identity.world_size if sharded else 1,
    }
    slots = Slots(folder)
    writes = sharded or identity.rank == 0
    try:
        if writes and not slots.open():
            say(f"no checkpoints are kept: another process keeps its own in {folder}")
            return None
    except OSError as error:
        say(f"no checkpoints are kept: {folder} cannot be written to ({error.strerror})")
        return None
    parts = (model, given["optimizer"], given["scheduler"], given["scaler"])
    training = Training(*parts, given["tokenizer"])
    return CheckpointRing(slots, training, about, writer, identity.rank, say, faults, writes=writes)


def _is_sharded(model: Any) -> bool:
    return any(hasattr(parameter, "_local_tensor") for parameter in model.parameters())
