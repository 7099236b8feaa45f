"""A mixed batch in every kind of layer: each sample as that sample alone, forward and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, apply_lora, lora_parameters, remove_lora, use_adapters
from lightning_lora.layers.adapter import Adapter
from lightning_lora.model.several.acting import choose
from tests.helpers.layer_cases import LAYER_CASES, Subject, cast, tensors
from tests.helpers.oracles import SCALE, same_bits
from tests.helpers.selection import slow_except

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")
RANKS = {"fr": 2, "de": 3, "es": 1, "idle": 2}
ENTRIES = [{"de": 1.0}, {"fr": 0.7, "es": -2.0}, {}, {"de": 0.3}]
HALF = (torch.bfloat16, torch.float16)
NOT_LINEAR = ("max", "norm")  # an embedding bag with the largest value, or with a limit of norms, reads merged weights


def acts_by_its_weight(name: str) -> bool:
    own_forward = name.startswith(("standardized", "normalized", "looked-up")) or name.endswith("-own")
    bag = name.startswith("embedding-bag") and any(word in name for word in NOT_LINEAR)
    return own_forward or bag or name.startswith(("recurrent", "parameter"))


def several(name: str) -> Subject:
    """The layer in fp64 with four adapters, as after some training."""
    subject = Subject(name)
    subject.model.double()
    subject.plain.double()
    targets = [subject.case.targets] if isinstance(subject.case.targets, str) else subject.case.targets
    for adapter, r in RANKS.items():
        apply_lora(subject.model, LoRAConfig(name=adapter, r=r, alpha=r * SCALE, targets=targets))
    torch.default_generator.manual_seed(5)
    for _, parameter in lora_parameters(subject.model):
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
    for module in subject.model.modules():
        if isinstance(module, Adapter) and module.padding_idx is not None:
            module.A.data[:, module.padding_idx] = 0  # as it is initialized, and stays
    subject.inputs, subject.others = cast(subject.inputs), cast(subject.others)
    return subject


def pairs(subject: Subject, adapter: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each matrix, by the key of the first adapter of a subject."""
    found = dict(lora_parameters(subject.model))
    names = {key: key.replace("lora.default", f"lora.{adapter}") for key in subject.matrices}
    return {key: (found[f"layer.{name}.A"], found[f"layer.{name}.B"]) for key, name in names.items()}


def alone(subject: Subject, weights: dict[str, float]) -> list[Tensor]:
    """What the plain layer gives for the whole batch with ``W + c * scale * B @ A`` of one entry for its weights."""
    total = {m.parameter: subject.plain.get_parameter(m.parameter).detach() for m in subject.matrices.values()}
    for adapter, c in weights.items():
        for key, (A, B) in pairs(subject, adapter).items():
            matrix = subject.matrices[key]
            total[matrix.parameter] = total[matrix.parameter] + matrix.place(c * SCALE * B @ A)
    return tensors(subject.case.call(subject.plain, total, subject.inputs, subject.others))


def samples_of(name: str, subject: Subject) -> tuple[int, int]:
    """The number of samples of the case, and their dimension in the first output."""
    y = subject.run()[0]
    layer, x = subject.plain, subject.inputs[0]
    if "attention" in name:
        dim = 0 if layer.batch_first else 1
        return (1, 0) if x.dim() == 2 else (x.shape[dim], dim)
    return (1, 0) if "unbatched" in name or "vector" in name else (len(y), 0)


def weighted(outputs: list[Tensor]) -> Tensor:
    """A sum in which every element counts differently."""
    torch.default_generator.manual_seed(6)
    return sum((y * torch.randn(y.shape, dtype=y.dtype)).sum() for y in outputs)


FAST = [
    *("linear", "linear-sequence", "linear-vector", "scaled-linear", "hf-conv1d", "standardized-linear"),
    *("embedding", "embedding-padding", "embedding-max-norm", "embedding-by-frequency"),
    *("conv1d-groups", "conv2d", "conv2d-unbatched", "conv2d-circular", "conv3d-all", "standardized-conv"),
    *("embedding-bag-mean", "embedding-bag-mean-offsets", "embedding-bag-weighted", "embedding-bag-max"),
    *("transposed-conv-1d", "transposed-conv-2d-output-size", "bilinear-batch", "bilinear-more-dimensions"),
    *("attention-self", "attention-self-batch-first", "attention-self-unbatched", "attention-memory", "attention-kdim"),
    *("attention-self-batch-first-no-weights", "recurrent-lstm", "recurrent-gru-cell", "parameter-matrices"),
]
every_case = pytest.mark.parametrize(
    "name", slow_except(FAST, [name for name in LAYER_CASES if not name.endswith(("bf16", "fp16", "fp64"))])
)


@every_case
def test_each_sample_of_a_mixed_batch_is_that_sample_alone(name):
    subject = several(name)
    count, dim = samples_of(name, subject)
    entries = [ENTRIES[sample % len(ENTRIES)] for sample in range(count)]
    if acts_by_its_weight(name) and count > 1:
        with (
            use_adapters(subject.model, entries),
            pytest.raises(ValueError, match=r"`layer.*` computes with its weight"),
        ):
            subject.run()
        return
    with use_adapters(subject.model, entries):
        outputs = subject.run()
    expected = [[] for _ in outputs]
    for sample, entry in enumerate(entries):
        for place, y in enumerate(alone(subject, entry)):
            along = dim if place == 0 else 0  # weights of attention have the batch first
            expected[place].append(y if count == 1 else y.narrow(along, sample, 1))
    expected = [torch.cat(parts, dim if not place and count > 1 else 0) for place, parts in enumerate(expected)]
    for y, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(y, wanted, rtol=1e-11, atol=1e-11)
    if subject.case.gradients:
        assert_same_gradients(subject, weighted(outputs), weighted(expected), {key for each in entries for key in each})


def assert_same_gradients(subject, loss, expected, used):
    matrices = dict(lora_parameters(subject.model))
    found, wanted = (torch.autograd.grad(each, list(matrices.values()), allow_unused=True) for each in (loss, expected))
    for name, gradient, other in zip(matrices, found, wanted, strict=True):
        assert (gradient is not None) == any(f".{adapter}" in name for adapter in used), name
        if gradient is not None:
            torch.testing.assert_close(gradient, torch.zeros_like(gradient) if other is None else other)


@pytest.mark.parametrize(
    "name",
    ["linear", "linear-sequence", "embedding", "conv2d", "transposed-conv-2d", "bilinear-batch", "attention-self"],
)
def test_a_name_that_must_be_present_gets_zeros_where_no_sample_uses_it(name):
    subject, undo = several(name), []
    count, _ = samples_of(name, subject)
    choose(subject.model, ["de", *["fr"] * (count - 1)], undo, present=["es"])
    sum(y.sum() for y in subject.run()).backward()
    gradients = {key: parameter.grad for key, parameter in lora_parameters(subject.model)}
    assert all(gradients[key] is None for key in gradients if ".idle" in key)
    assert all(not gradients[key].any() for key in gradients if ".es" in key)
    assert all(gradients[key] is not None for key in gradients if ".fr" in key or ".de" in key)


@pytest.mark.parametrize("name", ["linear", "conv2d", "attention-self-batch-first", "embedding", "hf-conv1d"])
def test_values_that_are_not_finite_stay_in_the_samples_that_use_them(name):
    subject = several(name)
    count, dim = samples_of(name, subject)
    for key, parameter in lora_parameters(subject.model):
        if ".fr" in key:
            parameter.data.fill_(float("nan"))
    entries = ["fr", *["de"] * (count - 1)]
    with use_adapters(subject.model, entries):
        y = subject.run()[0].movedim(0, dim)
    assert y[0].isnan().any() and not y[1:].isnan().any()


@every_case
def test_a_choice_for_the_whole_batch_has_the_bits_of_that_adapter_alone(name):
    subject = several(name)
    count, _ = samples_of(name, subject)
    outputs = []
    for choice in ("fr", ["fr"] * count):
        if choice == "fr" or not name.startswith(("recurrent", "parameter")):
            with use_adapters(subject.model, choice):
                outputs.append(subject.run())
    for other in ("de", "es", "idle"):
        remove_lora(subject.model, name=other)
    alone = subject.run()
    for found in outputs:
        assert all(same_bits(y, expected) for y, expected in zip(found, alone, strict=True))


class EveryKind(nn.Module):
    """One layer of each kind that has a batch."""

    def __init__(self):
        super().__init__()
        self.embedding, self.bag = nn.Embedding(20, 8), nn.EmbeddingBag(20, 3)
        self.conv, self.transposed = nn.Conv1d(8, 8, 3, padding=1), nn.ConvTranspose1d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear, self.bilinear = nn.Linear(8, 4), nn.Bilinear(4, 4, 3)

    def forward(self, index):
        x = self.transposed(self.conv(self.embedding(index).mT)).mT
        x = self.linear(x + self.attention(x, x, x, need_weights=False)[0])
        return self.bilinear(x, x).mean(1) + self.bag(index)


@pytest.mark.slow
def test_one_compiled_graph_serves_every_choice_in_every_kind_of_layer():
    torch.manual_seed(0)
    model, index, graphs = EveryKind(), torch.randint(0, 20, (5, 6)), []
    for name in ("fr", "de", "es"):
        apply_lora(model, LoRAConfig(r=2, targets=["*"], name=name))
    for _, parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.5)
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    for choice in ("fr", None, {"fr": 0.5, "de": 1.0}, ["fr", "de", None, {"es": 0.3}, "es"], ["fr"] * 5):
        with use_adapters(model, choice):
            torch.testing.assert_close(compiled(index), model(index))
    assert len(graphs) == 1
