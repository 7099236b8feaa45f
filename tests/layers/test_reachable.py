"""Code that the forward cannot reach does not decide how a layer is adapted."""

import functools
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.layers.weight_reads import WeightReads


class Holder(nn.Module):
    """Each sub-class reads ``fc.weight`` in one method and reaches it in its own way, or does not."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def mixed(self, x):
        return F.linear(x, self.fc.weight)


class Fuses(nn.Module):
    """As diffusers fuses projections: for inference, when the user asks."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x)

    @torch.no_grad()
    def fuse_projections(self):
        self.fused = nn.Linear(4, 4)
        self.fused.weight.copy_(self.fc.weight)

    def clip_(self, limit):
        self.fuse_projections()
        self.fc.weight.data.mul_(limit)


class CallsIt(Holder):
    def forward(self, x):
        return self.mixed(x)


class PassesItOn(Holder):
    def forward(self, x):
        return functools.reduce(lambda total, function: total + function(x), [self.mixed], 0)


class Inherits(CallsIt):
    def forward(self, x):
        return super().forward(x)


class ByProperty(Holder):
    @property
    def summed(self):
        return self.fc.weight.sum()

    def forward(self, x):
        return x * self.summed


class ByCachedProperty(Holder):
    @functools.cached_property
    def mean(self):
        return self.mixed(torch.ones(2, 4)).mean()

    def forward(self, x):
        vars(self).pop("mean", None)
        return x * self.mean


class ByPartial(Holder):
    def __init__(self):
        super().__init__()
        self.run = functools.partial(type(self).mixed, self)

    def forward(self, x):
        return self.run(x)


class ByName(Holder):
    def forward(self, x):
        return getattr(self, "mixed")(x)  # noqa: B009


class Kept(Holder):
    def __init__(self):
        super().__init__()
        self.run = self.mixed

    def forward(self, x):
        return self.run(x)


def through(holder, x):
    return holder.mixed(x)


class ByFunction(Holder):
    def forward(self, x):
        return through(self, x)


def through_itself(holder, x, depth=1):
    return through_itself(holder, x, depth - 1) if depth else holder.mixed(x)


class ByFunctionThatCallsItself(Holder):
    def forward(self, x):
        return through_itself(self, x)


functions = types.ModuleType("functions")
functions.of_a_module = through


class ByModuleOfFunctions(Holder):
    def forward(self, x):
        return functions.of_a_module(self, x)


class Processor:
    def __call__(self, holder, x):
        return holder.mixed(x)


class ByProcessor(Holder):
    def __init__(self):
        super().__init__()
        self.processor = Processor()

    def forward(self, x):
        return self.processor(self, x)


class ByProcessorOfDict(Holder):
    def __init__(self):
        super().__init__()
        self.processors, self.kind = {"only": Processor()}, Processor

    def forward(self, x):
        return self.processors["only"](self, x)


class ByProcessorOfList(Holder):
    def __init__(self):
        super().__init__()
        self.processors = [Processor()]

    def forward(self, x):
        return self.processors[0](self, x)


class Unused(Holder):
    """No forward of its own: a user may call any public method of the model itself that returns something."""

    def mixed(self, x):
        return F.linear(x, self.fc.weight)


READS = [CallsIt, PassesItOn, Inherits, ByProperty, ByName, Kept, ByFunction, ByProcessor]
READS += [
    ByCachedProperty,
    ByPartial,
    ByFunctionThatCallsItself,
    ByModuleOfFunctions,
    ByProcessorOfDict,
    ByProcessorOfList,
]


@pytest.mark.parametrize("make", READS, ids=lambda make: make.__name__)
def test_what_the_forward_reaches_counts_as_a_read(make):
    for model, name in ((make(), "fc"), (nn.Sequential(make()), "0.fc")):
        assert WeightReads(dict(model.named_modules())).is_read_raw(name, "weight")
        x = torch.ones(2, 4)
        apply_lora(model, LoRAConfig(r=1, targets=["fc"]))
        before = model(x)
        with torch.no_grad():
            model.get_submodule(name).lora.default.B.fill_(1.0)
        assert not torch.equal(model(x), before)


def test_helpers_that_only_a_user_calls_do_not():
    for model, name in ((Fuses(), "fc"), (nn.Sequential(Fuses()), "0.fc")):
        assert not WeightReads(dict(model.named_modules())).is_read_raw(name, "weight")
        assert apply_lora(model, LoRAConfig(targets=["fc"], dropout=0.1)) == [name]  # adapted as a layer


def test_what_a_user_may_call_on_the_model_itself_does():
    assert WeightReads({"": Unused(), "fc": nn.Linear(4, 4)}).is_read_raw("fc", "weight")
    assert not WeightReads(dict(nn.Sequential(Unused()).named_modules())).is_read_raw("0.fc", "weight")
