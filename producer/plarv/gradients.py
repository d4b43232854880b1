"""Gradient norms measured where they are whole: at the end of backward, by a hook.

After ``zero_grad()``, where the usual loop calls ``argus.step(loss)``, no gradient is left.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, cast

from plarv.faults import Faults, Guard
from plarv.loss_graph import parameters_of
from plarv.loss_scaler import LossScalerSearch
from plarv.tensors import global_norm, live_gradients, loaded_torch
from plarv.weight_sample import WeightSample

__all__ = ["GradientProbe", "GradientSignals", "parameters_of"]

_MAX_HOOKS = 8
_LEARNING_STEPS = 4  # long enough to see both halves of a run that alternates (a GAN)
_MAX_FAILURES = 3


class GradientSignals(NamedTuple):
    """What one step gave, each a 0-d tensor that nobody has waited for yet, or ``None``."""

    grad_norm: Optional[object] = None
    loss_scale: Optional[object] = None
    grad_l1_norm: Optional[object] = None
    grad_l2_norm: Optional[object] = None
    update_norm: Optional[object] = None


class GradientProbe:
    """Measures the gradient of ``parameters`` at the end of every backward, without waiting.

    Tensor hooks on at most eight of the parameters notice that a backward runs; the first to fire
    queues a callback for its end, which measures all of ``.grad``: before clipping, after the
    all-reduce of DDP, accumulated over the micro-batches so far, divided by the loss scale of a
    GradScaler that was found. With sharded parameters (FSDP) it is the norm of this rank's part.
    Where no hooked parameter took part in a step, all are hooked for a few steps and others chosen.

    Parameters are held weakly. Nothing here raises: failures are counted in ``faults``, and after
    three the probe rests. Cost of a step: one multi-tensor norm and about 50 us; every
    ``sample_every`` steps three samples of at most ``sample_size`` elements.
    """

    def __init__(
        self,
        parameters: Iterable[object],
        *,
        sample_every: int = 16,
        sample_size: int = 32_768,
        faults: Optional[Faults] = None,
    ) -> None:
        unique = {id(parameter): parameter for parameter in parameters}
        self._references = [weakref.ref(parameter) for parameter in unique.values()]
        self._sample_every = max(1, sample_every)
        self._sample_size = sample_size
        self._sample: Optional[WeightSample] = None
        self._hooks: Dict[int, Any] = {}
        self._optimizer_hooks: List[Any] = []
        self._scaler = LossScalerSearch()
        self._active = False
        self._queued = False
        self._was_read_directly = False
        self._learning: Optional[List[Set[int]]] = None
        self._arrived: Set[int] = set()
        self._fresh = GradientSignals()
        self._taken = GradientSignals()
        self._steps = 0
        self._norms_due = True
        self._update_due = True
        self._before: Optional[Any] = None
        self._guard = Guard("gradients could not be measured", faults)

    @property
    def is_attached(self) -> bool:
        """Whether hooks are in place."""
        return bool(self._hooks)

    @property
    def signals(self) -> GradientSignals:
        """All that the latest ``take()`` took."""
        return self._taken

    def attach(self) -> bool:
        """Install the hooks; False where torch is not loaded or no parameter wants a gradient."""
        self._active = True
        with self._guard:
            if not self._hooks:
                self._hook_only(_spread(self._trainable(), _MAX_HOOKS))
        return bool(self._hooks)

    def watch(self, optimizer: object) -> bool:
        """Follow this optimizer: finds its GradScaler, takes update norms exactly around its step.

        False where it has no step hooks (torch before 2.0, other libraries): update norms are then
        taken from one ``take()`` to the next.
        """
        for handle in self._optimizer_hooks:
            handle.remove()
        self._optimizer_hooks = []
        self._before = None
        probe = weakref.ref(self)

        def before_step(*_: object) -> None:
            alive = probe()
            if alive is not None:
                alive._optimizer_begins()

        def after_step(*_: object) -> None:
            alive = probe()
            if alive is not None:
                alive._optimizer_ended()

        try:
            owner: Any = optimizer
            self._optimizer_hooks.append(owner.register_step_pre_hook(before_step))
            self._optimizer_hooks.append(owner.register_step_post_hook(after_step))
        except (AttributeError, TypeError):  # not torch's, or a wrapper around one of torch's
            for handle in self._optimizer_hooks:
                handle.remove()
            self._optimizer_hooks = []
        return bool(self._optimizer_hooks)

    def use_scaler(self, scaler: object) -> None:
        """Unscale by this GradScaler without looking for one."""
        self._scaler.use(scaler)

    def scaler(self) -> Any:
        """The GradScaler that was given or found, or ``None``."""
        return self._scaler.scaler()

    def detach(self) -> None:
        """Remove every hook. The probe can be attached again."""
        for handle in [*self._hooks.values(), *self._optimizer_hooks]:
            handle.remove()
        self._active = False
        self._hooks = {}
        self._optimizer_hooks = []
        self._fresh = GradientSignals()
        self._before = None
        self._queued = False

    def take(self) -> Optional[object]:
        """The gradient norm of the latest backward since the last ``take()``, or ``None``.

        A 0-d tensor, still to be read without waiting (see ``ScalarReader``). Call it once a step;
        ``signals`` and ``scale()`` then hold what else that step gave.
        """
        self._taken, self._fresh = self._fresh, GradientSignals()
        self._queued = False  # a backward that raised never called back
        with self._guard:
            self._steps += 1
            if not self._optimizer_hooks:
                self._sample_between_steps()
            if self._taken.grad_l1_norm is not None:
                self._norms_due = False
            if self._steps % self._sample_every == 0:
                self._norms_due = self._update_due = True
                if self._active and not self._hooks:
                    self.attach()  # a model that was frozen may have thawed
            if self._hooks:
                self._adapt(self._taken.grad_norm is not None)
        return self._taken.grad_norm

    def scale(self) -> Optional[object]:
        """The loss scale in force during the backward that was taken, a 0-d tensor, or ``None``."""
        return self._taken.loss_scale

    def direct(self) -> Optional[object]:
        """The norm of the gradients that lie in ``.grad`` now, or ``None`` where there are none.

        For the first step, before any hook was there: whatever clipping or unscaling has done by
        now is in it.
        """
        torch = loaded_torch()
        if torch is None:
            return None
        self._was_read_directly = True
        with self._guard, torch.no_grad():
            present = [parameter for parameter in self._all() if parameter is not None]
            return cast(Optional[object], global_norm(torch, live_gradients(present)))
        return None

    # -- which parameters are hooked

    def _adapt(self, measured: bool) -> None:
        if self._guard.failures >= _MAX_FAILURES:
            self.detach()
        elif not measured and self._learning is None:
            if not self._was_read_directly:  # else the hooks came after this step's backward
                self._learning = []
                self._hook_only(self._trainable())
        elif measured and self._learning is not None:
            self._learning.append(self._arrived)
            if len(self._learning) >= _LEARNING_STEPS:
                chosen = {
                    index
                    for arrived in self._learning
                    for index in _spread(sorted(arrived), _MAX_HOOKS // _LEARNING_STEPS)
                }
                self._learning = None
                self._hook_only(sorted(chosen))
        self._arrived = set()
        self._was_read_directly = False

    def _trainable(self) -> List[int]:
        alive = enumerate(reference() for reference in self._references)
        return [index for index, p in alive if p is not None and getattr(p, "requires_grad", False)]

    def _hook_only(self, indices: Sequence[int]) -> None:
        if loaded_torch() is None:
            return
        wanted = set(indices)
        for index in [index for index in self._hooks if index not in wanted]:
            self._hooks.pop(index).remove()
        for index in indices:
            parameter: Any = self._references[index]()
            if index not in self._hooks and parameter is not None:
                self._hooks[index] = _on_gradient(parameter, self._arrival_of(index))

    def _arrival_of(self, index: int) -> Callable[..., None]:
        probe = weakref.ref(self)

        def arrived(_: object) -> None:
            alive = probe()
            if alive is not None:
                alive._gradient_arrived(index)

        return arrived

    # -- inside backward

    def _gradient_arrived(self, index: int) -> None:
        if self._learning is not None:
            self._arrived.add(index)
        if not self._queued and self._guard.failures < _MAX_FAILURES:
            self._queued = True
            self._at_end_of_backward(self._others_are_done)

    def _others_are_done(self) -> None:
        # DDP queues its own last callback after this one; once more, and it comes before us.
        self._at_end_of_backward(self._measure)

    def _at_end_of_backward(self, callback: Callable[[], None]) -> None:
        with self._guard:
            torch: Any = sys.modules["torch"]
            torch.autograd.Variable._execution_engine.queue_callback(callback)

    def _measure(self) -> None:
        self._queued = False
        torch: Any = sys.modules["torch"]
        with self._guard, torch.no_grad():
            if not _is_capturing(torch):
                self._measure_gradients(torch)

    def _measure_gradients(self, torch: Any) -> None:
        parameters = self._all()
        norm = global_norm(torch, live_gradients([p for p in parameters if p is not None]))
        if norm is None:
            return
        l1 = l2 = None
        if self._norms_due:
            l1, l2 = self._sample_of(torch).gradient_norms(parameters) or (None, None)
        self._fresh = self._fresh._replace(
            grad_norm=norm, loss_scale=None, grad_l1_norm=l1, grad_l2_norm=l2
        )
        self._unscale()

    def _unscale(self) -> None:
        """Divide what the latest backward gave by the scale in force: on the device, once."""
        scale = self._scaler.scale()
        fresh = self._fresh
        if scale is None or fresh.grad_norm is None or fresh.loss_scale is not None:
            return
        scale = scale.detach().clone()  # the scaler changes its own in place
        self._fresh = fresh._replace(
            grad_norm=_divided(fresh.grad_norm, scale),
            loss_scale=scale,
            grad_l1_norm=_divided(fresh.grad_l1_norm, scale),
            grad_l2_norm=_divided(fresh.grad_l2_norm, scale),
        )

    # -- around the optimizer's step

    def _optimizer_begins(self) -> None:
        with self._guard:
            if not self._scaler.is_over and self._scaler.look(inspect.currentframe()):
                torch: Any = sys.modules["torch"]
                with torch.no_grad():
                    self._unscale()  # update() has not changed the scale of this backward yet
            if self._update_due and self._guard.failures < _MAX_FAILURES:
                self._before = self._weights()

    def _optimizer_ended(self) -> None:
        if self._before is not None:
            with self._guard:
                self._compare()

    def _sample_between_steps(self) -> None:
        if self._before is not None:
            self._compare()
            self._taken = self._taken._replace(update_norm=self._fresh.update_norm)
            self._fresh = GradientSignals()
        elif self._update_due and self._guard.failures < _MAX_FAILURES:
            self._before = self._weights()

    def _compare(self) -> None:
        before, self._before = self._before, None
        after = self._weights()
        if self._sample is not None and before is not None and after is not None:
            with sys.modules["torch"].no_grad():
                update = self._sample.distance(before, after)
            self._fresh = self._fresh._replace(update_norm=update)
            self._update_due = False

    def _weights(self) -> Optional[Any]:
        torch = loaded_torch()
        if torch is None or _is_capturing(torch):
            return None
        with torch.no_grad():
            return self._sample_of(torch).weights(self._all())

    def _sample_of(self, torch: Any) -> WeightSample:
        if self._sample is None:
            self._sample = WeightSample(torch, self._all(), self._sample_size)
        return self._sample

    # -- small parts

    def _all(self) -> List[Any]:
        return [reference() for reference in self._references]


def _on_gradient(parameter: Any, callback: Callable[..., None]) -> Any:
    if hasattr(parameter, "register_post_accumulate_grad_hook"):
        return parameter.register_post_accumulate_grad_hook(callback)
    return parameter.register_hook(callback)  # torch before 2.1


def _divided(norm: Any, scale: Any) -> Optional[Any]:
    if norm is None:
        return None
    if norm.device != scale.device:
        # Towards the accelerator: the other way would wait for it.
        if scale.device.type == "cpu":
            scale = scale.to(norm.device, non_blocking=True)
        else:
            norm = norm.to(scale.device, non_blocking=True)
    return norm / scale


def _is_capturing(torch: Any) -> bool:
    """Whether a CUDA graph is being recorded, in which a measurement would be replayed for ever."""
    return bool(torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def _spread(indices: Sequence[int], count: int) -> List[int]:
    """At most ``count`` of ``indices``, evenly spaced, always with the first and the last."""
    if len(indices) <= count:
        return list(indices)
    last = len(indices) - 1
    return [indices[place * last // (count - 1)] for place in range(count)]
