"""Linear layers that keep their weight in few bits, as those of bitsandbytes: no matrix to read, a map to add to.

They are known by the library that their class comes from, which is not imported.
"""

from __future__ import annotations

from torch import nn


def is_quantizing(cls: type[nn.Module]) -> bool:
    """Whether layers of class ``cls`` keep a weight that is no matrix."""
    known = any(base.__module__.partition(".")[0] == "bitsandbytes" for base in cls.__mro__)
    return known and issubclass(cls, nn.Linear)  # its embeddings are plain
