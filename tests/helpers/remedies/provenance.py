"""Remedies of messages about the records in the header of an adapter's file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tests.helpers.models import net
from tests.helpers.remedies.case import Expected, outputs, remedy
from tests.helpers.remedies.models import adapted
from tests.helpers.remedies.peft_files import loaded, reconfigure, saved

PROVENANCE = "peft_format/provenance.py"


@remedy(PROVENANCE, "`metadata` must be a dict of strings, but got {}: {}", "`metadata`", "'step': 3", "Write str(...)")
def metadata_of_strings(message: Expected, folder: Path) -> None:
    with message:
        saved(folder, metadata={"step": 3})
    saved(folder, metadata={"step": str(3)})


@remedy(PROVENANCE, "`metadata` has {}, which the file itself uses", "'format'", "take another key")
def metadata_under_another_key(message: Expected, folder: Path) -> None:
    with message:
        saved(folder, metadata={"format": "mine"})
    saved(folder, metadata={"my_format": "mine"})


@remedy(
    PROVENANCE, "`{}`: `adapter_config.json` does not belong", "`r` is `3` and was `2`", "Copy or save both files again"
)
def two_files_of_one_write(message: Expected, folder: Path) -> None:
    directory = saved(folder)
    reconfigure(directory, r=3)
    with message:
        loaded(directory)
    assert torch.equal(outputs(loaded(saved(folder))), outputs(adapted()))


@remedy(PROVENANCE, "The adapter's file is damaged", "Copy it again")
def a_file_without_a_flipped_bit(message: Expected, folder: Path) -> None:
    path = saved(folder) / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with message:
        loaded(folder)
    path.write_bytes(content)
    assert torch.equal(outputs(loaded(folder)), outputs(adapted()))


@remedy(PROVENANCE, "The adapter was trained on another base: {}. Load", "`layers.0.q.weight`", "strict_base=False")
def the_base_of_the_directory(message: Expected, folder: Path) -> None:
    directory, other = saved(folder), net()
    nn.init.ones_(other.layers[0].q.weight)
    with message:
        loaded(directory, other)
    assert torch.equal(outputs(loaded(directory)), outputs(adapted()))
    import pytest

    with pytest.warns(UserWarning, match="trained on another base"):
        assert loaded(directory, other, strict_base=False).layers[0].q.lora
