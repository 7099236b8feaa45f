"""UpdateSpectrum: the singular values of each layer's update."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_lora.analysis.decomposition import singular_values
from lightning_lora.analysis.metric import UpdateMetric
from lightning_lora.analysis.plot import draw_spectra
from lightning_lora.analysis.sources import factors_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class UpdateSpectrum(UpdateMetric):
    r"""The singular values of each layer's update ``delta = scale * B A``: how much of its rank the training used.

    .. math:: \Delta W = U \, \mathrm{diag}(\sigma_1 \ge \dots \ge \sigma_r) \, V^\top

    Delta is not built: the values are those of :math:`R_B R_A^\top`, of QR of B and of :math:`A^\top`, in fp64.

    Args:
        name: Name of the adapter to measure. None is the only one of the model.
        kwargs: As of :class:`torchmetrics.Metric`.

    ``update`` takes a module with adapters in it, live or merged, or a part of one; or the path of a directory in
    PEFT's format, or of its safetensors file (without adapter_config.json the scale is taken to be 1). A later update
    replaces what was measured before. Under a strategy that shards, every rank must call it.

    ``compute`` gives the singular values of each layer by its name, the largest first, as a tensor of shape
    ``(min(out_features, in_features, r),)``, or ``(experts, ...)`` for stacked experts. A single value has no
    dimension: torchmetrics takes that off.

    Raises:
        ValueError: If there are no adapters, or several and ``name`` is None.
        TypeError: If ``update`` gets something else, such as a state dict, which has no scale.

    Source: Hu et al. 2021 (arXiv 2106.09685), equation 3 and section 7.2.

    Example:
        >>> from lightning_lora import LoRAConfig, apply_lora
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> _ = apply_lora(model, LoRAConfig(r=2, targets=["0"]))
        >>> spectrum = UpdateSpectrum()
        >>> spectrum.update(model)  # B is zero
        >>> spectrum.compute()
        {'0': tensor([0., 0.])}
    """

    def update(self, source: nn.Module | str | Path) -> None:
        """Measure ``source``."""
        self.store({layer: singular_values(factors) for layer, factors in factors_of(source, self.name).items()})

    def draw(self, values: Mapping[str, Any], ax: Axes) -> None:
        """Draw the singular values by index, one line for all layers of a kind with the range of them."""
        draw_spectra(values, ax)
        ax.set_ylabel(r"singular value $\sigma_i$ of $\Delta W$")
        ax.set_title("Spectrum of the update")
