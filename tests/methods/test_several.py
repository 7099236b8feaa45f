"""A later run on the same module: what an earlier one trained stays as it is, and the merge takes what is named."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from lightning_lora import (
    LoRACallback,
    load_from_checkpoint,
    lora_parameters,
    unmerge_lora,
    use_adapters,
)
from lightning_lora.model.several.strengths import strengths_of
from tests.helpers.models import Lit, checkpoints, data, trainer
from tests.helpers.remedies.case import lines_of_log
from tests.helpers.routed import RoutedLit, rows, values_of
from tests.helpers.runs import load

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))


def output(module) -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(X)


def first_run() -> Lit:
    module = Lit()
    trainer(LoRACallback(r=2, name="fr", merge=False), max_epochs=1).fit(module, data())
    return module


def later_run(module, folder=None, **kwargs):
    own = LoRACallback(**{"r": 2, "name": "de", "keep": ["fr"], "merge": False, **kwargs})
    files = () if folder is None else (checkpoints(folder, monitor=None, save_top_k=1),)
    runner = trainer(own, *files, max_epochs=1)
    runner.fit(module, data(1))
    return runner


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.0, 1.0, 0.5])
def test_a_kept_adapter_stays_as_it_is_and_acts_with_its_strength(tmp_path, strength):
    module = first_run()
    before = values_of(module, "fr")
    runner = later_run(module, tmp_path, keep={"fr": strength})
    assert all(torch.equal(value, before[key]) for key, value in values_of(module, "fr").items())
    file = load(tmp_path / "last.ckpt")
    assert {key for key in file["state_dict"] if ".fr." in key} == before.keys()
    assert len(file["optimizer_states"][0]["state"]) == len(values_of(module, "de"))
    assert not any(p.requires_grad for _, p in lora_parameters(module, name="fr"))
    after = output(module)  # after the run it acts as in it
    with use_adapters(module, {"fr": strength, "de": 1.0}):
        assert torch.equal(output(module), after)
    assert runner.global_step == 8
    built = load_from_checkpoint(Lit, tmp_path / "last.ckpt")
    assert torch.equal(output(built), after)


@pytest.mark.slow
def test_a_resting_adapter_leaves_the_run_of_the_other_as_it_is():
    module, alone = first_run(), Lit()
    later_run(module)
    trainer(LoRACallback(r=2, name="de", merge=False), max_epochs=1).fit(alone, data(1))
    expected = values_of(alone)
    assert all(torch.equal(value, expected[key]) for key, value in values_of(module, "de").items())


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_the_merge_follows_the_strengths_and_both_come_back(strength):
    module = first_run()
    live = copy.deepcopy(module)
    later_run(live, keep={"fr": strength})
    later_run(module, keep={"fr": strength}, merge=True)
    torch.testing.assert_close(output(module), output(live), rtol=0, atol=1e-5)
    assert not any(".lora." in key for key in module.state_dict())
    unmerge_lora(module)
    assert torch.equal(output(module), output(live))


def test_a_run_that_fails_before_its_first_step_leaves_the_module_as_it_was():
    module = first_run()
    before = output(module)

    class Broken(Callback):
        def on_train_start(self, runner, pl_module):
            raise RuntimeError("broken")

    own = LoRACallback(r=2, name="de", keep=["fr"])
    with pytest.raises(RuntimeError, match="broken"):
        trainer(own, Broken()).fit(module, data(1))
    assert torch.equal(output(module), before)
    assert {name.split(".lora.")[1].split(".")[0] for name, _ in lora_parameters(module)} == {"fr"}


def with_head() -> Lit:
    """A module whose first run trained a head and biases in addition to ``fr``."""
    module = Lit()
    own = LoRACallback(r=2, name="fr", targets=["q"], also_train=["head"], bias="lora_only", merge=False)
    trainer(own, max_epochs=1).fit(module, data())
    return module


def output_of(module, name: str) -> torch.Tensor:
    with use_adapters(module, name):
        return output(module)


def of_the_base(module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if ".lora." not in name}


@pytest.mark.slow
def test_what_trained_with_a_kept_adapter_stays_too_and_is_in_the_files(tmp_path):
    module = with_head()
    before, base = output_of(module, "fr"), of_the_base(module)
    later_run(module, tmp_path, targets=["v"])
    assert torch.equal(output_of(module, "fr"), before)
    assert all(torch.equal(value, base[name]) for name, value in of_the_base(module).items())
    assert not torch.equal(output_of(module, "de"), before), "the later run trained"
    built = load_from_checkpoint(Lit, tmp_path / "last.ckpt")
    assert torch.equal(output_of(built, "fr"), before)
    assert torch.equal(output(built), output(module))
    own = LoRACallback(r=2, name="de", keep=["fr"], targets=["v"], merge=False)
    trainer(own, max_epochs=2).fit(built, data(1), ckpt_path=str(tmp_path / "last.ckpt"))
    through = with_head()
    trainer(LoRACallback(r=2, name="de", keep=["fr"], targets=["v"], merge=False), max_epochs=2).fit(through, data(1))
    assert torch.equal(output(built), output(through))
    assert torch.equal(output_of(built, "fr"), before)


def test_what_a_later_run_trains_in_addition_changes_the_kept_adapter_and_that_is_a_warning():
    module = with_head()
    before, base = output_of(module, "fr"), of_the_base(module)
    with pytest.warns(UserWarning, match=r"`keep` has `fr`, and this run trains `net.head.weight` and 1 more in add"):
        later_run(module, targets=["v"], also_train=["head"])
    assert not torch.equal(output_of(module, "fr"), before)
    moved = {name for name, value in of_the_base(module).items() if not torch.equal(value, base[name])}
    assert moved == {"net.head.weight", "net.head.bias"}, "the biases of `fr` stay"


@pytest.mark.slow
def test_the_kept_adapter_can_train_on_with_what_trained_with_it():
    module = with_head()
    later_run(module, targets=["v"])
    base = of_the_base(module)
    own = LoRACallback(r=2, name="fr", targets=["q"], also_train=["head"], bias="lora_only", merge=False, keep=["de"])
    with pytest.warns(UserWarning, match="`keep` has `de`"):
        trainer(own, max_epochs=1).fit(module, data())
    moved = {name for name, value in of_the_base(module).items() if not torch.equal(value, base[name])}
    assert {"net.head.weight", "net.layers.0.q.bias"} <= moved


@pytest.mark.slow
def test_an_evaluation_leaves_the_strengths_as_they_were(tmp_path):
    module = first_run()
    later_run(module, tmp_path, keep={"fr": 0.5})
    before, expected = output(module), strengths_of(module)
    own = LoRACallback(r=2, name="de", keep=["fr"], merge=False)
    trainer(own).test(module, data(1))
    assert strengths_of(module) == expected and torch.equal(output(module), before)
    bare = first_run()
    trainer(own).validate(bare, data(1))
    assert strengths_of(bare) == {"fr": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["fit", "test"])
def test_the_file_of_a_run_that_kept_adapters_needs_their_module_and_that_is_said(tmp_path, verb):
    module = first_run()
    later_run(module, tmp_path, keep={"fr": 0.5})
    expected = output(module)
    path = str(tmp_path / "last.ckpt")

    def go_on(module):
        own = LoRACallback(r=2, name="de", keep={"fr": 0.5}, merge=False)
        getattr(trainer(own, max_epochs=1), verb)(module, data(1), ckpt_path=path)

    with pytest.raises(ValueError, match=r"For a checkpoint of a run that kept it .* load_from_checkpoint\(cls, path"):
        go_on(Lit())
    built = load_from_checkpoint(Lit, path)
    go_on(built)
    assert torch.equal(output(built), expected)
    with pytest.raises(ValueError, match=r"`keep` the same strengths, and fit the module that load_from_checkpoint"):
        trainer(LoRACallback(r=2, name="de"), max_epochs=2).fit(Lit(), data(1), ckpt_path=path)


def test_names_that_the_module_has_not_or_the_run_does_not_name():
    with pytest.raises(ValueError, match=r"`keep` has 'fr', which is no adapter of the module; its others: none"):
        later_run(Lit())
    with pytest.raises(ValueError, match=r"an adapter `fr`, which this run does not name.* keep=\['fr'\]"):
        later_run(first_run(), keep=None)


ADAPTERS = {"fr": {}, "de": {"r": 4}}


def routed(**kwargs) -> LoRACallback:
    return LoRACallback(**{"r": 2, "adapters": ADAPTERS, "route": "task", **kwargs})


def fit(callback: LoRACallback, *more) -> RoutedLit:
    module = RoutedLit()
    trainer(callback, *more, max_epochs=1).fit(module, rows(without="it"), rows(without="it"))
    return module


def test_of_several_adapters_nothing_is_merged_and_that_is_said():
    lines: list[str] = []
    with lines_of_log(lines):
        module = fit(routed())
    assert set(module.net.layers[0].q.lora) == {"fr", "de"}
    [said] = [line for line in lines if "nothing is merged, and the module keeps them" in line]
    assert re.search(r"trains `fr`, `de`, and merged together .*merge=\{'fr': 1\.0\}", said)
    [metrics] = trainer(routed()).test(module, rows(without="it"), verbose=False)
    assert metrics["test_loss"] > 0


@pytest.mark.slow
def test_a_dict_says_which_is_merged_and_tests_follow(tmp_path):
    live = fit(routed(merge=False))
    merged = tmp_path / "merged.safetensors"
    lines: list[str] = []
    with lines_of_log(lines):
        files = checkpoints(tmp_path)
        module = fit(routed(merge={"fr": 1.0, "de": 0.5}, merged=str(merged), save="merged"), files)
    assert any("with the factors {'fr': 1.0, 'de': 0.5}." in line for line in lines)
    with use_adapters(live, {"fr": 1.0, "de": 0.5}):
        expected = output(live)
    torch.testing.assert_close(output(module), expected, rtol=0, atol=1e-5)
    for state in (torch.load(files.last_model_path)["state_dict"], load_file(merged), module.state_dict()):
        plain = RoutedLit()
        plain.load_state_dict(state)
        assert torch.equal(output(plain), output(module))
    before = copy.deepcopy(module.state_dict())
    routed_loss = trainer(routed(merge=False)).test(live, rows(without="it"), verbose=False)
    again = trainer(routed()).test(module, rows(without="it"), ckpt_path=files.last_model_path, verbose=False)
    assert again == routed_loss  # unmerged, routed, and merged again as it was
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"merge": {"es": 1.0}}, r"`merge` has 'es', which this run neither trains nor keeps.* such as `de`"),
        ({"merge": {"fr": float("inf")}}, r"`merge\['fr'\]` must be finite"),
        ({"merge": {"fr": "1"}}, r"`merge\['fr'\]` must be a number"),
        ({"merge": "best"}, r"`merge='best'` would merge `fr`, `de` together.*merge=\{'fr': 1.0\}"),
    ],
)
def test_a_merge_that_cannot_be_meant(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        routed(**arguments)


@pytest.mark.parametrize("argument", ["merged", "save"])
def test_merged_files_of_several_adapters_need_to_be_told_which(tmp_path, argument):
    value = {"merged": str(tmp_path / "merged.safetensors"), "save": "merged"}[argument]
    with pytest.raises(Exception, match=rf"`{argument}=.* To merge say which, .*merge=\{{'fr': 1\.0\}}"):
        fit(routed(**{argument: value}))
