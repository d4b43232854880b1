"""Small trainings that a fault is put into: their logs, as the journal of such a run has them."""

from __future__ import annotations

import importlib
import math
import random
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from plarv_schemas.events import LOCAL_CHECKS, ControlEvent, Event, StepEvent

__all__ = ["Log", "Setting", "Training"]

_SAMPLES, _FEATURES, _CLASSES = 4096, 24, 8
_SPARSITY = LOCAL_CHECKS.index("activation_sparsity")
_FLOW = LOCAL_CHECKS.index("gradient_flow")
_REPORT_EVERY = 10  # steps between two local reports
_VALIDATE_EVERY = 20
_BEGIN_NS = 1_700_000_000_000_000_000


@dataclass(frozen=True)
class Setting:
    """What one run is made of; drawn from its seed, so that no fault is tried on one model."""

    seed: int
    steps: int = 600
    ranks: int = 1
    batch: int = 64
    width: int = 48
    depth: int = 3
    optimizer: str = "adam"
    activation: str = "ReLU"
    lr: float = 2e-3
    schedule: str = "constant"

    @classmethod
    def drawn(cls, seed: int, **fixed: Any) -> Setting:
        """A setting by chance; ``fixed`` says what the fault asks for."""
        chance = random.Random(f"setting {seed}")
        optimizer = chance.choice(["adam", "adam", "sgd"])
        free: Dict[str, Any] = {
            "batch": chance.choice([32, 64, 128]),
            "width": chance.choice([32, 48, 64]),
            "depth": chance.choice([2, 3, 4]),
            "optimizer": optimizer,
            "activation": chance.choice(["ReLU", "Tanh", "GELU"]),
            "schedule": chance.choice(["constant", "cosine"]),
        }
        drawn = {**free, **fixed}
        if "lr" not in fixed:
            usual = 2e-3 if drawn["optimizer"] == "adam" else 5e-2
            drawn["lr"] = usual * chance.choice([0.7, 1.0, 1.4])
        return cls(seed=seed, **drawn)

    def lr_at(self, step: int) -> float:
        """Warm-up, then constant or a cosine down to a tenth."""
        if step < 30:
            return self.lr * (step + 1) / 30
        if self.schedule == "constant":
            return self.lr
        return self.lr * (0.1 + 0.45 * (1.0 + math.cos(math.pi * step / self.steps)))


class Log:
    """Events of one run in the order of its log: sessions, records and times are filled in."""

    def __init__(self, run_id: str, ranks: int) -> None:
        self.events: List[Event] = []
        self._run_id, self._ranks, self._attempt = run_id, ranks, 0
        self._records = [0] * ranks
        self.begin()

    def begin(self) -> None:
        """All ranks start: the next attempt."""
        self._attempt += 1
        self._records = [0] * self._ranks
        for rank in range(self._ranks):
            self.control(rank, "session_started", {"world_size": self._ranks, "mode": "MANUAL"})

    def control(self, rank: int, kind: Any, data: Dict[str, Any]) -> None:
        """A control event of one rank."""
        self._add(rank, ControlEvent(self._run_id, "", 0, rank, kind, data=data))

    def step(self, rank: int, step: int, columns: Dict[str, Any]) -> None:
        """One rank's step."""
        self._add(
            rank, StepEvent(self._run_id, "", 0, rank, step, world_size=self._ranks, **columns)
        )

    def end(self, status: str = "completed") -> None:
        """All ranks end."""
        for rank in range(self._ranks):
            self.control(rank, "session_finished", {"status": status, "exception": None})

    def _add(self, rank: int, event: Event) -> None:
        record = self._records[rank]
        self._records[rank] += 1
        when = _BEGIN_NS + len(self.events) * 20_000_000
        session = f"attempt-{self._attempt}-rank-{rank}"
        self.events.append(event._replace(session=session, record=record, time_ns=when))


def _same_batch(step: int, ids: List[int]) -> List[int]:
    return ids


@dataclass
class Hooks:
    """Where a fault reaches into a training."""

    lr: Callable[[int, float], float] = lambda step, lr: lr
    choose: Callable[[int, List[int]], List[int]] = _same_batch
    batch: Optional[Callable[[int, int, Any, Any], Tuple[Any, Any]]] = None  # step, rank, x, y
    before: Optional[Callable[[int, Training], None]] = None
    gradient: Optional[Callable[[int, Training], None]] = None
    columns: Optional[Callable[[int, int, Dict[str, Any]], None]] = None  # step, rank, columns


@dataclass
class Training:
    """A multilayer perceptron that learns what a random teacher says; several ranks in lockstep.

    Every rank has replicas of its own; gradients are averaged. ``hooks`` put the fault in.
    """

    setting: Setting
    hooks: Hooks = field(default_factory=Hooks)
    loss_scale: Optional[float] = None

    def __post_init__(self) -> None:
        self.torch: Any = importlib.import_module("torch")
        self.torch.manual_seed(self.setting.seed)
        self._chance = random.Random(f"training {self.setting.seed}")
        self._make_data()
        first = self._make_model()
        self.models: List[Any] = [first]
        for _ in range(1, self.setting.ranks):
            model = self._make_model()
            model.load_state_dict(first.state_dict())
            self.models.append(model)
        self.optimizers = [self._make_optimizer(model) for model in self.models]
        self.log = Log(f"injected-{self.setting.seed}", self.setting.ranks)
        self._order: List[int] = []
        self._dead: List[str] = []  # layers, at the newest forward pass

    def run(self, begin: int = 0, end: Optional[int] = None) -> None:
        """Trains from one step to another, writing the log."""
        for step in range(begin, self.setting.steps if end is None else end):
            self._step(step)

    def layers(self, model: Any) -> List[Tuple[str, Any]]:
        """The linear layers, with their names."""
        linear = self.torch.nn.Linear
        return [(name, part) for name, part in model.named_modules() if isinstance(part, linear)]

    def _make_data(self) -> None:
        torch, size = self.torch, _SAMPLES + 512
        self.x = torch.randn(size, _FEATURES)
        teacher = torch.nn.Sequential(
            torch.nn.Linear(_FEATURES, 32), torch.nn.Tanh(), torch.nn.Linear(32, _CLASSES)
        )
        with torch.no_grad():
            self.y = (teacher(self.x) * 6.0).argmax(1)
            wrong = torch.rand(size) < 0.03
            self.y[wrong] = torch.randint(0, _CLASSES, (int(wrong.sum()),))

    def _make_model(self) -> Any:
        torch, setting = self.torch, self.setting
        parts: List[Any] = []
        width = _FEATURES
        for _ in range(setting.depth):
            parts += [
                torch.nn.Linear(width, setting.width),
                getattr(torch.nn, setting.activation)(),
            ]
            width = setting.width
        return torch.nn.Sequential(*parts, torch.nn.Linear(width, _CLASSES))

    def _make_optimizer(self, model: Any) -> Any:
        torch, setting = self.torch, self.setting
        if setting.optimizer == "adam":
            return torch.optim.AdamW(model.parameters(), lr=setting.lr)
        return torch.optim.SGD(model.parameters(), lr=setting.lr, momentum=0.9)

    def _ids(self) -> List[int]:
        if len(self._order) < self.setting.batch:
            self._order = list(range(_SAMPLES))
            self._chance.shuffle(self._order)
        ids = self._order[: self.setting.batch]
        del self._order[: self.setting.batch]
        return ids

    def _step(self, step: int) -> None:
        hooks = self.hooks
        if hooks.before is not None:
            hooks.before(step, self)
        lr = hooks.lr(step, self.setting.lr_at(step))
        found = [self._backward(step, rank, model) for rank, model in enumerate(self.models)]
        self._reduce()
        if hooks.gradient is not None:
            hooks.gradient(step, self)
        report = self._report(step)
        for rank, (model, optimizer) in enumerate(zip(self.models, self.optimizers)):
            columns = {**found[rank], **report, **self._norms(model), "current_lr": lr}
            columns.update(self._update(model, optimizer, lr))
            if step % _VALIDATE_EVERY == 0:
                columns["val_loss"] = self._validate(model)
            columns["step_time_ms"] = 20.0 * math.exp(self._chance.gauss(0.0, 0.03))
            columns["forward_ms"] = 8.0 * math.exp(self._chance.gauss(0.0, 0.03))
            if hooks.columns is not None:
                hooks.columns(step, rank, columns)
            self.log.step(rank, step, columns)

    def _backward(self, step: int, rank: int, model: Any) -> Dict[str, Any]:
        torch = self.torch
        ids = self.hooks.choose(step, self._ids())
        x, y = self.x[ids], self.y[ids]
        if self.hooks.batch is not None:
            x, y = self.hooks.batch(step, rank, x, y)
        model.zero_grad()
        logits = self._forward(model, x, watch=rank == 0 and step % _REPORT_EVERY == 0)
        losses = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        losses.mean().backward()
        with torch.no_grad():
            own = logits.gather(1, y[:, None])[:, 0]
            best = logits.scatter(1, y[:, None], -math.inf).max(1).values
        return {
            "loss": float(losses.detach().mean()),
            "batch_size": len(ids),
            "sample_ids": tuple(ids),
            "sample_losses": tuple(losses.detach().tolist()),
            "sample_margins": tuple((own - best).tolist()),
        }

    def _forward(self, model: Any, x: Any, *, watch: bool) -> Any:
        """The logits; notes the layers none of whose units is on."""
        if not watch:
            return model(x)
        self._dead = []
        for name, part in model.named_children():
            x = part(x)
            if type(part).__name__ == "ReLU" and not bool((x > 0).any()):
                self._dead.append(str(int(name) - 1))
        return x

    def _reduce(self) -> None:
        if len(self.models) == 1:
            return
        for together in zip(*(model.parameters() for model in self.models)):
            mean = self.torch.stack([each.grad for each in together]).mean(0)
            for each in together:
                each.grad.copy_(mean)

    def _report(self, step: int) -> Dict[str, Any]:
        """A local report as a hook on the layers makes it: dead units, and no gradient."""
        if step % _REPORT_EVERY:
            return {}
        cut = [
            name
            for name, part in self.layers(self.models[0])
            if float(part.weight.grad.abs().max()) < 1e-12
        ]
        levels = [0] * len(LOCAL_CHECKS)
        levels[_SPARSITY] = 2 if self._dead else 0
        levels[_FLOW] = 2 if cut else 0
        layers = tuple(dict.fromkeys([*self._dead, *cut]))
        scores = tuple(0.5 * level for level in levels)
        return {"local_levels": tuple(levels), "local_scores": scores, "local_layers": layers}

    def _norms(self, model: Any) -> Dict[str, Any]:
        torch = self.torch
        flat = torch.cat([each.grad.flatten() for each in model.parameters()])
        norm = float(flat.norm())
        return {"grad_norm": norm, "grad_l1_norm": float(flat.abs().sum()), "grad_l2_norm": norm}

    def _update(self, model: Any, optimizer: Any, lr: float) -> Dict[str, Any]:
        """Takes the step: how far the weights moved."""
        torch = self.torch
        before = torch.cat([each.detach().flatten() for each in model.parameters()])
        for group in optimizer.param_groups:
            group["lr"] = lr
        columns: Dict[str, Any] = {}
        if self.loss_scale is not None:
            columns["loss_scale"] = self.loss_scale
            flat = torch.cat([each.grad.flatten() for each in model.parameters()])
            if not bool(torch.isfinite((flat * self.loss_scale).half()).all()):
                self.loss_scale *= 0.5
                return {**columns, "grad_norm": math.inf, "update_norm": 0.0}
        optimizer.step()
        after = torch.cat([each.detach().flatten() for each in model.parameters()])
        return {**columns, "update_norm": float((after - before).norm())}

    def _validate(self, model: Any) -> float:
        torch = self.torch
        with torch.no_grad():
            logits = model(self.x[_SAMPLES:])
            return float(torch.nn.functional.cross_entropy(logits, self.y[_SAMPLES:]))


def onset_of(seed: int, fault: str, between: Sequence[int] = (300, 420)) -> int:
    """The step at which the fault begins, by chance."""
    return random.Random(f"{fault} {seed}").randrange(*between)
