"""A TCP forwarder between a client and a broker: slow, deaf or gone, as a test wants it."""

from __future__ import annotations

import queue
import socket
import threading
import time
from typing import List, Optional, Tuple

__all__ = ["Proxy"]


class Proxy:
    """Forwards connections to ``target``; each way is ``delay_s`` late.

    While it is ``deaf`` it accepts connections and takes in bytes, and nothing comes out.
    """

    def __init__(self, target: Optional[Tuple[str, int]] = None, delay_s: float = 0.0) -> None:
        self.target = target
        self.delay_s = delay_s
        self.deaf = False
        self.connections = 0
        self._sockets: List[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def close(self) -> None:
        """Ends all connections; nobody listens any more."""
        for each in [self._server, *self._sockets]:
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it was not connected
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            self.connections += 1
            self._sockets.append(client)
            if self.target is None:
                continue
            try:
                broker = socket.create_connection(self.target)
            except OSError:
                client.close()
                continue
            self._sockets.append(broker)
            for source, sink in ((client, broker), (broker, client)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                way: queue.Queue[Tuple[float, bytes]] = queue.Queue()
                threading.Thread(target=self._take, args=(source, way), daemon=True).start()
                threading.Thread(target=self._give, args=(sink, way), daemon=True).start()

    def _take(self, source: socket.socket, way: queue.Queue[Tuple[float, bytes]]) -> None:
        data = b"-"
        while data:
            try:
                data = source.recv(65536)
            except OSError:
                data = b""
            if not self.deaf:
                way.put((time.monotonic() + self.delay_s, data))

    def _give(self, sink: socket.socket, way: queue.Queue[Tuple[float, bytes]]) -> None:
        while True:
            due, data = way.get()
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                if not data:
                    sink.close()
                    return
                sink.sendall(data)
            except OSError:
                return
