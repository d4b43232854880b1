"""How a command says that it cannot go on."""

from __future__ import annotations

import sys

__all__ = ["Complaint", "tell"]


class Complaint(Exception):
    """Ends a command with one line on stderr.

    >>> complaint = Complaint("run.csv: no such file")
    >>> str(complaint), complaint.exit_code
    ('run.csv: no such file', 2)
    """

    def __init__(self, text: str, exit_code: int = 2) -> None:
        super().__init__(text)
        self.exit_code = exit_code  # 1: failure, 2: a call or input that cannot work


def tell(line: str) -> None:
    """One line for the person at the terminal, on stderr."""
    try:
        sys.stderr.write(f"argus: {' '.join(line.splitlines())}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        return  # nobody is there to read
