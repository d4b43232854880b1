"""What a worker tells of itself: Prometheus metrics, and whether it is well."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, List, Optional, Tuple

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

__all__ = ["Health", "serve"]

_LAG_LIMIT_S = 30.0  # from a message's time to its judgement
_LAG_FRESH_S = 15.0  # an older measurement says nothing about now
_LOOP_LIMIT_S = 10.0  # without a turn of the event loop


class Health:
    """Counters and gauges; written by the event loop, read by the server's thread."""

    def __init__(self, labels: List[str]) -> None:
        self.registry = CollectorRegistry()
        self._rebuilding: Dict[str, bool] = dict.fromkeys(labels, True)
        self._lag_s = 0.0
        self._lag_at = 0.0
        self._turned = time.monotonic()
        self._folded: Dict[str, Tuple[Any, Any]] = {}  # looking a label up costs more than counting
        registry = self.registry
        self._steps = Counter("argus_steps", "Events judged", ["detector"], registry=registry)
        self._seconds = Counter(
            "argus_detector_seconds", "Seconds spent in a detector", ["detector"], registry=registry
        )
        self._verdicts = Counter(
            "argus_verdicts", "Verdicts written", ["detector", "level"], registry=registry
        )
        self._actions = Counter("argus_actions", "Actions written", ["kind"], registry=registry)
        self._faults = Counter(
            "argus_detector_faults", "Runs a detector raised on", ["detector"], registry=registry
        )
        self._letters = Counter(
            "argus_dead_letters", "Messages that could not be read", registry=registry
        )
        self._orders = Counter("argus_orders", "Operators' orders", ["result"], registry=registry)
        self._gaps = Counter("argus_gaps", "Offsets missing from the log", registry=registry)
        self._lag = Gauge(
            "argus_lag_messages", "Messages not judged yet", ["app", "partition"], registry=registry
        )
        self._delay = Gauge(
            "argus_lag_seconds", "Age of the message judged last", registry=registry
        )
        self._runs = Gauge("argus_runs", "Runs held in memory", ["app", "state"], registry=registry)
        self._rebuild_s = Gauge(
            "argus_rebuild_seconds", "Of the last rebuild", ["app"], registry=registry
        )
        self._waiting = Gauge(
            "argus_awaited_detectors", "That the policy has not heard of", registry=registry
        )

    def folded(self, detector: str, events: int, seconds: float) -> None:
        """A detector has judged a message."""
        counters = self._folded.get(detector)
        if counters is None:
            counters = self._folded[detector] = (
                self._steps.labels(detector), self._seconds.labels(detector)
            )  # fmt: skip
        counters[0].inc(events)
        counters[1].inc(seconds)

    def judged(self, timestamp_s: Optional[float]) -> None:
        """A message of that time (UTC) has been judged by the last detector."""
        now = time.time()
        self._lag_s, self._lag_at = max(0.0, now - (timestamp_s or now)), time.monotonic()
        self._delay.set(self._lag_s)

    def verdict(self, detector: str, level: str) -> None:
        """A verdict is out."""
        self._verdicts.labels(detector, level).inc()

    def action(self, kind: str) -> None:
        """An action is out."""
        self._actions.labels(kind).inc()

    def order(self, result: str) -> None:
        """An order was accepted or refused."""
        self._orders.labels(result).inc()

    def fault(self, detector: str) -> None:
        """A detector raised, and is off for a run."""
        self._faults.labels(detector).inc()

    def dead_letter(self) -> None:
        """A message could not be read."""
        self._letters.inc()

    def gap(self, partition: int, wanted: int, found: int) -> None:
        """The log went on at another offset than the next."""
        self._gaps.inc(found - wanted)

    def awaiting(self, count: int) -> None:
        """So many detectors have told the policy nothing yet."""
        self._waiting.set(count)

    def lag(self, app: str, partition: int, messages: int) -> None:
        """Messages of a partition that wait."""
        self._lag.labels(app, str(partition)).set(messages)

    def runs(self, app: str, going: int, ended: int) -> None:
        """Runs in memory."""
        self._runs.labels(app, "open").set(going)
        self._runs.labels(app, "ended").set(ended)

    def rebuilding(self, app: str, is_on: bool) -> None:
        """Whether an app's states are being rebuilt."""
        self._rebuilding[app] = is_on

    def rebuilt(self, app: str, seconds: float) -> None:
        """An app's states are whole."""
        self._rebuild_s.labels(app).set(seconds)

    def turn(self) -> None:
        """The event loop is alive."""
        self._turned = time.monotonic()

    def problems(self) -> List[str]:
        """Why the worker is not well; empty: it is."""
        now = time.monotonic()
        found = [
            f"{app}: rebuilding its states" for app, is_on in self._rebuilding.items() if is_on
        ]
        if self._lag_s > _LAG_LIMIT_S and now - self._lag_at < _LAG_FRESH_S:
            found.append(f"{self._lag_s:.0f} s behind")
        if now - self._turned > _LOOP_LIMIT_S:
            found.append(f"the event loop has not turned for {now - self._turned:.0f} s")
        return found


def serve(health: Health, host: str, port: int) -> int:
    """Answers ``/metrics`` and ``/healthz`` on a thread; the port. OSError: it is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, "text/plain; version=0.0.4", generate_latest(health.registry))
            elif self.path == "/healthz":
                problems = health.problems()
                body = json.dumps({"ok": not problems, "problems": problems}).encode("utf-8")
                self._answer(503 if problems else 200, "application/json", body)
            else:
                self._answer(404, "text/plain", b"/metrics or /healthz\n")

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
            """Nothing: a probe every few seconds is no news."""

    server = ThreadingHTTPServer((host, port), Handler)
    threading.Thread(target=server.serve_forever, name="argus-health", daemon=True).start()
    return int(server.server_address[1])
