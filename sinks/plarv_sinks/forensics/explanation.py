"""Why a verdict was given: its formula, its numbers, what it saw, and whether it still holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from plarv_schemas.events import Verdict
from plarv_sinks.forensics import markup
from plarv_sinks.forensics.sentences import number, printable

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Explanation"]

_SHOWN_ROWS = 8


@dataclass(frozen=True, eq=False)  # frames are compared cell by cell
class Explanation:
    """What :meth:`Run.explain` gives; shows itself in a terminal and in a notebook."""

    verdict: Verdict
    formula: str  # of the detector, in its own words; empty where it is not installed
    settings: Mapping[str, Any]  # those that the formula names
    window: pl.DataFrame  # the steps it saw, and of each the columns that it read
    recomputed: Optional[Verdict]  # from the stored steps; None: there it finds nothing
    differences: Tuple[str, ...]  # between that and what was recorded
    notes: Tuple[str, ...]  # what the recomputation could not know, or knew otherwise
    next: Tuple[str, ...]  # what happened then

    @property
    def agrees(self) -> bool:
        """Whether the stored steps give the recorded score, level and evidence, bit for bit."""
        return self.recomputed is not None and not self.differences

    @property
    def outcome(self) -> str:
        """The recomputation in one sentence."""
        if self.recomputed is None:
            return "Recomputed from the stored steps: not confirmed."
        if self.differences:
            return f"Recomputed from the stored steps: {len(self.differences)} numbers differ."
        return (
            f"Recomputed from the stored steps: the same, level {self.recomputed.level}, "
            f"score {number(self.recomputed.score)}, bit for bit."
        )

    def to_dict(self) -> Dict[str, Any]:
        """JSON values, the window aside."""
        recomputed = self.recomputed
        return {
            "verdict": self.verdict.to_dict(),
            "formula": self.formula,
            "settings": dict(self.settings),
            "recomputed": None if recomputed is None else recomputed.to_dict(),
            "agrees": self.agrees,
            "differences": list(self.differences),
            "notes": list(self.notes),
            "next": list(self.next),
        }

    def __str__(self) -> str:
        parts = [self._title(), "", f"  {printable(self.verdict.message)}", ""]
        parts += [f"  {name:<16} {value}" for name, value in self._numbers()]
        parts += ["", self.outcome, *(f"  - {line}" for line in (*self.differences, *self.notes))]
        parts += ["", "What happened next:", *(f"  - {line}" for line in self.next)]
        if self.settings:
            parts += ["", f"Settings: {self._settings()}"]
        parts += ["", "Formula:", *(f"  {line}".rstrip() for line in self.formula.splitlines())]
        parts += ["", f"It saw {self._range()}:", *_indented(self._shown())]
        return "\n".join(parts)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        shown = self._shown()
        odd = [*self.differences, *self.notes]
        return markup.block(
            self._title(),
            markup.paragraph(self.verdict.message),
            markup.table(("number", "value"), self._numbers()),
            markup.paragraph(self.outcome),
            markup.preformatted("\n".join(odd)) if odd else "",
            markup.block("What happened next", markup.bullets(self.next)),
            markup.block("Formula", markup.preformatted(self.formula)),
            markup.paragraph(f"Settings: {self._settings()}") if self.settings else "",
            markup.block(f"It saw {self._range()}", markup.table(shown[0], shown[1:])),
        )

    def _title(self) -> str:
        found = self.verdict
        who = "" if found.rank is None else f", rank {found.rank}"
        attempt = f", attempt {found.attempt}" if found.attempt > 1 else ""
        what = f"{found.detector}/{found.kind} {found.state}, {found.level}"
        return printable(f"{what}: step {found.step}{who}{attempt} of {found.run_id} [{found.id}]")

    def _numbers(self) -> Iterator[Tuple[str, str]]:
        found = self.verdict
        yield "score", f"{number(found.score)} (threshold {number(found.threshold)})"
        yield "onset step", str(found.onset_step)
        for name, value in found.evidence.items():
            yield name, number(value)
        yield "version", found.version

    def _settings(self) -> str:
        return ", ".join(f"{name} = {value}" for name, value in self.settings.items())

    def _range(self) -> str:
        if self.window.is_empty():
            return "no step that is still stored"
        first, last = self.window.get_column("step")[0], self.window.get_column("step")[-1]
        return f"{self.window.height} reports, steps {first} to {last}"

    def _shown(self) -> List[Sequence[str]]:
        """Heads and cells: the last rows of the window, its lists left out."""
        plain = [name for name, kind in self.window.schema.items() if not kind.is_nested()]
        rows = self.window.select(plain).tail(_SHOWN_ROWS)
        return [plain, *([_cell(value) for value in row] for row in rows.iter_rows())]


def _cell(value: object) -> str:
    return number(value) if isinstance(value, float) else ("" if value is None else str(value))


def _indented(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in rows:
        yield "  " + "  ".join(cell.rjust(12) for cell in row)
