from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from tests.producer.runs import controls_of, steps_of, until

import plarv
from plarv.exceptions import ArgusConfigurationError, ArgusPause
from plarv.orders import order
from plarv.settings import text

lightning: Any = pytest.importorskip("lightning.pytorch")
ArgusLightningCallback: Any = plarv.ArgusLightningCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning",  # torch, of Lightning's use of it
    "ignore:.*does not have many workers",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:.*`configure_optimizers` returned",
    "ignore:.*`tensorboardX` has been removed",
    "ignore:.*Checkpoint directory .* exists and is not empty",
    "ignore:.*does not contain a state dict for these callbacks",
    "ignore:.*resuming from a checkpoint that ended before the epoch ended",
)


class Regression(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 1)
        self.losses: List[float] = []
        self.validated: List[float] = []

    def loss(self, batch: Any) -> Any:
        return torch.nn.functional.mse_loss(self.linear(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated.append(self.trainer.callback_metrics["val_loss"].item())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Adversaries(Regression):
    """Two optimizers, stepped by hand in every second batch; returns no loss, logs it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first, second = self.optimizers()
        loss = self.loss(batch) + self.other(batch[0]).square().mean()
        self.log("train_loss", loss)
        self.losses.append(loss.item())
        self.manual_backward(loss)
        if batch_idx % 2 == 1:
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.linear, self.other)]


def batches(count: int) -> Any:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2 * count, 4, generator=generator)
    data = torch.utils.data.TensorDataset(rows, rows.sum(1, keepdim=True))
    return torch.utils.data.DataLoader(data, batch_size=2)


def trainer_of(folder: Path, *callbacks: Any, **arguments: Any) -> Any:
    defaults: Dict[str, Any] = {
        "max_epochs": 1, "enable_checkpointing": False, "num_sanity_val_steps": 2,
    }  # fmt: skip
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=str(folder),
        callbacks=list(callbacks),
        **{**defaults, **arguments},
    )


def folder_of(run_id: str) -> Path:
    return Path(text("ARGUS_DIR")) / "runs" / run_id


def training_of(run_id: str) -> Any:
    return [step for step in steps_of(folder_of(run_id)) if step.val_loss is None]


class Ordering(lightning.Callback):  # type: ignore[misc]
    """Pauses the run that ``callback`` reports, within the step after ``at`` ones."""

    def __init__(self, callback: Any, at: int) -> None:
        self.callback, self.at = callback, at

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.at:
            argus = self.callback.argus
            order(argus.run_id, "pause")
            until(lambda: argus.decision.newest_action is not None)


def test_every_step_is_reported_with_what_the_trainer_knows(tmp_path: Path) -> None:
    callback = ArgusLightningCallback("key:secret", run_id="pl", silent=True)
    module = Regression()
    trainer_of(tmp_path, callback).fit(module, batches(6))
    steps = training_of("pl")
    assert [step.step for step in steps] == [0, 1, 2, 3, 4, 5]
    assert [step.loss for step in steps] == pytest.approx(module.losses)
    assert [step.current_lr for step in steps] == pytest.approx([0.1 * 0.5**n for n in range(6)])
    assert all(step.grad_norm > 0.0 for step in steps)
    assert {(step.batch_size, step.epoch) for step in steps} == {(2, 0.0)}
    (started,) = controls_of(folder_of("pl"), "session_started")
    assert (started.data["total_steps"], started.data["dtype"]) == (6, "float32")
    (finished,) = controls_of(folder_of("pl"), "session_finished")
    assert finished.data["status"] == "completed"
    assert isinstance(callback, lightning.Callback)


def test_the_loss_of_a_step_is_the_mean_over_its_micro_batches(tmp_path: Path) -> None:
    module = Regression()
    callback = ArgusLightningCallback(run_id="ga", silent=True)
    trainer_of(tmp_path, callback, accumulate_grad_batches=3).fit(module, batches(8))
    micro = module.losses
    expected = [sum(part) / len(part) for part in (micro[:3], micro[3:6], micro[6:])]
    assert [step.loss for step in training_of("ga")] == pytest.approx(expected)


def test_manual_optimization_is_a_step_where_optimizers_stepped(tmp_path: Path) -> None:
    module = Adversaries()
    trainer_of(tmp_path, ArgusLightningCallback(run_id="gan", silent=True)).fit(module, batches(6))
    steps = training_of("gan")
    assert [step.step for step in steps] == [0, 1, 2]
    assert all(math.isfinite(step.loss) for step in steps)


def test_validations_are_reported_and_the_sanity_check_is_not(tmp_path: Path) -> None:
    module = Regression()
    callback = ArgusLightningCallback(run_id="val", silent=True)
    trainer = trainer_of(tmp_path, callback, val_check_interval=3)
    trainer.fit(module, batches(6), batches(2))
    events = [step for step in steps_of(folder_of("val")) if step.val_loss is not None]
    assert [event.step for event in events] == [2, 5]
    assert [event.val_loss for event in events] == pytest.approx(module.validated)
    trainer.validate(module, batches(2), verbose=False)
    assert len(steps_of(folder_of("val"))) == 6 + 2


def test_a_pause_stops_the_trainer_and_the_run_goes_on_from_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = ArgusLightningCallback(run_id="paused", mode="AUTO")
    trainer = trainer_of(tmp_path, callback, Ordering(callback, at=3))
    trainer.fit(Regression(), batches(6))
    assert trainer.global_step == 4
    assert isinstance(callback.intervention, ArgusPause)
    assert callback.intervention.step == 3
    assert capsys.readouterr().err.count("the Trainer stops") == 1
    (finished,) = controls_of(folder_of("paused"), "session_finished")
    assert finished.data["status"] == "paused"
    saved = tmp_path / "saved.ckpt"
    trainer.save_checkpoint(saved)

    with pytest.raises(ArgusPause):
        trainer_of(tmp_path, ArgusLightningCallback(run_id="paused")).fit(Regression(), batches(6))
    order("paused", "resume")
    again = ArgusLightningCallback(run_id="paused", silent=True)
    resumed = trainer_of(tmp_path, again, max_epochs=2)
    resumed.fit(Regression(), batches(6), ckpt_path=str(saved), weights_only=False)
    assert [step.step for step in training_of("paused")] == list(range(resumed.global_step))


class BrokenError(Exception):
    pass


def test_an_exception_ends_the_run_and_passes_on(tmp_path: Path) -> None:
    class Breaking(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise BrokenError
            return super().training_step(batch, batch_idx)

    callback = ArgusLightningCallback(run_id="broken", silent=True)
    with pytest.raises(BrokenError):
        trainer_of(tmp_path, callback).fit(Breaking(), batches(6))
    (finished,) = controls_of(folder_of("broken"), "session_finished")
    assert finished.data == {"status": "failed", "exception": "BrokenError"}


def test_no_training_opens_no_run(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, ArgusLightningCallback(run_id="none", silent=True))
    trainer.validate(Regression(), batches(2), verbose=False)
    assert not folder_of("none").exists()


def test_disabled_it_does_nothing_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARGUS_DISABLED", "1")
    trainer = trainer_of(tmp_path, ArgusLightningCallback(mode="whatever"))
    trainer.fit(Regression(), batches(3), batches(2))
    assert not Path(text("ARGUS_DIR")).exists()
    assert "[argus]" not in capsys.readouterr().err


def test_the_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    weights = []
    for callback in (lightning.Callback(), ArgusLightningCallback(silent=True)):
        module = Regression()
        trainer_of(tmp_path, callback, accumulate_grad_batches=2).fit(module, batches(6))
        weights.append(module.linear.weight)
    assert torch.equal(*weights)


def test_a_wrong_setting_is_an_error_at_once() -> None:
    with pytest.raises(ArgusConfigurationError, match="run_id must be"):
        ArgusLightningCallback(run_id="../x")
