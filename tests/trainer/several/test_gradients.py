"""An adapter in a mixed run trains as in a run of its own, step by step; what no sample used has no gradient."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback
from tests.helpers.models import trainer
from tests.helpers.routed import (
    ADAPTERS,
    TASKS,
    ChoosesOneMore,
    RoutedLit,
    Rows,
    Trace,
    difference,
    own_run,
    rows,
    steps_of,
    values_of,
)
from tests.helpers.scripts import run_script


def fit(module: RoutedLit, batch_size: int = 8, by_index: bool = False, settings: dict | None = None, **kwargs):
    trace = Trace()
    callback = LoRACallback(r=2, adapters=ADAPTERS, route="task", merge=False, **kwargs)
    trainer(callback, trace, **{"max_epochs": 2, **(settings or {})}).fit(module, rows(batch_size, by_index=by_index))
    return trace.steps


def check(steps: list, **kwargs) -> None:
    for name in ADAPTERS:
        assert difference(steps, own_run(name, steps_of(2), **kwargs)) < 1e-6


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_an_adapter_trains_as_alone(optimizer, checkpointing):
    check(fit(RoutedLit(optimizer, checkpointing=checkpointing), by_index=checkpointing is None), optimizer=optimizer)


def test_accumulated_gradients_are_those_of_all_their_batches():
    check(fit(RoutedLit(), 4, settings={"accumulate_grad_batches": 2}), factor=0.5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_balanced_means_are_those_of_the_adapter_alone(accumulate):
    module = RoutedLit(reduction="mean")
    steps = fit(module, 8 // accumulate, settings={"accumulate_grad_batches": accumulate}, balance=True)
    check(steps, reduction="mean")


def test_means_without_balance_are_scaled_by_the_share_of_the_batch():
    steps = fit(RoutedLit("sgd", "mean"))
    assert difference(steps, own_run("fr", steps_of(2), "sgd", factor=1 / 8)) < 1e-6
    assert difference(steps, own_run("fr", steps_of(2), "sgd", reduction="mean")) > 1e-5


class KeepsZeros(RoutedLit):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


class Manual(RoutedLit):
    """Steps once in two batches, with gradients of zeros in between; with a backward pass that Lightning knows of."""

    automatic_optimization = False

    def training_step(self, batch, index):
        self.go_back(self.loss(batch) / 2)
        if index % 2:
            self.optimizers().step()
            self.optimizers().zero_grad(set_to_none=False)

    def go_back(self, loss):
        self.manual_backward(loss)


def test_gradients_that_are_set_to_zeros_are_none_at_the_step():
    check(fit(KeepsZeros()))
    check(fit(Manual(), 4), factor=0.5)


class Raw(Manual):
    def training_step(self, batch, index):
        self.optimizers().zero_grad(set_to_none=False)
        self.loss(batch).backward()
        self.optimizers().step()


def test_a_backward_pass_that_lightning_does_not_see_counts_the_present_batch():
    check(fit(Raw()))


class RawInPairs(RoutedLit):
    """Two backward passes past Lightning to a step, which the training step makes, or a hook after it."""

    automatic_optimization = False

    def __init__(self, *args, in_hook: bool):
        super().__init__(*args)
        self.in_hook, self.steps = in_hook, []

    def training_step(self, batch, index):
        (self.loss(batch) / 2).backward()
        self.step_at(index, not self.in_hook)

    def on_train_batch_end(self, outputs, batch, index):
        self.step_at(index, self.in_hook)

    def step_at(self, index, is_here):
        if index % 2 and is_here:
            self.optimizers().step()
            self.optimizers().zero_grad()
            self.steps.append(values_of(self))


@pytest.mark.parametrize("in_hook", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_every_batch_of_a_step_counts_without_lightnings_backward(in_hook, reduction):
    balanced, tasks = reduction == "mean", Rows().tasks
    steps = [sorted(places, key=tasks.__getitem__) for places in steps_of()]  # so that the two batches differ
    data = DataLoader(Rows(), batch_sampler=[half for places in steps for half in (places[:4], places[4:])])
    callback = LoRACallback(r=2, adapters=ADAPTERS, route="task", merge=False, balance=balanced)
    module = RawInPairs("adamw", reduction, in_hook=in_hook)
    trainer(callback, max_epochs=2).fit(module, data)
    check(module.steps, reduction=reduction, factor=1.0 if balanced else 0.5)


@pytest.mark.parametrize("balance", [False, True])
def test_an_adapter_that_the_step_chooses_itself_trains(balance):
    trace, every = Trace(), [steps_of()[1]] * 2  # "fr" alone is in these rows
    callback = LoRACallback(r=2, adapters=ADAPTERS, route="task", merge=False, balance=balance)
    trainer(callback, trace, max_epochs=1).fit(ChoosesOneMore(), DataLoader(Rows(), batch_sampler=every))
    assert difference(trace.steps, own_run("fr", every)) < 1e-6
    assert difference(trace.steps, own_run("it", every, tasks=["it"] * len(Rows()))) < 1e-6
    of_de = [{key: value for key, value in step.items() if ".de." in key} for step in trace.steps]
    assert of_de[0] and difference(of_de[1:], of_de[:1]) == 0


class DropsEverySecond(RoutedLit):
    """Drops the gradients of every second batch, as where they are not finite, or where a discriminator rests."""

    automatic_optimization = False

    def training_step(self, batch, index):
        self.optimizers().zero_grad()
        self.manual_backward(self.loss(batch))
        if index % 2:
            self.optimizers().step()


def test_samples_whose_gradients_were_dropped_do_not_count():
    steps = fit(DropsEverySecond("adamw", "mean"), balance=True)
    for name in ("fr", "de"):
        assert difference(steps, own_run(name, steps_of()[1::2] * 2, reduction="mean")) < 1e-6


def scaler() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"plugins": scaler},
    ],
    ids=["norm", "value", "bf16", "scaler"],
)
def test_what_no_sample_used_does_not_move(settings):
    settings = {key: value() if callable(value) else value for key, value in settings.items()}
    module = RoutedLit()
    steps = fit(module, settings=settings)
    for number, places in enumerate(steps_of(2)):
        used = {rows().dataset.tasks[place] for place in places}
        for name in ADAPTERS if number else ():
            keys = values_of(module, name)
            still = all(torch.equal(steps[number][key], steps[number - 1][key]) for key in keys)
            assert still != (name in used)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What two processes made under each strategy."""
    folder = tmp_path_factory.mktemp("routed")
    done = run_script("routed_two_processes.py", folder, ranks=2)
    assert done.returncode == 0, done.stderr[-6000:]
    return torch.load(folder / "results.pt")


STRATEGIES = [
    "ddp",
    "ddp-find-unused",
    "ddp-step-chooses",
    "ddp-static-graph",
    "ddp-bucket-view",
    "fsdp1",
    "fsdp2",
    "fsdp2-apply-before",
]
RUNS = {
    "sgd": {"optimizer": "sgd", "factor": 0.5},
    "adamw": {"factor": 0.5},
    "accumulated": {"factor": 0.25},
    "balanced": {"reduction": "mean"},
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("run", RUNS)
def test_an_adapter_trains_as_alone_where_processes_lack_it(ran, strategy, run):
    if (strategy, run) not in ran:
        assert (strategy, run) in {("ddp-static-graph", "accumulated"), ("ddp-step-chooses", "balanced")}
        return
    check(ran[strategy, run]["steps"], **RUNS[run])
    assert ran[strategy, run]["same"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp-find-unused", "fsdp1", "fsdp2"])
def test_an_adapter_that_the_step_chooses_itself_trains_on_every_process(ran, strategy):
    steps = [[place for place in places if TASKS[place] != "it"] for places in steps_of(2)]
    for name, tasks in (("fr", TASKS), ("de", TASKS), ("it", ["it"] * len(TASKS))):
        alone = own_run(name, steps, factor=0.5, tasks=tasks)
        assert difference(ran[strategy, "one more"]["steps"], alone) < 1e-6
    assert ran[strategy, "one more"]["same"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_resumed_run_of_two_processes_goes_on_with_one_adapter_more_or_fewer(ran, strategy):
    resumed = ran[strategy, "resumed"]
    for name in ("fr", "de"):
        alone = own_run(name, steps_of(4), factor=0.5)[10:]
        assert difference(resumed["more"], alone) < 1e-6
        assert difference(resumed["fewer"], alone) < 1e-6
    assert difference(resumed["more"], own_run("it", steps_of(2), factor=0.5)) < 1e-6
