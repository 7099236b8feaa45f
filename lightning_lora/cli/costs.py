"""Bytes of a checkpoint and bytes of memory in training, with LoRA and without, from numbers of parameters.

Memory is that of weights, gradients and Adam's two moments, without activations. LoRA holds only the weights of the
base, and everything for its adapters. The bytes of one trained parameter depend on how it is kept:

    16-bit, gradients freed as they are used   2 weight +              2 x 2 moments                =  6 bytes
    16-bit, gradients held                     2 weight + 2 gradient + 2 x 2 moments                =  8 bytes
    16-bit with fp32 copies (mixed precision)  2 weight + 2 gradient + 2 x 4 moments + 4 copy       = 16 bytes
    fp32                                       4 weight + 4 gradient + 2 x 4 moments                = 16 bytes

An adapter's parameter is kept in fp32 in every case, 16 bytes, as this package does. Hu et al. (2021, section 4.2)
report 1.2 TB for all of GPT-3 175B and 350 GB with LoRA: the second is its weights in 16 bits; the first, 6.9 bytes for
each parameter, lies between the first two rows (1.05 and 1.40 TB).
"""

from __future__ import annotations

from dataclasses import dataclass

ADAPTER = 16  # bytes for each parameter that LoRA trains


@dataclass(frozen=True)
class Accounting:
    """How many bytes a parameter takes: its ``weight``, and in all where it is ``trained``."""

    name: str
    weight: int
    trained: int


ACCOUNTINGS = (
    Accounting("16-bit, gradients freed as used", 2, 2 + 2 * 2),
    Accounting("16-bit, gradients held", 2, 2 + 2 + 2 * 2),
    Accounting("16-bit with fp32 copies", 2, 2 + 2 + 2 * 4 + 4),
    Accounting("fp32", 4, 4 + 4 + 2 * 4),
)


@dataclass(frozen=True)
class Costs:
    """Bytes of a checkpoint, and bytes of memory in training by accounting.

    Args:
        base: number of parameters of the model.
        trainable: number of parameters that LoRA trains.
    """

    base: int
    trainable: int

    def checkpoint(self, width: int) -> tuple[int, int]:
        """Bytes of a full checkpoint and of an adapter's, at ``width`` bytes for each number.

        Example:
            >>> Costs(base=6_738_415_616, trainable=4_194_304).checkpoint(2)
            (13476831232, 8388608)
        """
        return width * self.base, width * self.trainable

    def memory(self, how: Accounting) -> tuple[int, int]:
        """Bytes of memory in full fine-tuning and with LoRA, activations not counted."""
        return how.trained * self.base, how.weight * self.base + ADAPTER * self.trainable
