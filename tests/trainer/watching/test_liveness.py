"""Adapters that cannot learn, or are passed by in evaluation, are named with the likely cause."""

import warnings

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as rematerialized

from lightning_lora import LoRACallback, LoRAConfig, lora_parameters
from lightning_lora.methods.lora import LoRAMethod
from lightning_lora.trainer.watching.liveness import Liveness
from tests.helpers import models
from tests.helpers.models import Lit
from tests.helpers.routed import ADAPTERS, RoutedLit, rows


def weights(layer):
    """Reads weights where no source of the model's classes shows it."""
    return layer.weight, layer.bias


class Bypassing(nn.Module):
    """Its second map can be passed by, cut off, or run in a block that gives no gradients."""

    how = "plain"

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.first(x)
        return self.head(torch.relu(x + getattr(self, self.how)(x)))

    def plain(self, x):
        return self.second(x)

    def raw(self, x):
        return F.linear(x, *weights(self.second))

    def held(self, x):
        return F.linear(x, vars(self).setdefault("weights", (self.second._parameters["weight"],))[0])

    def unused(self, x):
        return x

    def detached(self, x):
        return self.second(x).detach()

    def without(self, x):
        with torch.no_grad():
            return self.second(x)

    def raw_in_evaluation(self, x):
        return self.second(x) if self.training else self.raw(x)


def module(how, **arguments):
    model = Lit(**arguments)
    model.net = Bypassing()
    model.net.how = how
    return model


def fit(model, *callbacks, limit=2, **arguments):
    """What was said of liveness in a short run."""
    callback = LoRACallback(r=2, **({"targets": ["first", "second"]} | arguments))
    trainer = models.trainer(callback, *callbacks, max_epochs=1, limit_train_batches=limit)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, models.data(), models.data())
    return [
        str(each.message)
        for each in caught
        if any(word in str(each.message) for word in ("adapters", "did not run", "`dropout`"))
    ]


def test_living_adapters_are_not_mentioned_and_nothing_is_left_on_them():
    model = module("plain")
    assert fit(model, merge=False) == []
    for adapter in (model.net.first.lora.default, model.net.second.lora.default):
        assert {"forward", "add_to_weight"}.isdisjoint(vars(adapter))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            "raw",
            r"1 of 2 adapters got no gradient in the first steps. `net.second` did not run: .*, 'net.second.weight'",
        ),
        ("unused", r"`net.second` did not run: this batch took another branch, or code reads the weight"),
        ("detached", r"`net.second` ran, but not into the loss: the output is unused or detached"),
        (
            "without",
            r"`net.second` ran where gradients are off, under .* Leave a teacher out, exclude=\['net.second'\]; call",
        ),
    ],
)
def test_an_adapter_without_gradient_is_named_with_its_cause(how, words):
    (told,) = fit(module(how))
    assert told.startswith("1 of 2 adapters got no gradient ")
    assert pytest.raises(AssertionError, match=words).matches(AssertionError(told))


def test_a_weight_that_code_holds_elsewhere_is_not_advised_again():
    (message,) = fit(module("held"), targets=["first", "net.second.weight"])
    assert "`net.second.weight` did not run, or not into the loss" in message and "Name the weight" not in message


@pytest.mark.parametrize("others", [["first"], ["first", "second"], ["all"]], ids=str)
def test_following_the_advice_on_a_raw_read_trains_it(others):
    model = module("raw")
    assert fit(model, targets=[*others, "net.second.weight"], merge=False) == []
    assert all(matrix.any() for _, matrix in lora_parameters(model))


def test_where_no_adapter_gets_a_gradient_the_run_stops():
    with pytest.raises(
        MisconfigurationException, match=r"No adapter got a gradient at the first step. `net.second` ran"
    ):
        fit(module("detached"), targets=["second"], also_train=["head"])


def test_it_can_be_switched_off():
    assert fit(module("detached"), liveness=False) == []


def test_an_adapter_that_evaluation_passes_by_is_named():
    (told,) = fit(module("raw_in_evaluation"))
    assert told.startswith("`net.second` ran in training and did not run in the first evaluation. If evaluation takes")


class Thief(Callback):
    """Takes a parameter out of the optimizer."""

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].param_groups[0]["params"].pop()


def test_an_adapter_in_no_optimizer_is_an_error_before_the_first_step():
    model = module("plain")
    callback = LoRACallback(r=2, targets=["first", "second"])
    trainer = models.trainer(Thief(), callback, max_epochs=1)
    with pytest.raises(
        MisconfigurationException, match=r"No optimizer holds the adapter of `net.second`, so it would never train"
    ):
        trainer.fit(model, models.data())


class Alternating(Lit):
    """Two optimizers; the second one's branch gets a gradient only from the second batch on, as a GAN's may."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(16, 3)

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net, self.other)]

    def training_step(self, batch, index):
        which = index % 2
        optimizer = self.optimizers()[which]
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy((self.net, self.other)[which](batch[0]), batch[1]))
        optimizer.step()


def test_each_optimizer_is_checked_at_its_own_first_step():
    model = Alternating()
    (told,) = fit(model, targets=["q", "k", "v", "other"], merge=False)
    assert told.startswith("`other` ran in training and did not run in the first evaluation"), "as is so"
    assert all(matrix.any() for name, matrix in lora_parameters(model))


class SkipsFirst(Lit):
    """Its first batch gives no loss."""

    def training_step(self, batch, index):
        return super().training_step(batch, index) if index else None


def test_a_step_without_any_gradient_is_not_the_first():
    assert fit(SkipsFirst(), targets="attn") == []


class Evaluated(Lit):
    """Its network is in eval mode, as one from `from_pretrained` is."""

    def __init__(self):
        super().__init__()
        self.net.eval()


def test_dropout_that_does_nothing_is_mentioned():
    assert fit(Evaluated(), targets="attn") == []
    (told,) = fit(Evaluated(), targets="attn", dropout=0.1)
    assert "(8 in all) train without `dropout`: their layers are in eval mode" in told


class Rematerialized(Bypassing):
    """Reentrant checkpointing under a name that does not say so."""

    def plain(self, x):
        return rematerialized(self.second, x.detach(), use_reentrant=True)


def test_reentrant_checkpointing_that_was_not_seen_is_named():
    model = module("plain")
    model.net = Rematerialized()
    (told, *_) = fit(model)
    assert (
        "`net.second` ran in reentrant activation checkpointing whose inputs require no gradient. Use checkpoint("
        in told
    )


def test_the_advice_names_the_one_weight_of_query_key_and_value_once():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)})
    method = LoRAMethod(LoRAConfig(r=2, targets=["attn.q", "attn.k", "attn.v"]))
    method.complete(model)
    liveness = Liveness(model, method.watched(model))
    assert liveness._advice(list(liveness.adapters)).endswith("targets=[..., 'attn.in_proj_weight']")
    liveness.close()


class EvaluatesNothing(Lit):
    def validation_step(self, batch, index):
        pass


def test_an_evaluation_without_the_model_is_not_mentioned():
    assert fit(EvaluatesNothing(), targets="attn") == []


class InTurn(Lit):
    """One optimizer, and another part in every step."""

    def __init__(self, every):
        super().__init__()
        self.net.heads = nn.ModuleList(nn.Linear(16, 3) for _ in range(3))
        self.every = every

    def forward(self, x):
        return self.net.heads[self.steps // self.every % 3](self.net.layers(x))

    steps = 0

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.steps += 1
        return loss

    def validation_step(self, batch, index):
        pass


@pytest.mark.parametrize(("every", "words"), [(1, []), (10, ["2 of 4 adapters got no gradient in the first steps."])])
def test_parts_that_train_in_turn_are_mentioned_only_if_none_of_the_first_steps_ran_them(every, words):
    messages = fit(InTurn(every), targets=["heads.*", "layers.0.q"], limit=9)
    assert [message[:51] for message in messages] == words


class Taught(Lit):
    """Its teacher is adapted by a preset, and gives no gradients."""

    def __init__(self):
        super().__init__()
        self.teacher = models.net()

    def loss(self, batch):
        with torch.no_grad():
            target = self.teacher(batch[0])
        return F.mse_loss(self(batch[0]), target)


@pytest.mark.slow
def test_an_adapted_teacher_gets_advice_that_works():
    (told,) = fit(Taught(), targets=["q", "k"])
    assert "`teacher.layers.*.k` (4 in all) ran where gradients are off" in told and "exclude=['teacher']" in told
    assert fit(Taught(), targets=["q", "k"], exclude=["teacher"]) == []


class Branching(RoutedLit):
    """Takes another branch for one adapter, from which its second layer gets no gradient."""

    def __init__(self, broken="", evaluates=True):
        super().__init__("sgd")
        self.net, self.broken, self.evaluates = Bypassing(), broken, evaluates

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        self.net.how = "detached" if self.broken in batch["task"] else "plain"
        return self.loss(batch)

    def validation_step(self, batch, index):
        self.net.how = "plain" if self.evaluates else "unused"
        self.loss(batch)


# In turn by batch; "it" comes at the end of the epoch alone, after more steps than a part that is idle may wait.
IN_TURN = [*(["fr"] * 8 + ["de"] * 8) * 5, *["it"] * 8]


def said_of_routes(model, tasks=IN_TURN, evaluation=("fr",) * 8):
    callback = LoRACallback(r=2, targets=["first", "second"], adapters=ADAPTERS, route="task", merge=False)
    trainer = models.trainer(callback, max_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, rows(tasks=tasks), rows(tasks=evaluation))
    messages = [str(each.message) for each in caught]
    return [message for message in messages if "adapters" in message or "did not run" in message]


def test_what_no_batch_chose_yet_is_not_dead():
    model = Branching()
    assert said_of_routes(model) == []
    assert not any(vars(pair).keys() & {"forward", "operands"} for pair in pairs_of(model))
    assert said_of_routes(Branching(), ["fr"] * 16) == []  # two of them never come


def pairs_of(model):
    return [pair for layer in model.modules() if hasattr(layer, "lora") for pair in layer.lora.all_pairs()]


@pytest.mark.parametrize("broken", ["fr", "de", "it"])
def test_what_was_chosen_and_got_no_gradient_is_named_with_its_adapter(broken):
    [said] = said_of_routes(Branching(broken))
    assert said.startswith(f"1 of 2 adapters got no gradient at the first step. `net.second ({broken})` ran, but not")


def test_an_evaluation_names_only_what_it_chose():
    [said] = said_of_routes(Branching(evaluates=False))
    assert "`net.second (fr)` ran in training and did not run in the first evaluation" in said
    assert "(de)" not in said


def test_all_of_one_adapter_without_gradients_is_an_error_when_it_is_first_chosen():
    class Cut(Branching):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            if "it" not in batch["task"]:
                return loss
            return 0 * loss.detach() + self.net.head.bias.sum()

    callback = LoRACallback(
        r=2, targets=["first", "second"], adapters=ADAPTERS, route="task", merge=False, also_train=["head"]
    )
    with pytest.raises(MisconfigurationException, match=r"No adapter got a gradient .*`net.first \(it\)`"):
        models.trainer(callback, max_epochs=1).fit(Cut(), rows(tasks=IN_TURN))
