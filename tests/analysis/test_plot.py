"""What plots draw: kinds of layers, scales, names on axes, and the error without matplotlib."""

from __future__ import annotations

import sys

import pytest
import torch

from lightning_lora.analysis import UpdateRatio
from lightning_lora.analysis.plot import draw_by_layer, draw_spectra, kinds, new_axes, short_names
from tests.helpers.dense_updates import two_layers

figure = pytest.importorskip("matplotlib.figure")


def axes():
    return figure.Figure().subplots()


BLOCKS = [f"blocks.{block}.attn.{name}" for block in range(3) for name in ("q", "v")]


def test_layers_of_blocks_share_a_line():
    ax = axes()
    draw_by_layer({name: torch.tensor(float(place)) for place, name in enumerate(BLOCKS)}, ax)
    assert [line.get_label() for line in ax.lines] == ["q", "v"]
    assert [list(line.get_xdata()) for line in ax.lines] == [[0, 2, 4], [1, 3, 5]]
    assert list(ax.lines[1].get_ydata()) == [1, 3, 5] and ax.lines[0].get_marker() != ax.lines[1].get_marker()
    assert ax.get_yscale() == "linear"  # there is a zero


def test_few_layers_are_named_and_many_are_numbered():
    ax = axes()
    draw_by_layer({name: torch.tensor(1.0) for name in ("encoder.up", "encoder.down")}, ax)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["up", "down"]
    ax = axes()
    draw_by_layer({f"{name}.{extra}": torch.tensor(1.0) for name in BLOCKS for extra in "ab"}, ax)
    assert ax.get_xlabel() == "layer, in the order of the model"


def test_values_of_several_sizes_have_a_logarithmic_axis():
    ax = axes()
    draw_by_layer({"a": torch.tensor(0.01), "b": torch.tensor(torch.nan), "c": torch.tensor(1.0)}, ax)
    assert ax.get_yscale() == "log"


def test_of_too_many_kinds_the_last_part_is_kept():
    names = [f"layer{stage}.{block}.conv{number}" for stage in "1234" for block in range(2) for number in "123"]
    assert list(kinds(names)) == ["conv1", "conv2", "conv3"]
    assert list(kinds([f"layer{number}" for number in "abcdefghi"])) == [""]
    ax = axes()
    draw_by_layer({f"layer{number}": torch.tensor(1.0) for number in "abcdefghi"}, ax)
    assert ax.get_legend() is None


def test_short_names():
    assert short_names(["a.x", "b.x", "b.y"]) == ["a.x", "b.x", "y"]
    assert short_names(["x", "a.x"]) == ["x", "a.x"]


def test_spectra_of_a_kind_are_a_line_and_a_range():
    ax = axes()
    spectra = {"a.0.q": [4.0, 2.0], "a.1.q": [2.0, 1.0], "a.2.q": [8.0]}
    draw_spectra({name: torch.tensor(values) for name, values in spectra.items()}, ax)
    (line,), (band,) = ax.lines, ax.collections
    assert list(line.get_ydata()) == [4.0, 1.0]  # the lower of two medians, as torch has it
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (1.0, 8.0)


def test_nothing_trained_can_be_drawn():
    ax = axes()
    draw_spectra({"q": torch.zeros(3), "v": torch.full((2,), torch.nan)}, ax)
    assert ax.get_yscale() == "linear"
    ax.figure.canvas.draw()


def test_axes_that_are_given():
    ax = axes()
    assert new_axes(ax) == (ax.figure, ax)


def test_without_matplotlib(monkeypatch):
    ratio = UpdateRatio()
    ratio.update(two_layers())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'not installed: pip install "lightning-lora\[plot\]"'):
        ratio.plot()
