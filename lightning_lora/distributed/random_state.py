"""The random state of every rank, for one checkpoint: a resumed run draws the same numbers as an uninterrupted one."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import distributed

State = dict[str, Any]


def random_state(device: torch.device) -> State:
    """The state of Python's, NumPy's and torch's generators, as data that ``weights_only=True`` loads."""
    kind, keys, *rest = np.random.get_state()
    state: State = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def is_random_state(state: Any) -> bool:
    """Whether ``state`` from a file has the form of what :func:`random_state` returns.

    NumPy believes the position in its state, and a wrong one makes it read other memory.
    """
    try:
        kind, keys, position, has_gauss, gauss = state["numpy"]
        version, internal, rest = state["python"]
        random.Random().setstate((version, tuple(internal), rest))  # raises where it does not fit
        with_bytes = [value for key, value in state.items() if key in ("torch", "cuda")]
        return (
            kind == "MT19937"
            and (keys.dtype, tuple(keys.shape)) == (torch.int64, (624,))
            and bool(((keys >= 0) & (keys < 1 << 32)).all())
            and type(position) is int
            and 0 <= position <= 624
            and isinstance(has_gauss, int)
            and isinstance(gauss, float)
            and all((value.dtype, value.dim()) == (torch.uint8, 1) for value in with_bytes)
            and state["torch"].shape == torch.get_rng_state().shape
        )
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        return False


def set_random_state(state: State, device: torch.device) -> None:
    """Restore what :func:`random_state` returned."""
    kind, keys, *rest = state["numpy"]
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def states_of_all_ranks(state: State) -> list[State]:
    """Gather the states of all ranks, in order; every rank must call this."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [state]
    states: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(states, state)
    return states
