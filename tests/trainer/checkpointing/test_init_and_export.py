"""A run starts from adapters of elsewhere, and leaves its own for others: judged by outputs."""

from __future__ import annotations

import copy
import json
import re
import warnings
from itertools import product

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from safetensors import SafetensorError, safe_open
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, load_adapter, lora_parameters, save_adapter
from lightning_lora.methods.lora import LoRAMethod
from lightning_lora.trainer.checkpointing.init_and_export import start_from
from tests.helpers.models import BuiltInConfigureModel, BuiltInSetup, Lit, checkpoints, data, net, trainer
from tests.helpers.oracles import Scaled
from tests.helpers.selection import slow_except

peft = pytest.importorskip("peft")
X = data(5).dataset.tensors[0]


def fit(folder, cls=Lit, epochs=2, files=None, ckpt=None, **lora):
    module = cls()
    callbacks = [LoRACallback(r=4, **lora), *([files] if files else [])]
    trainer(*callbacks, max_epochs=epochs).fit(module, data(), data(1), ckpt_path=ckpt)
    return module.eval()


def by_peft(directory, x=X):
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(net(), str(directory)).eval()(x)


def metadata(directory):
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        return file.metadata()


BUILT = product([Lit, BuiltInSetup, BuiltInConfigureModel], [True, False])


@pytest.mark.parametrize(("cls", "merge"), slow_except([(Lit, True), (BuiltInSetup, False)], BUILT))
def test_what_is_exported_is_what_was_trained(tmp_path, cls, merge):
    module = fit(tmp_path, cls, export=str(tmp_path / "out"), merge=merge)
    torch.testing.assert_close(by_peft(tmp_path / "out"), module(X), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(module(X), net()(X), atol=1e-2)


def test_it_tells_where_it_comes_from(tmp_path):
    fit(tmp_path, export=str(tmp_path / "out"))
    told = metadata(tmp_path / "out")
    assert (told["step"], told["epoch"]) == ("16", "2")
    assert json.loads(told["metrics"])["val_loss"] > 0
    assert json.loads(told["lightning_lora.config"])["r"] == 4


class Worse(Callback):
    """Makes the second epoch the worse one."""

    def on_train_epoch_start(self, trainer, pl_module):
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 0.5 if trainer.current_epoch else group["lr"]


def test_the_best_is_exported_where_the_best_is_merged(tmp_path):
    module, files = Lit(), checkpoints(tmp_path / "files")
    callbacks = [LoRACallback(r=4, merge="best", export=str(tmp_path / "out")), files, Worse()]
    trainer(*callbacks, max_epochs=2).fit(module, data(), data(1))
    best = torch.load(files.best_model_path, weights_only=True)["state_dict"]
    assert files.best_model_path != files.last_model_path and "epoch=0" in files.best_model_path
    told = metadata(tmp_path / "out")
    assert (told["epoch"], told["step"]) == ("0", "8")
    assert json.loads(told["metrics"]) == {"val_loss": float(files.best_model_score)}
    other = net()
    load_adapter(other, tmp_path / "out")
    for name, parameter in lora_parameters(other):
        assert torch.equal(parameter, best[f"net.{name}"])
    torch.testing.assert_close(by_peft(tmp_path / "out"), module.eval()(X), rtol=1e-5, atol=1e-5)


def test_nothing_is_exported_by_a_run_that_failed_or_was_a_try(tmp_path):
    class Fail(Lit):
        def on_train_epoch_end(self):
            raise RuntimeError("planned failure")

    with pytest.raises(RuntimeError, match="planned failure"):
        fit(tmp_path, Fail, export=str(tmp_path / "out"))
    trainer(LoRACallback(export=str(tmp_path / "out")), fast_dev_run=True).fit(Lit(), data(), data(1))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def from_peft(tmp_path):
    """A directory that peft wrote, and its outputs."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q", "k", "v", "o"])
    model = peft.get_peft_model(net(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "peft")
    return tmp_path / "peft", model.eval()(X).detach()


@pytest.mark.parametrize("cls", [Lit, BuiltInSetup, BuiltInConfigureModel])
def test_a_test_of_what_peft_wrote(from_peft, cls):
    directory, wanted = from_peft
    module = cls()
    trainer(LoRACallback(r=4, init_from=str(directory))).test(module, data(2), verbose=False)
    torch.testing.assert_close(module.eval()(X), wanted)


class Start(Callback):
    def on_train_start(self, trainer, pl_module):
        with torch.no_grad():
            self.output = pl_module.net.eval()(X)
        pl_module.net.train()


def test_training_starts_from_what_peft_wrote(from_peft, tmp_path):
    directory, wanted = from_peft
    spy, files = Start(), checkpoints(tmp_path / "files")
    trainer(LoRACallback(r=4, init_from=str(directory)), spy, files).fit(module := Lit(), data(), data(1))
    torch.testing.assert_close(spy.output, wanted)
    assert not torch.allclose(module.eval()(X), wanted, atol=1e-3)
    again = Start()  # a resumed run has the file's values
    lora = LoRACallback(r=4, init_from=str(directory), merge=False)
    trainer(lora, again, max_epochs=3).fit(Lit(), data(), data(1), ckpt_path=files.last_model_path)
    assert not torch.allclose(again.output, wanted, atol=1e-3)


def test_a_second_fit_goes_on(from_peft):
    directory, _ = from_peft
    module = Lit()
    for _ in range(2):
        before = net()(X) if module.net is None else module.eval()(X).detach()
        spy = Start()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="`init_from")  # these adapters did start from it
            trainer(LoRACallback(r=4, init_from=str(directory)), spy, max_epochs=1).fit(module, data(), data(1))
    torch.testing.assert_close(spy.output, before, rtol=1e-5, atol=1e-5)


def test_adapters_that_are_there_go_on_and_it_is_said(from_peft):
    module = Lit()
    trainer(LoRACallback(r=4, merge=False), max_epochs=1).fit(module, data(), data(1))
    before, spy = module.eval()(X).detach(), Start()
    with pytest.warns(UserWarning, match="was not read: the module has adapters, and trains them further"):
        trainer(LoRACallback(r=4, init_from=str(from_peft[0])), spy, max_epochs=1).fit(module, data(), data(1))
    assert torch.equal(spy.output, before)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="`init_from")
        trainer(LoRACallback(r=4, init_from=str(from_peft[0]))).test(module, data(2), verbose=False)


class OwnForward(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.net.layers[0].q = Scaled(16, 16)


class OwnParameter(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1))


REFUSED = {
    "layer": (OwnForward, {}, "out", "is a Scaled with its own forward"),
    "parameter": (OwnParameter, {"also_train": ["token"]}, "out", "A parameter of the model itself trains"),
    "matrix": (Lit, {"targets": ["layers.0.q.weight"]}, "out", "is adapted by its parameter `weight`"),
    "file": (Lit, {}, "file", "but is a file"),
    "inside-a-file": (Lit, {}, "file/out", "file is not a directory. Name a directory that can be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_be_written_is_refused_before_the_first_step(tmp_path, case):
    cls, arguments, name, words = REFUSED[case]

    class Started(cls):
        def on_train_start(self):
            raise AssertionError("too late")

    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=words):
        trainer(LoRACallback(export=str(tmp_path / name), **arguments)).fit(Started(), data(), data(1))
    assert not (tmp_path / "out").exists()


class Backbone(Lit):
    """A new head beside the network that holds all adapters."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.scores = nn.Linear(3, 3)

    def forward(self, x):
        return self.scores(self.net(x))


def test_a_head_outside_the_backbone_is_exported_with_it(tmp_path, monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr("lightning_lora.trainer.checkpointing.init_and_export.rank_zero_info", messages.append)
    with pytest.warns(UserWarning, match="lies outside of `net`"):
        module = fit(tmp_path, Backbone, also_train=["scores"], export=str(tmp_path / "out"))
    assert len(messages) == 1 and "are relative to the Backbone, and peft has to wrap that" in messages[0]
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(Backbone(), str(tmp_path / "out")).eval()(X)
    torch.testing.assert_close(theirs, module(X), rtol=1e-5, atol=1e-5)
    again = Backbone()
    trainer(LoRACallback(r=4, also_train=["scores"], init_from=str(tmp_path / "out"))).test(
        again, data(2), verbose=False
    )
    torch.testing.assert_close(again.eval()(X), module(X), rtol=1e-5, atol=1e-5)


def test_a_merge_does_not_depend_on_the_export(tmp_path):
    class Diverges(Callback):
        def on_train_end(self, trainer, pl_module):
            next(parameter for _, parameter in lora_parameters(pl_module)).data.fill_(float("nan"))

    module = Lit()
    with pytest.warns(UserWarning, match=r"was not written: `layers.0.q` has NaN"):
        trainer(LoRACallback(r=4, export=str(tmp_path / "out")), Diverges(), max_epochs=1).fit(module, data(), data(1))
    assert list(module.state_dict()) == list(Lit().state_dict()) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [SafetensorError("No space left"), OSError("full"), RuntimeError("no memory")])
def test_a_disk_that_is_full_costs_no_merge(tmp_path, monkeypatch, error):
    def fails(*arguments):
        raise error

    monkeypatch.setattr("lightning_lora.peft_format.save.write_tensors", fails)
    module = Lit()
    with pytest.warns(UserWarning, match=f"was not written: {error}"):
        trainer(LoRACallback(r=4, export=str(tmp_path / "out")), max_epochs=1).fit(module, data(), data(1))
    assert list(module.state_dict()) == list(Lit().state_dict())


def test_training_starts_from_another_runs_checkpoint(tmp_path):
    files = checkpoints(tmp_path / "files")
    first = fit(tmp_path, files=files, merge=False)
    spy = Start()
    trainer(LoRACallback(r=4, init_from=files.last_model_path), spy).fit(Lit(), data(), data(1))
    assert torch.equal(spy.output, first(X))


class Drawn(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.net.layers[0].q = nn.Linear(16, 16)


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_does_not_fit_is_refused_before_the_first_step(tmp_path, kind):
    files = checkpoints(tmp_path / "files")
    fit(tmp_path, files=files, export=str(tmp_path / "out"))
    path = {"directory": str(tmp_path / "out"), "file": files.last_model_path}[kind]
    for cls, lora, words in (
        (Drawn, {"r": 4}, "was trained on another base: `"),
        (Lit, {"r": 8}, "8"),
        (Lit, {"r": 4, "targets": ["q"]}, "`"),
    ):
        module = cls()
        before = {key: value.clone() for key, value in module.state_dict().items()}
        with pytest.raises(ValueError, match=re.escape(words)):
            trainer(LoRACallback(init_from=path, **lora)).fit(module, data(), data(1))
        assert list(before) == list(module.state_dict())
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_run_that_failed_before_its_first_step_leaves_the_module_bare(from_peft):
    class Fail(Lit):
        def on_train_start(self):
            raise RuntimeError("planned failure")

    module = Fail()
    with pytest.raises(RuntimeError, match="planned failure"):
        trainer(LoRACallback(r=4, init_from=str(from_peft[0]))).fit(module, data(), data(1))
    assert list(module.state_dict()) == list(Lit().state_dict()) and torch.equal(module.eval()(X), Lit().eval()(X))


def test_a_path_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="`init_from='nowhere'` is not there"):
        trainer(LoRACallback(init_from="nowhere")).fit(Lit(), data(), data(1))


def test_a_model_without_memory(from_peft):
    with torch.device("meta"):
        model = net()
    method = LoRAMethod(LoRAConfig(r=4))
    method.complete(model)
    with pytest.raises(ValueError, match=re.escape("A` has memory: the model is on the meta device")):
        start_from(model, str(from_peft[0]), method, {})


def test_processes_that_are_gone_export_nothing(tmp_path):
    lora, files = LoRACallback(export=str(tmp_path / "out")), checkpoints(tmp_path)
    runner = trainer(lora, files, strategy="ddp_spawn", devices=2)
    with pytest.raises(MisconfigurationException, match="gone with the adapters"):
        lora.setup(runner, Lit(), "fit")


def test_both_ways_by_hand(tmp_path):
    one, other = net(), net()
    apply_lora(one, LoRAConfig(r=4))
    for name, parameter in lora_parameters(one):
        if name.endswith("B"):
            nn.init.normal_(parameter)
    save_adapter(one, tmp_path)
    load_adapter(other, tmp_path)
    assert torch.equal(one(X), other(X))


class Momentum(Lit):
    """Follows a teacher, which is the average of its network from the step `since` on."""

    since, only_what_trains = 0, False

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch, index):
        with torch.no_grad():
            goal = self.teacher(batch[0])
        return self.loss(batch) + (self(batch[0]) - goal - 1).square().mean()

    @torch.no_grad()
    def on_train_batch_end(self, *args):
        pairs = zip(self.teacher.parameters(), self.net.parameters(), strict=True)
        for average, parameter in pairs if self.global_step > self.since else ():
            if parameter.requires_grad or not self.only_what_trains:
                average.mul_(0.9).add_(parameter, alpha=0.1)


class OnlyWhatTrains(Momentum):
    only_what_trains = True


class Later(Momentum):
    since = 5


NAMED = "ignore:.*would not train without adapters"
MOVING = "ignore:Frozen, but moving"
WORDS = r"cannot be written: PEFT's format has no weights for `teacher.* other code moves them. Leave `export` out, or"


@pytest.mark.filterwarnings(NAMED, MOVING)
def test_an_adapted_twin_that_moves_is_refused_in_the_first_steps(tmp_path):
    """Before them nobody knows that it will move."""
    steps = []

    class Counts(Callback):
        def on_train_batch_end(self, *args):
            steps.append(1)

    module = Momentum()
    with pytest.raises(MisconfigurationException, match=WORDS):
        trainer(LoRACallback(r=4, export=str(tmp_path / "out")), Counts()).fit(module, data(), data(1))
    assert len(steps) == 1 and not (tmp_path / "out").exists()
    assert dict(lora_parameters(module)) == {}
    fit(tmp_path, Momentum, epochs=1)  # without `export`
    module = fit(tmp_path, OnlyWhatTrains, epochs=1, export=str(tmp_path / "out"))
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(OnlyWhatTrains(), str(tmp_path / "out")).eval()(X)
    torch.testing.assert_close(theirs, module(X), rtol=1e-5, atol=1e-5)


def test_what_a_twin_must_not_do_is_said_before_the_first_step(tmp_path):
    with pytest.warns(UserWarning, match="With `export` no other code may move them, as that of a momentum teacher"):
        fit(tmp_path, OnlyWhatTrains, epochs=1, export=str(tmp_path / "out"))


@pytest.mark.filterwarnings(NAMED, MOVING)
def test_a_run_that_goes_on_from_a_twin_that_moved_is_refused_before_its_first_step(tmp_path):
    files = checkpoints(tmp_path)
    fit(tmp_path, Momentum, epochs=1, files=files)

    class Started(Momentum):
        def training_step(self, batch, index):
            raise AssertionError("too late")

    with pytest.raises(MisconfigurationException, match=WORDS):
        fit(tmp_path, Started, epochs=2, ckpt=files.last_model_path, export=str(tmp_path / "out"))


@pytest.mark.filterwarnings(NAMED, MOVING)
def test_a_twin_that_moves_late_costs_the_directory_and_not_the_run(tmp_path):
    said, folder = [], str(tmp_path / "out")

    class Says(Callback):
        def on_train_batch_end(self, trainer, *args):
            said.append(sum("export=" in str(each.message) for each in caught))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callbacks = LoRACallback(r=4, export=folder), Says(), checkpoints(tmp_path)
        trainer(*callbacks, max_epochs=2).fit(Later(), data(), data(1))
    assert said == [0] * 8 + [1] * 8, "as soon as the save after the first epoch has seen it"
    (message,) = (str(each.message) for each in caught if "export=" in str(each.message))
    assert re.search(WORDS, message) and not (tmp_path / "out").exists()


@pytest.mark.filterwarnings(MOVING, "ignore:.*lies outside of `net`")
def test_a_teacher_without_adapters_makes_the_directory_wider_and_that_is_said_in_the_first_steps(tmp_path, log):
    class ByName(Momentum):
        @torch.no_grad()
        def on_train_batch_end(self, *args):
            averages = dict(self.teacher.named_parameters())
            for name, parameter in self.net.named_parameters():
                if name in averages:
                    averages[name].mul_(0.9).add_(parameter, alpha=0.1)

    fit(tmp_path, ByName, epochs=1, exclude=["teacher"], export=str(tmp_path / "out"))
    (place,) = (index for index, text in enumerate(log) if "peft has to wrap that" in text)
    assert "`teacher." in log[place] and "stopped" in "".join(log[place:])
