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


BLOCKS = [f"blocks.{block}.attn.{name}" for block in range(4) for name in ("q", "v")]


def test_layers_of_blocks_share_a_line():
    ax = axes()
    draw_by_layer({name: torch.tensor(float(place)) for place, name in enumerate(BLOCKS)}, ax)
    assert [line.get_label() for line in ax.lines] == ["q", "v"]
    assert [list(line.get_xdata()) for line in ax.lines] == [[0, 1, 2, 3]] * 2 and ax.get_xlabel() == "block"
    assert list(ax.lines[1].get_ydata()) == [1, 3, 5, 7] and ax.lines[0].get_marker() != ax.lines[1].get_marker()
    assert ax.get_yscale() == "linear"  # there is a zero


def test_few_layers_are_named_and_many_are_numbered():
    ax = axes()
    draw_by_layer({name: torch.tensor(1.0) for name in ("encoder.up", "encoder.down")}, ax)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["up", "down"]
    ax = axes()
    draw_by_layer({name: torch.tensor(1.0) for name in [*BLOCKS, "head"]}, ax)
    assert ax.get_xlabel() == "layer, in the order of the model"
    assert [list(line.get_xdata()) for line in ax.lines] == [[0, 2, 4, 6], [1, 3, 5, 7], [8]]


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
    spectra = [[4.0, 2.0], [2.0, 1.0], [8.0], [8.0, 3.0], [8.0], [4.0, 2.0], [1.0, 0.5]]
    draw_spectra({f"a.{index}.q": torch.tensor(values) for index, values in enumerate(spectra)}, ax)
    (line,), (band,) = ax.lines, ax.collections
    assert list(line.get_ydata()) == [4.0, 2.0]
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0.5, 8.0)


def test_names_from_files_are_no_formulas():
    ax = axes()
    draw_by_layer({"$x_$": torch.tensor(1.0), "a$": torch.tensor(2.0)}, ax)
    assert [label.get_text() for label in ax.get_xticklabels()] == [r"\$x_\$", r"a\$"]
    ax.figure.canvas.draw()


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
