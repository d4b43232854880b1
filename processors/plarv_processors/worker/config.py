"""What a worker is told."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional, Tuple, Type

from plarv_processors.detectors.detector import Detector
from plarv_processors.policy import Policy
from plarv_schemas.kafka_connection import Connection
from plarv_schemas.topics import Topics

__all__ = ["WorkerConfig"]


@dataclass(frozen=True)
class WorkerConfig:
    """A worker: which detectors it runs, whether it runs the policy, and how patient it is."""

    connection: Connection
    detectors: Tuple[Type[Detector], ...]
    all_detectors: Tuple[Type[Detector], ...]  # of the fleet, in the order the policy hears them
    topics: Topics = field(default_factory=Topics)
    run_policy: bool = True
    awaited: Optional[Tuple[Type[Detector], ...]] = None  # by the policy; None: all of the fleet's
    policy: Policy.Config = field(default_factory=Policy.Config)
    master_key: str = ""  # signs actions and checks orders; "": neither
    name: str = "worker"  # stays the same over restarts; no two workers have the same
    state_dir: Path = Path(".argus/worker")
    snapshot_s: float = 10.0  # between two rounds of snapshots, at least
    watermark_s: float = 0.025  # between two watermarks of a partition while steps flow
    silent_after_s: float = 3600.0  # without a word, a session counts as ended
    hang_s: float = 20.0  # of CPU time in one call of a detector: then it hangs
    metrics_port: Optional[int] = None  # on metrics_host; 0: a free one; None: no server
    metrics_host: str = "127.0.0.1"

    @property
    def detector_group(self) -> str:
        """The consumer group of the detectors: one for each choice of them."""
        names = [cls.name for cls in self.detectors]
        if names == [cls.name for cls in self.all_detectors]:
            return f"{self.topics.prefix}-detectors"
        digest = hashlib.blake2b(",".join(sorted(names)).encode(), digest_size=4).hexdigest()
        return f"{self.topics.prefix}-detectors-{digest}"

    @property
    def policy_group(self) -> str:
        """The consumer group of the policy."""
        return f"{self.topics.prefix}-policy"
