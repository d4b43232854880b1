"""A DataLoader's workers, with Argus within their reach."""

from __future__ import annotations

import os
from pathlib import Path

import torch  # noqa: F401 - without it this file is left out
from tests.producer.processes import run
from tests.producer.runs import events_of, recorded, replayed, steps_of

LOOP = """
    import torch
    from torch.utils.data import DataLoader, Dataset
    from plarv import Argus

    class Reporting(Dataset):
        '''Reports from where nobody should: its worker has a copy of the run's Argus.'''

        def __init__(self, argus):
            self.argus = argus

        def __len__(self):
            return 32

        def __getitem__(self, index):
            decision = self.argus.step(3.5)
            assert self.argus.run_id == "", "a worker reports"
            return torch.full((4,), float(index))

    def train(method):
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        argus = Argus(run_id=method, model=model, optimizer=optimizer)
        data = Reporting(argus)
        for batch in DataLoader(data, 4, num_workers=2, multiprocessing_context=method):
            loss = model(batch).pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            argus.step(loss)
        argus.complete()

    if __name__ == "__main__":
        torch.set_num_threads(1)
        train("fork")
        train("spawn")
"""


def test_workers_of_a_data_loader_report_nothing_and_end(tmp_path: Path) -> None:
    done = run(tmp_path, LOOP, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "[argus] run" in line]
    assert len(said) == 4, done.stderr
    for method in ("fork", "spawn"):
        folder = Path(os.environ["ARGUS_DIR"]) / "runs" / method
        assert [event.record for event in events_of(folder)] == list(range(10))
        steps = steps_of(folder)
        assert [step.step for step in steps] == list(range(8))
        assert all(step.grad_norm is not None and step.loss != 3.5 for step in steps)
        assert recorded(folder) == replayed(folder)
