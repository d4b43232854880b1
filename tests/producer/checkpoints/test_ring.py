"""Checkpoints in a run: saved, certified, frozen, gone back to, and left whole by a kill."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Generator, List

import pytest
import torch as _torch
from tests.integration.law import live_records, replayed_records
from tests.integration.live import LiveRun
from tests.producer.processes import environment

from plarv import Argus
from plarv.checkpoints.anchor import ANCHOR
from plarv.checkpoints.slots import Slots, read_json
from plarv.exceptions import ArgusError, ArgusPause
from plarv_schemas.events import Action, ControlEvent, StepEvent
from plarv_schemas.run_log import read_run

torch: Any = _torch


class Training:
    """A small model in a loop of its own, watched by a run."""

    def __init__(self, folder: Path, monkeypatch: Any, mode: str = "MANUAL", **given: Any) -> None:
        torch.manual_seed(5)
        self.model = torch.nn.Linear(4, 4)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.folder = folder
        self.paused = False
        self.run = LiveRun(
            monkeypatch, mode=mode, model=self.model, optimizer=self.optimizer,
            checkpoint_dir=folder, **given,
        )  # fmt: skip
        self.argus: Argus = self.run.ranks[0]

    def step(self, poison: bool = False) -> None:
        x = torch.randn(8, 4)
        loss = ((self.model(x) - x) ** 2).mean() + 1.0
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if poison:
            with torch.no_grad():
                self.model.weight.fill_(math.nan)
        try:
            self.argus.step(loss)
        except ArgusPause:
            self.paused = True

    def go(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
        self.run.catch_up()

    def until(self, done: Callable[[], bool]) -> None:
        """Trains on until the condition holds."""
        end = time.monotonic() + 180
        while not done():
            assert time.monotonic() < end
            self.step()
            self.run.catch_up()

    def collapse(self, after: int) -> None:
        """Trains until one is certified, ``after`` steps more, and on with dead weights."""
        self.until(lambda: bool(self.certified()))
        self.go(after)
        self.step(poison=True)
        self.go(40)

    def slots(self) -> Any:
        return Slots(self.folder).all()

    def certified(self) -> List[int]:
        return [slot.step for slot in self.slots() if slot.certified]

    def controls(self, kind: str) -> List[ControlEvent]:
        assert self.argus.run_dir is not None
        events = read_run(self.argus.run_dir)
        return [e for e in events if isinstance(e, ControlEvent) and e.kind == kind]

    def weights(self) -> Any:
        return self.model.weight.detach().clone()


def test_checkpoints_are_saved_and_certified_and_a_replay_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path / "ring", monkeypatch)
    training.until(lambda: bool(training.certified()))
    training.until(lambda: (tmp_path / "ring" / ANCHOR).exists())
    training.argus.complete()
    anchor = read_json(tmp_path / "ring" / ANCHOR)
    assert anchor["step"] in training.certified()
    assert (anchor["onset_step"], anchor["verdicts"]) == (None, [])
    saved = training.controls("checkpoint_saved")
    assert {event.data["certified"] for event in saved} == {False}
    verdicts, actions = live_records(training.run.folder)
    assert "CERTIFY" in [action["kind"] for action in actions]
    assert (verdicts, actions) == replayed_records(training.run.folder)


def test_in_auto_a_poisoned_run_goes_back_and_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path / "ring", monkeypatch, mode="AUTO")
    training.until(lambda: bool(training.certified()))
    training.go(5)
    training.step(poison=True)
    training.until(lambda: bool(torch.isfinite(training.weights()).all()))
    (recovered,) = training.controls("recovered")
    assert recovered.step is not None
    back_at = recovered.step
    training.until(lambda: max(training.certified()) > back_at)
    training.argus.complete()
    assert bool(torch.isfinite(training.weights()).all())
    anchor = read_json(tmp_path / "ring" / ANCHOR)
    assert anchor["step"] >= recovered.step
    applied = [event.data["kind"] for event in training.controls("action_applied")]
    assert "ROLLBACK" in applied
    verdicts, actions = live_records(training.run.folder)
    assert (verdicts, actions) == replayed_records(training.run.folder)
    rollback = next(action for action in actions if action["kind"] == "ROLLBACK")
    first, last = rollback["parameters"]["bad_steps"]
    assert recovered.step < first <= last


def test_a_rollback_may_come_before_the_certificate_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certify = Slots.certify

    def late(*given: Any, **named: Any) -> Any:
        time.sleep(2.0)
        return certify(*given, **named)

    monkeypatch.setattr(Slots, "certify", late)
    training = Training(tmp_path / "ring", monkeypatch, mode="AUTO")
    session: Any = training.argus._session  # pyright: ignore[reportPrivateUsage]
    training.until(lambda: bool(session._ring._heard))
    assert training.certified() == []
    training.step(poison=True)
    training.until(lambda: bool(torch.isfinite(training.weights()).all()))
    (recovered,) = training.controls("recovered")
    assert recovered.step in (0, 1, 2)
    assert not training.controls("action_refused")
    training.argus.complete()


def test_in_manual_a_rollback_is_told_the_anchor_is_frozen_and_nothing_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path / "ring", monkeypatch)
    training.collapse(5)
    training.argus.complete()
    assert bool(torch.isnan(training.weights()).all())
    assert training.controls("recovered") == []
    _, actions = live_records(training.run.folder)
    rollback = next(action for action in actions if action["kind"] == "ROLLBACK")
    assert rollback["parameters"]["dry_run"] is True
    anchor = read_json(tmp_path / "ring" / ANCHOR)
    assert anchor["onset_step"] == rollback["parameters"]["onset_step"]
    assert anchor["step"] == rollback["parameters"]["checkpoint_step"]
    assert anchor["verdicts"] == rollback["verdict_ids"]
    frozen = next(slot for slot in training.slots() if slot.step == anchor["step"])
    assert frozen.certified
    assert anchor["checksum"] == frozen.checksum


def test_a_new_process_recovers_the_anchor_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path / "ring", monkeypatch)
    training.collapse(3)
    training.argus.complete("failed")
    again = Training(tmp_path / "ring", monkeypatch)
    found = again.argus.recover()
    anchor = read_json(tmp_path / "ring" / ANCHOR)
    assert found is not None
    assert (found.step, found.certified) == (anchor["step"], True)
    assert found.bad_steps == (anchor["onset_step"], anchor["frozen_at_step"])
    assert bool(torch.isfinite(again.weights()).all())
    with pytest.raises(ArgusError, match="no checkpoint of step 12345"):
        again.argus.recover(step=12345)
    again.step()
    again.argus.complete()
    steps = [e.step for e in read_run(again.run.folder) if isinstance(e, StepEvent)]
    assert steps[-1] == found.step + 1
    other = Training(tmp_path / "other", monkeypatch, run_id="other")
    assert other.argus.recover() is None


def test_recover_without_checkpoints_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = LiveRun(monkeypatch)
    with pytest.raises(ArgusError, match="needs a model and checkpoint_dir"):
        run.ranks[0].recover()


def test_another_model_is_not_recovered_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path / "ring", monkeypatch)
    training.until(lambda: bool(training.certified()))
    training.argus.complete()
    other = LiveRun(
        monkeypatch, run_id="other", model=torch.nn.Linear(3, 3), checkpoint_dir=tmp_path / "ring"
    )
    with pytest.raises(ArgusError, match="shape"):
        other.ranks[0].recover()


def test_a_damaged_anchor_refuses_the_rollback_and_the_run_is_paused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path / "ring", monkeypatch, mode="AUTO")
    training.until(lambda: bool(training.certified()))
    for slot in training.slots():
        path = slot.path / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    training.step(poison=True)
    end = time.monotonic() + 60
    while not training.paused:
        assert time.monotonic() < end
        training.step()
    refused = training.controls("action_refused")
    assert "damaged" in str(refused[0].data["why"])
    training.argus.complete()
    verdicts, actions = live_records(training.run.folder)
    assert (verdicts, actions) == replayed_records(training.run.folder)


def test_the_folder_of_another_process_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(tmp_path / "ring", monkeypatch)
    second = Training(tmp_path / "ring", monkeypatch, run_id="second", silent=False)
    assert "another process keeps its own" in capsys.readouterr().err
    second.argus.complete()
    training.argus.complete()


def test_a_place_that_is_not_ours_is_told_and_the_others_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "ring" / "slot-0" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    training = Training(tmp_path / "ring", monkeypatch, silent=False)
    training.until(lambda: bool(training.certified()))
    training.argus.complete()
    said = f"[argus] a checkpoint's place is left alone: {mine.parent}"
    assert capsys.readouterr().err.count(said) == 1
    assert mine.read_text() == "mine"


def test_a_model_is_needed_and_a_folder_that_takes_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    LiveRun(monkeypatch, run_id="a", checkpoint_dir=tmp_path, silent=False).ranks[0].complete()
    assert "give model=" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    Training(tmp_path / "file", monkeypatch, run_id="b", silent=False).argus.complete()
    assert "cannot be written to" in capsys.readouterr().err


def test_a_disk_that_is_full_costs_the_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path / "ring", monkeypatch)

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("plarv.checkpoints.snapshot.write_tensor_file", full)
        session: Any = training.argus._session  # pyright: ignore[reportPrivateUsage]
        faults: Any = session.faults
        training.until(lambda: "No space left" in faults.describe())
    assert training.slots() == ()
    training.until(lambda: bool(training.slots()))
    training.argus.complete()


_CHILD = """
import sys, time, torch
from plarv import Argus
torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.Linear(512, 64))
optimizer = torch.optim.AdamW(model.parameters())
argus = Argus(run_id=sys.argv[2], model=model, optimizer=optimizer, checkpoint_dir=sys.argv[1],
              silent=True)
found = argus.recover()
print("back" if found else "new", flush=True)
while True:
    x = torch.randn(16, 64)
    loss = ((model(x) - x) ** 2).mean()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    argus.step(loss)
    time.sleep(0.005)
"""


@contextlib.contextmanager
def started_child(folder: Path, run_id: str) -> Generator[Any, None, None]:
    """A training in a process of its own, which ends with the block."""
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(folder), run_id],
        stdout=subprocess.PIPE, text=True,
        env=environment(ARGUS_CHECKPOINT_STEPS="3"),
    )  # fmt: skip
    try:
        yield child
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def test_a_training_that_is_killed_at_any_time_leaves_checkpoints_that_can_be_gone_back_to(
    tmp_path: Path,
) -> None:
    slots = Slots(tmp_path / "ring")
    for number in range(3):
        run_id = f"run-{number}"
        with started_child(tmp_path / "ring", run_id) as child:
            assert child.stdout.readline().strip() == ("back" if number else "new")
            end = time.monotonic() + 180
            while not any(slot.certified and slot.run_id == run_id for slot in slots.all()):
                assert time.monotonic() < end
                time.sleep(0.01)
            time.sleep(0.013 * number)
        assert all(slots.verify(slot) is None for slot in slots.all())
        assert any(slot.certified for slot in slots.all())


def test_poisoned_moments_are_made_anew_in_auto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path / "ring", monkeypatch, mode="AUTO")
    training.go(3)
    session: Any = training.argus._session  # pyright: ignore[reportPrivateUsage]
    sessions = ((session.writer.session, 0),)
    session.mailbox.actions.append(
        Action("run", 1, sessions, 3, 3, "RESET_OPTIMIZER", {}, "poisoned", (), 1.0, 99)
    )
    training.step()
    assert not training.optimizer.state
    assert [e.data["parameters"] for e in training.controls("action_applied")] == [2]
    training.step()
    assert training.optimizer.state
    training.argus.complete()


def test_a_checkpoint_that_the_engine_asks_for_is_saved_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARGUS_CHECKPOINT_STEPS", "100000")
    training = Training(tmp_path / "ring", monkeypatch)
    training.until(lambda: len(training.slots()) == 1)
    session: Any = training.argus._session  # pyright: ignore[reportPrivateUsage]
    asked = Action(
        "run", 1, ((session.writer.session, 0),), 9, 9, "CHECKPOINT", {}, "a spike", (), 1.0, 9999
    )
    session.mailbox.actions.append(asked)
    training.until(lambda: len(training.slots()) == 2)
    training.argus.complete()
