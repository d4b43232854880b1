"""Signatures of actions and orders: HMAC-SHA256 under the run's key.

The run's key is made from the fleet's master key and the run's id. Workers and operators hold the
master key; a training process needs its own run's key only, and with that it can forge nothing of
another run.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any, Dict, NamedTuple, Optional

__all__ = ["MIN_KEY_LENGTH", "Order", "parse_run_key", "run_key", "sign", "verify"]

MIN_KEY_LENGTH = 16  # characters of a master key


class Order(NamedTuple):
    """What an operator asks of a run."""

    id: str  # 16 hex digits, drawn by chance; an order is carried out once
    run_id: str
    order: str  # pause, resume or stop
    operator: str
    issued_ns: int  # UTC
    expires_ns: int  # UTC; not obeyed from then on
    attempt: Optional[int] = None  # of the run; None: whichever stands

    def to_bytes(self) -> bytes:
        """The order as a message's value: what is signed."""
        return json.dumps(self._asdict(), separators=(",", ":"), sort_keys=True).encode("utf-8")

    @classmethod
    def from_bytes(cls, value: bytes) -> Order:
        """The inverse of :meth:`to_bytes`. ValueError: it is no order."""
        try:
            data: Dict[str, Any] = json.loads(value)
            attempt = data["attempt"]
            order = cls(
                _text(data["id"]),
                _text(data["run_id"]),
                _text(data["order"]),
                _text(data["operator"]),
                issued_ns=int(data["issued_ns"]),
                expires_ns=int(data["expires_ns"]),
                attempt=None if attempt is None else int(attempt),
            )
        except (
            AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError,
        ) as error:  # fmt: skip
            raise ValueError(f"not an order: {error!r}") from error
        return order


def run_key(master_key: str, run_id: str) -> bytes:
    """The key of one run, 32 bytes. ValueError: the master key is too short to be one."""
    if len(master_key) < MIN_KEY_LENGTH:
        raise ValueError(f"a master key has {MIN_KEY_LENGTH} characters or more")
    return _hmac(master_key.encode("utf-8"), b"argus run key\0" + run_id.encode("utf-8"))


def parse_run_key(text: str) -> bytes:
    """A run's key from the 64 hex digits that ``argus key for RUN`` prints. ValueError."""
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ValueError("a run key is the 64 hex digits that `argus key for RUN` prints")
    return key


def sign(key: bytes, kind: str, value: bytes) -> str:
    """The signature of a message's value; ``kind`` (action, order) is signed with it."""
    return _hmac(key, kind.encode("utf-8") + b"\0" + value).hex()


def verify(key: bytes, kind: str, value: bytes, signature: Optional[str]) -> bool:
    """Whether ``signature`` is that of the value under this key."""
    if signature is None:
        return False
    given = signature.encode("utf-8", "replace")  # text beyond ASCII cannot be compared
    return hmac.compare_digest(sign(key, kind, value).encode("ascii"), given)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    value.encode("utf-8")  # a lone surrogate, which JSON can spell, raises here and not later
    return value


def _hmac(key: bytes, data: bytes) -> bytes:
    return hmac.new(key, data, hashlib.sha256).digest()
