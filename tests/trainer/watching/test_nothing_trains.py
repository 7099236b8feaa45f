"""A run in which nothing can train is told why, and the remedy in the message works."""

import warnings

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F

from lightning_lora import LoRACallback, lora_parameters
from tests.helpers.models import Lit, data, trainer


class WithoutGradients(Lit):
    """Calls its backbone under `torch.no_grad`, as a linear probe does."""

    off = True

    def forward(self, x):
        with torch.set_grad_enabled(not self.off):
            h = self.net.layers(x)
        return self.net.head(h)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.head.parameters(), lr=self.lr)


def fit(module, **arguments):
    callback = LoRACallback(**{"r": 2, "merge": False, **arguments})
    trainer(callback, max_epochs=1, limit_train_batches=2).fit(module, data())


@pytest.mark.parametrize("liveness", [True, False])
def test_a_backbone_under_no_grad(liveness):
    module = WithoutGradients()
    with pytest.raises(MisconfigurationException) as caught:
        fit(module, liveness=liveness)
    message = str(caught.value)
    assert message.startswith("The loss requires no gradient: it depends on no adapter")
    assert "`net.head` is frozen, and an optimizer held it before: to train it too, also_train=['net.head']." in message
    assert liveness == ("where gradients are off, under `torch.no_grad`" in message)
    assert liveness == ("call what trains outside of `torch.no_grad`" in message)
    module.off = False
    fit(module, liveness=liveness)


class Adversarial(Lit):
    """Steps a generator and a discriminator in turn."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.discriminator = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net, self.discriminator)]

    def training_step(self, batch, index):
        of_generator, of_discriminator = self.optimizers()
        fake = self(batch[0])
        losses = [F.softplus(-self.discriminator(fake)).mean(), F.softplus(self.discriminator(fake.detach())).mean()]
        for optimizer, loss in zip((of_generator, of_discriminator), losses, strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


def test_lora_on_one_of_two_networks():
    words = r"`discriminator` is frozen, and an optimizer held it before: .* also_train=\['discriminator'\]"
    with pytest.raises(MisconfigurationException, match=words):
        fit(Adversarial())
    module = Adversarial()
    before = module.discriminator[0].weight.detach().clone()
    fit(module, also_train=["discriminator"])
    assert not torch.equal(module.discriminator[0].weight, before)


class ZeroHead(Lit):
    """Starts with a head of zeros, as timm's Mixer and torchvision's ViT do."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.net.head.weight)


def warnings_of(module, **arguments):
    callback = LoRACallback(**{"r": 2, "merge": False, **arguments})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callback, max_epochs=1, limit_train_batches=3).fit(module, data())
    return [str(each.message) for each in caught if "zero" in str(each.message)]


def test_a_frozen_head_of_zeros_is_named_and_the_remedy_trains():
    module = ZeroHead()
    [told] = warnings_of(module)
    assert told.startswith("Every gradient is exactly zero at the first step, so nothing trains. A frozen weight of ")
    assert told.endswith("zeros, as of `net.head`, lets no gradient through: train it too, also_train=['net.head'].")
    assert "also_train=['net.head']" in told
    assert not any(p.any() for name, p in lora_parameters(module) if name.endswith(".B"))
    module = ZeroHead()
    assert warnings_of(module, also_train=["net.head"]) == []
    assert all(p.any() for name, p in lora_parameters(module) if name.endswith(".B"))


def test_a_loss_that_is_always_zero():
    class Zero(Lit):
        def loss(self, batch):
            return 0 * super().loss(batch)

    [told] = warnings_of(Zero())
    assert "No frozen weight matrix is zero: does the loss depend on the model's output?" in told


@pytest.mark.parametrize("arguments", [{}, {"liveness": False}])
def test_nothing_is_said_of_a_run_that_trains(arguments):
    assert warnings_of(Lit(), **arguments) == []


def test_only_matrices_of_zeros_are_named():
    class ZeroBias(ZeroHead):
        def __init__(self):
            super().__init__()
            torch.nn.init.zeros_(self.net.layers[0].q.bias)

    [told] = warnings_of(ZeroBias())
    assert "as of `net.head`, lets no gradient through" in told
