"""The reader of files that ``torch.save`` wrote: bounded in time and memory, and no damage goes unseen.

``torch.load`` compares no checksum, and believes what the file says of the sizes of its tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from lightning_lora.files.pickles import check_pickle
from lightning_lora.files.torch_archive import open_archive

Value = TypeVar("Value")


def read_torch_file(path: Path, weights_only: bool) -> Any:
    """The content of a file that ``torch.save`` wrote, on the CPU.

    Args:
        path: the file.
        weights_only: whether only plain data is read; ``False`` runs code that the file names.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: if the file is of another kind, damaged, or holds more than it should.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of in a file of another kind is in the error
        return checked(path, weights_only, lambda: torch.load(path, map_location="cpu", weights_only=weights_only))


def checked(path: Path, weights_only: bool, load: Callable[[], Value]) -> Value:
    """The result of ``load``, which reads the file at ``path`` after it was checked.

    The checksums are compared at the same time in another thread, as that takes half as long as reading.
    """
    archive = open_archive(path)
    structure = archive.structure()
    if weights_only:
        check_pickle(structure, archive.storages())
    with ThreadPoolExecutor(max_workers=1) as pool:
        sums = pool.submit(archive.check_sums)
        try:
            return load()
        finally:
            sums.result()  # a wrong one is why `load` failed
