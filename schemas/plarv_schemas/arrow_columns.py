"""The columns of the Arrow tables: their names, their kinds, and which are always there."""

from __future__ import annotations

from typing import Dict, Literal, NamedTuple, Tuple

__all__ = [
    "EXTRA_COLUMNS",
    "RUN_TABLES",
    "TABLES",
    "TABLE_COLUMNS",
    "Column",
    "TableName",
    "ValueKind",
]

TableName = Literal["steps", "events", "verdicts", "actions", "runs"]
RUN_TABLES: Tuple[TableName, ...] = ("steps", "events", "verdicts", "actions")
TABLES: Tuple[TableName, ...] = (*RUN_TABLES, "runs")
"""What one run is made of, and the list of the runs of a store."""

ValueKind = Literal[
    "text", "int", "float", "timing", "texts", "ints", "floats", "json", "map", "sessions", "bytes"
]


class Column(NamedTuple):
    """A column of a table."""

    name: str
    kind: ValueKind
    required: bool = False  # never null, and always sent


def _named(text: str, kind: ValueKind, *, required: bool = False) -> Tuple[Column, ...]:
    return tuple(Column(name, kind, required) for name in text.split())


# Of each table: the fields of its named tuple, in their order.
TABLE_COLUMNS: Dict[TableName, Tuple[Column, ...]] = {
    "steps": (
        *_named("run_id session", "text", required=True),
        *_named("record rank step", "int", required=True),
        *_named("time_ns world_size", "int"),
        *_named("epoch loss grad_norm current_lr update_norm val_loss perplexity", "float"),
        *_named("grad_l1_norm grad_l2_norm", "float"),
        *_named("forward_ms backward_ms step_time_ms", "timing"),
        *_named("batch_size", "int"),
        *_named("loss_scale", "float"),
        *_named("sample_ids", "ints"),
        *_named("sample_losses sample_confidences sample_margins sample_entropies", "floats"),
        *_named("sample_correct local_levels", "ints"),
        *_named("local_scores", "floats"),
        *_named("local_layers", "texts"),
    ),
    "events": (
        *_named("run_id session", "text", required=True),
        *_named("record", "int", required=True),
        *_named("rank", "int"),
        *_named("kind", "text", required=True),
        *_named("time_ns step", "int"),
        *_named("data", "json", required=True),
    ),
    "verdicts": (
        *_named("run_id", "text", required=True),
        *_named("attempt", "int", required=True),
        *_named("rank", "int"),
        *_named("step ordinal", "int", required=True),
        *_named("detector kind level state", "text", required=True),
        *_named("onset_step", "int", required=True),
        *_named("score threshold", "float", required=True),
        *_named("evidence", "map", required=True),
        *_named("message version", "text", required=True),
    ),
    "actions": (
        *_named("run_id", "text", required=True),
        *_named("attempt", "int", required=True),
        *_named("sessions", "sessions", required=True),
        *_named("step ordinal", "int", required=True),
        *_named("kind", "text", required=True),
        *_named("parameters", "json", required=True),
        *_named("reason", "text", required=True),
        *_named("verdict_ids", "texts", required=True),
        *_named("harm_pressure", "float", required=True),
        *_named("expiry_step", "int", required=True),
    ),
    "runs": (
        *_named("run_id", "text", required=True),
        *_named("project status", "text"),
        *_named("attempt num_events num_steps", "int", required=True),
        *_named("world_size first_time_ns last_time_ns last_step", "int"),
        *_named("last_loss", "float"),
        *_named("started", "json"),
        *_named("state", "bytes"),
    ),
}
_PLACE_COLUMNS = _named("ordinal attempt", "int")  # set by a fold: optional beside steps and events
_ID_COLUMN = _named("id", "text")  # of verdicts and actions: for readers, not read back
EXTRA_COLUMNS: Dict[TableName, Tuple[Column, ...]] = {
    "steps": _PLACE_COLUMNS,
    "events": _PLACE_COLUMNS,
    "verdicts": _ID_COLUMN,
    "actions": _ID_COLUMN,
    "runs": (),
}
