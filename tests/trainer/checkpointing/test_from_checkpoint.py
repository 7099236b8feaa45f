"""Adapter-only files back into modules, against the module that was trained."""

from __future__ import annotations

import json
import os
import re

import pytest
import pytorch_lightning
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import save_file
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    apply_lora,
    load_from_checkpoint,
    lora_state_dict,
    merge_lora,
    remove_lora,
)
from lightning_lora.layers.base import is_adapted
from lightning_lora.ops.exact_sum import same_bits
from tests.helpers.models import BuiltInConfigureModel, BuiltInSetup, Lit, checkpoints, data, net, trainer
from tests.helpers.selection import slow_except

X = data(5).dataset.tensors[0]


class Named(Lit):
    """Remembers what it was made with, and notes what it was given."""

    def __init__(self, width: int = 16, dropout: float = 0.0, lr: float = 1e-2) -> None:
        super().__init__(lr=lr, batch_norm=True, dropout=dropout)
        self.save_hyperparameters()
        self.width, self.given = width, []

    def on_save_checkpoint(self, checkpoint):
        checkpoint["note"] = 7

    def on_load_checkpoint(self, checkpoint):
        self.given.append((checkpoint["note"], len(checkpoint["state_dict"])))


def fit(folder, cls=Lit, lora=None, **kwargs):
    """A trained module with live adapters, and its last file."""
    module, files = cls(**kwargs), checkpoints(folder)
    trainer(LoRACallback(r=4, merge=False, **(lora or {})), files).fit(module, data(), data(1))
    return module.eval(), files.last_model_path


@pytest.mark.filterwarnings("ignore:Found keys that are")
@pytest.mark.parametrize("cls", slow_except([Lit, Named], [Lit, BuiltInConfigureModel, Named]))
def test_it_gives_what_was_trained(tmp_path, cls):
    trained, path = fit(tmp_path, cls)
    loaded = load_from_checkpoint(cls, path).eval()
    assert type(loaded) is cls and is_adapted(loaded)
    assert torch.equal(loaded(X), trained(X))
    assert not torch.allclose(loaded(X), cls.load_from_checkpoint(path, strict=False).eval()(X), atol=1e-3)
    mine, its = lora_state_dict(loaded), lora_state_dict(trained)
    assert mine.keys() == its.keys() and all(torch.equal(mine[key], value) for key, value in its.items())


def test_hyperparameters_and_hooks(tmp_path):
    _, path = fit(tmp_path, Named, width=5, dropout=0.1)
    loaded = load_from_checkpoint(Named, path, lr=0.5)
    assert (loaded.width, loaded.hparams.dropout, loaded.lr) == (5, 0.1, 0.5)
    assert loaded.given == [(7, 0), (7, len(torch.load(path, weights_only=True)["state_dict"]))]


def test_what_trains_beside_and_what_moved_comes_too_and_goes_again(tmp_path):
    trained, path = fit(tmp_path, Named, lora={"also_train": ["head"]})
    loaded, fresh = load_from_checkpoint(Named, path), Named()
    assert torch.equal(loaded.net.head.weight, trained.net.head.weight)
    assert torch.equal(loaded.net.bn.running_mean, trained.net.bn.running_mean)
    remove_lora(loaded)
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_merged_it_is_the_plain_module(tmp_path):
    trained, path = fit(tmp_path)
    merged = load_from_checkpoint(Lit, path, merge=True).eval()
    assert [type(m) for m in merged.modules()] == [type(m) for m in Lit().modules()]
    assert list(merged.state_dict()) == list(Lit().state_dict())
    torch.testing.assert_close(merged(X), trained(X), rtol=1e-5, atol=1e-5)


class Drawn(Lit):
    """Draws another base every time."""

    def __init__(self) -> None:
        super().__init__()
        self.net.layers[0].q = nn.Linear(16, 16)


def test_another_base(tmp_path):
    _, path = fit(tmp_path, Drawn)
    words = r"was trained on another base: `net\.layers\.0\.q\.weight` has other values"
    with pytest.raises(ValueError, match=words):
        load_from_checkpoint(Drawn, path)
    words = r"`strict_base=False`: .* Frozen weights that differ, 2 of 26: `net\.layers\.0\.q\.weight` has other values"
    with pytest.warns(UserWarning, match=words):
        assert is_adapted(load_from_checkpoint(Drawn, path, strict_base=False))


def test_a_model_that_setup_makes(tmp_path):
    trained, path = fit(tmp_path, BuiltInSetup)
    words = "It has a `setup`, which only a Trainer calls: if that makes the model, build it first, and give the module"
    with pytest.raises(ValueError, match=re.escape(words)):
        load_from_checkpoint(BuiltInSetup, path)
    module = BuiltInSetup()
    module.setup("test")
    assert load_from_checkpoint(module, path) is module
    assert torch.equal(module.eval()(X), trained(X))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("lightning_lora"), "is a full checkpoint, without adapters"),
        (lambda c: c["lightning_lora"].pop("base"), "does not say what adapter it holds"),
        (lambda c: c["lightning_lora"]["config"].update(r=3), "has shape (4, 16), but the model needs (3, 16)"),
        (lambda c: c["state_dict"].popitem(), "it lacks `"),
    ],
)
def test_files_that_do_not_fit(tmp_path, change, words):
    _, path = fit(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if ".lora." in key}
    change(checkpoint)
    if "lightning_lora" not in checkpoint:
        checkpoint["state_dict"] = net().state_dict()
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=re.escape(words)):
        load_from_checkpoint(Lit, path)


def test_a_truncated_file(tmp_path):
    _, path = fit(tmp_path)
    os.truncate(path, 2000)
    with pytest.raises(ValueError, match="cannot be read; is the file truncated"):
        load_from_checkpoint(Lit, path)


class Twin(pytorch_lightning.LightningModule):
    """Of the other Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    training_step, configure_optimizers, loss = Lit.training_step, Lit.configure_optimizers, Lit.loss
    forward, lr = Lit.forward, 1e-2


def test_pytorch_lightning(tmp_path):
    module, files = Twin(), pytorch_lightning.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "max_epochs": 1}
    callbacks = [LoRACallback(r=4, merge=False), files]
    pytorch_lightning.Trainer(callbacks=callbacks, enable_model_summary=False, **settings).fit(module, data())
    assert torch.equal(load_from_checkpoint(Twin, files.last_model_path)(X), module(X))


def test_a_class_that_adapts_itself(tmp_path):
    _, path = fit(tmp_path)
    config = torch.load(path, weights_only=True)["lightning_lora"]["config"]

    class Adapted(Lit):
        def __init__(self) -> None:
            super().__init__()
            apply_lora(self, LoRAConfig(**config))

    assert is_adapted(load_from_checkpoint(Adapted, path))


class Random(Lit):
    """Draws every weight, as a class does whose base comes from a file."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.parameters():
            nn.init.normal_(parameter)


def in_file(module, folder):
    torch.save({"state_dict": module.state_dict()}, folder / "base.ckpt")
    return folder / "base.ckpt"


def in_state_dict(module, folder):
    torch.save(module.net.state_dict(), folder / "base.pt")
    return str(folder / "base.pt")


def in_safetensors(module, folder):
    save_file(module.net.state_dict(), folder / "base.safetensors")
    return folder / "base.safetensors"


def in_shards(module, folder):
    tensors = module.net.state_dict()
    of = {key: f"model-{int(key.startswith('head')) + 1}.safetensors" for key in tensors}
    for file in set(of.values()):
        save_file({key: value for key, value in tensors.items() if of[key] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": of}))
    return folder


BASES = {
    "module": lambda module, folder: module,
    "network": lambda module, folder: module.net,
    "ckpt": in_file,
    "pt": in_state_dict,
    "safetensors": in_safetensors,
    "directory": in_shards,
    "index": lambda module, folder: in_shards(module, folder) / "model.safetensors.index.json",
}


@pytest.fixture(scope="module")
def run_on_random(tmp_path_factory):
    """A base that was drawn, the module that was trained on it, and its file."""
    folder = tmp_path_factory.mktemp("run")
    base = Random()
    trained = Random()
    trained.load_state_dict(base.state_dict())
    files = checkpoints(folder)
    trainer(LoRACallback(r=4, merge=False), files, max_epochs=1).fit(trained, data(), data(1))
    return base, trained.eval(), files.last_model_path


@pytest.mark.parametrize("kind", BASES)
def test_the_base_comes_from_a_module_or_a_file(run_on_random, tmp_path, kind):
    base, trained, path = run_on_random
    loaded = load_from_checkpoint(Random, path, base=BASES[kind](base, tmp_path))
    assert torch.equal(loaded.eval()(X), trained(X))
    remove_lora(loaded)
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_a_base_in_half_precision_is_the_same_base(run_on_random):
    base, trained, path = run_on_random
    with pytest.warns(UserWarning, match="The base differs in low bits"):
        loaded = load_from_checkpoint(Random, path, base=half(base))
    q = loaded.net.layers[0].q
    assert torch.equal(q._parameters["weight"], base.net.layers[0].q.weight.bfloat16().float())
    assert torch.equal(q.lora.default.B, trained.net.layers[0].q.lora.default.B)


def half(base):
    copy = Random()
    copy.load_state_dict(base.state_dict())
    return copy.bfloat16()


def other_shape(base):
    copy = half(base).float()
    copy.net.layers[0].q = nn.Linear(8, 16)
    return copy


def merged(base):
    copy = half(base).float()
    apply_lora(copy, LoRAConfig(r=4))
    merge_lora(copy)
    return copy


UNFIT = {
    "two places": (lambda base, path: nn.Linear(2, 2), r"`base` fits `net\.layers\.0\.q` and `net\.layers\.0\.k`"),
    "no names": (lambda base, path: nn.ModuleDict({"a": base.net.head}), "`base` has no tensor under any name of the"),
    "shape": (
        lambda base, path: other_shape(base),
        r"`net\.layers\.0\.q\.weight` has shape \(16, 8\) in it and \(16, 16",
    ),
    "merged": (lambda base, path: merged(base), "`base` has merged adapters, so its weights are no base"),
    "adapters": (lambda base, path: path, "`base=.* holds adapters alone"),
    "values": (lambda base, path: Random(), "was trained on another base: `net.layers.0.q.weight` has other values"),
    "a part": (lambda base, path: base.net.layers, r"another base: .* `base` has no `net.head.bias` \(2 missing\)"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_base_that_does_not_fit(run_on_random, kind):
    make, words = UNFIT[kind]
    base, _, path = run_on_random
    module = Random()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        load_from_checkpoint(module, path, base=make(base, path))
    assert [type(m) for m in module.modules()] == [type(m) for m in base.modules()]
    assert all(same_bits(value, before[key]) for key, value in module.state_dict().items())


def test_a_file_that_is_no_base(run_on_random, tmp_path):
    _, _, path = run_on_random
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"`base='.*list.pt'` must hold a state dict, alone or as the entry"):
        load_from_checkpoint(Random, path, base=tmp_path / "list.pt")
    (tmp_path / "damaged.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"`base='.*damaged.pt'` cannot be read"):
        load_from_checkpoint(Random, path, base=tmp_path / "damaged.pt")
    files, lora = checkpoints(tmp_path), LoRACallback(r=4, save="merged")
    trainer(lora, files, max_epochs=1).fit(Random(), data(), data(1))
    with pytest.raises(ValueError, match=r"`base=.*` holds the merged model, in which adapters are already. Give the"):
        load_from_checkpoint(Random, path, base=files.last_model_path)


class Fails(Lit):
    """Replaces its head in `on_load_checkpoint`, and fails after it."""

    def on_load_checkpoint(self, checkpoint):
        self.net.head = nn.Linear(16, 3)
        raise RuntimeError("no")


@pytest.mark.parametrize("state", ["plain", "live", "merged"])
def test_a_failure_leaves_a_given_module_as_it_was(tmp_path, state):
    trained, path = fit(tmp_path)
    module = Fails()
    if state != "plain":
        module.load_state_dict(trained.state_dict(), strict=False)
        apply_lora(module, LoRAConfig(r=4))
        with torch.no_grad():
            module.net.layers[0].q.lora.default.B.fill_(0.3)
    if state == "merged":
        merge_lora(module)
    head, before = module.net.head, {key: value.clone() for key, value in module.state_dict().items()}
    flags = [parameter.requires_grad for parameter in module.parameters()]
    with pytest.raises(RuntimeError, match="no"):
        load_from_checkpoint(module, path)
    assert module.net.head is head and is_adapted(module) == (state == "live")
    assert module.state_dict().keys() == before.keys()
    assert all(same_bits(value, before[key]) for key, value in module.state_dict().items())
    assert [parameter.requires_grad for parameter in module.parameters()] == flags


@pytest.mark.parametrize("state", ["plain", "live", "merged"])
def test_a_given_module_is_adapted_in_place(tmp_path, state):
    trained, path = fit(tmp_path)
    module = Lit()
    if state != "plain":
        apply_lora(module, LoRAConfig(r=4))
    if state == "merged":
        merge_lora(module)
    assert load_from_checkpoint(module, path) is module
    assert torch.equal(module.eval()(X), trained(X))


class OwnLoader(Lit):
    """Reads the file itself, as chemprop's models do."""

    def __init__(self, network: nn.Module) -> None:
        LightningModule.__init__(self)
        self.lr, self.net = 1e-2, network

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path, map_location=None, hparams_file=None, strict=True, **kwargs):
        content = torch.load(checkpoint_path, map_location, weights_only=False)
        module = cls(net())
        module.load_state_dict(content["state_dict"], strict=strict)
        return module


def test_a_class_with_a_loader_of_its_own(tmp_path):
    module, files = OwnLoader(net()), checkpoints(tmp_path)
    trainer(LoRACallback(r=4, merge=False), files, max_epochs=1).fit(module, data(), data(1))
    path = files.last_model_path

    class Strict(OwnLoader):
        @classmethod
        def load_from_checkpoint(cls, checkpoint_path, **kwargs):
            return super().load_from_checkpoint(checkpoint_path, weights_only=False, **kwargs)

    words = r"Strict has a `load_from_checkpoint` of its own.*multiple values.*load_from_checkpoint\(Strict\("
    with pytest.raises(ValueError, match=words):
        load_from_checkpoint(Strict, path)
    assert torch.equal(load_from_checkpoint(Strict(net()), path).eval()(X), module.eval()(X))


class TakesBase(Lit):
    def __init__(self, base: int = 1, strict: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.base = base


def test_arguments_of_the_class_and_of_this_function(tmp_path):
    _, path = fit(tmp_path, TakesBase, base=3)
    assert load_from_checkpoint(TakesBase, path).base == 3
    assert load_from_checkpoint(TakesBase, path, base=Lit(), cls_kwargs={"base": 4}).base == 4
    assert load_from_checkpoint(TakesBase, checkpoint_path=path).base == 3
    for arguments, words in (
        ({"cls_kwargs": {"strict": 2}}, r"`cls_kwargs` has `strict`, .* load_from_checkpoint\(TakesBase\(strict="),
        ({"checkpoint_path": path}, "`path` must be the path of one checkpoint, but got two paths"),
    ):
        with pytest.raises(TypeError, match=words):
            load_from_checkpoint(TakesBase, path, **arguments)
    for arguments in ({"base": 2, "cls_kwargs": {"base": 4}}, {"width": 4}, {"hparams_file": "a.yaml"}):
        with pytest.raises(TypeError, match="is an argument for making the module, but `cls_or_module` is built"):
            load_from_checkpoint(TakesBase(), path, **{**arguments, "base": None})
    with pytest.raises(TypeError, match="`cls_or_module` must be a class of LightningModule, or a module"):
        load_from_checkpoint(nn.Linear, path)
    with pytest.raises(TypeError, match="`path` must be the path of one checkpoint, but got None"):
        load_from_checkpoint(TakesBase)


class RebuildsHead(Lit):
    """Builds its head anew when a file is loaded, with the old weights, as models of pyannote.audio do."""

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        old = self.state_dict()
        self.net.head = nn.Linear(16, 3)
        self.load_state_dict(old, strict=False)


@pytest.mark.parametrize("arguments", [{"targets": ["q", "head"]}, {"targets": ["q"], "also_train": ["head"]}])
def test_a_head_that_is_built_anew_on_load(tmp_path, arguments):
    trained, path = fit(tmp_path, RebuildsHead, lora=arguments)
    loaded = load_from_checkpoint(RebuildsHead, path, merge=True)
    torch.testing.assert_close(loaded.eval()(X), trained(X), rtol=1e-5, atol=1e-5)
    assert torch.equal(load_from_checkpoint(RebuildsHead(), path).eval()(X), trained(X))
