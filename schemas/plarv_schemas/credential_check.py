"""Asks a broker whether it accepts our credentials, in a connection of its own.

Needed because kafka-python 3.0 drops the answer of a broker that refuses them, which comes together
with the end of the connection: it tries again until its time is over and says that nobody answered.
"""

from __future__ import annotations

import socket
import struct
import time
from contextlib import closing
from typing import Any, Optional, Tuple

from plarv_schemas.kafka_connection import Connection
from plarv_schemas.kafka_types import require_kafka

__all__ = ["refusal"]

_HANDSHAKE, _AUTHENTICATE = 17, 36
_NAMES = {33: "it has no such SASL mechanism", 58: "wrong name or password"}
_MAX_REPLY = 1 << 20


def refusal(connection: Connection, timeout_s: float) -> Optional[str]:
    """Why the first broker that answers refuses our credentials.

    None: it accepts them, or there are none, or none answers within ``timeout_s``.
    """
    if not connection.uses_sasl:
        return None
    until = time.monotonic() + timeout_s
    for address in connection.brokers:
        try:
            with closing(_connect(connection, address, until)) as sock:
                return _authenticate(connection, address, sock)
        except (OSError, ValueError, struct.error):
            continue  # that it cannot be reached is the client's to say
    return None


def _connect(connection: Connection, address: str, until: float) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    left = max(0.1, until - time.monotonic())
    sock = socket.create_connection((host, int(port)), timeout=left)
    context = connection.ssl_context()
    if context is None:
        return sock
    try:
        return context.wrap_socket(sock, server_hostname=host)
    except (OSError, ValueError):
        sock.close()
        raise


def _authenticate(connection: Connection, address: str, sock: socket.socket) -> Optional[str]:
    """The exchange of the mechanism, to its end or to the broker's refusal."""
    mechanism: Any = require_kafka("kafka.net.sasl").get_sasl_mechanism(connection.mechanism)(
        host=address,
        sasl_mechanism=connection.mechanism,
        sasl_plain_username=connection.username,
        sasl_plain_password=connection.password,
    )
    name = connection.mechanism.encode("ascii")
    reply = _ask(sock, _HANDSHAKE, 1, struct.pack(">h", len(name)) + name)
    (code,) = struct.unpack_from(">h", reply)
    while code == 0 and not mechanism.is_done():
        token: bytes = mechanism.auth_bytes()
        reply = _ask(sock, _AUTHENTICATE, 0, struct.pack(">i", len(token)) + token)
        (code,) = struct.unpack_from(">h", reply)
        said, place = _text(reply, 2)
        if code:
            return said or _NAMES.get(code, f"error {code}")
        mechanism.receive(reply[place + 4 :])
    return _NAMES.get(code, f"error {code}") if code else None


def _ask(sock: socket.socket, request: int, version: int, body: bytes) -> bytes:
    """What the broker answers, without the header. OSError: it does not."""
    head = struct.pack(">hhih", request, version, 1, 5) + b"argus"
    sock.sendall(struct.pack(">i", len(head) + len(body)) + head + body)
    (size,) = struct.unpack(">i", _read(sock, 4))
    if not 4 <= size <= _MAX_REPLY:
        raise ValueError("that is no Kafka broker")
    return _read(sock, size)[4:]


def _read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise ConnectionError("the broker closed the connection")
        data += more
    return data


def _text(data: bytes, place: int) -> Tuple[str, int]:
    """The nullable text at ``place``, and where it ends."""
    (size,) = struct.unpack_from(">h", data, place)
    end = place + 2 + max(0, size)
    return data[place + 2 : end].decode("utf-8", "replace"), end
