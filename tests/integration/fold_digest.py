"""Prints a digest of what a fold says of the run folders named; on any Python."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path


def digest(folder: Path) -> str:
    """Of every record, as JSON, with its bits: in the order in which they came."""
    from plarv_processors.engine import Engine
    from plarv_schemas.run_log import read_run

    engine, seen = Engine(), hashlib.sha256()
    for event in read_run(folder):
        for record in engine.fold(event):
            seen.update(json.dumps(record.to_dict(), allow_nan=False).encode())
    seen.update(engine.snapshot())
    return seen.hexdigest()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        sys.stdout.write(digest(Path(name)) + "\n")
