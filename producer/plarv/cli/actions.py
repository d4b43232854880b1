"""``argus actions RUN``: what the fleet's policy wants done."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from plarv.cli.brokers import add_broker_option, fleet_of, told
from plarv.cli.complaint import Complaint, tell

__all__ = ["add_to"]


def add_to(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "actions",
        help="a run's signed actions from the fleet's log",
        description="Prints the actions of a run, each once. Those that are not signed with the "
        "run's key (ARGUS_RUN_KEY, or made from ARGUS_MASTER_KEY) are refused and counted.",
    )
    parser.add_argument("run", metavar="RUN", help="id of the run")
    parser.add_argument("--follow", action="store_true", help="go on as new ones come")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    add_broker_option(parser)
    parser.set_defaults(command=_actions)


def _actions(options: argparse.Namespace) -> int:
    from plarv.exceptions import ArgusAuthenticationError, ArgusConnectionError
    from plarv.fleet.actions import actions
    from plarv_sinks.findings_table import action_line

    fleet_of(options)  # says what is wrong with the settings, and quiets the client's log
    with told():
        try:
            with actions(
                options.run,
                brokers=options.brokers,
                follow=options.follow,
                from_beginning=True,
                refused=tell,
            ) as stream:
                for action in stream:
                    if options.json:
                        line = json.dumps(action.to_dict(), allow_nan=False)
                    else:
                        line = action_line(action)
                    sys.stdout.write(line + "\n")
                    sys.stdout.flush()  # somebody waits for it
        except (ArgusAuthenticationError, ArgusConnectionError) as error:
            raise Complaint(str(error), 1) from error
    return 0
