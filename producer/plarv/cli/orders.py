"""An operator's orders: ``argus resume``, ``argus pause``, ``argus stop``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from plarv import settings
from plarv.cli.brokers import add_broker_option, fleet_of, told
from plarv.cli.complaint import Complaint
from plarv.cli.run_folders import find_run
from plarv.journal_home import places
from plarv_schemas.run_log import is_run_dir

if TYPE_CHECKING:
    from plarv.fleet.orders import Answer
    from plarv_schemas.events import Action

__all__ = ["add_to"]

_ORDERS = (
    ("resume", "lift a pause, so that the run's next attempt may start"),
    ("pause", "ask a run to pause"),
    ("stop", "ask a run to stop for good"),
)
_DOES = {"PAUSE": "pauses", "RESUME": "may go on", "HALT": "stops"}


def add_to(commands: Any) -> None:
    """Adds the commands."""
    for kind, what in _ORDERS:
        parser = commands.add_parser(
            kind,
            help=what,
            description=f"An operator's order: {what}. With brokers it goes to the fleet, signed "
            "by ARGUS_MASTER_KEY; without, to the run's folder on this machine.",
        )
        parser.add_argument("run", metavar="RUN", help="id of the run, or its folder")
        add_broker_option(parser)
        parser.add_argument(
            "--local", action="store_true", help="to a run of the embedded engine on this machine"
        )
        parser.add_argument(
            "--attempt", type=int, metavar="N", help="void once the run is in another attempt"
        )
        parser.add_argument(
            "--expires", type=float, default=600.0, metavar="S", help="void then (default: 600)"
        )
        parser.add_argument(
            "--wait", type=float, default=10.0, metavar="S", help="for the answer (default: 10)"
        )
        parser.set_defaults(command=_order, order=kind)


def _order(options: argparse.Namespace) -> int:
    if options.local or not (options.brokers or settings.text("ARGUS_BROKERS")):
        return _order_here(options)
    from plarv.fleet.connection import master_key
    from plarv.fleet.orders import give_order, new_order
    from plarv.orders import user_name

    folder = _folder(options.run)
    run_id = folder.name if folder is not None else options.run
    fleet, key = fleet_of(options), master_key()
    if not key:
        raise Complaint(
            "an order must be signed: set ARGUS_MASTER_KEY to the key that the fleet's workers have"
        )
    if not options.expires > 0.0:
        raise Complaint(f"--expires must be above 0, not {options.expires:g}")
    order = new_order(
        run_id, options.order, user_name(), expires_s=options.expires, attempt=options.attempt
    )
    with told():
        try:
            answer = give_order(order, fleet.connection, fleet.topics, key, wait_s=options.wait)
        except ValueError as error:
            raise Complaint(f"ARGUS_MASTER_KEY: {error}") from error
    return _say(answer, folder, options.wait)


def _order_here(options: argparse.Namespace) -> int:
    from plarv.orders import OrderError, order

    find_run(options.run)  # names the runs that there are, where this one is not
    try:
        sys.stdout.write(order(options.run, options.order) + "\n")
    except OrderError as error:
        raise Complaint(str(error), 1) from error
    return 0


def _folder(run: str) -> Optional[Path]:
    """The run's folder on this machine, where it has one."""
    return next((path for path in (Path(run), *places(run)) if is_run_dir(path)), None)


def _say(answer: Answer, folder: Optional[Path], wait_s: float) -> int:
    order, action = answer.order, answer.action
    if answer.refused:
        raise Complaint(f"the fleet refused to {order.order} {order.run_id}: {answer.refused}", 1)
    if action is None:
        until = time.strftime("%H:%M:%S", time.localtime(order.expires_ns * 1e-9))
        raise Complaint(
            f"{order.order} sent to {order.run_id}, and no answer within {wait_s:g} s; it stands "
            f"until {until}. Does a worker with the policy run, and with this ARGUS_MASTER_KEY?",
            1,
        )
    sys.stdout.write(_sentence(action) + "\n")
    if action.kind == "RESUME" and folder is not None:
        _lift_here(folder, action)
    return 0


def _sentence(action: Action) -> str:
    said = f"{action.reason}: action {action.kind} {action.id}"
    if not action.sessions:
        return f"{said}, but the fleet knows of no training process of run {action.run_id}"
    if action.parameters.get("dry_run"):
        return f"{said}, reported only: the run is in MANUAL mode and accepts no operator"
    apply_step = action.parameters.get("apply_step")
    when = (
        "at its next step" if apply_step is None else f"at step {apply_step:,}, all ranks at once"
    )
    return f"{said}; run {action.run_id} {_DOES.get(action.kind, 'obeys')} {when}"


def _lift_here(folder: Path, action: Action) -> None:
    from plarv.fleet.orders import note_resumed

    try:
        lifted = note_resumed(folder, action)
    except OSError as error:
        raise Complaint(
            f"the pause could not be lifted in {folder}: {error.strerror or error}", 1
        ) from error
    if not lifted:
        raise Complaint(f"{folder}: a pause still holds the run: another one, given later", 1)
    sys.stdout.write(f"run {folder.name} is resumed here: its next attempt may start\n")
