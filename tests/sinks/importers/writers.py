"""Writes one format's files by its real writer: ``python writers.py FORMAT FOLDER``.

A process of its own: what these packages warn of and start is none of the tests' business.
"""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any, Callable, Dict

LOSSES = [2.0 - 0.01 * step if step != 7 else math.nan for step in range(20)]


def package(name: str) -> Any:
    return importlib.import_module(name)


def tensorboard(folder: Path) -> None:
    write = package("tensorboard.summary").Writer
    pb = package("tensorboard.compat.proto.summary_pb2")
    event_pb2 = package("tensorboard.compat.proto.event_pb2")
    old = package("tensorboard.summary.writer.event_file_writer").EventFileWriter

    def point(writer: Any, tag: str, value: float, step: int, time_s: float) -> None:
        summary = pb.Summary(value=[pb.Summary.Value(tag=tag, simple_value=value)])
        writer.add_event(event_pb2.Event(step=step, wall_time=time_s, summary=summary))

    writer = old(str(folder / "one"))
    for step, loss in enumerate(LOSSES):
        point(writer, "train/loss", loss, step, 1e9 + step)
        point(writer, "train/learning_rate", 0.5, step, 1e9 + step)
        point(writer, "reward", 1.0, step, 1e9 + step)
    point(writer, "val/loss", 2.5, 1, 1e9 + 19.5)  # at its epoch
    writer.close()
    for number, first in enumerate((0, 5)):  # resumed at 5
        writer = old(str(folder / "resumed"), filename_suffix=f".{number}")
        for step in range(first, 10):
            point(writer, "train/loss", 2.0, step, 1e9 + 100 * number + step)
        writer.close()
    newer = write(str(folder / "newer"))  # scalars as tensors
    for step in range(4):
        newer.add_scalar("loss", 2.0 + step, step)
    newer.close()


def torch(folder: Path) -> None:
    writer = package("torch.utils.tensorboard").SummaryWriter(str(folder / "one"))
    for step, loss in enumerate(LOSSES):
        writer.add_scalar("Loss/train", loss, step)
    writer.add_scalar("Loss/val", 2.5, 19, new_style=True)
    writer.add_histogram("weights", package("numpy").arange(9.0), 19)
    writer.add_text("note", "loss went down", 19)
    writer.close()


def wandb(folder: Path) -> None:
    module = package("wandb")
    settings = module.Settings(mode="offline", console="off", x_disable_stats=True, silent=True)
    for seed in (1, 2):
        run = module.init(
            project="digits", name=f"seed {seed}", id=f"run{seed}", dir=str(folder),
            config={"lr": 0.5}, settings=settings,
        )  # fmt: skip
        for loss in LOSSES:
            run.log({"train/loss": loss, "train/lr": 0.5, "extra": {"reward": 1.0}})
        run.log({"eval/loss": 2.5})
        run.finish(exit_code=seed - 1)


def mlflow(folder: Path) -> None:
    module = package("mlflow")
    module.set_tracking_uri((folder / "mlruns").as_uri())
    module.set_experiment("digits")
    for name in ("first", "second"):
        with module.start_run(run_name=name):
            module.log_param("lr", 0.5)
            for step, loss in enumerate(LOSSES):
                module.log_metric("train/loss", loss, step=step)
                module.log_metric("reward", 1.0, step=step)
            module.log_metric("val_loss", 2.5, step=19)
            for _ in range(3):
                module.log_metric("grad_norm", 1.0)  # without a step


def lightning(folder: Path) -> None:
    logger_type = package("lightning.pytorch.loggers").CSVLogger
    for version in range(2):
        logger = logger_type(str(folder), name="digits", version=version)
        logger.log_hyperparams({"lr": 0.5})
        for step, loss in enumerate(LOSSES):
            logger.log_metrics({"train_loss_step": loss, "lr-AdamW": 0.5, "epoch": 0}, step=step)
        logger.log_metrics({"val_loss": 2.5, "epoch": 0}, step=19)
        logger.log_metrics({"train_loss_epoch": 1.9, "epoch": 0}, step=19)
        logger.finalize("success")


def huggingface(folder: Path) -> None:
    torch, transformers = package("torch"), package("transformers")

    class Model(torch.nn.Module):  # type: ignore[misc,name-defined,unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def forward(self, x: Any, labels: Any) -> Dict[str, Any]:
            found = self.layer(x)
            return {"loss": ((found - labels) ** 2).mean(), "logits": found}

    data = [{"x": torch.randn(2), "labels": torch.randn(1)} for _ in range(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "digits"), max_steps=12, logging_steps=1, eval_strategy="steps",
        eval_steps=4, save_steps=6, report_to=[], use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=4,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=Model(), args=arguments, train_dataset=data, eval_dataset=data
    )
    trainer.train()
    trainer.save_state()


WRITERS: Dict[str, Callable[[Path], None]] = {
    "tensorboard": tensorboard,
    "torch": torch,
    "wandb": wandb,
    "mlflow": mlflow,
    "lightning": lightning,
    "huggingface": huggingface,
}

if __name__ == "__main__":
    WRITERS[sys.argv[1]](Path(sys.argv[2]))
