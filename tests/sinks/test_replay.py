"""What is recorded comes back as events: curves in tables, journals, and a clear word else."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest

from plarv_processors.engine import Engine, EngineConfig
from plarv_schemas.events import Action, ControlEvent, Event, StepEvent, Verdict
from plarv_schemas.journal import pack_full
from plarv_schemas.journal_writer import JournalWriter
from plarv_sinks.curve import understood
from plarv_sinks.findings_table import findings_table, summary_line
from plarv_sinks.replay import ReplayError, RunSummary, engine_for, read_events, replay


def written(folder: Path, text: str, name: str = "run.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode("utf-8"))
    return path


def read(path: Path) -> Tuple[List[Any], List[str]]:
    """The events in the file, and what was told."""
    told: List[str] = []
    return list(read_events(path, told.append)), told


def steps_of(folder: Path, text: str, name: str = "run.csv") -> List[StepEvent]:
    events, _ = read(written(folder, text, name))
    assert all(isinstance(event, StepEvent) for event in events)
    return events


def single(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def test_a_csv_is_read_under_the_names_of_step_and_their_aliases(tmp_path: Path) -> None:
    text = "step,loss,grad_norm,lr,step_ms,batch_size,epoch\n7,2.5,1.25,0.1,33.3,32.0,0.5\n"
    assert steps_of(tmp_path, text) == [
        StepEvent(
            "run", "file", 0, 0, 7, world_size=1, loss=2.5, grad_norm=1.25, current_lr=0.1,
            step_time_ms=single(33.3), batch_size=32, epoch=0.5,
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (["lr", "current_lr"], {"current_lr": "current_lr"}),
        (["learning_rate"], {"current_lr": "learning_rate"}),
        (["Step", " Loss "], {"step": "Step", "loss": " Loss "}),
        (["reward"], {}),
    ],
)
def test_a_columns_own_name_goes_before_its_aliases(
    columns: List[str], found: Dict[str, str]
) -> None:
    assert understood(columns)[0] == found


def test_an_empty_cell_is_missing_and_nan_and_inf_are_values(tmp_path: Path) -> None:
    steps = steps_of(tmp_path, "step,loss,grad_norm\n0,,1\n1,nan,inf\n2,-inf,null\n")
    assert steps[0].loss is None
    assert steps[0].grad_norm == 1.0
    loss = steps[1].loss
    assert loss is not None
    assert math.isnan(loss)
    assert steps[1].grad_norm == math.inf
    assert steps[2].loss == -math.inf
    assert steps[2].grad_norm is None


def test_a_row_without_loss_may_carry_val_loss(tmp_path: Path) -> None:
    steps = steps_of(tmp_path, "step,loss,val_loss\n0,2.5,\n0,,2.75\n")
    assert [(step.step, step.loss, step.val_loss) for step in steps] == [
        (0, 2.5, None),
        (0, None, 2.75),
    ]


def test_without_step_the_rows_of_each_run_attempt_and_rank_count_from_0(tmp_path: Path) -> None:
    text = "run_id,attempt,rank,loss\na,1,0,1\na,1,1,1\nb,1,0,1\na,1,0,1\na,2,0,1\n"
    steps = steps_of(tmp_path, text)
    assert [(step.run_id, step.step, step.session) for step in steps] == [
        ("a", 0, "file"),
        ("a", 0, "file.1"),
        ("b", 0, "file"),
        ("a", 1, "file"),
        ("a", 0, "file-2"),
    ]
    assert [step.record for step in steps] == [0, 1, 2, 3, 4]


def test_unknown_columns_are_named_in_one_line(tmp_path: Path) -> None:
    events, told = read(written(tmp_path, "step,loss,reward,kl\n0,1,2,3\n"))
    assert len(events) == 1
    assert told == [f"{tmp_path / 'run.csv'}: ignored columns: reward, kl"]


def test_another_attempt_in_the_file_is_another_attempt_of_the_fold(tmp_path: Path) -> None:
    text = "attempt,step,loss\n" + "".join(
        f"{attempt},{step},1.0\n"
        for attempt, first in ((1, 0), (2, 20))
        for step in range(first, 30)
    )
    engine = Engine(EngineConfig(detectors=()))
    attempts = []
    for event in steps_of(tmp_path, text):
        engine.fold(event)
        attempts.append(engine.attempt)
    assert attempts == [1] * 30 + [2] * 10


def test_the_world_is_as_large_as_the_ranks_in_the_file_unless_it_says_so(tmp_path: Path) -> None:
    text = "step,rank,loss\n0,0,1\n0,1,1\n1,0,1\n1,1,1\n"
    steps = steps_of(tmp_path, text)
    assert {step.world_size for step in steps} == {2}
    engine = Engine(EngineConfig(detectors=()))
    for step in steps:
        engine.fold(step)
    assert engine.attempt == 1
    told = steps_of(tmp_path, "step,rank,world_size,loss\n0,0,4,1\n0,1,,1\n")
    assert [step.world_size for step in told] == [4, 2]


def test_cells_that_are_no_numbers_are_missing_and_told_once(tmp_path: Path) -> None:
    events, told = read(written(tmp_path, "step,loss\n0,high\n1,1.5\n2,low\n1.5,1\n,1\n"))
    assert [(event.step, event.loss) for event in events] == [(0, None), (1, 1.5), (2, None)]
    assert [line.partition(": ")[2] for line in told] == [
        "2 rows without a step left out",
        "3 cells could not be read and count as missing, the first: 'high' in column loss, row 1",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "step;loss\n0;1.5\n1;2.5\n",
        "step\tloss\r\n0\t1.5\r\n1\t2.5\r\n",
        "\ufeffstep,loss\n\n0,1.5\n\n1,2.5",
        '"step","loss","note"\n0,1.5,"a, b"\n1,2.5\n',
    ],
)
def test_the_usual_dialects_of_csv_are_read(tmp_path: Path, text: str) -> None:
    assert [(step.step, step.loss) for step in steps_of(tmp_path, text)] == [(0, 1.5), (1, 2.5)]


def test_json_lines_hold_lists_and_non_finite_numbers(tmp_path: Path) -> None:
    rows = [
        '{"step": 0, "loss": NaN, "sample_losses": [1.5, null, "inf"], "sample_ids": [1, "a"]}',
        '{"step": 1, "loss": "nan", "sample_correct": [true, 0], "local_layers": ["h.0"]}',
        '{"step": 2, "loss": null, "val_loss": 3}',
        '{"step": 3, "lo',
    ]
    events, told = read(written(tmp_path, "\n".join(rows), "run.jsonl"))
    first, second, third = events
    assert math.isnan(first.loss)
    assert math.isnan(second.loss)
    assert (third.loss, third.val_loss) == (None, 3.0)
    assert first.sample_losses[0] == 1.5
    assert math.isnan(first.sample_losses[1])
    assert first.sample_losses[2] == math.inf
    assert first.sample_ids[0] == 1
    assert isinstance(first.sample_ids[1], int)
    assert (second.sample_correct, second.local_layers) == ((1, 0), ("h.0",))
    assert told == [f"{tmp_path / 'run.jsonl'}: lines that are no JSON object and were left out: 1"]


def test_a_list_may_stand_as_json_in_a_cell(tmp_path: Path) -> None:
    text = 'step,loss,sample_losses\n0,1,"[1.5, 2.5]"\n1,1,\n2,1,[]\n3,1,oops\n'
    events, told = read(written(tmp_path, text))
    assert [event.sample_losses for event in events] == [(1.5, 2.5), None, (), None]
    assert "'oops' in column sample_losses" in told[0]


def test_numbers_beyond_64_bits_and_beyond_float32_do_not_stop_the_reading(tmp_path: Path) -> None:
    text = "step,loss,batch_size,step_ms,time_ns\n0,1e400,1e30,1e300,1700000000000000001\n"
    (step,) = steps_of(tmp_path, text)
    assert (step.loss, step.batch_size, step.step_time_ms) == (math.inf, None, math.inf)
    assert step.time_ns == 1700000000000000001


def test_a_parquet_table_is_read_like_a_csv(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table(
        {
            "step": [0, 1],
            "loss": pa.array([None, math.nan], pa.float64()),
            "lr": pa.array([0.5, None], pa.float32()),
            "sample_losses": [[1.0, 2.0], None],
            "reward": [1.0, 2.0],
        }
    )
    parquet.write_table(table, tmp_path / "run.parquet")
    (first, second), told = read(tmp_path / "run.parquet")
    assert (first.loss, first.current_lr, first.sample_losses) == (None, 0.5, (1.0, 2.0))
    assert math.isnan(second.loss)
    assert (second.current_lr, second.sample_losses) == (None, None)
    assert told == [f"{tmp_path / 'run.parquet'}: ignored columns: reward"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.csv", b"", "the file is empty"),
        ("blank.csv", b" \n\n", "the file is empty"),
        ("binary.csv", bytes(range(256)) * 4, "a binary file"),
        ("latin.csv", b"\xff\xfe" * 200, "a binary file"),
        ("noloss.csv", b"step,reward\n0,1\n", "no loss and no val_loss column; its columns: step,"),
        ("header.csv", b"step,loss\n", "there are columns but no rows"),
        ("array.json", b'[{"loss": 1}]', "one JSON array"),
        ("noloss.jsonl", b'{"reward": 1}\n', "no loss and no val_loss column"),
        ("broken.jsonl", b"{oops\n", "no line of it is a JSON object"),
        ("prose.md", b"# Runs\nAll went well.\n", "no loss and no val_loss column"),
        ("other.journal", b"not one of ours", "the journal holds no event"),
    ],
)
def test_what_cannot_be_replayed_is_said_in_one_line(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ReplayError) as raised:
        read(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PAR1 and no more", "unreadable Parquet"),
        (b"PAR1" + bytes(400) + b"PAR1", "unreadable Parquet"),
    ],
)
def test_a_broken_parquet_file_is_said_in_one_line(
    tmp_path: Path, content: bytes, words: str
) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "broken.parquet"
    path.write_bytes(content)
    with pytest.raises(ReplayError, match=words) as raised:
        read(path)
    assert "\n" not in str(raised.value)


def test_a_missing_file_and_an_unfit_folder_are_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="no such file"):
        read(tmp_path / "nowhere.csv")
    with pytest.raises(ReplayError, match="a folder without a journal"):
        read(tmp_path)


def journal(folder: Path, losses: List[float]) -> Path:
    """A run's folder with one session."""
    folder.mkdir(parents=True)
    writer = JournalWriter(
        folder, run_id="run", session="0" * 16, rank=0, world_size=1, segment_bytes=1 << 14
    )
    writer.control("session_started", step=None, rank=0, data={"mode": "MANUAL"})
    for step, loss in enumerate(losses):
        writer.prepare()
        packed, _ = pack_full(writer.record, 1_000_000 * step, step, {"loss": loss})
        assert writer.append(packed)
    writer.close()
    return folder


def test_a_runs_folder_gives_its_control_and_step_events_in_order(tmp_path: Path) -> None:
    folder = journal(tmp_path / "runs" / "run", [2.0, math.inf, 1.0])
    events, told = read(folder)
    assert isinstance(events[0], ControlEvent)
    assert [event.loss for event in events[1:]] == [2.0, math.inf, 1.0]
    assert [event.record for event in events] == [0, 1, 2, 3]
    assert told == []
    (segment,) = folder.glob("r*-000000.journal")
    assert read(segment)[0] == events
    with pytest.raises(ReplayError, match="holds 1 runs; name one, such as"):
        read(tmp_path)


def test_a_truncated_last_record_costs_that_record_alone(tmp_path: Path) -> None:
    folder = journal(tmp_path / "run", [3.0, 2.0, 1.0])
    (segment,) = folder.glob("r*-000000.journal")
    data = segment.read_bytes().rstrip(b"\0")
    segment.write_bytes(data[:-9])
    events, _ = read(folder)
    assert [event.loss for event in events[1:]] == [3.0, 2.0]


def healthy(step: int) -> float:
    return 2.0 + 0.01 * (step % 5)


def test_a_replay_yields_verdicts_and_actions_and_counts_them() -> None:
    losses = [9.0 if step == 60 else healthy(step) for step in range(70)]
    events: List[Event] = [
        StepEvent("run", "s", step, 0, step, loss=loss, step_time_ms=1e3)
        for step, loss in enumerate(losses)
    ]
    summary = RunSummary("run")
    engine = engine_for(Path("nowhere.csv"), EngineConfig(), [].append)  # type: ignore[arg-type]
    found = list(replay(events, engine, summary))
    assert [type(finding) for finding in found] == [Verdict, Action, Verdict]
    assert (summary.num_steps, summary.num_verdicts, summary.num_actions) == (70, 2, 1)
    assert summary_line(summary) == "run: 70 steps, 2 verdicts, 1 action, run of 1 min 10 s"


def test_a_runs_duration_is_read_off_its_times_and_else_off_its_steps() -> None:
    timed = RunSummary("run")
    for step, time_ns in enumerate((10**9, 4 * 10**9)):
        timed.count_event(StepEvent("run", "s", step, 0, step, time_ns=time_ns, step_time_ms=7.0))
    assert timed.duration_s == 3.0
    sparse = RunSummary("run")
    for rank in (0, 1):
        for number in range(3):
            sparse.count_event(
                StepEvent("run", "s", number, rank, 100 * number, step_time_ms=500.0)
            )
    assert sparse.duration_s == 100.5
    assert sparse.num_steps == 3
    assert RunSummary("run").duration_s is None


def verdict(**fields: Any) -> Verdict:
    base = Verdict(
        "run", 1, None, 60, 60, "loss_spike", "transient", "warn", "opened", 60, 9.0, 8.0, {},
        "loss 9 is far above its median 2", "loss_spike-1",
    )  # fmt: skip
    return base._replace(**fields)


def test_the_table_is_aligned_marks_actions_and_shows_attempts_where_there_are_several() -> None:
    action = Action("run", 2, (), 1234, 9, "SET_LR", {"dry_run": True}, "lower it", (), 1.0, 1300)
    lines = list(findings_table([verdict(), verdict(rank=3, level="critical", step=5), action]))
    assert lines == [
        "step  attempt  level     finding               rank  message",
        "  60  1        warn      loss_spike/transient        loss 9 is far above its median 2",
        "   5  1        critical  loss_spike/transient  3     loss 9 is far above its median 2",
        "1234  2        =>        SET_LR                      lower it (MANUAL: not applied)",
    ]
    assert "attempt" not in next(findings_table([verdict()]))
    assert list(findings_table([])) == []


def test_colour_is_added_on_request_alone_and_text_cannot_bring_its_own() -> None:
    plain, coloured = (
        list(findings_table([verdict(message="a\x1b[31mb\nc")], colour=colour))[1]
        for colour in (False, True)
    )
    assert plain.endswith("a?[31mb?c")
    assert "\x1b" not in plain
    assert "\x1b[33mwarn \x1b[0m" in coloured


def test_findings_print_as_json_that_reads_back() -> None:
    found = verdict(score=math.inf, evidence={"loss": math.nan})
    line = json.dumps(found.to_dict(), allow_nan=False)
    back = Verdict.from_dict(json.loads(line))
    assert back.score == math.inf
    assert math.isnan(back.evidence["loss"])
