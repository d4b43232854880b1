from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from tests.producer.runs import controls_of, steps_of, until

import plarv
from plarv.exceptions import ArgusConfigurationError, ArgusPause
from plarv.orders import order
from plarv.settings import text

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
ArgusCallback: Any = plarv.ArgusCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning",  # the Trainer asks for it, without an accelerator too
    "ignore:Detected call of `lr_scheduler.step:UserWarning",
)


class Regression(torch.nn.Module):
    """Remembers the loss of each micro-batch; the one of a batch with NaN in it is NaN."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 1)
        self.losses: List[float] = []

    def forward(self, x: Any, labels: Any) -> Dict[str, Any]:
        output = self.linear(x)
        loss = torch.nn.functional.mse_loss(output, labels)
        if self.training:
            self.losses.append(loss.item())
        return {"loss": loss, "logits": output}


class Mean(torch.nn.Module):
    """Takes the number of items, so that the Trainer does not divide its loss again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Regression()

    def forward(self, x: Any, labels: Any, num_items_in_batch: Any = None, **_: Any) -> Any:
        output = self.inner(x, labels)
        if num_items_in_batch is not None:
            output["loss"] = output["loss"] * labels.numel() / num_items_in_batch
        return output


def samples(count: int) -> List[Dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(count, 4, generator=generator)
    return [{"x": row, "labels": row.sum().view(1)} for row in rows]


def train(
    folder: Path,
    callback: Any,
    *more: Any,
    model: Any = None,
    data: Any = None,
    resume: Any = None,
    **arguments: Any,
) -> Any:
    arguments = {"max_steps": 6, "save_strategy": "no", "lr_scheduler_type": "linear", **arguments}
    trainer = transformers.Trainer(
        model=model or Regression(),
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            per_device_train_batch_size=2,
            dataloader_pin_memory=False,
            **arguments,
        ),
        train_dataset=samples(32) if data is None else data,
        eval_dataset=samples(8),
        callbacks=[callback, *more],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def folder_of(run_id: str) -> Path:
    return Path(text("ARGUS_DIR")) / "runs" / run_id


def logged(trainer: Any, name: str) -> List[float]:
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


class Ordering(transformers.TrainerCallback):  # type: ignore[misc]
    """Pauses or stops the run that ``callback`` reports, within the step after ``at`` ones."""

    def __init__(self, callback: Any, kind: str, at: int) -> None:
        self.callback, self.kind, self.at = callback, kind, at

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.at:
            argus = self.callback.argus
            order(argus.run_id, self.kind)
            until(lambda: argus.decision.newest_action is not None)


def test_every_step_is_reported_with_what_the_trainer_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = ArgusCallback("key:secret", run_id="hf")
    model = Regression()
    before = type(model).forward
    trainer = train(tmp_path, callback, model=model)
    steps = steps_of(folder_of("hf"))
    assert [step.step for step in steps] == [0, 1, 2, 3, 4, 5]
    assert [step.loss for step in steps] == pytest.approx(model.losses)
    assert [step.grad_norm for step in steps] == pytest.approx(logged(trainer, "grad_norm"))
    assert [step.current_lr for step in steps] == pytest.approx(logged(trainer, "learning_rate"))
    assert {step.batch_size for step in steps} == {2}
    assert steps[-1].epoch == trainer.state.epoch
    assert any(step.update_norm for step in steps), "the optimizer was not known"
    (started,) = controls_of(folder_of("hf"), "session_started")
    assert (started.data["total_steps"], started.data["dtype"]) == (6, "float32")
    (finished,) = controls_of(folder_of("hf"), "session_finished")
    assert finished.data["status"] == "completed"
    assert "training_step" not in vars(trainer)
    assert type(model).forward is before
    assert capsys.readouterr().err.count("logging_steps is now 1") == 1
    assert isinstance(callback, transformers.TrainerCallback)


@pytest.mark.parametrize("kind", [Regression, Mean])
def test_the_loss_of_a_step_is_the_mean_over_its_micro_batches(tmp_path: Path, kind: Any) -> None:
    model = kind()
    arguments = {"gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 1}
    trainer = train(
        tmp_path, ArgusCallback(run_id="ga", silent=True), model=model, data=samples(16),
        **arguments,
    )  # fmt: skip
    micro: List[float] = getattr(model, "inner", model).losses
    assert len(micro) == 8
    expected = [sum(part) / len(part) for part in (micro[:3], micro[3:6], micro[6:])]
    steps = steps_of(folder_of("ga"))
    assert [step.loss for step in steps] == pytest.approx(expected)
    assert [step.loss for step in steps] == pytest.approx(logged(trainer, "loss"))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_nan_that_the_trainer_masks_is_reported_as_one(tmp_path: Path, accumulated: int) -> None:
    data = samples(8 * accumulated)
    data[4]["x"] = torch.full((4,), math.nan)
    trainer = train(
        tmp_path,
        ArgusCallback(run_id="nan", silent=True),
        data=data,
        max_steps=4,
        gradient_accumulation_steps=accumulated,
        learning_rate=0.0,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
    )
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
    losses: List[Any] = [step.loss for step in steps_of(folder_of("nan"))]
    assert math.isnan(losses[2 // accumulated])
    assert math.isfinite(losses[0])


def test_evaluation_losses_are_val_losses_of_the_step_before(tmp_path: Path) -> None:
    callback = ArgusCallback(run_id="eval", silent=True)
    trainer = train(tmp_path, callback, eval_strategy="steps", eval_steps=2, eval_on_start=True)
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    events = [step for step in steps_of(folder_of("eval")) if step.val_loss is not None]
    assert [event.step for event in events] == [0, 1, 3, 5]
    expected = [entry["eval_loss"] for entry in evaluated]
    assert [event.val_loss for event in events] == pytest.approx(expected)
    assert all(event.loss is None for event in events)
    trainer.evaluate()  # outside of a training: nobody's
    assert len(steps_of(folder_of("eval"))) == 6 + 4


def test_of_several_evaluation_sets_one_is_followed(tmp_path: Path) -> None:
    callback = ArgusCallback(run_id="sets", silent=True)
    trainer = transformers.Trainer(
        model=Regression(),
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            max_steps=4,
            save_strategy="no",
            eval_strategy="steps",
            eval_steps=2,
            dataloader_pin_memory=False,
        ),
        train_dataset=samples(32),
        eval_dataset={"near": samples(4), "far": samples(8)},
        callbacks=[callback],
    )
    trainer.train()
    near = [e["eval_near_loss"] for e in trainer.state.log_history if "eval_near_loss" in e]
    found = [step.val_loss for step in steps_of(folder_of("sets")) if step.val_loss is not None]
    assert found == pytest.approx(near)


def test_a_pause_stops_the_trainer_and_saves_and_the_run_goes_on_after_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = ArgusCallback(run_id="paused", mode="AUTO")
    saving = {"save_strategy": "steps", "save_steps": 100, "max_steps": 8}
    trainer = train(tmp_path, callback, Ordering(callback, "pause", at=3), **saving)
    assert trainer.state.global_step == 4
    stop = callback.intervention
    assert isinstance(stop, ArgusPause)
    assert stop.step == 3
    assert capsys.readouterr().err.count("the Trainer stops") == 1
    (finished,) = controls_of(folder_of("paused"), "session_finished")
    assert finished.data["status"] == "paused"
    checkpoint = tmp_path / "checkpoint-4"
    assert checkpoint.is_dir()

    with pytest.raises(ArgusPause):
        train(tmp_path, ArgusCallback(run_id="paused"), resume=str(checkpoint), **saving)
    order("paused", "resume")
    again = ArgusCallback(run_id="paused", mode="AUTO")
    resumed = train(tmp_path, again, resume=str(checkpoint), **saving)
    assert resumed.state.global_step == 8
    assert again.intervention is None
    assert [step.step for step in steps_of(folder_of("paused"))] == list(range(8))
    started = controls_of(folder_of("paused"), "session_started")[-1]
    assert (started.data["start_step"], started.data["total_steps"]) == (4, 8)


def test_where_only_one_checkpoint_is_kept_a_pause_saves_none(tmp_path: Path) -> None:
    callback = ArgusCallback(mode="AUTO", silent=True)
    saving = {"save_strategy": "steps", "save_steps": 100, "save_total_limit": 1, "max_steps": 8}
    train(tmp_path, callback, Ordering(callback, "pause", at=2), **saving)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_in_manual_a_pause_is_not_obeyed(tmp_path: Path) -> None:
    callback = ArgusCallback(silent=True)
    trainer = train(tmp_path, callback, Ordering(callback, "pause", at=2))
    assert trainer.state.global_step == 6
    assert callback.intervention is None


class BrokenError(Exception):
    pass


class Breaking(Regression):
    def forward(self, x: Any, labels: Any) -> Dict[str, Any]:
        if len(self.losses) == 3:
            raise BrokenError
        return super().forward(x, labels)


class BreakingData(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        if index == 5:
            raise BrokenError
        return samples(32)[index]


@pytest.mark.parametrize("where", ["model", "data"])
def test_an_exception_ends_the_run_and_passes_on(tmp_path: Path, where: str) -> None:
    callback = ArgusCallback(run_id="broken", silent=True)
    broken = {"model": Breaking()} if where == "model" else {"data": BreakingData()}
    with pytest.raises(BrokenError):
        train(tmp_path, callback, train_sampling_strategy="sequential", **broken)
    (finished,) = controls_of(folder_of("broken"), "session_finished")
    assert finished.data == {"status": "failed", "exception": "BrokenError"}
    assert callback.argus is None


def test_a_trainer_that_logs_no_loss_is_reported_all_the_same(tmp_path: Path) -> None:
    class Mute(transformers.Trainer):  # type: ignore[misc]
        def log(self, *_: Any, **__: Any) -> None:
            pass

    model = Regression()
    trainer = Mute(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            max_steps=3,
            save_strategy="no",
            dataloader_pin_memory=False,
        ),
        train_dataset=samples(32),
        callbacks=[ArgusCallback(run_id="mute", silent=True)],
    )
    trainer.train()
    steps = steps_of(folder_of("mute"))
    assert [step.step for step in steps] == [0, 1, 2]
    assert [step.loss for step in steps] == pytest.approx(model.losses)
    assert all(step.grad_norm is not None for step in steps)


def test_evaluation_alone_opens_no_run(tmp_path: Path) -> None:
    trainer = transformers.Trainer(
        model=Regression(),
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        eval_dataset=samples(8),
        callbacks=[ArgusCallback(run_id="only", silent=True)],
    )
    trainer.evaluate()
    assert not folder_of("only").exists()


def test_a_training_that_is_over_already_makes_no_step(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    train(tmp_path, ArgusCallback(silent=True), **saving)
    saved = str(tmp_path / "checkpoint-2")
    callback = ArgusCallback(run_id="over", silent=True)
    train(tmp_path, callback, resume=saved, **{**saving, "max_steps": 2, "num_train_epochs": 0})
    (finished,) = controls_of(folder_of("over"), "session_finished")
    assert finished.data["status"] == "completed"


def test_two_trainers_and_a_second_training_are_runs_of_their_own(tmp_path: Path) -> None:
    first, second = ArgusCallback(silent=True), ArgusCallback(silent=True)
    trainer = train(tmp_path / "a", first)
    train(tmp_path / "b", second)
    trainer.train()
    runs = list((Path(text("ARGUS_DIR")) / "runs").iterdir())
    assert [len(steps_of(run)) for run in runs] == [6, 6, 6]


def test_disabled_it_does_nothing_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARGUS_DISABLED", "1")
    callback = ArgusCallback(mode="whatever")
    trainer = train(tmp_path, callback, logging_steps=5, eval_strategy="steps", eval_steps=3)
    assert trainer.args.logging_steps == 5
    assert callback.argus is None
    assert not Path(text("ARGUS_DIR")).exists()
    assert "[argus]" not in capsys.readouterr().err


def test_the_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    callbacks = [transformers.TrainerCallback(), ArgusCallback(silent=True)]
    plain, watched = (
        train(tmp_path, callback, gradient_accumulation_steps=2).model.linear.weight
        for callback in callbacks
    )
    assert torch.equal(plain, watched)


class Rank(transformers.TrainerCallback):  # type: ignore[misc]
    """Makes this process look like rank 1 to the callbacks behind it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.is_world_process_zero = False


def test_a_rank_that_does_not_own_the_loss_reports_its_steps_only(tmp_path: Path) -> None:
    train(tmp_path, Rank(), ArgusCallback(run_id="rank", silent=True), eval_strategy="epoch")
    steps = steps_of(folder_of("rank"))
    assert [step.step for step in steps] == list(range(6))
    assert {(step.loss, step.grad_norm, step.val_loss) for step in steps} == {(None, None, None)}


def test_a_wrong_setting_is_an_error_at_once() -> None:
    with pytest.raises(ArgusConfigurationError, match="mode must be"):
        ArgusCallback(mode="FAST")
    with pytest.raises(ArgusConfigurationError, match="modle must be an argument of Argus"):
        ArgusCallback(modle=1)


def test_a_callback_can_be_pickled_while_it_is_at_work(tmp_path: Path) -> None:
    class Pickling(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            copies.append(pickle.loads(pickle.dumps(callback)))

    copies: List[Any] = []
    callback = ArgusCallback(silent=True)
    train(tmp_path, callback, Pickling())
    assert len(copies) == 6
    assert {copy.argus for copy in copies} == {None}
