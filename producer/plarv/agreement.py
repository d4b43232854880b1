"""How the ranks of a job act at one step or not at all, by torch.distributed's key-value store.

No collective is called. Each rank that has an action says so in the store; a background thread
writes ``apply`` once all have; at the action's step each rank writes ``drop`` unless something
stands there, and obeys what stands. ``compare_set`` decides once for all of them.
"""

from __future__ import annotations

import sys
from typing import Any, Dict, List, Optional

from plarv.identity import Identity
from plarv_schemas.events import Action

__all__ = ["StoreAgreement"]


class StoreAgreement:
    """The ranks' agreement on each action.

    ``announce`` and ``settle`` are the training thread's, ``tend`` the background's. No call waits
    for a key: ``check`` asks whether it is there, and ``get`` is never used (it holds the client's
    lock until the key comes).
    """

    def __init__(self, identity: Identity, store: Any = None) -> None:
        self._rank = identity.rank
        self._world_size = identity.world_size
        self._given = store
        self._announce: Dict[str, bool] = {}  # action id -> whether the store knows that we have it

    def available(self) -> bool:
        """Whether torch.distributed is initialised, and has a store."""
        return self._store() is not None

    def announce(self, action: Action) -> None:
        """This rank has ``action``; the background thread tells the store."""
        self._announce.setdefault(action.id, False)

    def tend(self) -> None:
        """Tells the store what this rank has, and decides where all have it."""
        if not self._announce:
            return
        store = self._store()
        if store is None:
            return
        try:
            for name, told in list(self._announce.items()):
                self._tend(store, name, told)
        except RuntimeError:  # the store is gone, and with it the job
            self._announce.clear()

    def settle(self, action: Action) -> bool:
        """Whether all ranks carry ``action`` out. One round trip to the store."""
        self._announce.pop(action.id, None)
        store = self._store()
        if store is None:
            return False
        try:
            stands = store.compare_set(f"argus/{action.id}", "", "drop")
        except RuntimeError:  # the store is gone: so is the job
            return False
        return bytes(stands) == b"apply"

    def _tend(self, store: Any, name: str, told: bool) -> None:
        if not told:
            store.set(f"argus/{name}/{self._rank}", "1")
            self._announce[name] = True
        keys: List[str] = [f"argus/{name}/{rank}" for rank in range(self._world_size)]
        if store.check(keys):
            store.compare_set(f"argus/{name}", "", "apply")
            self._announce.pop(name, None)

    def _store(self) -> Any:
        return self._given if self._given is not None else _default_store()


def _default_store() -> Optional[Any]:
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    try:
        if distributed is None or not distributed.is_available():
            return None
        if not distributed.is_initialized():
            return None
        return distributed.distributed_c10d._get_default_store()
    except (AttributeError, RuntimeError, ValueError):
        return None
