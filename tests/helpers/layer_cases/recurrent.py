"""LSTM, GRU, RNN and their cells, packed or not, with and without a first state."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence

from tests.helpers.layer_cases.case import LayerCase, Matrix

WIDTH, HIDDEN, BATCH, LENGTH = 4, 3, 3, 5


def case(cls, packed=False, state=False, unbatched=False, **arguments):
    """How to make a layer and what to call it with."""

    def make():
        layer = cls(WIDTH, HIDDEN, **arguments)
        shape = (LENGTH,) if unbatched else (BATCH, LENGTH) if layer.batch_first else (LENGTH, BATCH)
        x = torch.randn(*shape, WIDTH)
        if packed:
            x = pack_padded_sequence(x, [2, 5, 3], layer.batch_first, enforce_sorted=False)
        return layer, (x, first_state(layer, () if unbatched else (BATCH,))) if state else (x,)

    return make


def first_state(layer, batch):
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    hidden = torch.randn(count, *batch, layer.proj_size or HIDDEN)
    return (hidden, torch.randn(count, *batch, HIDDEN)) if isinstance(layer, nn.LSTM) else hidden


def cell(cls, **arguments):
    def make():
        hidden = torch.randn(BATCH, HIDDEN)
        state = (hidden, torch.randn(BATCH, HIDDEN)) if cls is nn.LSTMCell else hidden
        return cls(WIDTH, HIDDEN, **arguments), (torch.randn(BATCH, WIDTH), state)

    return make


class Residual(nn.GRU):
    """Does something to what the forward that it inherits gives."""

    def forward(self, x, hx=None):
        output, state = super().forward(x, hx)
        return 2 * output + 1, state


class Unrolled(nn.RNN):
    """Reads its weights itself."""

    def forward(self, x):
        state, states = x.new_zeros(x.shape[1], HIDDEN), []
        for each in x:
            state = torch.tanh(each @ self.weight_ih_l0.t() + state @ self.weight_hh_l0.t() + self.bias_ih_l0)
            states.append(state)
        return torch.stack(states), state


class OwnCell(nn.GRUCell):
    """A cell that reads its weights itself."""

    def forward(self, x, state):
        return torch.tanh((x @ self.weight_ih.t() + state @ self.weight_hh.t()).chunk(3, -1)[0])


CASES = {
    "lstm": case(nn.LSTM),
    "lstm-two-layers": case(nn.LSTM, num_layers=2, state=True),
    "lstm-both-directions": case(nn.LSTM, bidirectional=True, batch_first=True, state=True),
    "lstm-projection": case(nn.LSTM, proj_size=2, num_layers=2, bidirectional=True, state=True),
    "lstm-packed": case(nn.LSTM, packed=True, num_layers=2, bidirectional=True),
    "lstm-packed-projection": case(nn.LSTM, packed=True, proj_size=2, batch_first=True, state=True),
    "lstm-no-bias": case(nn.LSTM, bias=False),
    "lstm-unbatched": case(nn.LSTM, unbatched=True, state=True),
    "gru": case(nn.GRU),
    "gru-two-layers": case(nn.GRU, num_layers=2, bidirectional=True, batch_first=True, state=True),
    "gru-packed": case(nn.GRU, packed=True, batch_first=True, state=True),
    "gru-no-bias": case(nn.GRU, bias=False, unbatched=True),
    "rnn": case(nn.RNN),
    "rnn-relu": case(nn.RNN, nonlinearity="relu", num_layers=2, state=True),
    "rnn-packed": case(nn.RNN, packed=True, bidirectional=True, bias=False),
    "residual-gru": case(Residual, state=True),
    "unrolled-rnn": case(Unrolled),
    "lstm-cell": cell(nn.LSTMCell),
    "lstm-cell-no-bias": cell(nn.LSTMCell, bias=False),
    "gru-cell": cell(nn.GRUCell),
    "rnn-cell": cell(nn.RNNCell, nonlinearity="relu"),
    "own-cell": cell(OwnCell),
}


def matrices(plain: nn.Module) -> dict[str, Matrix]:
    """Every matrix, by torch's name for it."""
    named = {name: tuple(p.shape) for name, p in plain.named_parameters() if p.dim() == 2}
    return {f"lora.default.{name}": Matrix(name, shape) for name, shape in named.items()}


def call(plain, sums, inputs, others):
    """`plain` with `sums` for its weights; nn.RNNBase reads a list of them."""
    if not isinstance(plain, nn.RNNBase) or isinstance(plain, Unrolled):
        return functional_call(plain, sums, inputs)
    twin = copy.deepcopy(plain)
    sums = dict(plain.named_parameters()) | sums
    twin._flat_weights = [sums[key] for key in twin._flat_weights_names]
    return twin(*inputs)


LAYER_CASES = {
    f"recurrent-{name}": LayerCase(make, matrices, call, same_bits_when_disabled=False, same_bits_in_inference=False)
    for name, make in CASES.items()
}
