"""Which arguments must be the same on every rank. Two real ranks are in `strategies/test_ddp.py`."""

from __future__ import annotations

import re

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_lora import LoRACallback
from lightning_lora.trainer.same_on_ranks import arguments_of, check_alike


def of_ranks(*callbacks: LoRACallback) -> None:
    check_alike([arguments_of(callback.method, callback.run_config) for callback in callbacks])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"r": 4}, "`r` differs between ranks: 8 on rank 0 and 4 on rank 2."),
        ({"targets": ["q"]}, "`targets` differs between ranks: 'attn' on rank 0 and ['q'] on rank 2."),
        ({"merge": False}, "`merge` differs between ranks: True on rank 0 and False on rank 2."),
        ({"export": "here"}, "`export` is given on one of the ranks 0 and 2 only."),
    ],
)
def test_the_first_difference_is_named_with_its_rank(arguments, words):
    with pytest.raises(MisconfigurationException, match=re.escape(words)):
        of_ranks(LoRACallback(), LoRACallback(), LoRACallback(**arguments))


def test_paths_may_differ():
    of_ranks(LoRACallback(export="/scratch/0", init_from="a"), LoRACallback(export="/scratch/1", init_from="b"))
