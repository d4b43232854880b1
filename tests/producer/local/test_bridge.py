"""From the model to the verdict: a real training, its local detector, and the engine beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping

import pytest
import torch
from tests.producer.runs import folder_of, recorded, replayed
from torch import nn

from plarv import Argus
from plarv.faults import Faults
from plarv.local import LocalDetector, LocalReport, read_reports
from plarv.local.kept_reports import LOCAL_FOLDER, ReportKeeper
from plarv.local.report import CheckResult

ONSET = 80
everything: Any = torch


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 32)
        self.last = nn.Linear(32, 4)

    def forward(self, given: torch.Tensor) -> Any:
        hidden = torch.tanh(self.first(given))
        return self.last(torch.tanh(self.second(hidden)))


def train(fault: Callable[[Net, Any, int], None], steps: int = 130) -> Path:
    """The run's folder."""
    everything.manual_seed(0)
    model = Net()
    optimizer: Any = torch.optim.AdamW(model.parameters(), 1e-3)
    truth = torch.randn(16, 4)
    argus = Argus(model=model, optimizer=optimizer, silent=True)
    with LocalDetector(model, optimizer) as detector:
        for step in range(steps):
            given = torch.randn(64, 16)
            loss: Any = nn.functional.mse_loss(model(given), given @ truth)
            loss.backward()
            fault(model, optimizer, step)
            report = detector.step(loss=loss.item())
            gradients: Any = [each.grad for each in model.parameters()]
            norms = everything.stack([each.norm() for each in gradients])
            argus.step(loss.item(), grad_norm=norms.norm().item(), local_report=report)
            optimizer.step()
            optimizer.zero_grad()
    argus.complete()
    return folder_of(argus)


def flip_a_bit(model: Net, _: Any, step: int) -> None:
    if step == ONSET:
        bits = model.second.weight.data.view(torch.int32)
        bits.view(-1)[7] ^= 1 << 20


def block_a_layer(model: Net, _: Any, step: int) -> None:
    if step >= ONSET:
        for parameter in model.first.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()


def poison_a_moment(model: Net, optimizer: Any, step: int) -> None:
    if step >= ONSET:
        optimizer.state[model.second.weight]["exp_avg_sq"].fill_(1e6)


@pytest.mark.parametrize(
    ("fault", "detector", "kind", "layer"),
    [
        (flip_a_bit, "fleet_skew", "hardware", "second"),
        (block_a_layer, "gradient_collapse", "blocked_layers", "first"),
        (poison_a_moment, "optimizer_corruption", "local_only", "second"),
    ],
)
def test_a_fault_in_a_layer_becomes_a_verdict_that_names_it(
    fault: Callable[[Net, Any, int], None], detector: str, kind: str, layer: str
) -> None:
    folder = train(fault)
    live = recorded(folder)
    assert live == replayed(folder)
    found = [each for each in live.values() if each.get("detector") == detector]
    assert [each["kind"] for each in found if each["state"] == "opened"] == [kind]
    assert f"(layer {layer})" in str(found[0]["message"])
    assert ONSET <= int(found[0]["step"]) <= ONSET + 20
    kept = list(read_reports(folder))
    ill = [each for each in kept if each["report"]["any_critical"]]
    assert ill[0]["step"] <= found[0]["step"]
    assert ill[0]["report"]["top_affected_layers"] == [layer]
    assert kept[kept.index(ill[0]) - 1]["report"]["worst_level"] == "ok"  # how it was before


def test_what_a_report_says_in_words_stays_in_the_runs_local_folder() -> None:
    folder = train(poison_a_moment, steps=100)
    words = b"state changed without a step"
    holding = {
        path.parent.name
        for path in folder.rglob("*")
        if path.is_file() and words in path.read_bytes()
    }
    assert holding == {LOCAL_FOLDER}


def report(step: int, *, ill: bool = False) -> Mapping[str, Any]:
    check = CheckResult("warn", 2.0, 1.0, ("layer",), "words") if ill else CheckResult()
    return LocalReport(step, {"loss_spike": check}, 1).to_dict()


def keeper(folder: Path, faults: Faults) -> ReportKeeper:
    return ReportKeeper(folder / LOCAL_FOLDER, "session", 0, faults)


def steps(folder: Path) -> List[int]:
    return [each["step"] for each in read_reports(folder)]


def test_every_report_with_a_fault_is_kept_and_one_in_ten_without(tmp_path: Path) -> None:
    keeps = keeper(tmp_path, Faults())
    for step in range(40):
        keeps.take(step, report(step, ill=step in (25, 26)))
    keeps.write()
    assert steps(tmp_path) == [0, 10, 20, 24, 25, 26, 32]


def test_the_folder_stays_within_its_bound_and_the_oldest_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARGUS_LOCAL_MAX_MB", "1")
    old = tmp_path / LOCAL_FOLDER / "reports-before-00000-0000.jsonl"
    old.parent.mkdir()
    old.write_text("{}\n" * 100_000)
    os.utime(old, (1, 1))
    keeps, faults = keeper(tmp_path, Faults()), Faults()
    for step in range(6000):
        keeps.take(step, report(step, ill=True))
        if step % 50 == 0:
            keeps.write()
    keeps.write()
    sizes = [path.stat().st_size for path in old.parent.iterdir()]
    assert 1 << 19 < sum(sizes) <= 1 << 20
    assert not old.exists()
    kept = steps(tmp_path)
    assert kept == list(range(kept[0], 6000))
    assert faults.counts == {}


def test_none_are_kept_where_the_bound_is_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARGUS_LOCAL_MAX_MB", "0")
    keeps = keeper(tmp_path, Faults())
    keeps.take(0, report(0, ill=True))
    keeps.write()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="no local reports"):
        next(read_reports(tmp_path))


def test_a_line_that_a_crash_has_cut_is_left_out(tmp_path: Path) -> None:
    keeps = keeper(tmp_path, Faults())
    for step in range(3):
        keeps.take(step, report(step, ill=True))
    keeps.write()
    (path,) = (tmp_path / LOCAL_FOLDER).iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    assert steps(tmp_path) == [0, 1]


def test_a_disk_that_takes_no_reports_is_counted_and_loses_no_later_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Faults()
    keeps = keeper(tmp_path, found)
    write = os.write

    def half(descriptor: int, data: bytes) -> int:
        if len(data) < 100:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:100])

    keeps.take(0, report(0, ill=True))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        keeps.write()
    assert found.counts == {"local reports could not be kept (No space left on device)": 1}
    keeps.take(1, report(1, ill=True))
    keeps.write()
    assert steps(tmp_path)[-1] == 1


def test_reports_that_come_faster_than_they_are_written_are_counted(tmp_path: Path) -> None:
    found = Faults()
    keeps = keeper(tmp_path, found)
    for step in range(1030):
        keeps.take(step, report(step, ill=True))
    keeps.write()
    assert steps(tmp_path) == list(range(1024))
    assert sum(found.counts.values()) == 6


def test_a_report_that_is_no_json_is_kept_as_text(tmp_path: Path) -> None:
    keeps = keeper(tmp_path, Faults())
    data: Dict[str, Any] = {"worst_level": "warn", "checks": {"loss_spike": {"score": object()}}}
    keeps.take(0, data)
    keeps.write()
    assert steps(tmp_path) == [0]
