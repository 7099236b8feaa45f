"""Methods replaced for one run: given back as they were, and no part of a copy."""

from __future__ import annotations

import copy
import pickle
from contextlib import ExitStack

import pytest
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_lora.trainer.patching import patch_method


class Model(nn.Module):
    def setup(self, stage="fit"):
        return f"setup {stage}"


def louder(original, *args, **kwargs):
    return original(*args, **kwargs).upper()


def test_replaces_and_gives_back():
    model = Model()
    with ExitStack() as stack:
        patch_method(stack, model, "setup", louder)
        assert model.setup("test") == "SETUP TEST"
        assert Model().setup() == "setup fit"
    assert model.setup() == "setup fit" and "setup" not in vars(model)


def test_what_was_on_the_instance_comes_back():
    model = Model()
    own = lambda: "mine"  # noqa: E731
    object.__setattr__(model, "setup", own)
    with pytest.raises(RuntimeError), ExitStack() as stack:
        patch_method(stack, model, "setup", louder)
        patch_method(stack, model, "setup", lambda original: original() + "!")
        assert model.setup() == "MINE!"
        raise RuntimeError
    assert vars(model)["setup"] is own


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_carries_the_original(copied):
    model = Model()
    with ExitStack() as stack:
        patch_method(stack, model, "setup", louder)
        twin = copied(model)
        if copied is not copy.copy:
            assert twin.setup("fit") == "setup fit"
            assert twin.setup.__self__ is twin
    assert model.setup() == "setup fit"


def test_lightning_sees_an_overridden_method():
    module = LightningModule()
    with ExitStack() as stack:
        assert not is_overridden("configure_model", module)
        patch_method(stack, module, "configure_model", lambda original: original())
        assert is_overridden("configure_model", module)
    assert not is_overridden("configure_model", module)
