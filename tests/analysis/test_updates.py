"""Where the updates of a model are, and the weights that they adapt: every kind of layer, live and merged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, merge_lora, unmerge_lora
from lightning_lora.analysis import AmplificationFactor, UpdateRatio, UpdateSpectrum
from lightning_lora.analysis.updates import Update, chosen_name, frozen_matrices, updates_of
from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.weight_view import Rows, WeightPart
from tests.helpers.dense_updates import dense, two_layers
from tests.helpers.layer_cases import LAYER_CASES, Subject
from tests.helpers.oracles import same_bits, snapshot
from tests.helpers.quantized_tensors import matrix_of, quantize
from tests.helpers.selection import slow_except

FAST = {
    "linear", "hf-conv1d", "embedding-padding", "conv2d-groups", "transposed-conv-2d-groups", "bilinear-batch",
    "attention-self", "attention-kdim", "recurrent-lstm-two-layers", "parameter-matrices", "parameter-transposed",
}  # fmt: skip


@pytest.mark.parametrize("name", slow_except(FAST, LAYER_CASES))
def test_of_every_kind_of_layer(name):
    subject = Subject(name).train()
    expected, updates = dense(subject), updates_of(subject.model)
    assert {update.name for update in updates} == expected.keys()
    for update, matrix in frozen_matrices(subject.model, updates):
        B, A = update.factors()
        torch.testing.assert_close(B @ A, expected[update.name].delta, rtol=1e-12, atol=1e-14)
        assert torch.equal(matrix.double(), expected[update.name].weight)


@pytest.mark.parametrize("name", ["linear-bf16", "embedding-max-norm", "attention-self", "parameter-indexed"])
def test_after_a_merge_the_weight_is_that_before_it(name):
    subject = Subject(name).train()
    live = {update.name: matrix.clone() for update, matrix in frozen_matrices(subject.model, updates_of(subject.model))}
    merge_lora(subject.model)
    merged = snapshot(subject.model)
    updates = updates_of(subject.model)
    assert {update.name for update in updates} == live.keys()
    for update, matrix in frozen_matrices(subject.model, updates):
        assert same_bits(matrix, live[update.name])
    assert all(same_bits(value, merged[key]) for key, value in subject.model.state_dict().items())
    unmerge_lora(subject.model)
    assert updates_of(subject.model)[0].merged is None


def test_rows_that_are_fused_head_by_head():
    part = WeightPart(rows=Rows(1, 3, blocks=3))
    weight, placed = torch.arange(48.0).view(12, 4), torch.arange(24.0).view(6, 4)
    matrix = Update("0", nn.Linear(4, 12), Adapter(4, 6, r=2, alpha=2, scale=1.0, part=part)).matrix(weight)
    assert torch.equal(matrix, weight[[1, 2, 5, 6, 9, 10]])
    assert (part.place_rows(placed, 12) * weight).sum() == (placed * matrix).sum()


def test_which_adapter():
    model = two_layers()
    assert [update.name for update in updates_of(model, "default")] == ["0", "1"]
    assert [update.name for update in updates_of(model[1])] == ["weight"]  # the model itself is a layer
    with pytest.raises(ValueError, match="`name` must be an adapter of Sequential, which has 'default', but got 'fr'"):
        updates_of(model, "fr")
    for layer, other in zip(model, two_layers(seed=7), strict=True):
        layer.lora["fr"] = other.lora["default"]
    with pytest.raises(ValueError, match=r"several adapters, .*: give `name`, one of 'default', 'fr'"):
        updates_of(model)
    chosen = updates_of(model, "fr")
    assert [update.pair for update in chosen] == [layer.lora["fr"] for layer in model]
    assert chosen_name({"only"}, None, "x") == "only"


def test_without_adapters():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Sequential has no LoRA adapters: call `apply_lora`"):
        updates_of(model)
    apply_lora(model, LoRAConfig(r=1, targets=["0"]))
    assert len(updates_of(model)) == 1


def test_a_merged_weight_that_was_changed():
    model = two_layers()
    merge_lora(model)
    with torch.no_grad():
        model[1].weight += 1
    with pytest.raises(ValueError, match=r"`1` is not what the merge left there: .* Measure it before that change"):
        list(frozen_matrices(model, updates_of(model)))


def test_a_base_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    apply_lora(model, LoRAConfig(r=2, targets=["0"]))
    with pytest.raises(ValueError, match="`0` is on the meta device, without values to measure: load the base first"):
        list(frozen_matrices(model, updates_of(model)))
    model.to_empty(device="cpu").load_state_dict({"0.weight": torch.eye(4), "0.bias": torch.zeros(4)}, strict=False)
    ((_, matrix),) = frozen_matrices(model, updates_of(model))
    assert torch.equal(matrix, torch.eye(4))


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "bf16 storage", "int8"])
def test_a_quantized_weight_is_the_dequantized_matrix_live_and_after_a_merge(kind, called):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from tests.helpers.quantized import eight_bits, four_bits

    torch.manual_seed(0)
    plain, storage = nn.Linear(64, 96), torch.bfloat16 if "bf16" in kind else torch.uint8
    model = nn.Sequential(eight_bits(plain) if kind == "int8" else four_bits(plain, quant_storage=storage))
    weight = model[0].weight
    if kind == "int8":
        expected = weight.CB.float() * weight.SCB.unsqueeze(1) / 127
    else:
        expected = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    apply_lora(model, LoRAConfig(r=2, targets=["0"]))
    nn.init.normal_(model[0].lora.default.B)
    delta = (model[0].lora.default.scale * model[0].lora.default.B @ model[0].lora.default.A).detach()
    U, _, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    if called:
        model(torch.randn(2, 64))
    for merged in (False, True, False):
        ((_, matrix),) = frozen_matrices(model, updates_of(model))
        torch.testing.assert_close(matrix, expected, rtol=1e-6, atol=0)
        ratio, amplification = UpdateRatio(), AmplificationFactor()
        ratio.update(model)
        amplification.update(model)
        torch.testing.assert_close(ratio.compute()["0"]["ratio"], delta.norm() / expected.norm())
        projected = (U[:, :2].T @ expected.double() @ Vh[:2].T).norm().float()
        torch.testing.assert_close(amplification.compute()["0"]["factor"], delta.norm() / projected)
        unmerge_lora(model) if merged else merge_lora(model, dequantize=True)


def test_a_quantized_tensor_is_the_matrix_that_it_multiplies_by():
    model = two_layers()
    quantize(model, "toy", ("0",))
    matrices = {update.name: matrix for update, matrix in frozen_matrices(model, updates_of(model))}
    torch.testing.assert_close(matrices["0"].double(), matrix_of(model[0]), rtol=1e-6, atol=1e-7)


def test_a_quantized_weight_in_pieces_is_refused_and_the_spectrum_can_be_taken():
    model = two_layers()
    quantize(model, "toy", ("0",))
    model[0].weight._fsdp_flattened = True
    with pytest.raises(ValueError, match=r"`0` has a quantized weight that is sharded.* `UpdateSpectrum` and `Subspac"):
        list(frozen_matrices(model, updates_of(model)))
    spectrum = UpdateSpectrum()
    spectrum.update(model)
    assert spectrum.compute().keys() == {"0", "1"}


def test_a_weight_that_two_layers_share():
    model = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 8, bias=False))
    model[1].weight = model[0].weight
    apply_lora(model, LoRAConfig(r=2, targets=["0", "1"]))
    found = {update.name: matrix for update, matrix in frozen_matrices(model, updates_of(model))}
    assert torch.equal(found["0"], found["1"].mT) and found.keys() == {"0", "1"}
