"""The fleet's transport against a real broker: steps there, verdicts and actions back."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from tests.fleets import TopicsOnTest, signed
from tests.producer.fleet.fleet_runs import (
    action_for,
    arrived,
    distinct,
    journal_of,
    key_for,
    shipped,
    transport_of,
    until,
    verdict_for,
)
from tests.producer.processes import run, start
from tests.producer.runs import controls_of, folder_of, healthy

from plarv import faults
from plarv.client import Argus
from plarv.exceptions import ArgusHalt, ArgusPause
from plarv_schemas.events import Action, ControlEvent
from plarv_schemas.messages import Message, action_message, verdict_message
from plarv_schemas.records import ACTIONS_FILE, VERDICTS_FILE, read_lines
from plarv_schemas.topics import ID_HEADER, SIGNATURE_HEADER

pytest.importorskip("kafka")
pytest.importorskip("pyarrow")

RUN = "a-run"


def auto(**arguments: Any) -> Argus:
    return Argus(run_id=RUN, mode="AUTO", run_key=key_for(RUN), **arguments)


def refused(argus: Argus) -> List[Dict[str, Any]]:
    return [dict(event.data) for event in controls_of(argus, "action_refused")]


def stepped_until(argus: Argus, condition: Callable[[], Any]) -> None:
    """Steps until ``condition()`` holds."""

    def step() -> Any:
        argus.step(2.0, 1.0)
        return condition()

    until(step)


def test_every_event_arrives_in_the_order_of_the_journal(fleet: TopicsOnTest) -> None:
    argus = Argus(run_id=RUN)
    for number in range(300):
        argus.step(2.0 + number / 7, 1.0, sample_losses=[1.0 / (number + 1)] * (number % 5))
    argus.complete()
    events = [event for message in arrived(fleet, RUN) for event in message]
    assert events == journal_of(folder_of(argus))  # each once, too: nothing was killed
    assert len(events) == 302


def test_a_slow_loop_over_a_quick_link_sends_one_step_a_message(fleet: TopicsOnTest) -> None:
    argus = Argus(run_id=RUN)
    argus.step(2.0)
    until(lambda: len(arrived(fleet, RUN)) >= 2)
    for _ in range(10):
        count = len(arrived(fleet, RUN))
        argus.step(2.0)
        until(lambda: len(arrived(fleet, RUN)) > count)  # noqa: B023 - called here
    argus.complete()
    assert all(len(message) == 1 for message in arrived(fleet, RUN)[2:])


def test_the_world_is_that_of_the_job_not_of_the_node(
    fleet: TopicsOnTest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    argus = auto()
    argus.step(2.0)
    argus.complete()
    events = [event for message in arrived(fleet, RUN) for event in message]
    assert {event.world_size for event in events if not isinstance(event, ControlEvent)} == {8}
    assert events[0].data["mode"] == "AUTO"  # type: ignore[union-attr]
    assert "only observes" not in capsys.readouterr().err.replace("until it is, AUTO only", "")


def test_a_verdict_comes_back(fleet: TopicsOnTest, capsys: pytest.CaptureFixture[str]) -> None:
    argus = Argus(run_id=RUN)
    verdict = verdict_for(argus)
    fleet.put(fleet.topics.verdicts, [verdict_message(verdict, 5)] * 2)
    until(lambda: argus.decision.verdicts)
    assert argus.decision.verdicts == (verdict,)
    assert argus.decision.action == "WARN"
    fleet.put(
        fleet.topics.verdicts,
        [verdict_message(verdict._replace(state="resolved", level="ok", step=9), 6)],
    )
    until(lambda: not argus.decision.verdicts)
    argus.complete()
    lines = list(read_lines(folder_of(argus) / VERDICTS_FILE))
    assert [line["state"] for line in lines] == ["opened", "resolved"]
    assert capsys.readouterr().err.count("the loss leapt") == 2


def test_verdicts_of_another_run_in_the_same_partition_are_passed_over(
    fleet: TopicsOnTest,
) -> None:
    argus = Argus(run_id=RUN)
    other = verdict_for(argus, run_id="another")
    disguised = verdict_message(other, 1)._replace(key=RUN.encode())
    number = fleet.put(fleet.topics.verdicts, [verdict_message(verdict_for(argus, step=1), 1)])[0][
        0
    ]
    fleet.put(
        fleet.topics.verdicts,
        [
            verdict_message(other, 1),
            disguised,
            Message(RUN.encode(), b"no arrow", [("argus-table", b"verdicts")]),
            Message(RUN.encode(), b"", []),
            verdict_message(verdict_for(argus, step=2, kind="transient"), 1),
        ],
        partition=number,
    )
    until(lambda: argus.decision.step == 2)
    argus.complete()
    assert [line["step"] for line in read_lines(folder_of(argus) / VERDICTS_FILE)] == [1, 2]


def test_a_signed_action_is_applied_in_the_loop(fleet: TopicsOnTest) -> None:
    argus = auto()
    healthy(argus, 5)
    action = action_for(argus)
    fleet.put(fleet.topics.actions, [signed(action)])
    with pytest.raises(ArgusHalt, match="a test asks for it"):
        stepped_until(argus, lambda: False)
    argus.complete()
    (applied,) = controls_of(argus, "action_applied")
    assert applied.data == {"action": action.id, "kind": "HALT"}
    assert shipped(fleet, folder_of(argus))


def test_an_action_is_applied_once_however_often_it_comes(fleet: TopicsOnTest) -> None:
    heard: List[Any] = []
    argus = auto(on_pause=heard.append)
    action = action_for(argus, "PAUSE", parameters={"dry_run": True})
    fleet.put(fleet.topics.actions, [signed(action)] * 3)
    marker = action_for(argus, "WARN", ordinal=8)
    fleet.put(fleet.topics.actions, [signed(marker)])
    with pytest.raises(ArgusPause):
        stepped_until(argus, lambda: False)
    until(lambda: argus.decision.newest_action == marker)
    argus.complete()
    assert len(heard) == 1
    assert [line["id"] for line in read_lines(folder_of(argus) / ACTIONS_FILE)] == [
        action.id,
        marker.id,
    ]


def _altered(action: Action) -> Message:
    message = signed(action)
    return message._replace(value=action_message(action._replace(reason="altered"), 0).value)


def _of_another_run(action: Action) -> Message:
    return signed(action._replace(run_id="another"))._replace(key=RUN.encode())


def _resigned(action: Action) -> Message:
    """Of another run, and signed by somebody who has this run's key."""
    from tests.fleets import MASTER_KEY

    from plarv_schemas.signatures import run_key, sign

    message = action_message(action._replace(run_id="another"), 0)
    signature = sign(run_key(MASTER_KEY, RUN), "action", message.value)
    message.headers.append((SIGNATURE_HEADER, signature.encode()))
    return message._replace(key=RUN.encode())


def _as_an_order(action: Action) -> Message:
    """A signature that is good, of another kind of message."""
    from tests.fleets import MASTER_KEY

    from plarv_schemas.signatures import run_key, sign

    message = action_message(action, 0)
    signature = sign(run_key(MASTER_KEY, RUN), "order", message.value)
    message.headers.append((SIGNATURE_HEADER, signature.encode()))
    return message


FORGERIES: Dict[str, Callable[[Action], Message]] = {
    "unsigned": lambda action: action_message(action, 0),
    "signed by another": lambda action: signed(action, "another master key"),
    "altered": _altered,
    "of another run": _of_another_run,
    "of another run, resigned": _resigned,
    "of another session": lambda action: signed(action._replace(sessions=(("f" * 16, 0),))),
    "signed as an order": _as_an_order,
    "no arrow": lambda action: signed(action)._replace(value=b"no arrow"),
    "a torn signature": lambda action: Message(
        RUN.encode(),
        signed(action).value,
        [("argus-table", b"actions"), (SIGNATURE_HEADER, b"\xff")],
    ),
}


def test_forged_altered_and_foreign_actions_are_refused_counted_and_logged(
    fleet: TopicsOnTest, capsys: pytest.CaptureFixture[str]
) -> None:
    argus = auto()
    healthy(argus, 3)
    action = action_for(argus)
    fleet.put(fleet.topics.actions, [forge(action) for forge in FORGERIES.values()])
    stepped_until(argus, lambda: len(refused(argus)) == len(FORGERIES))
    argus.complete()
    written = refused(argus)
    assert len(written) == len(FORGERIES)
    assert all(set(data) == {"action", "why"} for data in written)  # no kind: nothing is known
    assert list(read_lines(folder_of(argus) / ACTIONS_FILE)) == []
    assert controls_of(argus, "action_applied") == []
    said = capsys.readouterr().err
    assert "action refused: it is of another attempt" in said
    assert "3 x action refused: its signature is not of this run" not in said.split("run a-run")[0]
    assert shipped(fleet, folder_of(argus))  # the fleet hears of it, too


def test_of_a_flood_of_forgeries_a_hundred_are_written_and_all_counted(
    fleet: TopicsOnTest, capsys: pytest.CaptureFixture[str]
) -> None:
    argus = auto()
    action = action_for(argus)
    forged = action_message(action, 0)
    named = [
        forged._replace(headers=[*forged.headers[:-1], (ID_HEADER, b"%016x" % number)])
        for number in range(150)
    ]
    fleet.put(fleet.topics.actions, named)
    counts = transport_of(argus)._faults.counts
    stepped_until(argus, lambda: counts.get("action refused: it is not signed") == 150)
    argus.step(2.0)
    argus.complete()
    assert len(refused(argus)) == 100
    assert "150 x action refused: it is not signed" in capsys.readouterr().err


def test_auto_without_a_key_says_at_once_that_every_action_will_be_refused(
    fleet: TopicsOnTest, capsys: pytest.CaptureFixture[str]
) -> None:
    argus = Argus(run_id=RUN, mode="AUTO")
    assert "every action of the fleet will be refused" in capsys.readouterr().err
    fleet.put(fleet.topics.actions, [signed(action_for(argus))])
    stepped_until(argus, lambda: refused(argus))
    argus.complete()
    assert refused(argus)[0]["why"] == "there is no key to check it by"


def test_in_manual_without_a_key_a_dry_run_is_told_and_no_more(
    fleet: TopicsOnTest, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: List[Any] = []
    argus = Argus(run_id=RUN, on_pause=heard.append)
    assert "refused" not in capsys.readouterr().err
    action = action_for(argus, "PAUSE", parameters={"dry_run": True})
    fleet.put(fleet.topics.actions, [action_message(action, 0)])
    stepped_until(argus, lambda: argus.decision.newest_action is not None)
    wet = action_for(argus, "PAUSE", ordinal=9)
    fleet.put(fleet.topics.actions, [action_message(wet, 0)])
    stepped_until(argus, lambda: refused(argus))
    argus.complete()
    assert heard == []
    assert [line["id"] for line in read_lines(folder_of(argus) / ACTIONS_FILE)] == [action.id]


def test_what_was_sent_while_nobody_ran_holds_the_next_attempt(fleet: TopicsOnTest) -> None:
    first = auto()
    healthy(first, 3)
    first.complete()
    pause = action_for(first, "PAUSE")
    fleet.put(fleet.topics.actions, [signed(pause), signed(pause, "another master key")])
    with pytest.raises(ArgusPause, match="paused at step 0"):
        auto()
    count = sum(len(message) for message in arrived(fleet, RUN))
    assert count == len(journal_of(folder_of(first)))  # what never began left nothing
    resume = action_for(first, "RESUME", ordinal=9)
    fleet.put(fleet.topics.actions, [signed(resume)])
    second = auto()  # lifted at another machine, which cannot write into this folder
    second.step(2.0)
    second.complete()


def test_of_the_past_nothing_is_applied(fleet: TopicsOnTest) -> None:
    first = auto()
    healthy(first, 3)
    first.complete()
    resume = action_for(first, "RESUME")
    old = verdict_for(first)
    fleet.put(fleet.topics.actions, [signed(resume), signed(resume, "another master key")])
    fleet.put(fleet.topics.verdicts, [verdict_message(old, 1)])
    second = auto()
    new = verdict_for(second, step=50, attempt=2)
    fleet.put(fleet.topics.verdicts, [verdict_message(new, 2)])
    stepped_until(second, lambda: second.decision.verdicts)
    second.complete()
    assert second.decision.verdicts == (new,)
    assert second.decision.newest_action is None
    assert refused(second) == []
    folder = folder_of(second)
    assert [line["id"] for line in read_lines(folder / VERDICTS_FILE)] == [old.id, new.id]
    assert [line["id"] for line in read_lines(folder / ACTIONS_FILE)] == [resume.id]


def test_a_child_that_was_killed_is_followed_by_another_and_nothing_is_lost(
    fleet: TopicsOnTest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(faults, "RERAISE", False)
    argus = auto()
    healthy(argus, 50)
    first = transport_of(argus).child_pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    missed = verdict_for(argus)
    fleet.put(fleet.topics.verdicts, [verdict_message(missed, 1)])  # nobody listens
    healthy(argus, 50, start=50)
    until(lambda: transport_of(argus).child_pid not in (None, first))
    until(lambda: argus.decision.verdicts == (missed,))
    fleet.put(fleet.topics.actions, [signed(action_for(argus))])
    with pytest.raises(ArgusHalt):
        stepped_until(argus, lambda: False)
    argus.complete()
    assert shipped(fleet, folder_of(argus))
    assert "1 x the process that ships died" in capsys.readouterr().err
    assert len(list(read_lines(folder_of(argus) / VERDICTS_FILE))) == 1


@pytest.mark.slow
def test_a_child_that_dies_again_and_again_costs_no_event(fleet: TopicsOnTest) -> None:
    argus = Argus(run_id=RUN)
    for round_ in range(3):
        killed = transport_of(argus).child_pid
        assert killed is not None
        healthy(argus, 700, start=700 * round_)
        os.kill(killed, signal.SIGKILL)
        until(lambda: transport_of(argus).child_pid not in (None, killed))  # noqa: B023
    argus.complete()
    until(lambda: shipped(fleet, folder_of(argus)))
    assert len(distinct(arrived(fleet, RUN))) == 2102


TRAINER = """
import os, sys, time
from plarv import Argus

argus = Argus(run_id="a-run")
print(argus.run_dir, argus._session.transport.child_pid, flush=True)
step = 0
while True:
    argus.step(2.0, 1.0, step=step)
    step += 1
    time.sleep(0.0005)
"""


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{pid}/stat", "rb") as file:  # a zombie is gone, too
        return file.read().rsplit(b")", 1)[1].split()[0] == b"Z"


def test_after_kill_9_of_the_trainer_its_child_ships_the_rest_and_ends(
    fleet: TopicsOnTest, tmp_path: Path
) -> None:
    with start(tmp_path, TRAINER) as trainer:
        assert trainer.stdout is not None
        place, child = trainer.stdout.readline().split()
        until(lambda: len(arrived(fleet, RUN)) > 3)
        trainer.kill()
    until(lambda: _gone(int(child)), 20.0)
    assert len(journal_of(Path(place))) > 10
    assert shipped(fleet, Path(place))


def test_what_a_killed_pair_left_is_shipped_by_the_next_start(
    fleet: TopicsOnTest, tmp_path: Path
) -> None:
    with start(tmp_path, TRAINER) as trainer:
        assert trainer.stdout is not None
        place, child = trainer.stdout.readline().split()
        until(lambda: len(journal_of(Path(place))) > 300)
        os.kill(int(child), signal.SIGKILL)
        trainer.kill()
    folder = Path(place)
    assert not shipped(fleet, folder)
    argus = Argus(run_id=RUN)
    assert folder_of(argus) == folder
    argus.step(2.0)
    argus.complete()
    until(lambda: shipped(fleet, folder))
    sessions = [event.session for event in distinct(arrived(fleet, RUN))]
    assert sessions == sorted(sessions, key=sessions.index)
    assert sessions[-1] != sessions[0]
    first_of_new = sessions.index(sessions[-1])
    assert len(set(sessions[:first_of_new])) == 1  # the old attempt before the new


def test_the_training_process_imports_no_kafka_and_no_arrow(
    fleet: TopicsOnTest, tmp_path: Path
) -> None:
    program = """
    import sys, time
    from plarv import Argus
    with Argus(run_id="a-run") as argus:
        while not argus.decision.verdicts:
            argus.step(2.0, 1.0)
            time.sleep(0.01)
    names = {name.split(".")[0] for name in sys.modules}
    print(sorted(names & {"kafka", "pyarrow", "faust", "aiokafka", "numpy"}))
    """
    with start(tmp_path, program) as trainer:
        argus_sessions: List[str] = []

        def began() -> bool:
            argus_sessions[:] = [e.session for message in arrived(fleet, RUN) for e in message]
            return bool(argus_sessions)

        until(began)
        values = {"run_id": RUN, "step": 1}
        verdict = verdict_for(_Named(), **values)  # type: ignore[arg-type]
        fleet.put(fleet.topics.verdicts, [verdict_message(verdict, 1)])
        out, err = trainer.communicate(timeout=60)
    assert out == "[]\n", err


@dataclasses.dataclass
class _Named:
    """Stands where only the run's name is asked for."""

    run_id: str = RUN


def test_a_forked_child_ends_neither_the_run_nor_its_shipper(
    fleet: TopicsOnTest, tmp_path: Path
) -> None:
    program = """
    import os, time
    from plarv import Argus
    argus = Argus(run_id="a-run")
    argus.step(2.0)
    pid = os.fork()
    if pid == 0:
        argus.step(9.0)
        argus.complete()
        os._exit(0)
    os.waitpid(pid, 0)
    for _ in range(20):
        argus.step(2.0)
    argus.complete()
    """
    done = run(tmp_path, program)
    assert done.returncode == 0, done.stderr
    assert "23 events" in done.stderr
    assert "not shipped" not in done.stderr
    assert "died" not in done.stderr
    assert len(distinct(arrived(fleet, RUN))) == 23


def test_two_ranks_of_a_node_each_ship_and_one_of_them_writes_the_records(
    fleet: TopicsOnTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks: List[Argus] = []
    for rank in range(2):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        ranks.append(Argus(run_id=RUN))
    for number in range(20):
        for argus in ranks:
            argus.step(2.0 + number, 1.0)
    first, second = verdict_for(ranks[0]), verdict_for(ranks[0], step=8, kind="again")
    fleet.put(fleet.topics.verdicts, [verdict_message(first, 1)])
    for argus in ranks:
        until(lambda: argus.decision.verdicts == (first,))  # noqa: B023
    ranks[0].complete()  # the one that wrote them; the other takes over
    fleet.put(fleet.topics.verdicts, [verdict_message(second, 2)])
    path = folder_of(ranks[1]) / VERDICTS_FILE
    until(lambda: [line["id"] for line in read_lines(path)] == [first.id, second.id])
    ranks[1].complete()
    until(lambda: shipped(fleet, folder_of(ranks[0])))
    assert {event.rank for event in distinct(arrived(fleet, RUN))} == {0, 1}


def test_shipped_segments_make_room_for_new_ones(
    fleet: TopicsOnTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARGUS_JOURNAL_MAX_MB", "4")
    argus = Argus(run_id=RUN)
    session = argus._session
    assert session is not None
    for number in range(100_000):
        argus.step(2.0, 1.0)
        if number % 2000 == 0:
            time.sleep(0.01)  # a loop without a pause is quicker than any shipper
            until(lambda: session.writer.ready > 0)
    argus.complete()
    assert session.writer.lost == 0
    assert not (folder_of(argus) / f"r00000-{session.writer.session}-000000.journal").exists()
    until(lambda: sum(len(message) for message in arrived(fleet, RUN)) >= 100_002)
    events = [event for message in arrived(fleet, RUN) for event in message]
    assert [event.record for event in events] == list(range(100_002))


def test_without_brokers_the_fleet_costs_no_import(tmp_path: Path) -> None:
    program = """
    import sys
    from plarv import Argus
    Argus(silent=True).complete()
    unwanted = ("plarv.fleet", "plarv.transport.kafka", "ssl", "subprocess")
    print([name for name in sys.modules if name.startswith(unwanted)])
    """
    done = run(tmp_path, program, ARGUS_DIR=str(tmp_path))
    assert done.stdout == "[]\n", done.stderr
    assert sys.executable
