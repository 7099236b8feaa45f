"""What the tests know without the package: the formula written out, bits as integers, a table of layers, a model."""

from __future__ import annotations

import copy
import io

import torch
from torch import nn
from torch.nn import functional as F

from lightning_lora import LoRAConfig, apply_lora, lora_parameters

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SCALE = 2.0  # a power of two: exact in every dtype


def conv1d(out_features, in_features):
    """Of transformers, which the lowest version of safetensors does not work with."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out_features, in_features)


def is_conv1d(layer):
    return any(cls.__name__ == "Conv1D" for cls in type(layer).__mro__)


class Scaled(nn.Linear):
    """Does something to the output of the forward that it inherits."""

    def forward(self, x):
        return super().forward(x) * 0.5 + 1


class ScaledTwice(Scaled):
    """Hands on through two classes."""

    def forward(self, x):
        return 3 * super().forward(x)


class Standardized(nn.Linear):
    """Reads its own weight: weight standardization."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean(1, keepdim=True)) / (self.weight.std(1, keepdim=True) + 1e-3)
        return F.linear(x, weight, self.bias)


class Normalized(nn.Linear):
    """Calls the forward that it inherits and reads its weight beside that."""

    def forward(self, x):
        return super().forward(x) / self.weight.norm()


class StandardizedConv(nn.Conv2d):
    """Reads its own weight in the hook that nn.Conv2d offers for it."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class ScaledConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 0.5


class ScaledEmbedding(nn.Embedding):
    def forward(self, index):
        return super().forward(index) * self.embedding_dim**0.5


class LookedUp(nn.Embedding):
    """Reads its own weight."""

    def forward(self, index):
        return F.embedding(index, self.weight * 2, self.padding_idx)


def rows(*shape):
    return lambda: torch.randn(shape)


def indices():
    return torch.tensor([[1, 5, 5, 0], [10, 3, 1, 3]])


def channels_last(conv):
    return conv.to(memory_format=torch.channels_last)


def conv1d_case(**arguments):
    return lambda: nn.Conv1d(4, 6, 3, **arguments), rows(2, 4, 11)


def conv2d_case(**arguments):
    return lambda: nn.Conv2d(4, 6, **({"kernel_size": 3} | arguments)), rows(2, 4, 8, 7)


def conv3d_case(**arguments):
    return lambda: nn.Conv3d(2, 4, **({"kernel_size": 2} | arguments)), rows(2, 2, 5, 4, 6)


def embedding_case(**arguments):
    return lambda: nn.Embedding(11, 6, **arguments), indices


# How a layer and an input of it are made.
CASES = {
    "linear": (lambda: nn.Linear(5, 7), rows(3, 5)),
    "linear-sequence": (lambda: nn.Linear(5, 7), rows(2, 3, 5)),
    "linear-vector": (lambda: nn.Linear(5, 7), rows(5)),
    "linear-no-bias": (lambda: nn.Linear(5, 7, bias=False), rows(3, 5)),
    "linear-one-output": (lambda: nn.Linear(5, 1), rows(3, 5)),
    "linear-fp64": (lambda: nn.Linear(5, 7).double(), rows(3, 5)),
    "linear-bf16": (lambda: nn.Linear(5, 7).bfloat16(), rows(3, 5)),
    "linear-fp16": (lambda: nn.Linear(5, 7).half(), rows(3, 5)),
    "linear-transposed-memory": (lambda: transposed_memory(nn.Linear(5, 7)), rows(3, 5)),
    "embedding": embedding_case(),
    "embedding-padding": embedding_case(padding_idx=5),
    "embedding-padding-from-the-end": embedding_case(padding_idx=-1),
    "embedding-sparse": embedding_case(sparse=True),
    "embedding-by-frequency": embedding_case(scale_grad_by_freq=True),
    "embedding-max-norm": embedding_case(max_norm=1.0),
    "embedding-max-norm-l1": embedding_case(max_norm=2.0, norm_type=1.0, padding_idx=0),
    "embedding-fp64": (lambda: nn.Embedding(11, 6).double(), indices),
    "embedding-bf16": (lambda: nn.Embedding(11, 6, padding_idx=5).bfloat16(), indices),
    "embedding-fp16": (lambda: nn.Embedding(11, 6).half(), indices),
    "conv1d": conv1d_case(),
    "conv1d-stride-dilation": conv1d_case(stride=2, dilation=2, padding=1),
    "conv1d-same": conv1d_case(padding="same", dilation=2),
    "conv1d-circular": conv1d_case(padding=2, padding_mode="circular"),
    "conv1d-groups": conv1d_case(groups=2, bias=False),
    "conv1d-unbatched": (lambda: nn.Conv1d(4, 6, 3, groups=2), rows(4, 11)),
    "conv2d": conv2d_case(),
    "conv2d-no-bias": conv2d_case(bias=False),
    "conv2d-pointwise": conv2d_case(kernel_size=1),
    "conv2d-stride": conv2d_case(stride=(2, 1), padding=(1, 0), kernel_size=(3, 2)),
    "conv2d-dilation": conv2d_case(dilation=(2, 1), padding=2),
    "conv2d-same": conv2d_case(padding="same"),
    "conv2d-same-even-kernel": conv2d_case(padding="same", kernel_size=(2, 4)),
    "conv2d-same-reflect": conv2d_case(padding="same", padding_mode="reflect"),
    "conv2d-valid": conv2d_case(padding="valid"),
    "conv2d-reflect": conv2d_case(padding=(1, 2), padding_mode="reflect"),
    "conv2d-replicate": conv2d_case(padding=1, padding_mode="replicate", stride=2),
    "conv2d-circular": conv2d_case(padding=1, padding_mode="circular", groups=2),
    "conv2d-groups": conv2d_case(groups=2, stride=2),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), rows(2, 4, 8, 7)),
    "conv2d-unbatched": (lambda: nn.Conv2d(4, 6, 3), rows(4, 8, 7)),
    "conv2d-channels-last": (lambda: channels_last(nn.Conv2d(4, 6, 3)), rows(2, 4, 8, 7)),
    "conv2d-channels-last-pointwise": (lambda: channels_last(nn.Conv2d(4, 6, 1)), rows(2, 4, 8, 7)),
    "conv2d-fp64": (lambda: nn.Conv2d(4, 6, 3, groups=2).double(), rows(2, 4, 8, 7)),
    "conv2d-bf16": (lambda: nn.Conv2d(4, 6, 3).bfloat16(), rows(2, 4, 8, 7)),
    "conv2d-fp16": (lambda: nn.Conv2d(4, 6, 3).half(), rows(2, 4, 8, 7)),
    "conv3d": conv3d_case(),
    "conv3d-all": conv3d_case(stride=2, padding=1, dilation=(1, 2, 1), groups=2, padding_mode="replicate"),
    "conv3d-same": conv3d_case(padding="same", bias=False),
    "hf-conv1d": (lambda: conv1d(7, 5), rows(2, 3, 5)),
    "hf-conv1d-bf16": (lambda: conv1d(7, 5).bfloat16(), rows(2, 3, 5)),
    "scaled-linear": (lambda: Scaled(5, 7), rows(3, 5)),
    "scaled-twice": (lambda: ScaledTwice(5, 7), rows(3, 5)),
    "standardized-linear": (lambda: Standardized(5, 7), rows(3, 5)),
    "standardized-linear-bf16": (lambda: Standardized(5, 7).bfloat16(), rows(3, 5)),
    "normalized-linear": (lambda: Normalized(5, 7), rows(3, 5)),
    "standardized-conv": (lambda: StandardizedConv(4, 6, 3, padding=1), rows(2, 4, 8, 7)),
    "scaled-conv": (lambda: ScaledConv(4, 6, 3, padding=1, groups=2), rows(2, 4, 8, 7)),
    "scaled-embedding": (lambda: ScaledEmbedding(11, 6, padding_idx=0), indices),
    "looked-up-embedding": (lambda: LookedUp(11, 6), indices),
    "looked-up-embedding-padding": (lambda: LookedUp(11, 6, padding_idx=5), indices),
}


def transposed_memory(layer):
    """``layer`` with a weight that is not contiguous."""
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    return layer


def build(case, seed=0):
    """The layer of a case, inside a model of its own under the name ``layer``, and an input of the right dtype."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # the quick part of torch.manual_seed
    make, make_input = CASES[case]
    layer, x = make(), make_input()
    torch.set_rng_state(state)
    model = nn.Sequential()
    model.add_module("layer", layer)
    return model, x.to(layer.weight.dtype) if x.is_floating_point() else x


def adapt(model, r=3, scale=SCALE, **arguments):
    """Adapters on ``model.layer``, trained: B is no longer zero."""
    apply_lora(model, LoRAConfig(**({"r": r, "alpha": r * scale, "targets": ["layer"]} | arguments)))
    train_by_hand(model)
    return model


def train_by_hand(model, size=0.3, seed=1):
    """Give every adapter a B as after some training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora_parameters(model):
        if name.endswith(".B"):
            parameter.data = size * torch.randn(parameter.shape, generator=generator)


def product(layer, dtype=torch.float64):
    """``scale * B A`` in the shape of the weight of an adapted ``layer``, as the paper and PEFT define it."""
    (adapter,) = layer.lora.values()
    A, B = adapter.A.detach().to(dtype), adapter.B.detach().to(dtype)
    return shaped(SCALE * (B @ A), layer)


def shaped(matrix, layer):
    """``matrix``, of shape (out, in), in the shape of the layer's weight."""
    return matrix.t() if isinstance(layer, nn.Embedding) or is_conv1d(layer) else matrix.reshape(layer.weight.shape)


def plain_with(layer, weight):
    """A copy of the plain ``layer``, of the dtype of ``weight``, that has this weight."""
    plain = copy.deepcopy(layer).to(weight.dtype)
    plain.weight = nn.Parameter(weight.clone())
    return plain


def as_double(x):
    return x.double() if x.is_floating_point() else x


def assert_close(found, expected, dtype):
    """Equal to a few units in the last place of ``dtype``, relative to the largest value."""
    size = float(expected.detach().abs().max()) + 1e-30
    tolerance = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 8e-3, torch.bfloat16: 5e-2}[dtype]
    error = float((found.detach().double() - expected.detach().double()).abs().max()) / size
    assert error < tolerance, f"off by {error:.2e} of the largest value, allowed are {tolerance:.0e}"


def same_bits(one, other):
    """Whether two tensors agree in every bit: -0 is not 0, a NaN equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    view = INTEGERS.get(one.element_size(), torch.uint8)
    return bool((one.detach().contiguous().view(view) == other.detach().contiguous().view(view)).all())


def snapshot(model):
    """Every value of a model, copied."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_values(model, before):
    """That a model holds exactly the values of a snapshot, under the same keys in the same order."""
    now = model.state_dict()
    assert list(now) == list(before)
    assert [name for name in now if not same_bits(now[name], before[name])] == []


def saved_and_loaded(model):
    """A model through ``torch.save`` and ``torch.load``."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def any_bits(shape, dtype, seed=0):
    """A tensor of arbitrary bits: NaNs with payloads, infinities, -0 and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    width = dtype.itemsize
    raw = torch.randint(0, 256, (*shape, width), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def special_values(dtype):
    """The values on which float comparisons and rounding trip."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), info.tiny, info.max, info.min, info.eps, 1.0]
    special = torch.tensor(values, dtype=torch.float64).to(dtype)
    payload = torch.tensor([1, 3, -2, -1], dtype=INTEGERS[dtype.itemsize]).view(dtype)  # subnormals and NaN payloads
    return torch.cat([special, payload])


class WithStatistics(nn.Module):
    """An embedding, a body with statistics, a head, a buffer that counts, and a parameter that is found frozen."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
        self.head = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, index):
        if self.training:
            self.steps += 1
        return self.head(self.body(self.embed(index)) * self.scale)


INDEX = torch.tensor([1, 2, 3, 2])
BODY = LoRAConfig(r=2, targets=["body.*"])
ADAPTERS = [f"body.{index}.lora.default.{matrix}" for index in (0, 2) for matrix in "AB"]


def net():
    """The same model every time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return WithStatistics()


def adapted(**arguments):
    """That model with adapters as in ``BODY`` or as asked for, B no longer zero."""
    model = net()
    apply_lora(model, LoRAConfig(**arguments) if arguments else BODY)
    train_by_hand(model)
    return model


def train(model, steps=3):
    """Train whatever trains in that model."""
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(INDEX).square().sum().backward()
        optimizer.step()
    return model
