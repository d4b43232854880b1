"""Argus with Unsloth, whose trainers are Hugging Face's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, Optional

from plarv.discovery import describe_model

if TYPE_CHECKING:
    from plarv.integrations.huggingface import ArgusCallback

__all__ = ["patch_unsloth"]

_METADATA = ("num_layers", "hidden_dim", "vocab_size", "sequence_length", "dtype")


def patch_unsloth(model: Any, api_key: Optional[str] = None, **settings: Any) -> ArgusCallback:
    """An ``ArgusCallback`` that knows the model's shape, for ``Trainer(callbacks=[...])``.

    Layers, hidden size, vocabulary, sequence length and dtype come from ``model.config`` (its
    ``text_config`` for a vision model), also under LoRA; ``max_seq_length``, which Unsloth keeps
    with the model, wins over the config's longest sequence. ``settings`` are arguments of
    ``Argus`` and win over all of it. The model is not changed. ImportError: no transformers.
    """
    from plarv.integrations.huggingface import ArgusCallback

    found: Dict[str, Any] = {**describe_model(model)}
    found = {name: found[name] for name in _METADATA if name in found}
    length = getattr(model, "max_seq_length", None)
    if type(length) is int and length > 0:
        found["sequence_length"] = length
    return ArgusCallback(api_key, **{**found, **settings})
