"""The adapters of one layer: which pairs act, with which coefficients, and which are merged."""

import copy
import threading

import torch
from torch import nn

from lightning_lora.layers.adapter import Adapter, Pairs
from lightning_lora.layers.adapters import Adapters
from lightning_lora.layers.choice import Choice
from lightning_lora.layers.weight_view import WeightPart

X = torch.ones(3, 4)


def pair(part=WeightPart(), r=1):  # noqa: B008 - frozen
    made = Adapter(4, 2, r=r, alpha=r, scale=2.0, part=part)
    nn.init.ones_(made.B)
    return made


def layer(*names):
    adapters = Adapters({name: pair() for name in names})
    adapters.prepare_choices()
    return adapters


def test_without_a_choice_every_pair_acts_fully():
    for adapters in (Adapters({"fr": pair(), "de": pair()}), layer("fr", "de")):
        assert [(each, c) for each, c in adapters.terms(X)] == [(adapters["fr"], None), (adapters["de"], None)]
        assert adapters.active_pairs() == adapters.all_pairs()


def test_a_choice_of_one_adapter_leaves_that_alone():
    adapters = layer("fr", "de")
    adapters.acting.begin(Choice([{"de": 1.0}]))
    assert adapters.terms(X) == [(adapters["de"], None)]
    adapters.acting.begin(Choice([{"de": 0.5}]))
    assert adapters.terms(X) == [(adapters["de"], 0.5)]
    adapters.acting.begin(Choice([{}]))
    assert adapters.terms(X) == [] == adapters.active_pairs()


def test_coefficients_of_samples_broadcast_with_A_x():
    adapters = layer("fr", "de")
    adapters.acting.begin(Choice([{"fr": 1.0}, {}, {"fr": 0.5}], size=3))
    ((acting, c),) = adapters.terms(torch.ones(3, 7, 4)).for_all_samples(torch.float32)
    assert (acting, c.shape, c.flatten().tolist()) == (adapters["fr"], (3, 1, 1), [1, 0, 0.5])
    ((_, c),) = adapters.terms(torch.zeros(3, dtype=torch.long), extra=1).for_all_samples(torch.float32)
    assert c.shape == (3, 1), "A x of an index has a dimension more"
    ((_, c),) = adapters.terms(torch.ones(7, 3, 4), dim=1).for_all_samples(torch.float32)
    assert c.shape == (3, 1)


def test_a_resting_adapter_acts_only_when_it_is_chosen():
    adapters = layer("fr", "de")
    adapters.strengths = {"fr": 0.0}
    adapters.prepare_choices()
    assert adapters.terms(X) == [(adapters["de"], None)]
    adapters.acting.begin(Choice([{"fr": 1.0}]))
    assert adapters.terms(X) == [(adapters["fr"], None)]


def test_disabled_adapters_do_not_act_whatever_is_chosen():
    adapters = layer("fr", "de")
    adapters.acting.begin(Choice([{"de": 1.0}]))
    adapters.enabled = False
    assert adapters.terms(X) == [] == adapters.terms_of_weight()


def test_what_is_merged_has_the_factors_in_its_scale():
    parts = [WeightPart("in_proj_weight", name) for name in "qv"]
    adapters = Adapters({"fr": Pairs({part.name: pair(part) for part in parts}), "de": pair()})
    merged = adapters.to_merge({"fr": 0.5})
    assert list(merged) == ["in_proj_weight"]
    assert [each.scale for each in merged["in_proj_weight"]] == [1.0, 1.0]
    assert [each.scale for each in adapters.all_pairs()] == [2.0, 2.0, 2.0], "the adapter itself stays"
    assert adapters.to_merge()["weight"] == [adapters["de"]]


def test_a_copy_has_its_own_choice():
    adapters = layer("fr", "de")
    adapters.acting.begin(Choice([{"de": 1.0}]))
    assert len(copy.deepcopy(adapters).terms(X)) == 2


def test_a_choice_stays_when_the_model_is_moved():
    adapters = layer("fr", "de")
    adapters.acting.begin(Choice([{"de": 1.0}]))
    adapters.to(torch.bfloat16)
    assert adapters.terms(X) == [(adapters["de"], None)]


def test_a_choice_stays_when_another_adapter_comes_and_goes():
    adapters, choice = layer("fr", "de"), Choice([{"de": 1.0}])
    adapters.begin(choice)
    adapters.add_module("es", pair())
    adapters.prepare_choices()
    assert adapters.terms(X) == [(adapters["de"], None)]
    adapters.end(choice)
    assert len(adapters.terms(X)) == 3


def test_tables_are_those_of_the_adapters_and_the_device_of_now():
    adapters, choice = layer("fr", "de"), Choice([{"de": 1.0}])
    adapters.begin(choice)
    assert adapters.acting.table[0].tolist() == [0, 1, -1]
    adapters.add_module("es", pair())
    adapters.prepare_choices()
    assert adapters.acting.table[0].tolist() == [0, 1, 0, -1]
    adapters.to("meta")
    assert adapters.acting.table is not None
    adapters.end(choice)
    assert adapters.acting.table[0].tolist() == [1, 1, 1, -1]


def test_two_threads_that_make_the_first_choice_at_once(monkeypatch):
    """The second thread does not forget what the first one chose."""
    adapters, entered = Adapters({"fr": pair(), "de": pair()}), threading.Barrier(2)
    device = Adapters.device
    monkeypatch.setattr(Adapters, "device", lambda self: (entered.wait(timeout=10) and None) or device(self))
    found = {}

    def run(name):
        choice = Choice([{name: 1.0}])
        adapters.begin(choice)
        found[name] = adapters.terms(X)
        adapters.end(choice)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("fr", "de")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: [(adapters[name], None)] for name in ("fr", "de")}
