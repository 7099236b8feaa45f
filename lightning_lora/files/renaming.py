"""How the modules of a model are called in a file of a larger model that contains it, or of a part of it.

A model with a head calls its inner model ``model`` or ``transformer``, a LightningModule calls it ``net``, and files of
the inner model alone lack that part of the names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

Renaming = Callable[[str], str]
# What to do if no name fits: in files of ViT, for example, tensors have other names than in the model.
OWN_NAMES = (
    "Of some models transformers writes other names than those of the modules. For these load the model without "
    "adapters, and call model.save_pretrained(DIR, save_original_format=False)."
)


def renamings(
    names: Iterable[str], keys: Iterable[str], fits: Callable[[Renaming], bool], leading: int = 1
) -> list[tuple[str, Renaming]]:
    """The ways to rename ``names`` so that they fit a file, each with the prefix that it adds; at most one adds none.

    Args:
        names: of modules.
        keys: of the tensors in the file.
        fits: whether every name, called in this way, is in the file.
        leading: how many first parts of ``names`` the file may lack.

    Example:
        >>> keys = {"model.up.weight"}
        >>> [(start, way)] = renamings(["net.model.up"], keys, lambda way: f"{way('net.model.up')}.weight" in keys)
        >>> start, way("net.model.up")
        ('', 'model.up')
    """
    for count in range(leading + 1):
        shorter = partial(_without, count)
        if fits(shorter):
            return [("", shorter)]
    starts = sorted({key.split(".")[0] for key in keys if "." in key})
    return [(start, way) for start in starts if fits(way := partial(_below, start))]


def _without(count: int, name: str) -> str:
    return ".".join(name.split(".")[count:])


def _below(start: str, name: str) -> str:
    return f"{start}.{name}"
