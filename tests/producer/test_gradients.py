"""The gradient is measured at the end of backward, exactly, and nothing else changes."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any, List, Optional

import pytest

torch: Any = pytest.importorskip("torch")
Function: Any = torch.autograd.Function

from plarv import faults  # noqa: E402
from plarv.gradients import GradientProbe, parameters_of  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _faults_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "RERAISE", True)
    torch.manual_seed(0)


def mlp(layers: int = 4, width: int = 8) -> Any:
    parts: List[Any] = []
    for _ in range(layers):
        parts += [torch.nn.Linear(width, width), torch.nn.Tanh()]
    return torch.nn.Sequential(*parts)


def loss_of(model: Any, rows: int = 4, width: int = 8) -> Any:
    return model(torch.randn(rows, width)).square().mean()


def read(scalar: Any) -> float:
    return float(scalar)


def norm_of(parameters: Any) -> float:
    """By hand: a plain sum of squares over all that have a gradient."""
    total = 0.0
    for parameter in parameters:
        if parameter.grad is not None:
            total += float(parameter.grad.double().square().sum())
    return math.sqrt(total)


def attached(model: Any, **options: Any) -> GradientProbe:
    probe = GradientProbe(model.parameters(), **options)
    assert probe.attach()
    return probe


def test_the_norm_is_that_of_the_whole_gradient_before_clipping_and_before_zero_grad() -> None:
    model = mlp()
    probe = attached(model)
    for _ in range(3):
        loss_of(model).backward()
        expected = norm_of(model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), expected / 100)
        model.zero_grad(set_to_none=True)
        assert read(probe.take()) == pytest.approx(expected, rel=1e-6)


def test_a_first_step_that_was_read_directly_does_not_look_for_other_hooks() -> None:
    model = mlp(layers=40)
    loss_of(model).backward()
    probe = attached(model)
    assert read(probe.direct()) == pytest.approx(norm_of(model.parameters()), rel=1e-6)
    assert probe.take() is None
    assert len([p for p in model.parameters() if p._post_accumulate_grad_hooks]) == 8


def test_a_step_without_backward_has_no_norm_and_nothing_is_taken_twice() -> None:
    model = mlp()
    probe = attached(model)
    assert probe.take() is None
    loss_of(model).backward()
    assert probe.take() is not None
    assert probe.take() is None


def test_with_accumulation_the_norm_is_that_of_the_sum_of_all_micro_batches() -> None:
    model = mlp()
    probe = attached(model)
    for _ in range(3):
        loss_of(model).backward()
    assert read(probe.take()) == pytest.approx(norm_of(model.parameters()), rel=1e-6)


def test_weights_are_bitwise_the_same_with_and_without_the_probe() -> None:
    def train(watched: bool) -> List[Any]:
        torch.manual_seed(1)
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        probe = GradientProbe(model.parameters(), sample_every=2)
        if watched:
            probe.attach()
            probe.watch(optimizer)
        for _ in range(8):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
            probe.take()
        return [parameter.detach().clone() for parameter in model.parameters()]

    for plain, watched in zip(train(False), train(True)):
        assert torch.equal(plain, watched)


def test_at_most_eight_parameters_are_hooked_among_them_the_first_and_the_last() -> None:
    model = mlp(layers=40)
    probe = attached(model)
    hooked = [p for p in model.parameters() if p._post_accumulate_grad_hooks]
    every = list(model.parameters())
    assert len(hooked) == 8
    assert hooked[0] is every[0]
    assert hooked[-1] is every[-1]
    probe.detach()
    assert not any(p._post_accumulate_grad_hooks for p in every)
    assert not probe.is_attached


def test_when_no_hooked_parameter_takes_part_others_are_hooked() -> None:
    model = mlp(layers=40)
    probe = attached(model)
    hooked = [p for p in model.parameters() if p._post_accumulate_grad_hooks]
    for parameter in hooked:
        parameter.requires_grad_(False)
    norms = []
    for _ in range(8):
        model.zero_grad()
        loss_of(model).backward()
        norms.append((probe.take(), norm_of(model.parameters())))
    assert norms[0][0] is None  # nobody told us; from the next step on it is there
    for norm, expected in norms[1:]:
        assert read(norm) == pytest.approx(expected, rel=1e-6)
    assert len([p for p in model.parameters() if p._post_accumulate_grad_hooks]) <= 8


def test_two_networks_trained_in_turn_are_both_measured() -> None:
    first, second = mlp(layers=30), mlp(layers=2)
    probe = GradientProbe([*first.parameters(), *second.parameters()])
    probe.attach()
    measured = []
    for step in range(24):
        model = (first, second)[step % 2]
        loss_of(model).backward()
        measured.append(probe.take() is not None)
    assert all(measured[8:])


def test_unused_and_frozen_parameters_count_as_nothing() -> None:
    model = mlp()
    model.unused = torch.nn.Linear(3, 3)
    model[2].weight.requires_grad_(False)
    used = torch.nn.Sequential(*list(model.children())[:-1])
    probe = attached(model)
    loss_of(used).backward()
    assert read(probe.take()) == pytest.approx(norm_of(model.parameters()), rel=1e-6)


def test_a_model_without_gradients_has_no_norm_until_it_is_thawed() -> None:
    model = mlp().requires_grad_(False)
    probe = GradientProbe(model.parameters(), sample_every=4)
    assert not probe.attach()
    for _ in range(4):
        assert probe.take() is None
    assert probe.direct() is None
    model.requires_grad_(True)
    for _ in range(4):
        probe.take()
    loss_of(model).backward()
    assert probe.take() is not None


def test_tied_weights_are_counted_once() -> None:
    model = mlp()
    model[2].weight = model[0].weight
    probe = GradientProbe([*model.parameters(), model[0].weight])
    probe.attach()
    loss_of(model).backward()
    assert read(probe.take()) == pytest.approx(norm_of(model.parameters()), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "complex64"])
def test_every_dtype_is_measured_and_halves_do_not_overflow(dtype: str) -> None:
    weight = torch.nn.Parameter(torch.ones(64, dtype=getattr(torch, dtype)))
    other = torch.nn.Parameter(torch.ones(2))
    probe = GradientProbe([weight, other])
    probe.attach()
    (weight * 60000).abs().sum().add(other.sum()).backward()
    assert read(probe.take()) == pytest.approx(60000 * 8, rel=5e-3)


def test_a_sparse_gradient_is_measured_with_its_repeated_rows_added() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = torch.nn.Embedding(10, 4, sparse=True)
        probe = attached(table)
        table(torch.tensor([1, 1, 3])).sum().backward()
        norm = read(probe.take())
    assert norm == pytest.approx(math.sqrt(4 * 2.0**2 + 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_gives_a_non_finite_norm(bad: float) -> None:
    model = mlp()
    probe = attached(model)
    (loss_of(model) * bad).backward()
    assert not math.isfinite(read(probe.take()))


def test_the_first_step_reads_what_still_lies_in_grad() -> None:
    model = mlp()
    probe = GradientProbe(model.parameters())
    assert probe.direct() is None
    loss_of(model).backward()
    assert read(probe.direct()) == pytest.approx(norm_of(model.parameters()), rel=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_are_in_the_norm(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model = mlp(layers=20)
    probe = attached(model)
    for _ in range(2):
        model.zero_grad()
        hidden = model[:2](torch.randn(4, 8))
        for start in range(2, 36, 2):
            hidden = checkpoint(model[start : start + 2], hidden, use_reentrant=reentrant)
        model[36:](hidden).square().mean().backward()
        assert read(probe.take()) == pytest.approx(norm_of(model.parameters()), rel=1e-6)


def test_a_backward_that_raised_does_not_silence_the_next() -> None:
    class Broken(Function):  # type: ignore[misc]
        @staticmethod
        def forward(_: Any, x: Any) -> Any:
            return x.clone()

        @staticmethod
        def backward(_: Any, __: Any) -> Any:
            raise RuntimeError("out of memory")

    model = mlp()
    probe = attached(model)
    loss = model[1:](Broken.apply(model[0](torch.randn(4, 8)))).sum()
    with pytest.raises(RuntimeError, match="out of memory"):
        loss.backward()
    assert probe.take() is None
    model.zero_grad()
    loss_of(model).backward()
    assert read(probe.take()) == pytest.approx(norm_of(model.parameters()), rel=1e-6)


def test_a_failure_of_ours_never_reaches_the_backward_and_ends_the_probe_after_three(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(faults, "RERAISE", False)
    model = mlp()
    counts = faults.Faults()
    probe = GradientProbe(model.parameters(), faults=counts)
    probe.attach()
    monkeypatch.setattr("plarv.gradients.global_norm", _failing)
    for _ in range(5):
        loss_of(model).backward()
        assert probe.take() is None
    assert list(counts.counts.values()) == [3]
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def _failing(*_: object) -> None:
    raise ValueError("a fault of ours")


def test_neither_model_nor_probe_is_kept_alive() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe: Optional[GradientProbe] = attached(model)
    assert probe is not None
    probe.watch(optimizer)
    loss_of(model).backward()
    optimizer.step()
    probe.take()
    weight, watched = weakref.ref(model[0].weight), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert weight() is None
    assert watched() is None
    assert probe.take() is None
    gone = weakref.ref(probe)
    probe = None
    assert gone() is None


def test_hooks_of_a_probe_that_is_gone_do_nothing() -> None:
    model = mlp()
    attached(model)
    loss_of(model).backward()
    assert norm_of(model.parameters()) > 0


def test_a_watched_model_can_be_copied_and_pickled() -> None:
    model = mlp()
    probe = attached(model)
    twin = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))
    for other in (twin, again):
        loss_of(other).backward()
        assert probe.take() is None


def test_the_probe_survives_a_change_of_the_models_dtype() -> None:
    model = mlp()
    probe = attached(model)
    model.double()
    model(torch.randn(4, 8, dtype=torch.float64)).sum().backward()
    assert read(probe.take()) == pytest.approx(norm_of(model.parameters()), rel=1e-6)


# -- the sample of the weights


def test_a_small_models_l1_and_l2_norms_are_exact() -> None:
    model = mlp()
    probe = attached(model, sample_every=3)
    seen = []
    for _ in range(7):
        model.zero_grad()
        loss_of(model).backward()
        probe.take()
        signals: Any = probe.signals
        seen.append(signals.grad_l1_norm is not None)
        if signals.grad_l1_norm is not None:
            gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
            assert float(signals.grad_l1_norm) == pytest.approx(float(gradients.abs().sum()))
            assert float(signals.grad_l2_norm) == pytest.approx(float(gradients.norm()))
    assert seen == [True, False, False, True, False, False, True]


def test_a_large_models_norms_are_estimated_from_a_few_elements() -> None:
    model = mlp(layers=6, width=256)
    probe = attached(model, sample_size=8192)
    loss_of(model, 64, 256).backward()
    norm = read(probe.take())
    signals: Any = probe.signals
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert float(signals.grad_l2_norm) == pytest.approx(norm, rel=0.25)
    assert float(signals.grad_l1_norm) == pytest.approx(float(gradients.abs().sum()), rel=0.25)


@pytest.mark.parametrize("is_watched", [True, False])
def test_the_update_norm_is_the_size_of_one_optimizer_step(is_watched: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    probe = attached(model, sample_every=4)
    if is_watched:
        assert probe.watch(optimizer)
    measured = 0
    for _ in range(9):
        loss_of(model).backward()
        norm = norm_of(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        probe.take()
        update: Any = probe.signals.update_norm
        if update is not None:
            measured += 1
            assert float(update) == pytest.approx(0.5 * norm, rel=1e-4)
    assert measured == (3 if is_watched else 2)


def test_an_update_is_measured_around_the_optimizer_also_when_it_steps_seldom() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    probe = attached(model, sample_every=4)
    probe.watch(optimizer)
    updates = []
    for step in range(6):
        loss_of(model).backward()
        if step == 2:
            optimizer.step()
        probe.take()
        updates.append(probe.signals.update_norm)
    assert [update is not None for update in updates] == [False, False, True, False, False, False]


def test_a_channels_last_model_is_sampled_too() -> None:
    model = torch.nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    probe = attached(model)
    model(torch.randn(2, 8, 6, 6)).square().mean().backward()
    norm = read(probe.take())
    assert read(probe.signals.grad_l2_norm) == pytest.approx(norm, rel=1e-5)


# -- GradScaler


def scaler_of(scale: float) -> Any:
    try:
        return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    except (AttributeError, TypeError):
        pytest.skip("this torch has no GradScaler for the CPU")


def test_the_norm_of_a_scaled_run_is_unscaled_from_the_first_step_on() -> None:
    model, scaler = mlp(), scaler_of(1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attached(model, sample_every=1)
    probe.watch(optimizer)
    scales = []
    for _ in range(6):
        scale = scaler.get_scale()
        scaler.scale(loss_of(model)).backward()
        expected = norm_of(model.parameters()) / scale
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert read(probe.take()) == pytest.approx(expected, rel=1e-5)
        assert read(probe.signals.grad_l2_norm) == pytest.approx(expected, rel=1e-5)
        assert read(probe.scale()) == scale
        scales.append(scale)
    assert scales == [1024.0, 1024.0, 2048.0, 2048.0, 4096.0, 4096.0]


def test_a_skipped_step_of_the_scaler_has_an_infinite_norm_and_its_scale() -> None:
    model, scaler = mlp(), scaler_of(8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attached(model)
    probe.watch(optimizer)
    probe.use_scaler(scaler)
    scaler.scale(loss_of(model) * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not math.isfinite(read(probe.take()))
    assert read(probe.scale()) == 8.0


def test_a_run_without_a_scaler_has_no_scale_and_the_search_for_one_ends() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attached(model)
    probe.watch(optimizer)
    for _ in range(9):
        loss_of(model).backward()
        optimizer.step()
        probe.take()
        assert probe.scale() is None
    assert probe._scaler.is_over


# -- from the loss to the parameters


@pytest.mark.parametrize("is_after", [True, False])
def test_the_graph_of_the_loss_leads_to_the_parameters_also_after_backward(is_after: bool) -> None:
    model = mlp()
    inputs = torch.randn(4, 8, requires_grad=True)
    loss = model(inputs).square().mean()
    if is_after:
        loss.backward()
    found = parameters_of(loss)
    assert {id(p) for p in found} == {id(p) for p in model.parameters()}


def test_plain_tensors_are_parameters_where_no_others_are() -> None:
    weight = torch.randn(3, requires_grad=True)
    assert parameters_of((weight * 2).sum())[0] is weight


@pytest.mark.parametrize("loss", [None, 1.0, "loss", [1.0]])
def test_what_is_no_tensor_leads_nowhere(loss: object) -> None:
    assert parameters_of(loss) == ()


def test_a_detached_loss_leads_nowhere() -> None:
    assert parameters_of(loss_of(mlp()).detach()) == ()


def test_a_graph_deeper_than_the_recursion_limit_is_walked() -> None:
    weight = torch.randn(1, requires_grad=True)
    value = weight
    for _ in range(3 * sys.getrecursionlimit()):
        value = value + 1
    assert parameters_of(value)[0] is weight


# -- DDP

_DDP = """
import os, sys, math
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from plarv import faults
from plarv.gradients import GradientProbe

faults.RERAISE = True


def run(rank, world, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=world)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 64) for _ in range(12)]
    model = DistributedDataParallel(torch.nn.Sequential(*layers), bucket_cap_mb=0.02)
    probe = GradientProbe(model.parameters())
    probe.attach()
    torch.manual_seed(rank)
    for step in range(3):
        model.zero_grad()
        model(torch.randn(4, 64)).square().mean().backward()
        squares = [float(p.grad.double().square().sum()) for p in model.parameters()]
        norm = float(probe.take())
        assert abs(norm / math.sqrt(math.fsum(squares)) - 1) < 1e-5, (rank, step)
        print(f"NORM {step} {norm:.12g}", flush=True)
    dist.barrier()
    os._exit(0)  # gloo's own threads may abort a process that takes its group apart


run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
"""


@pytest.mark.parametrize("world", [1, 2])
def test_under_ddp_the_norm_is_that_after_the_all_reduce_alike_on_all_ranks(
    world: int, tmp_path: Path
) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT / 'producer')!r})\n{_DDP}")
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * world, outputs
    norms = [[line for line in text.splitlines() if "NORM" in line] for text in outputs]
    assert len(norms[0]) == 3
    assert all(each == norms[0] for each in norms)


def test_nothing_here_imports_torch() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'producer')!r});"
        "import plarv.gradients as g, plarv.device_scalars as d, plarv.learning_rate as l,"
        " plarv.discovery as s;"
        "p = g.GradientProbe([]); p.attach(); p.take(); p.direct(); g.parameters_of(1.0);"
        "d.ScalarReader().begin([1.0, object()]);"
        "s.describe_model(object()); s.find_optimizer([]); s.scheduler_of(object());"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "False", done.stderr
