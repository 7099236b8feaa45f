"""What holds for every kind of layer, by one table: its output, gradients, merge, copies, and what stays the same."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch

from lightning_lora import (
    disable_lora,
    lora_parameters,
    merge_lora,
    merged_state_dict,
    remove_lora,
    unmerge_lora,
)
from tests.helpers import oracles
from tests.helpers.layer_cases import LAYER_CASES, RANK, Subject, cast, tensors
from tests.helpers.oracles import same_bits
from tests.helpers.selection import slow_except

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")
# Of each class: the plain layer, a subclass that reads its weight, another dtype, and what is special to its shapes.
KINDS = [
    *("linear", "linear-bf16", "linear-sequence", "standardized-linear", "scaled-linear", "hf-conv1d"),
    *("embedding", "embedding-padding", "embedding-max-norm", "embedding-sparse", "looked-up-embedding"),
    *("conv1d-groups", "conv2d", "conv2d-circular", "conv2d-bf16", "conv3d-all", "standardized-conv"),
    *("embedding-bag-mean", "embedding-bag-max-offsets", "embedding-bag-weighted-padding", "embedding-bag-own"),
    *("embedding-bag-sum-max-norm-l1", "embedding-bag-weighted-bf16", "transposed-conv-own"),
    *("transposed-conv-1d", "transposed-conv-2d-groups", "transposed-conv-2d-output-size", "transposed-conv-3d-all"),
    *("bilinear-batch", "bilinear-more-dimensions", "bilinear-own", "bilinear-bf16"),
    *("attention-self", "attention-self-batch-first-no-weights", "attention-self-both-masks", "attention-kdim"),
    *("attention-memory", "attention-self-bias-kv", "attention-three", "attention-kdim-memory"),
    *("recurrent-lstm", "recurrent-lstm-packed-projection", "recurrent-gru-two-layers", "recurrent-lstm-cell"),
    *("recurrent-unrolled-rnn", "recurrent-residual-gru", "recurrent-lstm-projection", "recurrent-lstm-packed"),
    *("recurrent-gru", "recurrent-rnn", "recurrent-rnn-packed", "recurrent-gru-cell", "recurrent-rnn-cell"),
    *("recurrent-own-cell", "scaled-twice", "normalized-linear", "scaled-conv", "scaled-embedding"),
    *("embedding-bag-super", "bilinear-super", "transposed-conv-super"),
    *(name for name in LAYER_CASES if name.startswith("parameter")),
]
# What the fast selection takes.
QUICK = [
    *(
        "linear",
        "linear-bf16",
        "standardized-linear",
        "hf-conv1d",
        "embedding-max-norm",
        "conv2d",
        "embedding-bag-mean",
    ),
    *("transposed-conv-2d-groups", "bilinear-batch", "attention-self", "recurrent-lstm", "parameter-matrices"),
]
# Other arguments of a class change its forward, and so the output, the gradients and the weight that is merged.
every_case = pytest.mark.parametrize("name", slow_except(QUICK, LAYER_CASES))
every_kind = pytest.mark.parametrize("name", slow_except(QUICK, KINDS))
MODES = {
    "train": (True, nullcontext),
    "eval": (False, nullcontext),
    "train-no-grad": (True, torch.no_grad),
    "eval-no-grad": (False, torch.no_grad),
    "eval-inference": (False, torch.inference_mode),
}


def run(subject, layer, mode):
    training, context = MODES[mode]
    with context():
        return subject.run(layer.train(training))


def assert_same_bits(found, expected):
    assert len(found) == len(expected) > 0
    assert all(same_bits(*pair) for pair in zip(found, expected, strict=True))


def assert_close(found, expected, dtype):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        oracles.assert_close(one, other, dtype)


def test_every_class_is_among_the_kinds():
    assert set(QUICK) < set(KINDS) < LAYER_CASES.keys()
    subjects = {name: Subject(name) for name in LAYER_CASES}
    assert {type(subjects[name].plain) for name in KINDS} == {type(each.plain) for each in subjects.values()}


@every_kind
def test_adapters_have_the_names_and_the_shapes_of_the_paper(name):
    subject = Subject(name).adapt()
    wanted = {f"layer.{key}.{matrix}" for key in subject.matrices for matrix in "AB"}
    assert {key for key in subject.model.state_dict() if ".lora." in key} == wanted
    assert {key for key, _ in lora_parameters(subject.model)} == wanted
    for key, (A, B) in subject.pairs().items():
        *experts, out_features, in_features = subject.matrices[key].shape
        assert A.shape == (*experts, RANK, in_features)
        assert B.shape == (*experts, out_features, RANK)
        assert A.dtype == B.dtype == torch.float32


@every_case
def test_output_at_the_start_is_the_plain_layer_s_bit_for_bit(name):
    subject = Subject(name).adapt()
    assert all(A.any() and not B.any() for A, B in subject.pairs().values())
    for mode in MODES:
        found, wanted = run(subject, subject.layer, mode), run(subject, subject.plain, mode)
        if mode == "eval-inference" and not subject.case.same_bits_in_inference:
            assert_close(found, wanted, torch.float32)
        else:
            assert_same_bits(found, wanted)


@every_case
def test_output_is_that_of_the_weights_with_the_product_added(name):
    subject = Subject(name).train()
    expected = subject.expected(subject.pairs())
    outputs = {mode: run(subject, subject.layer, mode) for mode in MODES}
    for output in outputs.values():
        assert_close(output, expected, subject.dtype)
        assert {x.dtype for x in output} == {subject.dtype}
    assert_same_bits(outputs["eval"], outputs["train"])
    plain = run(subject, subject.plain, "train")
    assert not all(torch.allclose(x.double(), y, rtol=0.1) for x, y in zip(plain, expected, strict=True))


GRADED = [name for name, case in LAYER_CASES.items() if case.gradients]


@pytest.mark.parametrize(
    ("dtype", "training"), [(torch.float64, True), (torch.float32, False)], ids=["fp64-train", "fp32-eval"]
)
@pytest.mark.parametrize("name", slow_except(QUICK, GRADED))
def test_gradients_are_those_through_the_weights_with_the_product_added(name, dtype, training):
    subject = Subject(name).train()
    model, leaves = subject.model.to(dtype).train(training), subject.leaves()
    inputs, others = cast((subject.inputs, subject.others), dtype)
    given = floating(inputs, others)
    found = tensors(model.layer(*inputs, **others))
    wanted, twins = expected_of(subject, leaves, inputs, others, given)
    mixed = [torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3)) for x in wanted]
    expected = torch.autograd.grad(mixture(wanted, mixed), [x for pair in leaves.values() for x in pair] + twins)
    mixture(found, mixed).backward()
    matrices = [matrix for pair in subject.pairs().values() for matrix in pair]
    for matrix in matrices:
        assert matrix.grad.dtype == torch.float32 and matrix.grad.layout == torch.strided
    tolerance = 5e-6 if dtype == torch.float64 else 2e-5
    for leaf, gradient in zip([*matrices, *given], expected, strict=True):
        assert float((leaf.grad.double() - gradient).abs().max()) < tolerance * float(gradient.abs().max())
    frozen = [parameter for parameter in model.parameters() if not any(parameter is matrix for matrix in matrices)]
    assert len(frozen) == len(list(subject.plain.parameters()))
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in frozen)


def floating(*values):
    """The tensors among arguments that take gradients: inputs and weights of samples, no masks."""
    found = [x for each in values[0] for x in tensors(each)] + [
        x for key, x in values[1].items() if key == "per_sample_weights"
    ]
    unique = {id(x): x for x in found if x.is_floating_point()}
    return [x.requires_grad_() for x in unique.values()]


def expected_of(subject, leaves, inputs, others, given):
    """The plain layer's outputs in fp64, and the fp64 twins of `given` that they were computed from."""
    twins = {id(x): x.detach().double().requires_grad_() for x in given}
    outputs = subject.expected(leaves, swapped(inputs, twins), swapped(others, twins))
    return outputs, list(twins.values())


def swapped(value, twins):
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        return value._replace(data=twins[id(value.data)])
    if isinstance(value, (tuple, list)):
        return type(value)(swapped(each, twins) for each in value)
    if isinstance(value, dict):
        return {key: swapped(each, twins) for key, each in value.items()}
    return twins.get(id(value), value)


def mixture(outputs, mixed):
    return sum((x.double() * m).sum() for x, m in zip(outputs, mixed, strict=True))


@every_kind
def test_gradients_are_dense_and_fp32_in_the_dtype_of_the_layer(name):
    subject = Subject(name).train()
    sum(x.float().square().sum() for x in subject.run()).backward()
    for A, B in subject.pairs().values():
        for matrix in (A, B):
            assert matrix.grad.dtype == torch.float32 and matrix.grad.layout == torch.strided
            assert matrix.grad.any()


@every_case
def test_a_merge_is_the_rounded_sum_and_unmerge_gives_every_bit_back(name):
    subject = Subject(name).train()
    values, sums = oracles.snapshot(subject.model), subject.sums(subject.pairs())
    output = {mode: run(subject, subject.layer, mode) for mode in ("train", "eval-no-grad")}
    beforehand = {key: value.clone() for key, value in merged_state_dict(subject.model).items()}
    oracles.assert_same_values(subject.model, values)
    for _ in range(2):
        merge_lora(subject.model)
        assert type(subject.layer) is type(subject.plain)
        oracles.assert_same_values(subject.model, beforehand)
        for key, total in sums.items():
            assert_rounded(subject.layer.get_parameter(key), shortened(subject.plain, total))
            assert not same_bits(subject.layer.get_parameter(key), subject.plain.get_parameter(key))
        merged = oracles.snapshot(subject.model)
        for mode, wanted in output.items():
            assert_close(run(subject, subject.layer, mode), wanted, subject.dtype)
        oracles.assert_same_values(subject.model, merged)
        unmerge_lora(subject.model)
        oracles.assert_same_values(subject.model, values)
        assert_same_bits(run(subject, subject.layer, "train"), output["train"])


def assert_rounded(weight, total):
    half_a_step = torch.finfo(weight.dtype).eps / 2
    sum_of_products = 1e-6 if weight.dtype != torch.float64 else 1e-15
    assert ((weight.double() - total).abs() <= half_a_step * total.abs() + sum_of_products).all()


def shortened(plain, total):
    """An embedding's rows are merged as `max_norm` cuts them."""
    total = total.detach().clone()
    if getattr(plain, "max_norm", None) is None:
        return total
    return torch.embedding_renorm_(total, torch.arange(len(total)), plain.max_norm, plain.norm_type)


@every_kind
def test_modules_parameters_and_keys_are_the_same_before_during_and_after(name):
    subject = Subject(name)
    model, layer, keys = subject.model, subject.layer, list(subject.model.state_dict())
    modules, parameters = list(layer.modules()), dict(layer.named_parameters())
    classes, strides = [type(module) for module in modules], {key: p.stride() for key, p in parameters.items()}
    for leave in (merge_lora, remove_lora):
        subject.train()
        for mode in MODES:
            run(subject, layer, mode)
            own = {key: p for key, p in registered(layer).items() if "lora." not in key}
            assert all(own[key] is parameter for key, parameter in parameters.items())
        assert model.layer is layer
        assert all(isinstance(module, cls) for module, cls in zip(modules, classes, strict=True))
        assert [key for key in model.state_dict() if ".lora." not in key] == keys
        leave(model)
        assert model.layer is layer and list(model.state_dict()) == keys
        assert list(layer.modules()) == modules and [type(module) for module in modules] == classes
        now = dict(layer.named_parameters())
        assert now.keys() == parameters.keys()
        assert all(now[key] is parameter and parameter.requires_grad for key, parameter in parameters.items())
        assert {key: p.stride() for key, p in now.items()} == strides


def registered(layer):
    """The parameters as they are registered, whatever a read of the attribute gives."""
    return {
        f"{prefix}.{key}" if prefix else key: parameter
        for prefix, module in layer.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is not None
    }


@every_kind
def test_disable_gives_the_plain_output(name):
    subject = Subject(name).train()
    with disable_lora(subject.model):
        for mode in MODES:
            found, wanted = run(subject, subject.layer, mode), run(subject, subject.plain, mode)
            if subject.case.same_bits_when_disabled:
                assert_same_bits(found, wanted)
            else:
                assert_close(found, wanted, torch.float32)


@every_kind
def test_remove_gives_the_plain_layer_back(name):
    subject = Subject(name).train()
    run(subject, subject.layer, "train")
    remove_lora(subject.model)
    oracles.assert_same_values(subject.layer, oracles.snapshot(subject.plain))
    for mode in MODES:
        assert_same_bits(run(subject, subject.layer, mode), run(subject, subject.plain, mode))
    assert [m.__dict__.keys() for m in subject.layer.modules()] == [m.__dict__.keys() for m in subject.plain.modules()]


@every_kind
@pytest.mark.parametrize("copied", [copy.deepcopy, oracles.saved_and_loaded], ids=["copied", "pickled"])
def test_copies_act_alike_and_stand_alone(name, copied):
    subject = Subject(name).train()
    values, output = oracles.snapshot(subject.model), subject.run()
    other = copied(subject.model)
    assert type(other.layer) is type(subject.layer)
    assert_same_bits(subject.run(other.layer), output)
    sum(x.float().square().sum() for x in subject.run(other.layer)).backward()
    assert all(parameter.grad is None for parameter in subject.model.parameters())
    merge_lora(other)
    assert type(other.layer) is type(subject.plain)
    again, merged = copied(other), oracles.snapshot(other)
    unmerge_lora(again)
    oracles.assert_same_values(again, values)
    assert_same_bits(subject.run(again.layer), output)
    for _, parameter in lora_parameters(again):
        parameter.data.fill_(1)
    oracles.assert_same_values(other, merged)
    oracles.assert_same_values(subject.model, values)
    assert_same_bits(subject.run(), output)


HALF = ["linear", "conv2d", "conv2d-groups", "hf-conv1d", "scaled-linear"]
AUTOCAST = [
    *HALF,
    *(f"embedding-bag-{name}" for name in ("mean", "weighted", "max")),
    *(f"transposed-conv-{name}" for name in ("1d-groups", "2d-output-size", "3d", "super", "own")),
    *(f"bilinear-{name}" for name in ("batch", "more-dimensions-no-bias", "super", "own")),
    *(f"attention-{name}" for name in ("self-batch-first", "self-pairs-float", "kdim")),
]


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, torch.bfloat16) for name in AUTOCAST] + [(name, torch.float16) for name in HALF]
)
def test_autocast_computes_in_the_dtype_of_the_plain_layer(name, dtype):
    subject = Subject(name).train()
    expected = subject.expected(subject.pairs())
    for mode in MODES:
        with torch.autocast("cpu", dtype=dtype):
            found, plain = run(subject, subject.layer, mode), run(subject, subject.plain, mode)
        assert [x.dtype for x in found] == [x.dtype for x in plain]
        assert_close(found, expected, dtype)
