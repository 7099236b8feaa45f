"""The other arguments of a block whose input has a prompt before the tokens: masks, positions and rotations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

OTHER_SEQUENCE = ("encoder", "memory", "cross")  # starts of the names of arguments about another sequence
MASK, POSITIONS, ROTATIONS = "mask", "position_ids", "position_embeddings"
# Names of what depends on positions, of modules and tensors in a block or of its arguments.
POSITION_TABLE = re.compile(r"positions?|(?:.*_)?(?:pos|positional|pe)(?:_.*)?", re.IGNORECASE)  # in a block
OF_POSITIONS = re.compile(r"rotary|rope|relative|rel_?(?:pos|att)|pos(?:ition)?_?(?:bias|emb)|alibi", re.IGNORECASE)
BOUNDARIES = ("seqlen", "seq_len")  # of sequences that are packed into one
SQUARE_MASKS = ("attn_mask", "causal_mask", "src_mask", "tgt_mask")  # of two dimensions: queries and keys
CROSS_MASK = "memory_mask"  # of `nn.TransformerDecoderLayer`, two dimensions


@dataclass(frozen=True)
class Sizes:
    """What is known when an argument is made longer.

    Args:
        site: name of the block, for errors, as the next one.
        stack: name of the list of blocks.
        tokens: number of tokens.
        length: of the prompt.
        causal: whether no token sees later ones.
        visible: the value with which a boolean mask shows a key; ``None`` where that is not known.
    """

    site: str
    stack: str
    tokens: int
    length: int
    causal: bool
    visible: bool | None


def extended(name: str, value: Any, sizes: Sizes) -> Any:
    """The argument ``name`` of a block for a prompt before the tokens.

    Raises:
        RuntimeError: if it has the length of the sequence and it is not known what the prompt would get.
    """
    word = name.lower()
    if word.startswith(OTHER_SEQUENCE):
        return _of_other_sequence(name, value, sizes)
    if word == ROTATIONS and value is not None:
        return _rotations(value, sizes)
    if not isinstance(value, Tensor):
        inner = value if isinstance(value, (list, tuple)) else ()
        if any(_is_per_token(word, each, sizes) for each in inner) or _needs_length(word, value, sizes.tokens):
            raise _unknown(name, sizes)
        return value
    if MASK in word and (mask := _mask(word, value, sizes)) is not None:
        return mask
    if not _is_per_token(word, value, sizes):
        return value
    if word == POSITIONS and value.shape[-1] == sizes.tokens:
        return F.pad(value, (sizes.length, 0))
    raise _unknown(name, sizes)


def _of_other_sequence(name: str, value: Any, sizes: Sizes) -> Any:
    """An argument about the keys of cross attention: of a mask the queries are those of this sequence."""
    of_queries = isinstance(value, Tensor) and (value.dim() > 2 or name == CROSS_MASK)
    if not of_queries or MASK not in name.lower() or value.shape[-2] != sizes.tokens:
        return value
    if value.dtype == torch.bool and sizes.visible is None:
        raise _unknown(name, sizes)
    return with_more_queries(value, replace(sizes, causal=False))


def _is_per_token(word: str, value: Any, sizes: Sizes) -> bool:
    """Whether ``value`` seems to depend on the tokens: by its name, or by a dimension that is not that of the batch."""
    if not isinstance(value, Tensor):
        return False
    by_shape = sizes.tokens in value.shape[1:] or tuple(value.shape) == (sizes.tokens,)
    return by_shape or bool(OF_POSITIONS.search(word)) or any(each in word for each in BOUNDARIES)


def _needs_length(word: str, value: Any, tokens: int) -> bool:
    """Whether ``value``, no tensor, is the length of the sequence or a mask in a form of its own."""
    if MASK in word:
        return not isinstance(value, (bool, int, float, str, type(None)))
    return "length" in word and isinstance(value, int) and value == tokens


def _unknown(name: str, sizes: Sizes) -> RuntimeError:
    return RuntimeError(
        f"`{sizes.site}` gets `{name}`, which depends on the {sizes.tokens} tokens, and what the prompt "
        f"would get is not known. If the model has other blocks, leave these out: exclude=[{sizes.stack!r}]. In a "
        "block of your own, name a mask of attention `attn_mask`, and one of padding `padding_mask`."
    )


def _rotations(value: Any, sizes: Sizes) -> Any:
    """Cosine and sine, or complex numbers, of rotary embeddings: the prompt is not rotated, as at position 0."""
    parts: Sequence[Any] = value if isinstance(value, (tuple, list)) else (value,)
    expected = 2 if isinstance(value, (tuple, list)) else 1
    fit = all(isinstance(part, Tensor) and part.dim() > 1 and part.shape[-2] == sizes.tokens for part in parts)
    if not fit or len(parts) != expected or (expected == 1 and not parts[0].is_complex()):
        raise _unknown(ROTATIONS, sizes)
    ones = [torch.ones_like(part[..., :1, :]).expand(*_resized(part, sizes.length)) for part in parts]
    if expected == 1:
        return torch.cat([ones[0], parts[0]], -2)
    cosine, sine = parts
    return torch.cat([ones[0], cosine], -2), torch.cat([0 * ones[1], sine], -2)


def _resized(part: Tensor, length: int) -> list[int]:
    return [*part.shape[:-2], length, part.shape[-1]]


def _mask(word: str, mask: Tensor, sizes: Sizes) -> Tensor | None:
    """A mask for a prompt that every token sees, or ``None`` if it is not known what its dimensions are.

    Args:
        word: the name of the argument.
        mask: of keys, ``(batch, tokens)``, or of queries and keys, ``(..., 1 or tokens, tokens)``.
        sizes: of the sequence.
    """
    if mask.dtype == torch.bool and sizes.visible is None:
        return None
    square = mask.dim() > 1 and mask.shape[-2] == sizes.tokens
    if mask.dim() == 2:
        of_keys = "padding" in word or not (square or mask.is_floating_point()) or _is_integer(mask)
        if not of_keys and not (square and word in SQUARE_MASKS):
            return None
        square = not of_keys
    elif mask.shape[-1] != sizes.tokens or (not square and mask.shape[-2] != 1):
        return None
    longer = with_more_keys(mask, sizes)
    return with_more_queries(longer, sizes) if square else longer


def _is_integer(mask: Tensor) -> bool:
    return mask.dtype != torch.bool and not mask.is_floating_point()


def with_more_keys(mask: Tensor, sizes: Sizes) -> Tensor:
    """``mask`` with columns for the prompt, which every query sees."""
    return F.pad(mask, (sizes.length, 0), value=_shown(mask, sizes))


def with_more_queries(mask: Tensor, sizes: Sizes) -> Tensor:
    """``mask`` with rows for the prompt.

    If the attention is causal the prompt sees what is before it in the prompt. Otherwise it sees those keys that every
    token sees: through the prompt no token learns of a key that is hidden from it.
    """
    shown = mask if mask.dtype != torch.bool or sizes.visible else ~mask
    common = shown.all(-2, keepdim=True) if shown.dtype == torch.bool else shown.amin(-2, keepdim=True)
    rows = common.expand(*mask.shape[:-2], sizes.length, mask.shape[-1])
    if sizes.causal:
        before = torch.ones(rows.shape[-2:], dtype=torch.bool, device=mask.device).tril()
        rows = rows & before if rows.dtype == torch.bool else rows.masked_fill(~before, _hidden(mask))
    rows = rows if mask.dtype != torch.bool or sizes.visible else ~rows
    return torch.cat([rows, mask], -2)


def _shown(mask: Tensor, sizes: Sizes) -> float:
    """The value that shows a key: masks that are no booleans are added to scores, but for integers, which are 1."""
    if mask.dtype == torch.bool:
        return float(bool(sizes.visible))
    return float(_is_integer(mask))


def _hidden(mask: Tensor) -> float:
    """The value of an additive mask that hides a key; minus infinity would give NaN where all keys are hidden."""
    return torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
