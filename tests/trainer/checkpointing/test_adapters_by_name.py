"""Checkpoints of several adapters: those that trained and those that were kept, all of them or those that fit."""

from __future__ import annotations

import pytest
import torch

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    load_adapter,
    load_from_checkpoint,
    lora_state_dict,
    save_adapter,
    use_adapters,
)
from lightning_lora.model.record import configs_of, kept_names
from lightning_lora.model.several.strengths import set_strengths, strengths_of
from tests.helpers.models import Lit, checkpoints, data, trainer
from tests.helpers.oracles import assert_same_values, same_bits, snapshot
from tests.helpers.several import callback_of, fill

X = data(5).dataset.tensors[0]
FR, DE, ES = {"r": 2, "alpha": 6}, {"r": 3, "targets": ["q", "mlp"]}, {"r": 1}


def several(keep=None, name="default", **adapters):
    """The configuration of a run that trains these adapters, or one of that name."""
    return LoRAConfig(targets=["q", "v"], seed=0, name=name, adapters=adapters or None), keep


def run(folder, config, keep=None, module=None, ckpt_path=None, steps=2, **run):
    """A module after a run, with live adapters, and its last file."""
    module, files = Lit() if module is None else module, checkpoints(folder)
    callback = callback_of(config, keep, **run)
    trainer(callback, files, max_epochs=1, limit_train_batches=steps).fit(module, data(), data(1), ckpt_path=ckpt_path)
    return module.eval(), files.last_model_path


def output(module, adapters="all"):
    with torch.no_grad():
        if adapters == "all":
            return module.eval()(X)
        with use_adapters(module, adapters):
            return module.eval()(X)


def of(state, name):
    return {key: value for key, value in state.items() if f".lora.{name}." in key}


def test_a_module_with_all_adapters_comes_back(tmp_path):
    trained, path = run(tmp_path, *several(fr=FR, de=DE))
    loaded = load_from_checkpoint(Lit, path)
    assert list(configs_of(loaded)) == ["fr", "de"]
    assert_same_values(loaded, snapshot(trained))
    for adapters in ("all", "fr", "de"):
        assert torch.equal(output(loaded, adapters), output(trained, adapters))


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_kept_adapters_are_in_the_file_and_come_back_as_they_acted(tmp_path, strength):
    module = Lit()
    apply_lora(module, LoRAConfig(**FR, targets="attn", name="fr"))
    fill(module)
    set_strengths(module, {"fr": strength})
    before = {key: value.clone() for key, value in lora_state_dict(module, "fr").items()}
    trained, path = run(tmp_path, *several({"fr": strength}, "de"), module=module)
    recorded = torch.load(path, weights_only=True)
    assert recorded["lightning_lora"]["kept"]["fr"]["strength"] == strength
    assert all(same_bits(recorded["state_dict"][key], value) for key, value in before.items())
    loaded = load_from_checkpoint(Lit, path)
    assert set(configs_of(loaded)) == {"fr", "de"} and kept_names(loaded) == {"fr"}
    assert strengths_of(loaded) == {"fr": strength, "de": 1.0}
    assert torch.equal(output(loaded), output(trained)) and torch.equal(output(loaded, "fr"), output(trained, "fr"))
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == list(lora_state_dict(loaded, "de"))


def test_a_kept_adapter_trains_where_the_new_run_says_so(tmp_path):
    module = Lit()
    apply_lora(module, LoRAConfig(**FR, targets=["q", "v"], seed=0, name="fr"))
    _, path = run(tmp_path / "a", *several({"fr": 1.0}, "de"), module=module)
    loaded = load_from_checkpoint(Lit, path)
    before = snapshot(loaded)
    config = LoRAConfig(**FR, targets=["q", "v"], seed=0, name="fr")
    run(tmp_path / "b", config, {"de": 1.0}, module=loaded)
    after = loaded.state_dict()
    assert all(same_bits(after[key], value) for key, value in of(before, "de").items())
    assert not all(same_bits(after[key], value) for key, value in of(before, "fr").items())


def test_a_failed_load_leaves_the_adapters_that_the_module_had(tmp_path):
    module = Lit()
    apply_lora(module, LoRAConfig(**FR, targets="attn", name="fr"))
    _, path = run(tmp_path, *several({"fr": 1.0}, "de"), module=module)
    built = Lit()
    apply_lora(built, several(name="de")[0])
    built.net.head.weight.data += 1
    before = snapshot(built)
    with pytest.raises(ValueError, match="another base"):
        load_from_checkpoint(built, path)
    assert list(configs_of(built)) == ["de"]
    assert_same_values(built, before)


def test_a_resume_with_one_name_more_and_one_fewer(tmp_path):
    """The common one goes on, the new one starts as without a file, the other is left out."""
    _, path = run(tmp_path / "a", *several(fr=FR, de=DE))
    recorded = torch.load(path, weights_only=True)["state_dict"]
    module, _ = run(tmp_path / "b", *several(de=DE, es=ES), ckpt_path=path, steps=0)
    fresh = Lit()
    apply_lora(fresh, several(de=DE, es=ES)[0])
    state = module.state_dict()
    assert list(configs_of(module)) == ["de", "es"]
    assert all(same_bits(state[key], value) for key, value in of(recorded, "de").items())
    assert all(same_bits(state[key], value) for key, value in of(fresh.state_dict(), "es").items())


def test_other_arguments_of_one_adapter_are_refused(tmp_path):
    _, path = run(tmp_path / "a", *several(fr=FR, de=DE))
    with pytest.raises(ValueError, match=r"`r=3` instead of `r=5` in the adapter 'de'"):
        run(tmp_path / "b", *several(fr=FR, de={**DE, "r": 5}), ckpt_path=path)
    with pytest.raises(ValueError, match=r"the adapters 'fr', 'de' instead of 'it', 'es'"):
        run(tmp_path / "c", *several(it=FR, es=ES), ckpt_path=path)


@pytest.mark.parametrize("source", ["checkpoint", "directory"])
def test_init_from_a_run_of_several(tmp_path, source):
    trained, path = run(tmp_path / "a", *several(fr=FR, de=DE), export=str(tmp_path / "out"))
    assert {place.name for place in (tmp_path / "out").iterdir()} == {"fr", "de"}
    path = path if source == "checkpoint" else str(tmp_path / "out")
    module, _ = run(tmp_path / "b", *several(de=DE, fr=FR), steps=0, init_from=path)
    assert all(same_bits(module.state_dict()[key], value) for key, value in lora_state_dict(trained).items())
    one, _ = run(tmp_path / "c", LoRAConfig(**DE, seed=0, name="de"), steps=0, init_from=path)
    expected = lora_state_dict(trained, "de")
    assert all(same_bits(lora_state_dict(one)[key], value) for key, value in expected.items())
    with pytest.raises(ValueError, match=r"has no adapter 'es': it holds `de`, `fr`"):
        run(tmp_path / "d", *several(fr=FR, es=ES), init_from=path)


def test_several_do_not_start_from_the_directory_of_one(tmp_path):
    trained, _ = run(tmp_path / "a", *several(fr=FR))
    save_adapter(trained, tmp_path / "one")
    with pytest.raises(ValueError, match=r"holds one adapter, and this run trains 'fr', 'de'"):
        run(tmp_path / "b", *several(fr=FR, de=DE), init_from=str(tmp_path / "one"))
    load_adapter(Lit(), tmp_path / "one")
