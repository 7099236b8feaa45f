"""SubspaceSimilarity: equation 4 of the paper written out."""

from __future__ import annotations

import pytest
import torch

from lightning_lora import lora_state_dict, save_adapter
from lightning_lora.analysis import SubspaceSimilarity
from lightning_lora.analysis.subspace import subspace_similarity
from tests.helpers.dense_updates import two_layers
from tests.helpers.layer_cases import Subject


def phi(first, second, i, j):
    """Equation 4: |U_1^i^T U_2^j|_F^2 / min(i, j), U of the right singular vectors of two matrices (r, features)."""
    U, V = (torch.linalg.svd(A.detach().double(), full_matrices=False).Vh.mT for A in (first, second))
    return float((U[:, :i].mT @ V[:, :j]).norm() ** 2 / min(i, j))


@pytest.mark.parametrize("matrix", ["A", "B"])
def test_against_the_equation(matrix):
    first, second, metric = two_layers(), two_layers(seed=3, r=5), SubspaceSimilarity(matrix)
    metric.update(first, second)
    for name, grid in metric.compute().items():
        ours, theirs = (getattr(model.get_submodule(name).lora["default"], matrix) for model in (first, second))
        ours, theirs = (ours, theirs) if matrix == "A" else (ours.mT, theirs.mT)
        assert grid.shape == (3, 5)
        for i in range(3):
            for j in range(5):
                assert float(grid[i, j]) == pytest.approx(phi(ours, theirs, i + 1, j + 1), abs=1e-6)


def test_a_subspace_in_itself_and_one_that_is_orthogonal():
    one = torch.linalg.qr(torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    assert torch.allclose(subspace_similarity(one[:, :3], one)[2, 2:], torch.ones(4, dtype=torch.float64))
    assert float(subspace_similarity(one[:, :3], one[:, 3:]).max()) < 1e-28
    assert torch.allclose(subspace_similarity(one, one).diagonal(), torch.ones(6, dtype=torch.float64))


def test_directories_and_state_dicts_are_sides_too(tmp_path):
    first, second, live = two_layers(), two_layers(seed=3), SubspaceSimilarity("B")
    live.update(first, second)
    save_adapter(second, tmp_path / "adapter")
    renamed = {f"net.{name}": value for name, value in lora_state_dict(second).items()}
    for side in (tmp_path / "adapter", lora_state_dict(second), renamed):
        metric = SubspaceSimilarity("B")
        metric.update(first, side)
        assert all(torch.allclose(metric.compute()[name], live.compute()[name], atol=1e-6) for name in ("0", "1"))


def test_two_adapters_of_one_model():
    model, other = two_layers(), two_layers(seed=3)
    for layer, its in zip(model, other, strict=True):
        layer.lora["fr"] = its.lora["default"]
    both, apart = SubspaceSimilarity(name="default", second_name="fr"), SubspaceSimilarity()
    both.update(model, model)
    apart.update(two_layers(), other)
    assert all(torch.equal(both.compute()[name], apart.compute()[name]) for name in ("0", "1"))


def test_stacked_experts():
    first, metric = Subject("parameter-indexed").train(), SubspaceSimilarity()
    metric.update(first.model, first.model)
    assert metric.compute()["layer.up"].shape == (3, 2, 2)
    assert torch.allclose(metric.compute()["layer.up"].diagonal(dim1=-2, dim2=-1), torch.ones(3, 2))


def test_directions_that_a_side_does_not_have():
    first, second = two_layers(), two_layers(seed=3)
    with torch.no_grad():
        first[0].lora["default"].B.zero_()  # as before the first step
        first[1].lora["default"].B[:, 1:] = 0
    metric = SubspaceSimilarity("B")
    metric.update(first, second)
    assert metric.compute()["0"].isnan().all()
    assert metric.compute()["1"].isnan().all(1).tolist() == [False, True, True]
    metric = SubspaceSimilarity("A")
    metric.update(first, second)
    assert metric.compute()["0"].isfinite().all()


def test_refusals():
    with pytest.raises(ValueError, match="`matrix` must be 'A' or 'B', but got 'left'"):
        SubspaceSimilarity("left")
    state = {
        name: value[..., :4] if name.endswith("A") else value for name, value in lora_state_dict(two_layers()).items()
    }
    with pytest.raises(ValueError, match=r"`0` has \[12\] features on the first side and \[4\] on the second: the two"):
        SubspaceSimilarity().update(two_layers(), state)


def test_plot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    metric = SubspaceSimilarity()
    metric.update(two_layers(rank_pattern={"1": 2}), two_layers(seed=3, r=5))
    fig, ax = metric.plot()
    (image,) = ax.images
    first, second = metric.compute().values()
    expected = (first[:2] + second) / 2  # as many rows as both have
    assert torch.allclose(torch.tensor(image.get_array().data, dtype=torch.float32), expected)
    assert ax.get_title() == "Similarity of the subspaces of $A$" and "second" in ax.get_xlabel()
    pyplot.close(fig)
