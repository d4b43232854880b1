"""What makes a slot a folder that ``from_pretrained()`` takes: configuration and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plarv.checkpoints.contents import Training
from plarv.discovery import unwrap
from plarv.faults import Faults

__all__ = ["save_beside"]


def save_beside(folder: Path, training: Training, faults: Faults) -> None:
    """Saves whatever of a model's configuration and of its tokenizer has ``save_pretrained()``.

    The weights lie there as model.safetensors already. What anybody's code raises is only counted.
    """
    inner: Any = unwrap(training.model)
    for name, thing in (
        ("configuration", getattr(inner, "config", None)),
        ("generation configuration", getattr(inner, "generation_config", None)),
        ("tokenizer", training.tokenizer),
    ):
        save = getattr(thing, "save_pretrained", None)
        if not callable(save):
            continue
        try:
            save(str(folder))
        except Exception as error:  # noqa: BLE001 - anybody's tokenizer
            faults.count(f"the {name} could not be saved beside a checkpoint", error)
