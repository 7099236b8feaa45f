"""Which rows of a fused projection are query, which key and which value.

They lie one after the other, or head by head, and no name or shape says which. So the forward of the attention block is
run on a copy of the block whose fused projection returns row numbers instead of values. It stops at the first operation
that computes with them. The local variables that are then called query, key and value hold the numbers of their rows.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise, product
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.base import parameter_of
from lightning_lora.layers.registry import is_linear, parts_of
from lightning_lora.layers.source_code import NOT_COMPUTING, is_library, names_in
from lightning_lora.layers.weight_view import Rows, WeightPart

EMPTY, VAR_KEYWORD = inspect.Parameter.empty, inspect.Parameter.VAR_KEYWORD
VAR_POSITIONAL = inspect.Parameter.VAR_POSITIONAL
FUSED_PARTS = ("q", "k", "v")
WORDS = {"q": {"q", "query", "queries"}, "k": {"k", "key", "keys"}, "v": {"v", "value", "values"}}
# Functions that move elements without a change of their values, or ask for sizes.
MOVES = {"view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "expand"}
MOVES |= {"chunk", "split", "split_with_sizes", "tensor_split", "unbind", "narrow", "select", "contiguous", "expand_as"}
MOVES |= {"transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "clone", "detach", "__getitem__"}
MOVES |= {"dim", "size", "numel", "stride", "is_contiguous", "repeat_interleave", "index_select", "__get__"}
SHAPES = [(1, 64), (64,), (1, 8, 8)]  # of the input, without its features
SIZES = {"size": (8, 8), "shape": (8, 8), "h": 8, "w": 8, "height": 8, "width": 8}
STATES = re.compile(r".*(?:states|context|memory|global)")
CASTS = {"to", "float", "half", "bfloat16", "double", "type_as"}  # skipped: a cast would round the numbers
SCALES = {"clamp", "clip", "mul", "__mul__", "__rmul__", "div", "__truediv__", "true_divide"}


class Stop(Exception):  # noqa: N818 - no error
    """Raised where the code computes with row numbers: by then they are sorted into query, key and value."""


class RowNumbers(Tensor):
    """A tensor of row numbers: it can be moved and sliced, but any computation with it raises :class:`Stop`."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Torch calls this for every function with such an argument."""
        name = getattr(func, "__name__", "")
        if name in MOVES:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if name in CASTS:
            return args[0]
        if name in SCALES and not any(isinstance(value, Tensor) and value.dim() for value in args[1:]):
            return args[0]
        if func is torch.nn.functional.scaled_dot_product_attention:
            raise Stop(
                *[*args, *(value for key, value in (kwargs or {}).items() if key in ("query", "key", "value"))][:3]
            )
        raise Stop


class NumberingWeight(Tensor):
    """Replaces the weight of the fused projection, for code that reads the weight."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """``F.linear`` returns row numbers; all else sees a tensor of zeros."""
        if func is not torch.nn.functional.linear:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        x, weight = [*args, *(value for key, value in (kwargs or {}).items() if key in ("input", "weight"))][:2]
        return numbered(x, len(weight))


class Numbering(nn.Module):
    """Replaces the fused projection."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.weight = torch.zeros(1, 1, device="cpu").expand(out_features, in_features).as_subclass(NumberingWeight)
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """The row numbers, at every position of ``x``."""
        return numbered(x, self.out_features)


def numbered(x: Tensor, out_features: int) -> Tensor:
    """The row numbers in place of the output of a linear layer on ``x``."""
    numbers = torch.arange(out_features, dtype=torch.float32, device="cpu")
    return numbers.expand(*x.shape[:-1], -1).clone().as_subclass(RowNumbers)


class Inert(nn.Module):
    """Replaces all other modules: a linear layer returns zeros of its width, any other module its input."""

    def __init__(self, out_features: int | None) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Zeros or ``x``. A linear layer would compute with row numbers."""
        if isinstance(x, RowNumbers) and self.out_features is not None:
            raise Stop
        return x if self.out_features is None else x.new_zeros(*x.shape[:-1], self.out_features)


def fused_parts(owner: nn.Module | None, leaf: str, layer: nn.Module) -> list[WeightPart] | None:
    """The parts ``q``, ``k`` and ``v`` that the fused projection ``leaf`` of ``owner`` has; ``None`` if unknown.

    Args:
        owner: the module whose forward uses ``layer``; ``None`` where there is none.
        leaf: the attribute of ``owner`` that ``layer`` is.
        layer: the projection.
    """
    (whole,) = parts_of(layer)
    out_features = whole.full_features(parameter_of(layer))[1]
    runs = _attempts(owner, leaf, layer) if owner is not None and is_linear(layer) else ()
    for by_role in filter(None, runs):  # not of a convolution, whose features are not the last dimension
        rows = {name: _as_rows(sorted(numbers), out_features) for name, numbers in by_role.items()}
        count = sum(len(numbers) for numbers in by_role.values())
        disjoint = count == len(set().union(*by_role.values())) == out_features
        if disjoint and len(rows) > 1 and None not in rows.values():
            return [replace(whole, name=name, rows=rows[name]) for name in FUSED_PARTS if name in rows]
    return None


def _attempts(owner: nn.Module, leaf: str, layer: nn.Module) -> Iterator[dict[str, set[int]]]:
    """The rows by role, from runs with inputs of several shapes and arguments: what ``owner`` takes is not known."""
    (whole,) = parts_of(layer)
    in_features, out_features = whole.full_features(parameter_of(layer))
    for method, keep, shape, given in product(
        _methods(owner, leaf), [False, True], SHAPES, ["first", "required", "states"]
    ):
        stand_in = _stand_in(owner, leaf, Numbering(out_features, in_features), keep)
        yield _attempt(method, stand_in, torch.zeros(*shape, in_features, device="cpu"), given)


def _attempt(method: Callable[..., Any], stand_in: nn.Module, x: Tensor, given: str) -> dict[str, set[int]]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            method(stand_in, **_arguments(method, x, given))
        except Exception as error:  # any error will do: it came after the rows were sliced, or no row is named yet
            named = _named_rows(error.__traceback__, stand_in)
            used = _rows_of(zip(FUSED_PARTS, error.args, strict=False)) if isinstance(error, Stop) else {}
            agree = all(named.get(part, rows) == rows for part, rows in used.items())
            return {**named, **used} if agree else {}
    return {}


def _methods(owner: nn.Module, leaf: str) -> list[Callable[..., Any]]:
    """The forward of ``owner``, and other methods of the user's classes that use ``leaf``."""
    bases = [cls for cls in type(owner).__mro__ if not is_library(cls)]
    methods = {name: value for cls in reversed(bases) for name, value in vars(cls).items() if inspect.isfunction(value)}
    helpers = [method for name, method in methods.items() if name != "forward" and not NOT_COMPUTING.fullmatch(name)]
    return [type(owner).forward, *(method for method in helpers if leaf in names_in(method.__code__))]


def _stand_in(owner: nn.Module, leaf: str, numbering: Numbering, keep: bool) -> nn.Module:
    """A replica of ``owner`` with ``numbering`` as its ``leaf``; other modules are inert unless ``keep`` is true."""
    inside: dict[str, nn.Module | None] = dict(owner._modules)
    for name, module in owner._modules.items():
        if module is not None and is_linear(module):
            inside[name] = Inert(parts_of(module)[0].full_features(parameter_of(module))[1])
        elif module is not None and not keep:
            inside[name] = Inert(None)
        elif module is not None:
            inside[name] = copy.deepcopy(module).eval()
    return replica(owner, {**inside, leaf: numbering})


def replica(owner: nn.Module, inside: Mapping[str, nn.Module | None]) -> nn.Module:
    """A copy of ``owner`` in eval mode, with the modules ``inside``, for a trial run of its forward."""
    result: nn.Module = object.__new__(type(owner))
    for key, value in owner.__dict__.items():  # caches are copied, so that no row number stays in them
        result.__dict__[key] = copy.copy(value) if isinstance(value, (list, dict, set)) else value
    result.__dict__["_modules"] = dict(inside)
    result.__dict__["training"] = False
    result.__dict__["_parameters"] = {
        key: None if p is None else p.detach().clone() for key, p in owner._parameters.items()
    }
    result.__dict__["_buffers"] = {key: None if b is None else b.clone() for key, b in owner._buffers.items()}
    return result


def _arguments(method: Callable[..., Any], x: Tensor, given: str) -> dict[str, Any]:
    """Arguments for ``method``: ``x`` for the first one, for all required ones, or for other hidden states too."""
    parameters = list(inspect.signature(method).parameters.values())[1:]
    named = [parameter for parameter in parameters if parameter.kind not in (VAR_POSITIONAL, VAR_KEYWORD)]
    return {
        parameter.name: x if place == 0 else _argument(parameter.name, x, given)
        for place, parameter in enumerate(named)
        if place == 0 or parameter.default is EMPTY or (given == "states" and STATES.fullmatch(parameter.name))
    }


def _argument(name: str, x: Tensor, given: str) -> Any:
    last = name.lower().rpartition("_")[2]
    return SIZES.get(last) if last in SIZES or given == "first" else x


def _named_rows(traceback: TracebackType | None, stand_in: nn.Module) -> dict[str, set[int]]:
    """The rows in the local variables that methods of ``stand_in`` call query, key and value."""
    by_role: dict[str, set[int]] = {}
    while traceback is not None:
        variables = traceback.tb_frame.f_locals
        if variables.get("self") is stand_in:
            for part, rows in _rows_of((_role(name), value) for name, value in variables.items()).items():
                by_role.setdefault(part, set()).update(rows)
        traceback = traceback.tb_next
    return by_role


def _role(variable: str) -> str:
    """``q`` for ``query_states``; the empty string for ``qkv`` and ``query_key_value``."""
    words = set(variable.lower().split("_"))
    roles = [role for role, synonyms in WORDS.items() if words & synonyms]
    return roles[0] if len(roles) == 1 else ""


def _rows_of(named: Any) -> dict[str, set[int]]:
    rows: dict[str, set[int]] = {}
    for name, value in named:
        if name and isinstance(value, RowNumbers):
            counts = torch.bincount(value.as_subclass(Tensor).flatten().long())  # `unique` sorts: seconds for 20 B
            rows.setdefault(name, set()).update(counts.nonzero().flatten().tolist())
    return rows


def _as_rows(numbers: list[int], out_features: int) -> Rows | None:
    """``numbers`` as the same run of rows in each of several equal blocks, or ``None`` if they are not that."""
    if not numbers:
        return None
    starts = [numbers[0], *(after for before, after in pairwise(numbers) if after != before + 1)]
    length, size = len(numbers) // len(starts), out_features // len(starts)
    rows = Rows(starts[0], starts[0] + length, len(starts))
    expected = [start + place for start in range(rows.start, out_features, size) for place in range(length)]
    return rows if numbers == expected and rows.stop <= size else None
