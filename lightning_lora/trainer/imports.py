"""Lightning's two packages, ``lightning.pytorch`` and ``pytorch_lightning``, which hold every class twice.

Each, when it is imported, makes its own logger that of all ``rank_zero_info`` messages. The user may have silenced the
other one, so this file restores the logger that was there, and the other files take Lightning's names from here.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lightning_utilities.core import rank_zero

_CHOSEN = rank_zero.log if {"lightning.pytorch", "pytorch_lightning"} & sys.modules.keys() else None


def _twin() -> Any:
    try:
        from pytorch_lightning import Callback
    except ImportError:
        return None
    return Callback


_TWIN = _twin()

import lightning.pytorch as pl  # noqa: E402
from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: E402
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # noqa: E402

if _CHOSEN is not None:
    rank_zero.log = _CHOSEN

if TYPE_CHECKING:
    CallbackBase = pl.Callback
else:
    CallbackBase = pl.Callback if _TWIN is None else type("CallbackBase", (pl.Callback, _TWIN), {})

__all__ = ["CallbackBase", "MisconfigurationException", "pl", "rank_zero_info", "rank_zero_warn"]
