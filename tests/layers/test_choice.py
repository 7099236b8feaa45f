"""Which adapters act in a call of a layer: coefficients, threads, and second forwards under checkpointing."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lora.layers.choice import CAPACITY, Acting, Choice, default_table, traced_coefficient
from lightning_lora.torch_internals import running_checkpoints

CPU = torch.device("cpu")


def test_a_list_of_equal_entries_is_one_choice_for_the_batch():
    assert Choice([{"fr": 1.0}] * 3, size=3).is_uniform
    assert not Choice([{"fr": 1.0}, {}], size=2).is_uniform


def test_what_is_present_takes_part_with_a_coefficient_of_zero():
    choice = Choice([{"fr": 1.0}] * 3, size=3, present=frozenset({"de"}))
    assert choice.is_uniform and choice.names == {"fr", "de"}
    assert [choice.weight_of(name) for name in ("fr", "de")] == [1.0, 0.0]


def test_a_mixture_has_the_coefficients_of_the_samples():
    choice = Choice([{"fr": 1.0}, {"de": 0.5}, {}], size=3)
    assert choice.names == {"fr", "de"}
    mixture = choice.mixture(("fr", "de"), CPU)
    assert mixture.of_samples(torch.float32).view(3, 2).tolist() == [[1, 0], [0, 0.5], [0, 0]]
    assert choice.mixture(("fr", "de"), CPU) is mixture, "layers share it"


@pytest.mark.parametrize("samples", [1, 3, CAPACITY + 5])
def test_a_table_has_one_size_unless_the_batch_is_larger(samples):
    table = Choice([{"fr": 1.0}, *[{"de": 2.0}] * (samples - 1)], size=samples).table(("fr", "de"), CPU)
    assert table.shape == (max(CAPACITY, samples), 3)
    assert table[0].tolist() == [1, 0, samples]
    assert traced_coefficient(table, 0, samples).tolist() == [1] + [0] * (samples - 1)


def test_a_traced_coefficient_is_nan_where_the_batch_has_another_size():
    by_sample, uniform = Choice([{"fr": 1.0}, {}], size=2), Choice([{"fr": 0.5}])
    assert traced_coefficient(by_sample.table(("fr",), CPU), 0, 3).isnan().all()
    assert traced_coefficient(uniform.table(("fr",), CPU), 0, 3).tolist() == [0.5] * 3


def test_layers_share_the_table_of_what_acts_by_default():
    first = default_table({"fr": 1.0}, CPU)
    assert default_table({"fr": 1.0}, CPU) is first
    assert default_table({"fr": 0.5}, CPU) is not first


def test_copies_act_by_default():
    acting = Acting(Choice([{"fr": 0.5}]))
    acting.begin(Choice([{"de": 1.0}]))
    for copied in (copy.deepcopy(acting), pickle.loads(pickle.dumps(acting))):
        assert copied.now().weight_of("fr") == 0.5


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_second_forward_finds_the_choice_of_the_first(reentrant):
    """Two forwards with two choices, both left before backward; nested checkpoints too."""
    acting, seen, choices = Acting(), [], [Choice([{"fr": 1.0}]), Choice([{"de": 1.0}])]

    def inner(x):
        seen.append(acting.now())
        return x.sin()

    def outer(x):
        return checkpoint(inner, x, use_reentrant=reentrant)

    x, total = torch.ones(2, requires_grad=True), 0
    for block in (inner, outer):
        for choice in choices:
            acting.begin(choice)
            total = total + checkpoint(block, x, use_reentrant=reentrant)
            acting.end(choice)
    total = total + checkpoint(inner, x, use_reentrant=reentrant)
    first, seen = seen.copy(), []
    acting.begin(Choice([{"other": 1.0}]))
    total.sum().backward()
    names = {tuple(choice.names) for choice in seen if choice is not None}
    assert names == {("fr",), ("de",)}
    assert None in seen, "the forward without a choice is repeated without one"
    assert [choice and tuple(choice.names) for choice in first] == [*[("fr",), ("de",)] * 2, None]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_choice_inside_of_a_checkpoint_is_made_again(reentrant):
    acting, seen = Acting(), []

    def block(x):
        for name in ("fr", "de"):
            choice = Choice([{name: 1.0}])
            acting.begin(choice)
            seen.extend(acting.now().names)
            acting.end(choice)
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    y = checkpoint(block, x, use_reentrant=reentrant)
    y.sum().backward()
    assert seen == ["fr", "de", "fr", "de"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_may_run_in_another_thread(reentrant):
    """As on a GPU: the recomputation there finds the choice of the forward, and a choice of that thread is its own."""
    acting, seen = Acting(), []

    def block(x):
        seen.append(acting.now())
        return x.sin()

    choice, x = Choice([{"fr": 1.0}]), torch.ones(2, requires_grad=True)
    acting.begin(choice)
    y = checkpoint(block, x, use_reentrant=reentrant)
    thread = threading.Thread(target=y.sum().backward)
    thread.start()
    thread.join()
    assert seen == [choice, choice]


def test_blocks_may_end_in_any_order():
    """Two generators in turns: the first one ends while the second one still runs."""
    acting, first, second = Acting(), Choice([{"fr": 1.0}]), Choice([{"de": 1.0}])
    acting.begin(first)
    acting.begin(second)
    acting.end(first)
    assert acting.now() is second
    acting.end(second)
    assert acting.now() is None


def test_one_choice_with_a_name_that_must_be_present_is_one_for_a_weight():
    choice = Choice([{"fr": 1.0}] * 2, size=2, present=frozenset({"de"}))
    choice.check_uniform(nn.ModuleDict())
    assert (choice.weight_of("fr"), choice.weight_of("de")) == (1, 0)


def test_outside_of_a_checkpoint_none_is_running():
    assert running_checkpoints() == ([], None)


def test_a_batch_of_another_size_and_an_ambiguous_one_are_refused_by_name():
    adapters, layer = nn.ModuleDict(), "encoder.linear1"
    choice = Choice([{"fr": 1.0}, {}], size=2, layers={id(adapters): layer}, is_ambiguous=True)
    choice.check_batch(torch.ones(2, 5), 2, 0, adapters)
    with pytest.raises(ValueError, match=r"by 2 entries .* but `encoder.linear1` gets an input of shape \(3, 5\)"):
        choice.check_batch(torch.ones(3, 5), 3, 0, adapters)
    with pytest.raises(ValueError, match=r"`encoder.linear1` gets .* \(2, 2, 5\), and the model has modules with"):
        choice.check_batch(torch.ones(2, 2, 5), 2, 0, adapters)
    with pytest.raises(ValueError, match=r"`encoder.linear1` computes with its weight, which is one for the whole"):
        choice.check_uniform(adapters)
