"""The fleet's commands: topics, keys, orders, actions, dead letters, and the replay of its log."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from tests.fleets import MASTER_KEY, TopicsOnTest, folded, going_wrong, signed

import plarv
from plarv.cli import main
from plarv.exceptions import ArgusConfigurationError, ArgusConnectionError
from plarv.fleet.orders import note_resumed
from plarv.fleet.record_files import RecordFiles
from plarv_schemas.events import Action, ControlEvent, Event, Verdict, digest
from plarv_schemas.journal_writer import JournalWriter
from plarv_schemas.messages import Message, event_messages
from plarv_schemas.records import ACTIONS_FILE, paused_by, read_lines
from plarv_schemas.signatures import Order, run_key, verify
from plarv_schemas.topic_reader import open_topic
from plarv_schemas.topics import SIGNATURE_HEADER, header, make_headers

pytest.importorskip("kafka")
pytest.importorskip("pyarrow")

Run = Callable[..., Tuple[int, str, str]]


@pytest.fixture
def fleet(broker_address: str, topic_prefix: str, monkeypatch: pytest.MonkeyPatch) -> TopicsOnTest:
    monkeypatch.setenv("ARGUS_TOPIC_PREFIX", topic_prefix)
    monkeypatch.setenv("ARGUS_BROKERS", broker_address)
    monkeypatch.setenv("ARGUS_MASTER_KEY", MASTER_KEY)
    return TopicsOnTest(broker_address, topic_prefix)


@pytest.fixture
def argus(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> Tuple[int, str, str]:
        code = main(arguments)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def order_action(run_id: str = "run", ordinal: int = 5, **changes: Any) -> Action:
    """The policy's answer to a pause."""
    action = Action(
        run_id, 1, (("a", 0),), 7, ordinal, "PAUSE", {"operator": "jo", "order": "pause"},
        "jo ordered pause after step 7", (), 0.0, 207,
    )  # fmt: skip
    return action._replace(**changes)


# --- topics and keys


def test_topics_are_created_and_listed(
    broker_address: str, topic_prefix: str, monkeypatch: pytest.MonkeyPatch, argus: Run
) -> None:
    monkeypatch.setenv("ARGUS_TOPIC_PREFIX", topic_prefix)
    code, out, _ = argus("topics", "create", "--partitions", "2", "--brokers", broker_address)
    assert (code, out.count(": created"), "2 partitions each" in out) == (0, 7, True)
    code, out, _ = argus("topics", "create", "--brokers", broker_address)
    assert (code, out.count(": was there"), "2 partitions each" in out) == (0, 7, True)
    code, out, _ = argus("topics", "list", "--brokers", broker_address)
    assert code == 0
    assert f"{topic_prefix}.steps" in out
    code, out, _ = argus("topics", "list", "--json", "--brokers", f"kafka://{broker_address}")
    listed = [json.loads(line) for line in out.splitlines()]
    assert listed[0] == {
        "name": f"{topic_prefix}.steps", "partitions": 2, "records": 0, "retention": "7 d",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["topics", "list"], "set ARGUS_BROKERS"),
        (["topics", "list", "--brokers", "nowhere"], "a broker is host:port, not 'nowhere'"),
        (["actions", "run", "--brokers", "a:1"], "set ARGUS_RUN_KEY"),
        (["stop", "run", "--brokers", "a:1"], "an order must be signed: set ARGUS_MASTER_KEY"),
        (["key", "for", "run"], "set ARGUS_MASTER_KEY"),
        (["dlq", "send", "--brokers", "a:1"], "name letters as PARTITION:OFFSET, or say --all"),
        (["replay"], "name files to replay, or a fleet's log"),
        (["replay", "x.csv", "--from", "kafka://a:1"], "name files to replay, or"),
        (["replay", "x.csv", "--compare"], "go with --from"),
        (["replay", "--from", "a:1"], "--from is kafka://HOST:PORT"),
    ],
)
def test_what_is_missing_is_said_in_one_line(command: List[str], why: str, argus: Run) -> None:
    code, out, err = argus(*command)
    assert (code, out) == (2, "")
    assert why in err
    assert len(err.splitlines()) == 1


def test_a_fleet_without_topics_says_how_to_make_them(
    broker_address: str, topic_prefix: str, monkeypatch: pytest.MonkeyPatch, argus: Run
) -> None:
    monkeypatch.setenv("ARGUS_TOPIC_PREFIX", topic_prefix)
    monkeypatch.setenv("ARGUS_BROKERS", broker_address)
    monkeypatch.setenv("ARGUS_MASTER_KEY", MASTER_KEY)
    for command in (["actions", "r"], ["stop", "r"], ["dlq"]):
        code, _, err = argus(*command)
        assert code == 1, command
        assert "`argus topics create` makes it" in err


def test_the_key_of_a_run_is_the_one_that_signs_its_actions(
    monkeypatch: pytest.MonkeyPatch, argus: Run
) -> None:
    monkeypatch.setenv("ARGUS_MASTER_KEY", MASTER_KEY)
    assert argus("key", "for", "run") == (0, run_key(MASTER_KEY, "run").hex() + "\n", "")
    monkeypatch.setenv("ARGUS_MASTER_KEY", "short")
    code, _, err = argus("key", "for", "run")
    assert (code, "16 characters or more" in err) == (2, True)


def test_a_new_master_key_is_fresh_and_long_enough(argus: Run) -> None:
    keys = {argus("key", "new")[1].strip() for _ in range(3)}
    assert len(keys) == 3
    assert all(len(run_key(key, "run")) == 32 for key in keys)


# --- orders


class Policy:
    """Answers the first order as the policy's worker does."""

    def __init__(self, fleet: TopicsOnTest, answer: Callable[[Order], Tuple[str, List[Message]]]):
        self.taken: List[Tuple[Order, bool]] = []
        self._fleet, self._answer = fleet, answer
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Policy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    def _work(self) -> None:
        deadline = time.monotonic() + 30.0
        with open_topic(self._fleet.connection, self._fleet.topics.orders) as reader:
            for record in reader.follow(dict.fromkeys(range(reader.num_partitions), 0)):
                if time.monotonic() > deadline:
                    return
                if record is None:
                    continue
                order = Order.from_bytes(record.value or b"")
                signature = header(record.headers, SIGNATURE_HEADER)
                key = run_key(MASTER_KEY, order.run_id)
                fine = verify(key, "order", record.value or b"", signature)
                assert record.key == order.run_id.encode()
                self.taken.append((order, fine))
                self._fleet.put(*self._answer(order))
                return


def answered(fleet: TopicsOnTest, kind: str, **changes: Any) -> Policy:
    def answer(order: Order) -> Tuple[str, List[Message]]:
        parameters = {"operator": order.operator, "order": order.order, "id": order.id}
        parameters.update(changes.pop("parameters", {}))
        action = order_action(
            order.run_id, kind=kind, parameters=parameters,
            reason=f"{order.operator} ordered {order.order} after step 7",
        )._replace(**changes)  # fmt: skip
        others = [order_action(order.run_id), order_action("other", parameters=parameters)]
        return fleet.topics.actions, [signed(each) for each in (*others, action)]

    return Policy(fleet, answer)


def test_an_order_is_signed_sent_and_its_answer_told(fleet: TopicsOnTest, argus: Run) -> None:
    before = time.time_ns()
    with answered(fleet, "HALT") as policy:
        code, out, err = argus("stop", "run", "--attempt", "3", "--expires", "60")
    assert (code, err) == (0, "")
    assert "ordered stop after step 7: action HALT" in out
    assert "run run stops at its next step" in out
    ((order, fine),) = policy.taken
    assert fine
    assert (order.run_id, order.order, order.attempt) == ("run", "stop", 3)
    assert before <= order.issued_ns <= time.time_ns()
    assert order.expires_ns - order.issued_ns == 60 * 10**9


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parameters": {"dry_run": True}}, "reported only: the run is in MANUAL mode"),
        ({"parameters": {"apply_step": 1040}}, "pauses at step 1,040, all ranks at once"),
        ({"sessions": ()}, "the fleet knows of no training process of run run"),
    ],
)
def test_the_answer_says_what_the_run_will_do(
    changes: Dict[str, Any], said: str, fleet: TopicsOnTest, argus: Run
) -> None:
    with answered(fleet, "PAUSE", **changes):
        code, out, _ = argus("pause", "run")
    assert code == 0
    assert said in out


def test_an_order_that_the_fleet_refuses_says_why(fleet: TopicsOnTest, argus: Run) -> None:
    def refuse(order: Order) -> Tuple[str, List[Message]]:
        why = "it is for attempt 3, and this is 4"
        session = digest("refused", order.run_id, order.id, why)
        data = {"order": order.id, "why": why}
        event = ControlEvent("run", session, 0, None, "action_refused", data=data)
        other = event._replace(data={"order": "another", "why": "not yours"}, session="b" * 16)
        return fleet.topics.steps, event_messages([other, event])

    with Policy(fleet, refuse):
        code, out, err = argus("pause", "run", "--attempt", "3")
    assert (code, out) == (1, "")
    assert "the fleet refused to pause run: it is for attempt 3, and this is 4" in err


def test_an_order_without_an_answer_is_told_and_stands(fleet: TopicsOnTest, argus: Run) -> None:
    forged = order_action("run", parameters={"order": "stop"})
    fleet.put(fleet.topics.actions, [signed(forged, "another master key")])
    code, out, err = argus("stop", "run", "--wait", "0.5")
    assert (code, out) == (1, "")
    assert "stop sent to run, and no answer within 0.5 s; it stands until" in err
    (record,) = fleet.records(fleet.topics.orders)
    assert Order.from_bytes(record.value or b"").order == "stop"


def test_an_answer_that_is_not_signed_is_none(fleet: TopicsOnTest, argus: Run) -> None:
    def forge(order: Order) -> Tuple[str, List[Message]]:
        action = order_action(order.run_id, parameters={"id": order.id})
        return fleet.topics.actions, [signed(action, "another master key")]

    with Policy(fleet, forge):
        code, _, err = argus("pause", "run", "--wait", "1")
    assert (code, "no answer within 1 s" in err) == (1, True)


def run_folder_of(folder: Path, run_id: str, pause: Optional[Action]) -> Path:
    """The folder that a training process left behind."""
    home = folder / "runs" / run_id
    home.mkdir(parents=True)
    writer = JournalWriter(
        home, run_id=run_id, session="a" * 16, rank=0, world_size=1, segment_bytes=64 * 1024
    )
    assert writer.control("session_started", step=None, rank=0, data={"mode": "AUTO"})
    writer.close()
    if pause is not None:
        (home / ACTIONS_FILE).write_text(json.dumps(pause.to_dict()) + "\n")
    return home


def test_a_resume_lifts_the_pause_where_no_training_process_is_left_to_hear_of_it(
    fleet: TopicsOnTest, argus: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARGUS_DIR", str(tmp_path))
    home = run_folder_of(tmp_path, "run", order_action("run"))
    assert paused_by(home) is not None
    with answered(fleet, "RESUME", ordinal=9):
        code, out, err = argus("resume", str(home))
    assert (code, err) == (0, "")
    assert "run run is resumed here: its next attempt may start" in out
    assert paused_by(home) is None
    assert [record["kind"] for record in read_lines(home / ACTIONS_FILE)] == ["PAUSE", "RESUME"]


def test_a_resume_that_a_training_process_wrote_down_is_not_written_twice(tmp_path: Path) -> None:
    home = run_folder_of(tmp_path, "run", order_action("run"))
    resume = order_action("run", 9, kind="RESUME")
    with open(home / ACTIONS_FILE, "a") as file:
        file.write(json.dumps(resume.to_dict()) + "\n")
    assert note_resumed(home, resume)
    assert len(list(read_lines(home / ACTIONS_FILE))) == 2


def test_a_resume_is_left_to_the_process_that_writes_there(tmp_path: Path) -> None:
    home = run_folder_of(tmp_path, "run", order_action("run"))
    resume = order_action("run", 9, kind="RESUME")
    helper = RecordFiles(home)
    assert helper.lead()
    with ThreadPoolExecutor(1) as pool:
        noted = pool.submit(note_resumed, home, resume)
        helper.add(resume)
        assert noted.result(30)
    helper.close()
    assert len(list(read_lines(home / ACTIONS_FILE))) == 2


def test_a_resume_does_not_lift_a_pause_that_came_after_it(tmp_path: Path) -> None:
    home = run_folder_of(tmp_path, "run", order_action("run", 20))
    assert not note_resumed(home, order_action("run", 9, kind="RESUME"))
    assert paused_by(home) is not None


def test_a_pause_that_is_written_down_late_does_not_hold_what_was_resumed(tmp_path: Path) -> None:
    home = run_folder_of(tmp_path, "run", order_action("run", 20, kind="RESUME"))
    with open(home / ACTIONS_FILE, "a") as file:
        file.write(json.dumps(order_action("run", 9).to_dict()) + "\n")
    assert paused_by(home) is None


def test_a_line_that_was_torn_does_not_swallow_the_resume(tmp_path: Path) -> None:
    home = run_folder_of(tmp_path, "run", order_action("run"))
    with open(home / ACTIONS_FILE, "a") as file:
        file.write('{"type":"act')
    assert note_resumed(home, order_action("run", 9, kind="RESUME"))


def test_without_brokers_or_with_local_an_order_stays_on_this_machine(
    fleet: TopicsOnTest, argus: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARGUS_DIR", str(tmp_path))
    run_folder_of(tmp_path, "here", None)
    code, out, _ = argus("pause", "here", "--local")
    assert (code, out) == (0, "pause recorded: no engine is running for here\n")
    monkeypatch.delenv("ARGUS_BROKERS")
    assert argus("pause", "here")[0] == 0
    assert argus("resume", "here")[1] == "run here is resumed: its next attempt may start\n"
    assert fleet.records(fleet.topics.orders) == []


# --- actions


def test_actions_come_once_each_and_only_those_that_are_signed(
    fleet: TopicsOnTest, argus: Run
) -> None:
    first, second = order_action("run"), order_action("run", 9, kind="RESUME")
    unsigned = signed(order_action("run", 6))
    altered = signed(order_action("run", 7))
    stolen = signed(order_action("other", 8))._replace(key=b"run")
    broken = Message(b"run", b"x", make_headers(table="actions", signature="\u00e9"))
    fleet.put(
        fleet.topics.actions,
        [
            signed(first),
            signed(order_action("other")),
            unsigned._replace(headers=unsigned.headers[:-1]),
            altered._replace(value=altered.value[:-1] + b"\1"),
            stolen,
            broken,
            signed(first),
            signed(second),
        ],
    )
    told: List[str] = []
    stream = plarv.actions("run", follow=False, refused=told.append)
    assert list(stream) == [first, second]
    assert stream.refused == len(told) == 4
    code, out, err = argus("actions", "run", "--json")
    assert code == 0
    assert [Action.from_dict(json.loads(line)) for line in out.splitlines()] == [first, second]
    assert err.count("an action was refused: its signature is wrong") == 4
    _, out, _ = argus("actions", "run")
    assert out.splitlines()[0].split() == ["7", "=>", "PAUSE", *first.reason.split()]


def test_a_runs_own_key_is_enough_and_another_ones_is_not(
    fleet: TopicsOnTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.put(fleet.topics.actions, [signed(order_action("run"))])
    monkeypatch.delenv("ARGUS_MASTER_KEY")
    with pytest.raises(ArgusConfigurationError, match="set ARGUS_RUN_KEY"):
        plarv.actions("run")
    own, other = run_key(MASTER_KEY, "run").hex(), run_key(MASTER_KEY, "other").hex()
    assert len(list(plarv.actions("run", run_key=own, follow=False))) == 1
    stream = plarv.actions("run", run_key=other, follow=False)
    assert (list(stream), stream.refused) == ([], 1)


def test_following_begins_with_what_comes_next(fleet: TopicsOnTest) -> None:
    fleet.put(fleet.topics.actions, [signed(order_action("run"))])
    with plarv.actions("run") as stream, plarv.actions("run", from_beginning=True) as whole:
        fleet.put(fleet.topics.actions, [signed(order_action("run", 9))])
        assert next(stream) == order_action("run", 9)
        assert [next(whole), next(whole)] == [order_action("run"), order_action("run", 9)]
    assert list(stream) == []


def test_a_topic_that_is_not_there_is_a_connection_error(fleet: TopicsOnTest) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARGUS_TOPIC_PREFIX", "nobody-has-this")
        with pytest.raises(ArgusConnectionError, match=r"no topic nobody-has-this\.actions"):
            plarv.actions("run")


# --- dead letters


def letter(fleet: TopicsOnTest, key: bytes, value: bytes, offset: int, **more: Any) -> Message:
    """As a worker writes it."""
    extra = {"source-topic": fleet.topics.steps, "source-partition": 1, "source-offset": offset}
    headers = make_headers(table="steps", schema=1, reason="damaged", **{**extra, **more})
    return Message(key, value, headers)


def test_dead_letters_are_listed_and_sent_again_where_they_came_from(
    fleet: TopicsOnTest, argus: Run
) -> None:
    assert argus("dlq") == (0, "", "argus: no dead letters\n")
    letters = [letter(fleet, b"run-%d" % n, b"value-%d" % n, n) for n in range(3)]
    places = fleet.put(fleet.topics.dead_letters, [*letters, letters[1]])
    code, out, _ = argus("dlq", "list", "--json")
    assert argus("dlq", "--json", "--brokers", fleet.address, "list")[1] == out
    listed = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert sorted(each["key"] for each in listed) == ["run-0", "run-1", "run-2"]  # a copy is one
    assert {(each["reason"], each["sent"]) for each in listed} == {("damaged", False)}
    name = "{}:{}".format(*places[1])
    assert argus("dlq", "send", name) == (0, "1 letter sent again\n", "")
    (record,) = fleet.records(fleet.topics.steps)
    assert (record.key, record.value) == (b"run-1", b"value-1")
    assert record.headers == tuple(make_headers(table="steps", schema=1))
    with open_topic(fleet.connection, fleet.topics.steps) as reader:
        assert record.partition == reader.partition_of("run-1")
    listed = [json.loads(line) for line in argus("dlq", "--json")[1].splitlines()]
    assert {each["key"] for each in listed if each["sent"]} == {"run-1"}
    assert argus("dlq", "send", "--all")[1] == "2 letters sent again\n"
    assert argus("dlq", "send", "--all")[1] == "0 letters sent again\n"
    assert len(fleet.records(fleet.topics.steps)) == 3
    assert argus("dlq")[1].count("sent again") == 3


def test_a_letter_does_not_choose_any_topic_it_likes(fleet: TopicsOnTest, argus: Run) -> None:
    strange = [
        letter(fleet, b"a", b"", 1, **{"source-topic": f"{fleet.topics.prefix}-other"}),
        letter(fleet, b"b", b"", 2, **{"source-topic": fleet.topics.dead_letters}),
        letter(fleet, b"c", b"", 3, **{"source-topic": fleet.topics.actions}),
        Message(b"d", b"no headers at all", []),
    ]
    fleet.put(fleet.topics.dead_letters, strange)
    code, out, err = argus("dlq", "send", "--all")
    assert (code, out) == (1, "0 letters sent again\n")
    assert f"4 did not come from {fleet.topics.steps}" in err
    assert fleet.records(fleet.topics.actions) == []


def test_a_letter_that_is_not_there_is_named(fleet: TopicsOnTest, argus: Run) -> None:
    code, _, err = argus("dlq", "send", "0:99")
    assert (code, "no letter 0:99" in err) == (2, True)


# --- replay


def lines_of(run_id: str, events: List[Event]) -> Iterator[str]:
    for finding in folded(events):
        yield json.dumps(finding.to_dict(), allow_nan=False)


def test_a_run_is_replayed_from_the_log_as_from_a_file(fleet: TopicsOnTest, argus: Run) -> None:
    runs = {name: going_wrong(name) for name in ("one", "two", "three")}
    for events in runs.values():
        fleet.put_events(events)
    source = f"kafka://{fleet.address}"
    code, out, err = argus("replay", "--from", source, "--runs", "two", "--json")
    assert (code, err) == (0, "")
    assert out.splitlines() == list(lines_of("two", runs["two"]))
    code, out, _ = argus("replay", "--from", source, "--runs", "two, one", "--fail-on", "critical")
    assert code == 3
    assert "two: 120 steps" in out
    assert "one: 120 steps" in out
    assert "three" not in out
    code, out, _ = argus("replay", "--from", source)
    assert code == 0
    assert all(f"{name}: 120 steps" in out for name in runs)


def test_a_run_that_is_not_in_the_log_and_poison_are_told(fleet: TopicsOnTest, argus: Run) -> None:
    source = f"kafka://{fleet.address}"
    code, _, err = argus("replay", "--from", source)
    assert (code, f"{fleet.topics.steps} at {fleet.address} holds no run" in err) == (2, True)
    fleet.put_events(going_wrong("run", 10))
    fleet.put(fleet.topics.steps, [Message(b"run", b"junk", make_headers(table="steps"))])
    code, out, err = argus("replay", "--from", source, "--runs", "run,other")
    assert code == 2
    assert "run: 10 steps" in out
    assert "left out 1 message that cannot be read" in err
    assert "no event of other in" in err


def test_a_replay_is_compared_with_what_was_recorded(fleet: TopicsOnTest, argus: Run) -> None:
    events = going_wrong("run")
    findings = folded(events)
    verdicts = len([each for each in findings if isinstance(each, Verdict)])
    actions = len(findings) - verdicts
    fleet.put_events(events)
    command = ("replay", "--from", f"kafka://{fleet.address}", "--runs", "run", "--compare")
    fleet.put_findings(findings[:-1])
    code, out, _ = argus(*command)
    assert code == 1
    assert "run: different" in out
    assert "only in the replay: 1 (a worker may be behind)" in out
    fleet.put_findings(findings)
    code, out, _ = argus(*command)
    assert (code, out) == (0, f"run: identical: {verdicts} verdicts, {actions} actions\n")
    code, out, _ = argus(*command, "--json")
    told = json.loads(out)
    assert (told["identical"], told["verdicts"], told["actions"]) == (True, verdicts, actions)
    altered = next(each for each in findings if isinstance(each, Verdict))
    fleet.put_findings([altered._replace(score=1.0), altered._replace(step=99_999)])
    code, out, _ = argus(*command)
    assert code == 1
    assert "only recorded: 1" in out
    assert "recorded twice, and not the same: 1" in out
