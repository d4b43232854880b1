"""The entropy of attention, from a few queries, wherever it is computed."""

from __future__ import annotations

import math
import threading
import weakref
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

from plarv.faults import Guard
from plarv.local.activations import ActivationProbe
from plarv.local.layers import Hook, is_out_of_reach
from plarv.local.readings import Readings

__all__ = ["AttentionProbe"]

_EVERY = 6  # steps
_QUERIES = 8
_SAMPLES = 2  # of the batch
_MIN_KEYS = 4
_MASKED = -9e3  # the masks in use are -inf, -1e9, -1e4 or the type's least number

Taker = Callable[[int, str, float], None]


class AttentionProbe:
    """Watches the forward of every sixth step through a ``TorchFunctionMode``.

    Seen are ``scaled_dot_product_attention``, ``nn.MultiheadAttention`` and any softmax over
    (batch, heads, queries, keys): the weights need not be returned by anybody. Of each call the
    entropy of eight queries of two samples is computed apart, which changes nothing of the call.
    """

    def __init__(
        self, torch: Any, activations: ActivationProbe, readings: Readings, guard: Guard
    ) -> None:
        self._torch = torch
        self._activations = activations
        self._readings = readings
        self._guard = guard
        self._handles: List[Any] = []
        self._seen: Set[str] = set()
        self._modes: Dict[int, Any] = {}  # by thread
        self._due = True
        self._step = 0
        self._take: Optional[Taker] = None
        functional = torch.nn.functional
        self._watch = _watch_class(torch)
        self.functions: Dict[Any, Callable[..., None]] = {
            functional.scaled_dot_product_attention: self._saw_fused,
            functional.multi_head_attention_forward: self._saw_multihead,
            functional.softmax: self._saw_softmax,
            torch.softmax: self._saw_softmax,
            torch.Tensor.softmax: self._saw_softmax,
        }

    def attach(self, model: Any, take: Taker, is_compiling: Callable[[], bool]) -> None:
        """Hooks the model's forward; TypeError where torch (before 2.1) cannot do it safely."""
        self._take = take
        probe = weakref.ref(self)

        def enter(*_: Any) -> None:
            alive = probe()
            if alive is not None:
                alive.enter()

        def leave(*_: Any) -> None:
            alive = probe()
            if alive is not None:
                alive.leave()

        # always_call: an exception in the forward must not leave the mode behind
        self._handles = [
            model.register_forward_hook(Hook(leave, is_compiling), always_call=True),
            model.register_forward_pre_hook(Hook(enter, is_compiling)),
        ]

    def detach(self) -> None:
        """Removes the hooks, and what an interrupted forward left behind on this thread."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._clear()

    def begin(self, step: int, suspicious: bool) -> None:
        """A new step."""
        self._clear()
        self._step = step
        self._seen = set()
        self._due = step % _EVERY == 0 or suspicious

    def enter(self) -> None:
        """The forward begins."""
        self._clear()
        mode = None
        if self._due and self._torch.is_grad_enabled() and self._guard.failures <= 8:
            with self._guard:
                if not is_out_of_reach(self._torch):
                    mode = self._watch()
                    mode.shown_to = self
                    mode.__enter__()
        if mode is not None:
            self._modes[threading.get_ident()] = mode

    def leave(self) -> None:
        """The forward has ended, one way or the other."""
        self._clear()

    def _clear(self) -> None:
        """Takes this thread's mode off. KeyboardInterrupt ends a forward without any hook."""
        mode = self._modes.pop(threading.get_ident(), None)
        if mode is None:
            return
        functions = self._torch._C
        above: List[Any] = []
        while functions._len_torch_function_stack():
            top = functions._pop_torch_function_stack()
            if top is mode:
                break
            above.append(top)
        for each in reversed(above):
            functions._push_on_torch_function_stack(each)

    def saw(self, function: Any, arguments: Tuple[Any, ...], named: Dict[str, Any]) -> None:
        """One of ``functions`` was called during a watched forward."""
        with self._guard, self._torch.no_grad():
            self.functions[function](*arguments, **named)

    # -- the three ways to compute attention

    def _saw_fused(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: Optional[float] = None,
        **_: Any,
    ) -> None:
        if query.dim() not in (3, 4) or key.shape[-2] < _MIN_KEYS or not self._is_new():
            return
        if query.dim() == 3:
            query, key = query.unsqueeze(1), key.unsqueeze(1)
        batch, rows = _spread(query.shape[0], _SAMPLES), _late(query.shape[-2])
        shape = (*query.shape[:-1], key.shape[-2])
        mask = None
        if attn_mask is not None:
            mask = attn_mask.detach().expand(shape)[batch][:, :, rows]
        query = query.detach()[batch][:, :, rows].float()
        key = key.detach()[batch].float()
        scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
        self._score(query * scale, key, rows, mask, is_causal)

    def _saw_multihead(
        self,
        query: Any,
        key: Any,
        value: Any,
        embed_dim: int,
        num_heads: int,
        in_proj_weight: Any = None,
        in_proj_bias: Any = None,
        *_: Any,
        attn_mask: Any = None,
        is_causal: bool = False,
        q_proj_weight: Any = None,
        k_proj_weight: Any = None,
        **__: Any,
    ) -> None:
        if query.dim() != 3 or key.shape[0] < _MIN_KEYS or not self._is_new():
            return
        if in_proj_weight is not None:
            q_proj_weight, k_proj_weight, _value = in_proj_weight.detach().chunk(3)
        batch, rows = _spread(query.shape[1], _SAMPLES), _late(query.shape[0])
        shape = (query.shape[1], num_heads, query.shape[0], key.shape[0])
        query = query.detach()[rows][:, batch].float() @ q_proj_weight.detach().float().T
        key = key.detach()[:, batch].float() @ k_proj_weight.detach().float().T
        if in_proj_bias is not None:
            biases = in_proj_bias.detach().float().chunk(3)
            query, key = query + biases[0], key + biases[1]
        query = query.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)
        key = key.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)
        mask = None
        if attn_mask is not None:
            mask = attn_mask.detach()
            mask = mask.view(shape) if mask.dim() == 3 else mask.expand(shape)
            mask = mask[batch][:, :, rows]
            mask = ~mask if mask.dtype is self._torch.bool else mask
        causal = is_causal and mask is None
        self._score(query / math.sqrt(query.shape[-1]), key, rows, mask, causal)

    def _saw_softmax(self, scores: Any, dim: Optional[int] = None, *_: Any, **__: Any) -> None:
        dims = scores.dim()
        square = dims == 3 and scores.shape[-1] == scores.shape[-2]
        if (dims != 4 and not square) or dim not in (-1, dims - 1) or dim is None:
            return
        if scores.shape[-1] < _MIN_KEYS or not self._is_new():
            return
        rows = _late(scores.shape[-2])
        picked = scores.detach()[_spread(scores.shape[0], _SAMPLES * (1 if dims == 4 else 8))]
        self._put(picked[..., rows, :].float())

    # -- small parts

    def _is_new(self) -> bool:
        """Once a layer and step."""
        name = self._name()
        if name in self._seen:
            return False
        self._seen.add(name)
        return True

    def _name(self) -> str:
        last = self._activations.last_name
        return last.rpartition(".")[0] or last or "attention"

    def _score(self, query: Any, key: Any, rows: slice, mask: Any, causal: bool) -> None:
        torch = self._torch
        if key.shape[1] != query.shape[1]:  # grouped queries
            key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = query @ key.transpose(-1, -2)
        if causal:
            keys = torch.arange(key.shape[-2], device=scores.device)
            places = torch.arange(rows.start, rows.stop, rows.step, device=scores.device)
            scores = scores.masked_fill(keys > places[:, None], -math.inf)
        if mask is not None:
            hidden = mask.dtype is torch.bool
            scores = scores.masked_fill(~mask, -math.inf) if hidden else scores + mask
        self._put(scores)

    def _put(self, scores: Any) -> None:
        torch = self._torch
        allowed = (scores > _MASKED).sum(-1)
        logs = torch.log_softmax(scores, -1).clamp_min(-1e4)
        entropy = -(logs.exp() * logs).sum(-1) / allowed.clamp_min(2).log()
        counts = (allowed >= _MIN_KEYS).float()
        entropy = torch.where(counts > 0, entropy, torch.zeros_like(entropy))
        step, name, take = self._step, self._name(), self._take

        def taken(values: List[float]) -> None:
            if take is not None:
                take(step, name, values[0])

        self._readings.put(entropy.sum() / counts.sum(), taken)


def _watch_class(torch: Any) -> Any:
    """A mode that shows a probe each function that is called, and calls it as it was."""

    class Watch(torch.overrides.TorchFunctionMode):  # type: ignore[misc]
        shown_to: AttentionProbe

        def __torch_function__(
            self, func: Any, types: Any, args: Tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if func in self.shown_to.functions:
                self.shown_to.saw(func, args, kwargs or {})
            return func(*args, **kwargs) if kwargs else func(*args)

    return Watch


def _spread(count: int, most: int) -> slice:
    """At most ``most`` of ``count`` places, evenly: a slice, which needs no copy of indices.

    >>> list(range(16))[_spread(16, 4)], list(range(3))[_spread(3, 2)]
    ([0, 4, 8, 12], [0, 1])
    """
    most = min(count, most)
    apart = max(1, count // max(1, most))
    return slice(0, apart * most, apart)


def _late(count: int) -> slice:
    """Places in the later half, the last among them: causal queries with many keys.

    >>> list(range(32))[_late(32)]
    [17, 19, 21, 23, 25, 27, 29, 31]
    """
    apart = max(1, count // (2 * _QUERIES))
    most = min(count, _QUERIES)
    return slice(count - 1 - apart * (most - 1), count, apart)
