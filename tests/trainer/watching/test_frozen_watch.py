"""Frozen means frozen: what is set after `setup` is the base, and what moves later is named and in the files."""

import copy
import warnings

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    load_from_checkpoint,
    load_lora_state_dict,
    lora_parameters,
    remove_lora,
)
from lightning_lora.methods.lora import LoRAMethod
from lightning_lora.model.fingerprint import fingerprint
from lightning_lora.trainer.watching import frozen_watch
from tests.helpers.models import Lit, checkpoints, data, trainer
from tests.helpers.runs import load, same

WORDS = ("after `setup`", "Frozen, but")


def pretrained():
    torch.manual_seed(7)
    return {name: torch.randn_like(value) / 4 for name, value in Lit().state_dict().items()}


class LoadsLate(Lit):
    """Loads its pretrained weights when training starts, as a module may that expects a download by then."""

    def on_fit_start(self):
        self.load_state_dict(pretrained(), strict=False)


class DrawsLate(Lit):
    """Draws every matrix anew when training starts, the adapters' too."""

    def on_train_start(self):
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)


class FirstBatch(Callback):
    """The values at the first batch."""

    seen = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen = self.seen or {name: value.clone() for name, value in pl_module.state_dict().items()}


def fit(module, *callbacks, epochs=1, ckpt=None, said=None, **arguments):
    """The Trainer; its warnings about frozen parameters go to `said`."""
    runner = trainer(LoRACallback(**{"r": 2, "merge": False, **arguments}), *callbacks, max_epochs=epochs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner.fit(module, data(), data(1), ckpt_path=ckpt)
    if said is not None:
        said += [str(each.message) for each in caught if any(word in str(each.message) for word in WORDS)]
    return runner


def test_nothing_is_said_of_a_plain_run(tmp_path):
    said = []
    fit(Lit(batch_norm=True), checkpoints(tmp_path), said=said, epochs=2)
    assert said == []


def test_weights_loaded_when_training_starts_are_the_base(tmp_path):
    said, files, module = [], checkpoints(tmp_path), LoadsLate()
    runner = fit(module, files, said=said, merge=True)
    assert len(said) == 1 and said[0].startswith("Set after `setup`, by a hook such as `on_fit_start`")
    assert "`net.layers.0.q.weight`" in said[0]
    [live] = trainer(LoRACallback(r=2)).test(module, data(2), verbose=False)
    [best] = runner.test(module, data(2), ckpt_path=files.best_model_path, verbose=False)
    assert best["test_loss"] == pytest.approx(live["test_loss"], rel=1e-5)
    words = r"another base: `net.*has other values.*set this parameter after `setup`, .* set it in `__init__`"
    with pytest.raises(ValueError, match=words):
        trainer(LoRACallback(r=2)).test(Lit(), data(2), ckpt_path=files.best_model_path)
    with pytest.raises(ValueError, match=words):
        load_from_checkpoint(Lit, files.best_model_path)
    ready = Lit()
    ready.load_state_dict(pretrained())  # the remedy
    assert trainer(LoRACallback(r=2)).test(ready, data(2), ckpt_path=files.best_model_path, verbose=False) == [best]


def test_a_run_on_weights_loaded_late_resumes_exactly(tmp_path):
    whole, first = LoadsLate(), checkpoints(tmp_path)
    fit(whole, epochs=2)
    fit(LoadsLate(), first)
    resumed = LoadsLate()
    fit(resumed, epochs=2, ckpt=first.last_model_path)
    assert same(dict(whole.state_dict()), dict(resumed.state_dict()))


def test_a_resumed_run_that_sets_other_weights_is_refused_at_the_first_batch(tmp_path):
    files = checkpoints(tmp_path)
    fit(DrawsLate(), files)
    module = DrawsLate()
    with pytest.raises(ValueError, match="was trained on another base"):
        fit(module, epochs=2, ckpt=files.last_model_path)
    assert not dict(lora_parameters(module)), "what was loaded is not left there"


def test_adapters_that_an_init_overwrites_get_their_values_again(tmp_path):
    said, first, module = [], FirstBatch(), DrawsLate()
    fit(module, first, said=said, merge=True)
    assert any("Written after `setup`" in each and "`net.layers.0.q.lora.default.B`" in each for each in said)
    assert not any(value.any() for name, value in first.seen.items() if name.endswith("default.B"))
    learned = {name: p.detach().clone() for name, p in lora_parameters(module)}
    again = FirstBatch()
    fit(module, again)  # a second fit continues them
    assert all(torch.equal(again.seen[name], value) for name, value in learned.items())


def test_adapters_that_are_loaded_on_purpose_stay():
    source = Lit()
    fit(source)
    state = {name: p.detach().clone() for name, p in lora_parameters(source)}

    class Loads(Callback):
        def on_fit_start(self, trainer, pl_module):
            load_lora_state_dict(pl_module, state)

    said, first = [], FirstBatch()
    fit(Lit(), Loads(), first, said=said)
    assert said == [] and all(torch.equal(first.seen[name], value) for name, value in state.items())


def test_one_row_set_past_autograd_is_part_of_the_base(tmp_path):
    class Row(Lit):
        def on_fit_start(self):
            self.net.head.weight.data[1, 13] = 3.0

    module, files = Row(), checkpoints(tmp_path)
    fit(module, files)
    trainer(LoRACallback(r=2)).test(module, data(2), ckpt_path=files.last_model_path, verbose=False)


def test_a_parameter_that_a_hook_replaces_is_frozen_and_part_of_the_base(tmp_path):
    class Replaces(Lit):
        def on_fit_start(self):
            self.net.layers[0].q.weight = nn.Parameter(torch.eye(16))

    said, module, files = [], Replaces(), checkpoints(tmp_path)
    fit(module, files, said=said)
    assert len(said) == 1 and "`net.layers.0.q.weight`" in said[0]
    assert torch.equal(module.net.layers[0].q.weight, torch.eye(16))
    trainer(LoRACallback(r=2)).test(module, data(2), ckpt_path=files.last_model_path, verbose=False)


def tie(block):
    block.q.weight = block.k.weight


def parametrize(block):
    nn.utils.parametrizations.weight_norm(block.k)


class Changes(Callback):
    def __init__(self, change):
        self.change = change

    def on_fit_start(self, trainer, pl_module):
        self.change(pl_module.net.layers[0])


def test_an_adapted_weight_that_a_hook_ties_is_refused():
    words = r"`net.layers.0.k.weight` or what it is tied to is adapted, and was tied after `setup`"
    with pytest.raises(MisconfigurationException, match=words):
        fit(Lit(), Changes(tie))
    module = Lit()
    tie(module.net.layers[0])  # the remedy
    fit(module)


def test_an_adapted_weight_that_a_hook_parametrizes_is_refused():
    words = r"`net.layers.0.k.weight` is adapted, and was removed or .* exclude=\['net.layers.0.k'\]"
    with pytest.raises(MisconfigurationException, match=words):
        fit(Lit(), Changes(parametrize))
    fit(Lit(), Changes(parametrize), exclude=["net.layers.0.k"], said=[])


def test_an_embedding_that_scales_itself_down_is_the_same_base(tmp_path):
    class Scales(Lit):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.embed = nn.Embedding(5, 16, max_norm=0.5)

        def forward(self, x):
            return super().forward(x + self.embed(torch.zeros(len(x), dtype=torch.long)))

    said, module, files = [], Scales(), checkpoints(tmp_path)
    runner = fit(module, files, said=said)
    assert said == [] and not torch.equal(module.embed.weight, Scales().embed.weight)
    own = runner.test(module, data(2), ckpt_path=files.last_model_path, verbose=False)
    fresh = trainer(LoRACallback(r=2))
    assert fresh.test(Scales(), data(2), ckpt_path=files.last_model_path, verbose=False) == own


def test_statistics_loaded_late_are_what_removing_gives_back():
    class Statistics(Lit):
        def on_fit_start(self):
            self.net.bn.running_mean.fill_(5.0)

    module = Statistics(batch_norm=True)
    fit(module)
    remove_lora(module)
    assert torch.equal(module.net.bn.running_mean, torch.full((16,), 5.0))


class OwnOptimizer(Lit):
    """Steps the base by an optimizer that Lightning does not know."""

    def on_fit_start(self):
        self.own = torch.optim.SGD(self.net.head.parameters(), 0.1)

    def training_step(self, batch, index):
        self.net.head.requires_grad_(True)
        loss = self.loss(batch)
        self.own.zero_grad()
        loss.backward(retain_graph=True, inputs=list(self.net.head.parameters()))
        self.own.step()
        return self.loss(batch)


def test_an_optimizer_outside_of_configure_optimizers(tmp_path):
    said, files, module = [], checkpoints(tmp_path), OwnOptimizer()
    fit(module, files, said=said)
    for what in ("moving", "requiring a gradient", "holding a gradient"):
        assert [each for each in said if each.startswith(f"Frozen, but {what}: `net.head.weight`, `net.head.bias`.")]
    assert len(said) == 3, "each is named once"
    assert {"net.head.weight", "net.head.bias"} < load(files.last_model_path)["state_dict"].keys()
    loaded = load_from_checkpoint(Lit, files.last_model_path)
    assert torch.equal(loaded.net.head.weight, module.net.head.weight)


def test_a_part_that_unfreezes_itself_later():
    class Unfreezes(Lit):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net.head.requires_grad_(True)

    said = []
    fit(Unfreezes(), said=said, epochs=2)
    assert [each.partition(":")[0] for each in said] == [
        "Frozen, but requiring a gradient",
        "Frozen, but holding a gradient",
    ]
    assert "To train them in addition to the adapters, name them in `also_train`" in said[0]


def test_gradients_of_an_earlier_fit_are_not_held():
    module, said = Lit(), []
    trainer(max_epochs=1).fit(module, data())
    assert module.net.head.weight.grad is not None
    fit(module, said=said)
    assert said == [] and module.net.head.weight.grad is None


class Momentum(Lit):
    """Learns to predict a teacher, which is a moving average of its network."""

    only_trained = False

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def loss(self, batch):
        with torch.no_grad():
            goal = self.teacher(batch[0])
        return (self(batch[0]) - goal - 1).square().mean()

    @torch.no_grad()
    def on_train_batch_end(self, *args):
        for average, parameter in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            if parameter.requires_grad or not self.only_trained:
                average.mul_(0.9).add_(parameter, alpha=0.1)


def test_a_momentum_teacher_is_in_the_files_and_resumes_exactly(tmp_path):
    said, files, whole = [], checkpoints(tmp_path / "whole"), Momentum()
    runner = fit(whole, files, epochs=2, targets="all", said=said)
    [told] = said
    assert told.startswith("Frozen, but moving: `teacher.layers.0.") and "such as the update of a momentum" in told
    runner.test(whole, data(2), ckpt_path=files.best_model_path, verbose=False)
    first, resumed = checkpoints(tmp_path / "first"), Momentum()
    fit(Momentum(), first, targets="all")
    fit(resumed, epochs=2, ckpt=first.last_model_path, targets="all")
    assert same(dict(whole.state_dict()), dict(resumed.state_dict()))
    fresh = trainer(LoRACallback(r=2, targets="all"))
    again = fresh.test(Momentum(), data(2), ckpt_path=files.last_model_path, verbose=False)
    assert again == runner.test(whole, data(2), verbose=False)


def test_an_average_of_what_trains_moves_nothing_frozen(tmp_path):
    said, files, module = [], checkpoints(tmp_path), Momentum()
    module.only_trained = True
    fit(module, files, targets="all", said=said)
    assert said == []
    assert all(".lora." in name for name in load(files.last_model_path)["state_dict"])


def test_what_is_sharded_is_named_once_and_not_promised_to_be_in_a_file(monkeypatch):
    model, method = nn.Linear(4, 4), LoRAMethod(LoRAConfig(r=2, targets="all"))
    method.complete(model)
    monkeypatch.setattr(frozen_watch, "is_in_pieces", lambda parameter: True)
    watch = frozen_watch.FrozenWatch(model, method, fingerprint(model))
    model.weight.data.add_(1)
    with pytest.warns(UserWarning, match="Frozen, but moving: `weight`.*Checkpoints do not hold what is sharded"):
        watch.check_values(thorough=True)
    model.weight.data.add_(1)
    watch.check_values(thorough=False)  # a second warning would be an error here
    assert list(method.state(model)) == ["lora.default.A", "lora.default.B"]


def test_merge_best_with_a_momentum_teacher(tmp_path):
    files, module = checkpoints(tmp_path), Momentum()
    runner = fit(module, files, epochs=2, targets="all", merge="best")
    [merged], before = runner.test(module, data(2), verbose=False), copy.deepcopy(module.state_dict())
    [best] = runner.test(module, data(2), ckpt_path=files.best_model_path, verbose=False)
    assert same(before, dict(module.state_dict()))
    assert merged["test_loss"] == pytest.approx(best["test_loss"], rel=1e-5)
