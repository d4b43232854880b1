"""Deterministic streams of events, as training makes them: healthy ones of many kinds, and fleets.

Pure functions of their arguments: the same seed gives the same bits on every Python version. Tests
share them; recordings of what the fold says about them are made from them.
"""

from __future__ import annotations

import math
import random
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from plarv_schemas.events import LOCAL_CHECKS, StepEvent

__all__ = [
    "FAULTY",
    "HEALTHY",
    "fleet",
    "joined",
    "language_model",
    "loss_only",
    "noisy_finetune",
    "policy_gradient",
    "rising_by_design",
    "short",
    "sparse",
    "with_samples",
]

QUIET_REPORT = tuple(0 for _ in LOCAL_CHECKS)
BATCH = 32
DATASET = 2_000  # samples


def language_model(steps: int = 2_000, seed: int = 0) -> List[StepEvent]:
    """Pretraining with every scalar column: a power law, warm-up and cosine, AdamW's updates."""
    chance = random.Random(seed)
    events: List[StepEvent] = []
    for step in range(steps):
        lr = _cosine(step, steps, warmup=min(100, steps // 10 + 1), peak=6e-4)
        loss = 2.6 + 8.2 * (1.0 + step / 12.0) ** -0.75 + chance.gauss(0.0, 0.03)
        grad = (0.35 + 3.0 / (1.0 + step / 15.0)) * math.exp(chance.gauss(0.0, 0.12))
        slow = 3.0 if step % 500 == 499 else 1.0  # a checkpoint is written
        evaluated = step % 100 == 99
        events.append(
            StepEvent(
                "run",
                "session",
                step,
                0,
                step,
                time_ns=1_700_000_000_000_000_000 + step * 250_000_000,
                epoch=step / 1_000.0,
                loss=loss,
                grad_norm=grad,
                current_lr=lr,
                update_norm=lr * 900.0 * math.exp(chance.gauss(0.0, 0.03)),
                val_loss=loss + 0.05 + chance.gauss(0.0, 0.01) if evaluated else None,
                perplexity=math.exp(min(loss, 20.0)),
                grad_l1_norm=grad * 2_400.0 * math.exp(chance.gauss(0.0, 0.02)),
                grad_l2_norm=grad,
                forward_ms=80.0 * math.exp(chance.gauss(0.0, 0.02)),
                backward_ms=160.0 * math.exp(chance.gauss(0.0, 0.02)),
                step_time_ms=250.0 * slow * math.exp(chance.gauss(0.0, 0.02)),
                batch_size=BATCH,
                local_levels=QUIET_REPORT if step % 50 == 0 else None,
                local_scores=tuple(0.1 for _ in LOCAL_CHECKS) if step % 50 == 0 else None,
            )
        )
    return events


def noisy_finetune(steps: int = 1_500, seed: int = 0) -> List[StepEvent]:
    """Small batches, loss noise of a third, a loss scaler that doubles and skips now and then."""
    chance = random.Random(seed)
    events: List[StepEvent] = []
    scale = 65_536.0
    for step in range(steps):
        level = 0.9 + 0.9 * math.exp(-step / 150.0)
        lr = _cosine(step, steps, warmup=30, peak=2e-5)
        if step % 400 == 399:
            scale *= 2.0
        skipped = step % 400 == 0 and step > 0  # the doubled scale overflows once
        if skipped:
            scale *= 0.5
        grad = 2.0 * math.exp(chance.gauss(0.0, 0.35))
        events.append(
            StepEvent(
                "run",
                "session",
                step,
                0,
                step,
                loss=level * math.exp(chance.gauss(0.0, 0.3)),
                grad_norm=math.inf if skipped else grad,
                current_lr=lr,
                update_norm=0.0 if skipped else lr * 400.0 * math.exp(chance.gauss(0.0, 0.05)),
                val_loss=level * 1.05 + chance.gauss(0.0, 0.01) if step % 150 == 149 else None,
                step_time_ms=120.0 * math.exp(chance.gauss(0.0, 0.1)),
                loss_scale=scale,
            )
        )
    return events


def policy_gradient(steps: int = 1_500, seed: int = 0) -> List[StepEvent]:
    """A surrogate loss around zero that is negative as often as not and need not fall."""
    chance = random.Random(seed)
    return [
        StepEvent(
            "run",
            "session",
            step,
            0,
            step,
            loss=0.0 if step % 11 == 5 else chance.gauss(-0.01, 0.05),
            grad_norm=0.4 * math.exp(chance.gauss(0.0, 0.4)),
            current_lr=1e-6,
            step_time_ms=9_000.0 * math.exp(chance.gauss(0.0, 0.1)),
        )
        for step in range(steps)
    ]


def rising_by_design(steps: int = 1_500, seed: int = 0) -> List[StepEvent]:
    """A loss that grows from 1 to 60 while all is well, as an adversarial or a balance loss can."""
    chance = random.Random(seed)
    return [
        StepEvent(
            "run",
            "session",
            step,
            0,
            step,
            loss=(1.0 + 59.0 * step / steps) * math.exp(chance.gauss(0.0, 0.05)),
            grad_norm=1.5 * math.exp(chance.gauss(0.0, 0.2)),
            current_lr=1e-4,
        )
        for step in range(steps)
    ]


def short(steps: int = 100, seed: int = 0) -> List[StepEvent]:
    """A run of 100 points: the classifier of a tutorial, one point an epoch with its validation."""
    chance = random.Random(seed)
    return [
        StepEvent(
            "run",
            "session",
            step,
            0,
            step,
            epoch=float(step),
            loss=0.3 + 2.0 * math.exp(-step / 20.0) + chance.gauss(0.0, 0.02),
            val_loss=0.45 + 1.9 * math.exp(-step / 20.0) + chance.gauss(0.0, 0.02),
            current_lr=1e-3,
        )
        for step in range(steps)
    ]


def sparse(steps: int = 300, seed: int = 0) -> List[StepEvent]:
    """One log in 100 steps, each the mean over them."""
    return [
        event._replace(step=100 * event.step, time_ns=None, batch_size=None)
        for event in language_model(steps, seed)
    ]


def loss_only(steps: int = 1_500, seed: int = 0) -> List[StepEvent]:
    """Nothing but step and loss."""
    return [
        StepEvent("run", "session", event.record, 0, event.step, loss=event.loss)
        for event in language_model(steps, seed)
    ]


def with_samples(steps: int = 600, seed: int = 0) -> List[StepEvent]:
    """A classifier with all per-sample signals, 32 a step, shuffled anew every epoch."""
    chance = random.Random(seed)
    events: List[StepEvent] = []
    order: List[int] = []
    for step in range(steps):
        if len(order) < BATCH:
            order = list(range(DATASET))
            chance.shuffle(order)
        ids, order = tuple(order[:BATCH]), order[BATCH:]
        events.append(
            StepEvent("run", "session", step, 0, step, sample_ids=ids)._replace(
                **_samples(chance, learned=1.0 - math.exp(-step / 200.0))
            )
        )
    return events


def _samples(chance: random.Random, learned: float) -> Dict[str, Any]:
    margins = tuple(chance.gauss(4.0 * learned - 0.5, 1.5) for _ in range(BATCH))
    right = [1.0 / (1.0 + math.exp(-margin)) for margin in margins]
    losses = tuple(-math.log(max(share, 1e-9)) for share in right)
    return {
        "loss": math.fsum(losses) / BATCH,
        "sample_losses": losses,
        "sample_confidences": tuple(max(share, 1.0 - share) for share in right),
        "sample_margins": margins,
        "sample_entropies": tuple(
            -share * math.log(max(share, 1e-9)) - (1.0 - share) * math.log(max(1.0 - share, 1e-9))
            for share in right
        ),
        "sample_correct": tuple(int(margin > 0.0) for margin in margins),
        "batch_size": BATCH,
    }


def fleet(ranks: int = 4, steps: int = 400, seed: int = 0) -> List[StepEvent]:
    """Complete steps of data-parallel ranks: own losses and times, one gradient norm."""
    chance = random.Random(seed + 1)
    return [
        joined(
            [
                event._replace(
                    session=f"session-{rank}",
                    rank=rank,
                    world_size=ranks,
                    loss=(event.loss or 0.0) + chance.gauss(0.0, 0.02),
                    step_time_ms=(event.step_time_ms or 0.0) * math.exp(chance.gauss(0.0, 0.03)),
                    forward_ms=(event.forward_ms or 0.0) * math.exp(chance.gauss(0.0, 0.03)),
                )
                for rank in range(ranks)
            ]
        )
        for event in language_model(steps, seed)
    ]


def joined(parts: List[StepEvent]) -> StepEvent:
    """The event that stands for a complete step, as far as detectors look at it."""
    losses = [part.loss for part in parts if part.loss is not None]
    times = [part.step_time_ms for part in parts if part.step_time_ms is not None]
    return parts[0]._replace(
        loss=math.fsum(losses) / len(losses) if losses else None,
        step_time_ms=max(times) if times else None,
        parts=tuple(parts),
    )


def _cosine(step: int, steps: int, warmup: int, peak: float) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1.0 + math.cos(math.pi * done)))


HEALTHY: Mapping[str, Callable[..., List[StepEvent]]] = {
    "language_model": language_model,
    "noisy_finetune": noisy_finetune,
    "policy_gradient": policy_gradient,
    "rising_by_design": rising_by_design,
    "short": short,
    "sparse": sparse,
    "loss_only": loss_only,
    "with_samples": with_samples,
    "fleet": fleet,
}
"""Name -> ``make(steps=…, seed=…)``: nothing is wrong with any of these runs."""


# Faults, each in a run that is healthy before.


def _from(
    start: int, change: Callable[[StepEvent, int], StepEvent], events: List[StepEvent]
) -> List[StepEvent]:
    """``events`` with ``change(event, steps since start)`` applied from ``start`` on."""
    return [
        change(event, event.record - start) if event.record >= start else event for event in events
    ]


def _times(value: Optional[float], factor: float) -> Optional[float]:
    return None if value is None else value * factor


def spike(steps: int = 900, seed: int = 0) -> List[StepEvent]:
    """The loss jumps to three times its level for 12 steps."""

    def change(event: StepEvent, since: int) -> StepEvent:
        return event._replace(loss=_times(event.loss, 3.0)) if since < 12 else event

    return _from(600, change, language_model(steps, seed))


def divergence(steps: int = 900, seed: int = 0) -> List[StepEvent]:
    """The loss leaves its level for good, 1% a step, up to ten times."""

    def change(event: StepEvent, since: int) -> StepEvent:
        return event._replace(loss=_times(event.loss, min(10.0, 1.01**since)))

    return _from(500, change, language_model(steps, seed))


def plateau(steps: int = 3_000, seed: int = 0) -> List[StepEvent]:
    """The loss stays at chance level from the first step on."""
    chance = random.Random(seed)
    return [
        event._replace(loss=math.log(1_000.0) + chance.gauss(0.0, 0.003), val_loss=None)
        for event in language_model(steps, seed)
    ]


def oscillation(steps: int = 1_200, seed: int = 0) -> List[StepEvent]:
    """The loss swings by 30% from step to step."""

    def change(event: StepEvent, since: int) -> StepEvent:
        return event._replace(loss=_times(event.loss, 1.3 if since % 2 else 0.7))

    return _from(600, change, language_model(steps, seed))


def explosion(steps: int = 900, seed: int = 0) -> List[StepEvent]:
    """The gradient is a thousand times what it was, and the loss doubles."""

    def change(event: StepEvent, since: int) -> StepEvent:
        if since >= 40:
            return event
        return event._replace(grad_norm=_times(event.grad_norm, 1e3), loss=_times(event.loss, 2.0))

    return _from(600, change, language_model(steps, seed))


def collapse(steps: int = 1_200, seed: int = 0) -> List[StepEvent]:
    """The gradient vanishes and the loss stands still far above where it would go."""

    def change(event: StepEvent, since: int) -> StepEvent:
        return event._replace(
            grad_norm=_times(event.grad_norm, 1e-6),
            grad_l1_norm=_times(event.grad_l1_norm, 1e-6),
            grad_l2_norm=_times(event.grad_l2_norm, 1e-6),
            loss=5.0 + 0.001 * (event.record % 3),
        )

    return _from(500, change, language_model(steps, seed))


def corruption(steps: int = 900, seed: int = 0) -> List[StepEvent]:
    """Updates are 20 times what learning rate and gradient explain."""

    def change(event: StepEvent, since: int) -> StepEvent:
        return event._replace(update_norm=_times(event.update_norm, 20.0))

    return _from(600, change, language_model(steps, seed))


def narrowing(steps: int = 1_500, seed: int = 0) -> List[StepEvent]:
    """The gradient narrows to a tenth of its L1 norm at the same L2 norm within 300 steps."""

    def change(event: StepEvent, since: int) -> StepEvent:
        return event._replace(grad_l1_norm=_times(event.grad_l1_norm, max(0.1, 0.99**since)))

    return _from(600, change, language_model(steps, seed))


def repeated_batch(steps: int = 300, seed: int = 0) -> List[StepEvent]:
    """The loader serves one batch for 60 steps."""
    events = with_samples(steps, seed)

    def change(event: StepEvent, since: int) -> StepEvent:
        return event._replace(sample_ids=events[200].sample_ids) if since < 60 else event

    return _from(200, change, events)


def overfitting(steps: int = 2_000, seed: int = 0) -> List[StepEvent]:
    """From step 800 on each evaluation is 4% worse, the training loss falls on."""

    def change(event: StepEvent, since: int) -> StepEvent:
        return event._replace(val_loss=_times(event.val_loss, 1.0 + 0.0004 * since))

    return _from(800, change, language_model(steps, seed))


def straggler(steps: int = 400, seed: int = 0) -> List[StepEvent]:
    """Rank 2 takes 30% longer from step 200 on."""

    def change(event: StepEvent, since: int) -> StepEvent:
        parts = list(event.parts)
        parts[2] = parts[2]._replace(step_time_ms=_times(parts[2].step_time_ms, 1.3))
        return joined(parts)

    return _from(200, change, fleet(4, steps, seed))


def disagreement(steps: int = 400, seed: int = 0) -> List[StepEvent]:
    """Rank 1 computes another gradient norm than the other replicas from step 200 on."""

    def change(event: StepEvent, since: int) -> StepEvent:
        parts = list(event.parts)
        parts[1] = parts[1]._replace(grad_norm=_times(parts[1].grad_norm, 1.02))
        return joined(parts)

    return _from(200, change, fleet(4, steps, seed))


def dead(steps: int = 700, seed: int = 0) -> List[StepEvent]:
    """Loss and gradient are NaN from step 500 on."""

    def change(event: StepEvent, since: int) -> StepEvent:
        return event._replace(loss=math.nan, grad_norm=math.nan, update_norm=math.nan)

    return _from(500, change, language_model(steps, seed))


FAULTY: Mapping[str, Tuple[str, Callable[..., List[StepEvent]]]] = {
    "dead": ("non_finite", dead),
    "spike": ("loss_spike", spike),
    "divergence": ("loss_divergence", divergence),
    "plateau": ("loss_plateau", plateau),
    "oscillation": ("loss_oscillation", oscillation),
    "explosion": ("gradient_explosion", explosion),
    "collapse": ("gradient_collapse", collapse),
    "corruption": ("optimizer_corruption", corruption),
    "narrowing": ("canalization", narrowing),
    "repeated_batch": ("sample_anomaly", repeated_batch),
    "overfitting": ("generalization_gap", overfitting),
    "straggler": ("fleet_skew", straggler),
    "disagreement": ("fleet_skew", disagreement),
}
"""Name of the fault -> (the detector it is for, ``make(steps=…, seed=…)``)."""
