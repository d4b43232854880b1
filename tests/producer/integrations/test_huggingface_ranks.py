from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
from tests.producer.runs import controls_of, events_of

from plarv_schemas.events import StepEvent

pytest.importorskip("torch.distributed.run")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[3]
JOB = """
import json, os, sys, time
import torch, transformers
from plarv import ArgusCallback
from plarv.orders import order

rank, folder = int(os.environ["RANK"]), sys.argv[1]
micro = []

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 1)
    def forward(self, x, labels):
        output = self.linear(x)
        loss = torch.nn.functional.mse_loss(output, labels)
        micro.append(loss.item())
        return {"loss": loss, "logits": output}

class Ordering(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        time.sleep(0.02)  # a step that takes as long as a step does: the ranks agree meanwhile
        if rank == 0 and state.global_step == 3:
            order("job", "pause")

rows = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
callback = ArgusCallback(run_id="job", mode="AUTO")
trainer = transformers.Trainer(
    model=Model(),
    args=transformers.TrainingArguments(
        output_dir=folder, use_cpu=True, report_to=[], disable_tqdm=True, max_steps=2000,
        save_strategy="no", per_device_train_batch_size=2, dataloader_pin_memory=False,
        ddp_backend="gloo",
    ),
    train_dataset=[{"x": row, "labels": row.sum().view(1)} for row in rows],
    callbacks=[callback, Ordering()],
)
trainer.train()
with open(f"{folder}/rank{rank}.json", "w") as file:
    found = {"steps": trainer.state.global_step, "micro": micro, "stop": str(callback.intervention)}
    json.dump(found, file)
"""


@pytest.mark.slow
def test_two_ranks_report_one_mean_loss_and_pause_at_one_step(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(JOB, encoding="utf-8")
    paths = [str(ROOT / name) for name in ("producer", "schemas", "processors", "sinks")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1",
        "ARGUS_DIR": str(tmp_path / "argus"), "ARGUS_STORE": "none",
    }  # fmt: skip
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path)],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ranks: List[Dict[str, Any]] = [
        json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)
    ]
    assert ranks[0]["steps"] == ranks[1]["steps"] < 2000
    assert "PAUSE" in ranks[0]["stop"]
    assert "PAUSE" in ranks[1]["stop"]
    folder = tmp_path / "argus" / "runs" / "job"
    events = [event for event in events_of(folder) if isinstance(event, StepEvent)]
    owner = [event for event in events if event.rank == 0]
    other = [event for event in events if event.rank == 1]
    means = [sum(pair) / 2 for pair in zip(ranks[0]["micro"], ranks[1]["micro"])]
    assert [event.loss for event in owner] == pytest.approx(means)
    assert [event.step for event in other] == list(range(ranks[0]["steps"]))
    assert {(event.loss, event.grad_norm) for event in other} == {(None, None)}
    statuses = [event.data["status"] for event in controls_of(folder, "session_finished")]
    assert statuses == ["paused", "paused"]
    assert done.stderr.count("the Trainer stops") == 1
