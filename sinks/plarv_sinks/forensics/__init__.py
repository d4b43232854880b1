"""Forensics: what remains of a run, in a notebook or a script, as polars data frames.

from plarv_sinks.forensics import open_store

store = open_store()                    # ARGUS_STORE, or .argus/store
store.runs()                            # one row a run
run = store.run("my-run")
run.timeline()                          # what happened, a sentence each
run.first_cause()                       # what began it
run.explain(run.verdicts()["id"][0])    # why that verdict
run.plot().savefig("run.png")
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Optional, Union

from plarv_sinks.forensics.explanation import Explanation
from plarv_sinks.forensics.forensics import Forensics
from plarv_sinks.forensics.run import Run
from plarv_sinks.store import StoreError

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Explanation", "Forensics", "Run", "StoreError", "open_store", "run", "runs"]


def open_store(
    location: Union[str, Path, None] = None, tell: Optional[Callable[[str], None]] = None
) -> Forensics:
    """The store at a path or URI; without one at ``ARGUS_STORE``, else ``store`` in ``ARGUS_DIR``.

    Raises:
        StoreError: there is none.
        ImportError: polars or pyarrow is missing.
    """
    if location is None:
        folder = os.environ.get("ARGUS_DIR") or ".argus"
        location = os.environ.get("ARGUS_STORE") or Path(folder) / "store"
        if location == "none":
            raise StoreError("ARGUS_STORE is none: name a store")
    return Forensics(location, tell)


def runs() -> pl.DataFrame:
    """The runs of the store where ``ARGUS_STORE`` or ``ARGUS_DIR`` says; see Forensics.runs."""
    return open_store().runs()


def run(run_id: str) -> Run:
    """One run of that store. StoreError: it has none of this id."""
    return open_store().run(run_id)
