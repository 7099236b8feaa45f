"""UpdateSpectrum: the singular values of the dense delta."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, save_adapter
from lightning_lora.analysis import UpdateSpectrum
from tests.helpers.dense_updates import dense, two_layers
from tests.helpers.layer_cases import LAYER_CASES, Subject
from tests.helpers.selection import slow_except


@pytest.mark.parametrize("name", slow_except({"linear", "conv2d", "attention-self", "parameter-indexed"}, LAYER_CASES))
def test_against_a_dense_svd(name):
    subject, spectrum = Subject(name).train(), UpdateSpectrum()
    spectrum.update(subject.model)
    expected = dense(subject)
    assert spectrum.compute().keys() == expected.keys()
    for layer, squeezed in spectrum.compute().items():
        values = torch.atleast_1d(squeezed)
        S = torch.linalg.svdvals(expected[layer].delta)[..., : values.shape[-1]]
        torch.testing.assert_close(values, S.float(), rtol=1e-5, atol=1e-7)
        assert values.shape[-1] == min(2, *expected[layer].delta.shape[-2:])


def test_of_a_directory(tmp_path):
    model, live, stored = two_layers(), UpdateSpectrum(), UpdateSpectrum()
    save_adapter(model, tmp_path / "adapter")
    live.update(model)
    stored.update(tmp_path / "adapter")
    assert all(torch.allclose(live.compute()[name], stored.compute()[name]) for name in ("0", "1"))


def test_plot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    spectrum = UpdateSpectrum()
    spectrum.update(two_layers())
    fig, ax = spectrum.plot()
    assert [list(line.get_ydata()) for line in ax.lines] == [
        pytest.approx(values.tolist()) for values in spectrum.compute().values()
    ]
    assert ax.get_title() == "Spectrum of the update" and "sigma" in ax.get_ylabel()
    own = ax.figure.subplots()
    assert spectrum.plot({"0": spectrum.compute()["0"]}, own) == (fig, own) and len(own.lines) == 1
    pyplot.close(fig)


def test_the_picture_of_a_layer_with_one_value():
    pytest.importorskip("matplotlib")
    model, spectrum = nn.Linear(4, 1), UpdateSpectrum()
    apply_lora(model, LoRAConfig(r=2, targets="all"))
    spectrum.update(model)
    _, axis = spectrum.plot()
    assert [list(line.get_xdata()) for line in axis.lines] == [[1]]
