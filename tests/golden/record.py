"""Writes the golden replays anew; see README.md beside this file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, List

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


def lines_of(name: str) -> List[str]:
    """What the engine says about the stream ``name``, as it stands in its file."""
    from tests.processors.logs import log_of

    from plarv_processors.engine import Engine

    engine = Engine()
    found = [record.to_dict() for event in log_of(name) for record in engine.fold(event)]
    return [json.dumps(_rounded(record), separators=(", ", ": ")) for record in found]


def _rounded(value: Any) -> Any:
    """To nine digits: the last ones are the C library's own."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    """Writes all files."""
    for root in ("", "producer", "schemas", "processors", "sinks"):
        sys.path.insert(0, str(ROOT / root))
    from tests.processors.logs import names

    for name in names:
        text = "".join(line + "\n" for line in lines_of(name))
        (FOLDER / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
