"""Axolotl does not install beside these tests: they hold the plugin to a stand-in of its interface.

Read in the wheel of axolotl 0.19.0: ``integrations/base.py`` (BasePlugin, load_plugin,
PluginManager), ``integrations/config.py`` (merge_input_args), ``cli/config.py`` (prepare_plugins),
``train.py`` (setup_model_and_trainer). Only what a plugin without models or data meets is here.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest
import torch
from tests.producer.runs import controls_of, steps_of

from plarv.exceptions import ArgusConfigurationError
from plarv.integrations import axolotl as integration
from plarv.settings import text

transformers: Any = pytest.importorskip("transformers")
pydantic: Any = pytest.importorskip("pydantic")
pytest.importorskip("accelerate")

NAME = "plarv.integrations.axolotl.ArgusAxolotlPlugin"


class Configuration(Dict[str, Any]):
    """As DictDefault: what is not there is None, as an attribute too."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


class BasePlugin:
    def __init__(self) -> None:
        pass

    def register(self, cfg: Any) -> None:
        pass

    def get_input_args(self) -> Optional[str]:
        return None

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        pass

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> List[Any]:
        return []

    def post_train(self, cfg: Any, model: Any) -> None:
        pass


def load_plugin(name: str) -> Any:
    module, _, kind = name.rpartition(".")
    return getattr(importlib.import_module(module), kind)()


def validated(plugin: Any, cfg: Configuration) -> Configuration:
    """Merges the plugin's keys into the schema, which drops all others."""

    class AxolotlInputConfig(pydantic.BaseModel):  # type: ignore[misc]
        learning_rate: Optional[float] = None

    module, _, kind = plugin.get_input_args().rpartition(".")
    space: Dict[str, Any] = {"Base": AxolotlInputConfig}
    exec(f"from {module} import {kind}\nclass Merged(Base, {kind}):\n    pass\n", space)
    return Configuration(space["Merged"](**cfg).model_dump(exclude_none=True))


@pytest.fixture(autouse=True)
def _axolotl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    base: Any = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = BasePlugin
    for module in (types.ModuleType("axolotl"), types.ModuleType("axolotl.integrations"), base):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield
    for name in ("ArgusAxolotlPlugin", "ArgusPluginArgs"):
        vars(integration).pop(name, None)


def trainer_of(folder: Path) -> Any:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(2, 1)

        def forward(self, x: Any) -> Dict[str, Any]:
            return {"loss": self.linear(x).square().mean()}

    return transformers.Trainer(
        model=Model(),
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            max_steps=2,
            save_strategy="no",
            dataloader_pin_memory=False,
        ),
        train_dataset=[{"x": torch.ones(2)}] * 32,
    )


def test_the_yaml_alone_puts_argus_into_the_training(tmp_path: Path) -> None:
    cfg = Configuration(
        plugins=[NAME], argus_run_id="axolotl-run", argus_api_key="key:secret", learning_rate=0.1
    )
    plugin = load_plugin(NAME)
    assert isinstance(plugin, BasePlugin)
    plugin.register(cfg)
    cfg = validated(plugin, cfg)
    assert cfg.argus_run_id == "axolotl-run"
    trainer = trainer_of(tmp_path)
    plugin.post_trainer_create(cfg, trainer)
    plugin.post_trainer_create(cfg, trainer)  # a second time it is there already
    for callback in plugin.add_callbacks_post_trainer(cfg, trainer):
        trainer.add_callback(callback)
    trainer.train()
    plugin.post_train(cfg, trainer.model)
    folder = Path(text("ARGUS_DIR")) / "runs" / "axolotl-run"
    assert [step.step for step in steps_of(folder)] == [0, 1]
    (finished,) = controls_of(folder, "session_finished")
    assert finished.data["status"] == "completed"


def test_without_its_keys_the_run_names_itself(tmp_path: Path) -> None:
    plugin = load_plugin(NAME)
    cfg = Configuration(plugins=[NAME])
    plugin.register(cfg)
    trainer = trainer_of(tmp_path)
    plugin.post_trainer_create(validated(plugin, cfg), trainer)
    trainer.train()
    assert len(list((Path(text("ARGUS_DIR")) / "runs").iterdir())) == 1


@pytest.mark.parametrize(
    "wrong", [{"argus_run_id": "a/b"}, {"argus_run_id": 7}, {"argus_api_key": ["x"]}]
)
def test_a_wrong_value_is_said_when_the_yaml_is_read(wrong: Dict[str, Any]) -> None:
    plugin = load_plugin(NAME)
    with pytest.raises(ArgusConfigurationError, match=next(iter(wrong))):
        plugin.register(Configuration(wrong))


def test_without_axolotl_the_plugin_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", None)
    with pytest.raises(ImportError, match="axolotl"):
        load_plugin(NAME)
