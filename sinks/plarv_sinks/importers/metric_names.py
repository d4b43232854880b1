"""Which of somebody else's metrics is which of our columns."""

from __future__ import annotations

from typing import Dict, List, Mapping, Sequence, Tuple

from plarv_schemas.events import LIST_COLUMNS, SCALAR_COLUMNS

__all__ = ["COLUMNS", "in_seconds", "is_known", "matched"]

COLUMNS: Tuple[str, ...] = ("step", *SCALAR_COLUMNS, *LIST_COLUMNS)
"""Ours, to which a log's metric may be mapped."""

# In order of preference, after the column's own name; see `_plain` for how they are compared. A
# bare train_loss comes last: the Hugging Face trainer's is the mean of the whole run, its last row.
_NAMES: Mapping[str, Tuple[str, ...]] = {
    "step": ("global_step",),
    "loss": (
        "train/loss", "train/loss_step", "train_loss_step", "training/loss", "training_loss",
        "loss/train", "train/total_loss", "total_loss", "loss_step", "lm_loss_training/lm_loss",
        "lm_loss", "train/lm_loss", "batch_loss", "train_loss", "train/loss_epoch",
        "train_loss_epoch", "epoch_loss",
    ),
    "val_loss": (
        "eval_loss", "eval/loss", "val/loss", "validation/loss", "validation_loss", "valid/loss",
        "valid_loss", "loss/val", "loss/eval", "loss/valid", "loss/validation", "val_loss_epoch",
        "val/loss_epoch", "lm_loss_validation/lm_loss_validation",
    ),
    "grad_norm": (
        "train/grad_norm", "gradient_norm", "global_grad_norm", "train/global_grad_norm",
        "grad_norm_step", "gnorm", "train/gnorm", "grad/norm", "total_grad_norm",
        "optim/total_grad_norm", "grad_norm/grad_norm", "grad_2.0_norm_total",
    ),
    "current_lr": (
        "lr", "learning_rate", "train/learning_rate", "train/lr", "learning_rate/learning_rate",
        "lr_adam", "lr_adamw", "lr_sgd", "lr_adam/pg1", "lr_adamw/pg1", "lr_sgd/pg1",
        "optim/learning_rate_group0", "lr/group0",
    ),
    "epoch": ("train/epoch",),
    "perplexity": (
        "ppl", "train/perplexity", "train/ppl", "eval_perplexity", "eval/perplexity",
        "val_perplexity", "val/perplexity",
    ),
    "batch_size": ("train/batch_size", "batch_size/batch_size"),
    "loss_scale": ("train/loss_scale", "loss_scale/loss_scale", "grad_scale"),
    "update_norm": ("train/update_norm", "param_update_norm"),
    "step_time_ms": (
        "step_ms", "train/step_time_ms", "step_time_s", "train/step_time_s", "seconds_per_step",
        "iteration_time", "iteration_time/iteration_time",
    ),
}  # fmt: skip

_SECONDS = frozenset(
    {
        "step_time_s", "train/step_time_s", "seconds_per_step", "iteration_time",
        "iteration_time/iteration_time",
    }
)  # fmt: skip
_KNOWN = frozenset(COLUMNS).union(*(set(names) for names in _NAMES.values()))


def matched(metrics: Sequence[str], given: Mapping[str, str]) -> Tuple[Dict[str, str], List[str]]:
    """Our name -> the log's, of every metric that we know, and the metrics that nobody reads.

    ``given`` goes before what is guessed.

    >>> matched(["train/loss", "lr-AdamW", "norm", "reward"], {"grad_norm": "norm"})
    ({'grad_norm': 'norm', 'loss': 'train/loss', 'current_lr': 'lr-AdamW'}, ['reward'])
    """
    found = {ours: theirs for ours, theirs in given.items() if theirs in metrics}
    taken = set(found.values())
    by_name: Dict[str, str] = {}
    for metric in metrics:
        if metric not in taken:
            by_name.setdefault(_plain(metric), metric)
    for ours in COLUMNS:
        if ours in found:
            continue
        for name in (ours, *_NAMES.get(ours, ())):
            if name in by_name:
                found[ours] = by_name[name]
                break
    used = set(found.values())
    return found, [metric for metric in metrics if metric not in used]


def is_known(metric: str, given: Mapping[str, str]) -> bool:
    """Whether `matched` may choose this metric."""
    return _plain(metric) in _KNOWN or metric in given.values()


def in_seconds(metric: str) -> bool:
    """Whether a time under this name is in seconds."""
    return _plain(metric) in _SECONDS


def _plain(metric: str) -> str:
    return metric.strip().lower().replace("-", "_").replace(" ", "_")
