"""Weights, gradients and optimizer state, looked at around the optimizer's step."""

from __future__ import annotations

import inspect
import weakref
from typing import Any, Callable, Dict, List, Sequence, Set, Tuple

from plarv.faults import Guard
from plarv.local.checks import Checks
from plarv.local.gradient_flow import StepContext
from plarv.local.layers import is_out_of_reach, layer_names
from plarv.local.multi_tensor import Named, Rolling, each_norm
from plarv.local.optimizer_state import StateReader, learning_rate_in
from plarv.local.readings import Readings
from plarv.local.unchanged import Unchanged
from plarv.local.update_sample import UpdateSample
from plarv.loss_scaler import LossScalerSearch
from plarv.tensors import is_tensor, local_part

__all__ = ["StepProbe"]

# elements a step, above which weights and state are looked at in turns
_CPU_ELEMENTS = 16 << 20
_DEVICE_ELEMENTS = 256 << 20
_SMALL_ELEMENTS = 1 << 20  # up to here norms are taken of all tensors on each step
_STATE_PARTS = 8
_TURNS = 6  # of the norms of weights and state
_SAMPLE_EVERY = 4  # steps of the optimizer; taken before one, compared before the next
_UNHEARD = 64  # looks without a step of the optimizer, after which its hooks are not believed in
_MAX_FAILURES = 8


class StepProbe:
    """One look a step at all that an optimizer's step reads and writes.

    The look is taken by ``look()`` before the optimizer's step, else by the hook at its beginning.
    Checksums are taken when the step has ended and compared when the next begins, the whole of the
    weights, an eighth of the state. Norms are those of a sixth of the tensors, in turns. Works
    without an optimizer, or with one that has no hooks: then only norms are seen.
    """

    def __init__(
        self,
        torch: Any,
        model: Any,
        optimizer: Any,
        checks: Checks,
        readings: Readings,
        guard: Guard,
    ) -> None:
        self._torch = torch
        self._model = model
        self._optimizer = optimizer
        self._checks = checks
        self._readings = readings
        self.guard = guard
        self._names = layer_names(model)
        self._parameters: List[Any] = _unique(torch, model, optimizer)
        on_device = any(parameter.device.type != "cpu" for parameter in self._parameters)
        elements = _DEVICE_ELEMENTS if on_device else _CPU_ELEMENTS
        total = sum(local_part(parameter).numel() for parameter in self._parameters)
        self._elements = min(elements, max(_SMALL_ELEMENTS, total // _TURNS))
        self._turns: Dict[str, Rolling] = {}
        self._weights = Unchanged(torch, Rolling(elements))
        self._state = Unchanged(torch, Rolling(elements), _STATE_PARTS)
        self._sample = UpdateSample(torch)
        self._state_reader = StateReader(torch, optimizer, self.name_of)
        self._scaler = LossScalerSearch()
        self._handles: List[Any] = []
        self._looked = False
        self._looked_in_hook = False
        self._gradients_seen = False
        self._stepped = False
        self._num_steps = 0  # of the optimizer
        self._unheard = 0  # steps of ours since
        self._step = 0
        self._context: Callable[[Set[str]], StepContext] = _no_context

    def attach(self, context: Callable[[Set[str]], StepContext]) -> bool:
        """Installs the optimizer's hooks; False where it has none."""
        self._context = context
        probe = weakref.ref(self)

        def before(*_: Any) -> None:
            alive = probe()
            if alive is not None:
                alive._before_step()

        def after(*_: Any) -> None:
            alive = probe()
            if alive is not None:
                alive._after_step()

        register = getattr(self._optimizer, "register_step_pre_hook", None)
        if register is None:
            return False
        self._handles = [register(before), self._optimizer.register_step_post_hook(after)]
        return True

    def detach(self) -> None:
        """Removes the hooks, forgets what the next comparison would start from."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._weights.forget()
        self._state.forget()
        self._state_reader.forget()
        self._sample.forget()

    @property
    def layers(self) -> Set[str]:
        """Layers with parameters."""
        return {self.name_of(parameter) for parameter in self._parameters}

    def is_outdated(self) -> bool:
        """Whether parameters came or went since: a layer that was added, pruned, put in anew."""
        known = {id(parameter) for parameter in self._parameters}
        return known != {
            id(parameter) for parameter in _unique(self._torch, self._model, self._optimizer)
        }

    @property
    def is_unheard(self) -> bool:
        """Whether the optimizer's hooks have long not run (torch 2.0 drops them where anything is
        compiled): then only norms are seen.
        """
        return bool(self._handles) and self._unheard > _UNHEARD

    def begin(self, step: int) -> None:
        """A new step of the detector."""
        self._step = step
        self._unheard += 1
        if self._looked_in_hook or not self._handles or self.is_unheard:
            self._looked = self._looked_in_hook = self._gradients_seen = False

    def name_of(self, parameter: Any) -> str:
        """The layer of a parameter."""
        return self._names.get(id(parameter), "parameters of no module")

    def look(self) -> None:
        """Looks, if no look was taken since the last step of the optimizer."""
        if self.guard.failures >= _MAX_FAILURES:
            return
        with self.guard, self._torch.no_grad():
            if is_out_of_reach(self._torch):
                return
            if not self._looked:
                self._looked = True
                self._look_at_weights()
                if self._optimizer is not None:
                    self._look_at_state()
            if not self._gradients_seen:
                self._look_at_gradients()

    def _before_step(self) -> None:
        self._looked_in_hook = not self._looked
        if not self._scaler.is_over:
            self._scaler.look(inspect.currentframe())
        self.look()
        with self.guard, self._torch.no_grad():
            if not is_out_of_reach(self._torch) and self.guard.failures < _MAX_FAILURES:
                self._compare()
                self._look_at_updates()

    def _after_step(self) -> None:
        self._stepped = True
        self._num_steps += 1
        self._unheard = 0
        if not self._looked_in_hook:
            self._looked = self._gradients_seen = False
        with self.guard, self._torch.no_grad():
            if not is_out_of_reach(self._torch) and self.guard.failures < _MAX_FAILURES:
                self._weights.remember(self._named_weights())
                self._state.remember(self._state_reader.read().tensors)

    # -- what is looked at

    def _compare(self) -> None:
        step, checks = self._step, self._checks

        def put_weights(layers: Tuple[str, ...], flags: Any, written: Sequence[bool]) -> None:
            self._readings.put(
                flags, lambda values: checks.hardware_integrity.take(step, layers, values, written)
            )

        def put_state(layers: Tuple[str, ...], flags: Any, _: Sequence[bool]) -> None:
            self._readings.put(
                flags, lambda values: checks.optimizer_health.take_changed(step, layers, values)
            )

        self._weights.compare(self._named_weights(), put_weights)
        if self._optimizer is not None:
            self._state.compare(self._state_reader.read().tensors, put_state)

    def _look_at_weights(self) -> None:
        step, check = self._step, self._checks.weight_imbalance
        named = list(self._named_weights().values())
        named = self._in_turn("weights", named, whole=True)
        elements: Dict[str, int] = {}
        for layer, tensor in named:
            elements[layer] = elements.get(layer, 0) + local_part(tensor).numel()
        layers, norms = self._norms(named)
        if norms is not None:
            sizes = [elements.pop(layer, 0) for layer in layers]
            self._readings.put(norms, lambda values: check.take(step, layers, values, sizes))

    def _look_at_state(self) -> None:
        step, check = self._step, self._checks.optimizer_health
        state = self._state_reader.read()
        stepped, self._stepped = self._stepped, False
        check.take_counters(step, state.host_counters(), stepped=stepped)
        on_device = state.device_counters()
        if on_device:
            names = [named.layer for named in on_device]
            counters = self._torch.stack([each.tensor.reshape(()).float() for each in on_device])
            self._readings.put(
                counters,
                lambda values: check.take_counters(step, dict(zip(names, values)), stepped=stepped),
            )
        seconds = self._in_turn("second moments", state.seconds())
        if seconds:
            least = self._torch.stack([named.tensor.amin().float() for named in seconds])
            of = [named.layer for named in seconds]
            self._readings.put(least, lambda values: check.take_minima(step, of, values))
        for key in {key for _, key in state.tensors}:
            # scalars keep accounts (NAdam's mu_product goes to zero): only their checksums count
            named = [
                each
                for (_, name), each in state.tensors.items()
                if name == key and each.tensor.dim()
            ]
            self._put_norms(key, self._in_turn(key, named, whole=True))

    def _put_norms(self, key: str, named: List[Named]) -> None:
        step, check = self._step, self._checks.optimizer_health
        power = 0.5 if "sq" in key or key == "sum" else 1.0

        def put(layers: Tuple[str, ...], norms: Any) -> None:
            self._readings.put(
                norms**power, lambda values: check.take_norms(step, key, layers, values)
            )

        each_norm(self._torch, named, put)

    def _look_at_gradients(self) -> None:
        step, check = self._step, self._checks.gradient_flow
        trainable = [each for each in self._parameters if each.requires_grad]
        named = [
            Named(self.name_of(parameter), parameter.grad)
            for parameter in trainable
            if parameter.grad is not None
        ]
        if not named:
            return
        self._gradients_seen = True
        context = self._context({self.name_of(parameter) for parameter in trainable})
        # a scaler is found at the first step that it does not skip: until then there may be one
        may_skip = bool(self._handles) and self._num_steps == 0
        context = context._replace(scaled=may_skip or self._scaler.scale() is not None)
        layers, norms = self._norms(named)
        if norms is not None:
            self._readings.put(norms, lambda values: check.take(step, layers, values, context))

    def _norms(self, named: List[Named]) -> Tuple[List[str], Any]:
        """The L2 norm of each tensor in one vector, and their layers; None without numbers."""
        layers: List[str] = []
        vectors: List[Any] = []

        def put(names: Tuple[str, ...], norms: Any) -> None:
            layers.extend(names)
            vectors.append(norms.float())

        each_norm(self._torch, named, put)
        if not vectors:
            return layers, None
        device = next((each.device for each in vectors if each.device.type != "cpu"), None)
        device = vectors[0].device if device is None else device
        return layers, self._torch.cat([each.to(device, non_blocking=True) for each in vectors])

    def _look_at_updates(self) -> None:
        turn = self._num_steps % _SAMPLE_EVERY
        if turn > 1:
            return
        mine = {id(each) for group in self._optimizer.param_groups for each in group["params"]}
        named = [
            Named(self.name_of(each), each)
            for each in self._parameters
            if id(each) in mine and each.dim() >= 2 and each.requires_grad
        ]
        if turn == 0:
            self._sample.take(named)
            return
        step, check = self._step, self._checks.precision_erosion
        rate = learning_rate_in(self._optimizer)

        def put(layers: Tuple[str, ...], shares: Any) -> None:
            self._readings.put(shares, lambda values: check.take(step, layers, values, rate))

        self._sample.compare(named, put)

    def _named_weights(self) -> Dict[int, Named]:
        return {
            index: Named(self.name_of(parameter), parameter)
            for index, parameter in enumerate(self._parameters)
            if parameter.device.type != "meta" and parameter.layout is self._torch.strided
        }

    def _in_turn(self, what: str, named: List[Named], *, whole: bool = False) -> List[Named]:
        """Those whose turn it is; ``whole``: with all other tensors of their layers."""
        rolling = self._turns.setdefault(what, Rolling(self._elements))
        chosen = rolling.next([local_part(each.tensor).numel() for each in named])
        if len(chosen) == len(named):
            return named
        layers = {named[index].layer for index in chosen}
        if whole:
            return [each for each in named if each.layer in layers]
        return [named[index] for index in chosen]


def _unique(torch: Any, model: Any, optimizer: Any) -> List[Any]:
    """The optimizer's parameters, and the frozen ones of the model; all where there is none."""
    found: Dict[int, Any] = {}
    if optimizer is not None:
        for group in optimizer.param_groups:
            found.update((id(parameter), parameter) for parameter in group["params"])
    for parameter in model.parameters():
        if optimizer is None or not parameter.requires_grad:
            found.setdefault(id(parameter), parameter)
    is_lazy: Any = torch.nn.parameter.is_lazy  # not made yet
    return [each for each in found.values() if is_tensor(each) and not is_lazy(each)]


def _no_context(trainable: Set[str]) -> StepContext:
    return StepContext(trainable, set())
