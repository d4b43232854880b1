from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.producer.runs import controls_of, steps_of

from plarv.integrations.unsloth import patch_unsloth
from plarv.settings import text

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def tiny_gpt() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=16,
        vocab_size=64,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def test_a_language_model_is_trained_and_its_shape_known(tmp_path: Path) -> None:
    model = tiny_gpt()
    model.max_seq_length = 24  # where Unsloth keeps it
    callback = patch_unsloth(model, api_key="key:secret", run_id="gpt", silent=True)
    torch.manual_seed(1)
    tokens = [torch.randint(64, (12,)) for _ in range(16)]
    transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            max_steps=3,
            save_strategy="no",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            dataloader_pin_memory=False,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        callbacks=[callback],
    ).train()
    folder = Path(text("ARGUS_DIR")) / "runs" / "gpt"
    (started,) = controls_of(folder, "session_started")
    expected = {
        "num_layers": 2, "hidden_dim": 16, "vocab_size": 64, "sequence_length": 24,
        "dtype": "float32",
    }  # fmt: skip
    assert {name: started.data[name] for name in expected} == expected
    losses: Any = [step.loss for step in steps_of(folder)]
    assert losses == pytest.approx([math.log(64)] * 3, abs=0.5)  # not divided once more


def test_the_callers_own_words_win_over_what_is_found() -> None:
    callback: Any = patch_unsloth(tiny_gpt(), num_layers=7)
    assert callback._run.settings["num_layers"] == 7
    assert callback._run.settings["hidden_dim"] == 16


def test_a_model_without_a_config_is_no_hindrance() -> None:
    assert patch_unsloth(object()).argus is None
