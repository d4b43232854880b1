"""``argus import``: runs that others recorded, into the store."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plarv.cli.brokers import told
from plarv.cli.complaint import Complaint, tell
from plarv.cli.replay import columns_in
from plarv.cli.sink import store_of, tidy

if TYPE_CHECKING:
    from plarv_sinks.run_writer import WrittenRun

__all__ = ["add_to"]

_EPILOG = """examples:
  argus import outputs/checkpoint-500              a Hugging Face trainer_state.json
  argus import lightning_logs mlruns --store s3://bucket/argus
  argus import losses.csv --column loss=train/total_loss
"""


def add_to(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "import",
        help="runs of Hugging Face, TensorBoard, W&B, MLflow, Lightning or a table, into the store",
        description="Writes runs that others recorded into a store, judged by the detectors.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", nargs="+", metavar="FILE_OR_FOLDER", type=Path)
    parser.add_argument("--into", "--store", dest="store", metavar="PATH|URI",
                        help="default: ARGUS_STORE, else `store` in ARGUS_DIR")  # fmt: skip
    parser.add_argument("--format", metavar="NAME", help="where the content does not say it")
    parser.add_argument(
        "--column", action="append", default=[], metavar="OURS=THEIRS",
        help="which of the log's metrics is our column, such as loss=train/total_loss",
    )  # fmt: skip
    parser.add_argument("--no-verdicts", action="store_true", help="events alone")
    parser.add_argument("--json", action="store_true", help="one JSON object a run")
    parser.set_defaults(command=_import)


def _import(options: argparse.Namespace) -> int:
    with told():
        from plarv_sinks.importers import FORMATS, open_source
        from plarv_sinks.importing import import_run
        from plarv_sinks.replay import ReplayError
        from plarv_sinks.store import Store

        if options.format is not None and options.format not in FORMATS:
            raise Complaint(f"--format is one of {', '.join(FORMATS)}; not {options.format!r}")
        columns = columns_in(options.column)
        store = Store(store_of(options), tell, create=True)
        failed = False
        for source in options.sources:
            try:
                for run in open_source(source, options.format, columns, tell):
                    for written in import_run(run, store, judge=not options.no_verdicts):
                        _show(written, as_json=options.json)
            except ReplayError as error:
                tell(str(error))
                failed = True
            tidy(store)
    return 2 if failed else 0


def _show(written: WrittenRun, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"run_id": written.run_id, **written.rows}) + "\n")
        return
    sys.stdout.write(f"{written}\n")
