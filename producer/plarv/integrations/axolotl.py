"""Argus as a plugin of Axolotl: two keys in the YAML, nothing in the code.

Read in axolotl 0.19.0: ``axolotl.integrations.base.BasePlugin``, ``PluginManager`` and
``axolotl.cli.config.prepare_plugins``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Dict, Mapping, Optional

from plarv.exceptions import ArgusConfigurationError
from plarv.identity import validate_run_id

__all__ = ["ArgusAxolotlPlugin", "ArgusPluginArgs", "AxolotlHooks"]

_KEYS = {"argus_api_key": "api_key", "argus_run_id": "run_id"}


class AxolotlHooks:
    """In the YAML: ``plugins: [plarv.integrations.axolotl.ArgusAxolotlPlugin]``.

    ``argus_api_key`` and ``argus_run_id`` are optional, as in ``Argus``; the other settings come
    from the environment. An ``ArgusCallback`` is added to the trainer once it is there.
    """

    def register(self, cfg: Mapping[str, Any]) -> None:
        """Looks at the YAML as it was written. ArgusConfigurationError: a value that is none."""
        for key in _KEYS:
            value = cfg.get(key)
            if value is not None and not isinstance(value, str):
                raise ArgusConfigurationError(key, "must be text", value)
        if cfg.get("argus_run_id"):
            validate_run_id(cfg["argus_run_id"], "argus_run_id")

    def get_input_args(self) -> str:
        """The keys, as the class that Axolotl adds to its schema; it would drop them else."""
        return f"{__name__}.ArgusPluginArgs"

    def post_trainer_create(self, cfg: Mapping[str, Any], trainer: Any) -> None:
        """Adds the callback, once."""
        from plarv.integrations.huggingface import ArgusCallback

        callbacks: Any = getattr(getattr(trainer, "callback_handler", None), "callbacks", ())
        if any(isinstance(callback, ArgusCallback) for callback in callbacks):
            return
        given: Dict[str, Any] = {name: cfg.get(key) or None for key, name in _KEYS.items()}
        trainer.add_callback(ArgusCallback(**given))


if TYPE_CHECKING:
    ArgusAxolotlPlugin = AxolotlHooks
    ArgusPluginArgs = object


def __getattr__(name: str) -> Any:
    """Classes whose bases are Axolotl's and pydantic's: made when Axolotl asks for them."""
    if name == "ArgusAxolotlPlugin":
        base: Any = importlib.import_module("axolotl.integrations.base").BasePlugin
        about = {"__module__": __name__, "__doc__": AxolotlHooks.__doc__}
        made: Any = type(name, (AxolotlHooks, base), about)
    elif name == "ArgusPluginArgs":
        create_model: Any = importlib.import_module("pydantic").create_model
        made = create_model(name, **dict.fromkeys(_KEYS, (Optional[str], None)))
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made
    return made
