"""What the update of an adapter is: its spectrum, size, subspace, and what it amplifies, as torchmetrics Metrics.

``delta = B A`` is never built: all comes from matrices of r x r and from products with B, A and W. A metric measures a
module with live or merged adapters and keeps numbers alone. This room reads models and files and changes neither.
"""

from lightning_lora.analysis.amplification import AmplificationFactor
from lightning_lora.analysis.ratio import UpdateRatio
from lightning_lora.analysis.spectrum import UpdateSpectrum
from lightning_lora.analysis.subspace import SubspaceSimilarity

__all__ = ["AmplificationFactor", "SubspaceSimilarity", "UpdateRatio", "UpdateSpectrum"]
