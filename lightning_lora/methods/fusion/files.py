"""Trained bottlenecks in checkpoints of AdapterCallback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora.files.json_files import printable
from lightning_lora.files.pickles import ObjectRefusedError
from lightning_lora.files.torch_files import read_torch_file
from lightning_lora.methods.bottleneck.config import BottleneckConfig
from lightning_lora.methods.bottleneck.layer import Bottleneck
from lightning_lora.methods.fusion.config import ALIKE
from lightning_lora.model.fingerprint import Fingerprint, is_fingerprint, other_base
from lightning_lora.names import clean

KEY = "lightning_lora"  # of what a checkpoint records of its run
NEEDED = ("state_dict", KEY)


@dataclass(frozen=True)
class TrainedBottlenecks:
    """The bottlenecks of one run.

    Args:
        path: of the checkpoint.
        config: of the run.
        base: the fingerprint of its base.
        values: the parameters by name, ``<site>.bottleneck.<key>``.
    """

    path: Path
    config: BottleneckConfig
    base: Fingerprint
    values: dict[str, Tensor]

    def at(self, site: str) -> dict[str, Tensor]:
        """The parameters of the bottleneck at ``site`` by key."""
        prefix = f"{site}.bottleneck."
        here = {name.removeprefix(prefix): value for name, value in self.values.items() if name.startswith(prefix)}
        if not here:
            raise ValueError(
                f"`adapters` names {str(self.path)!r}, which holds no bottleneck for `{site}`. If it was trained "
                f"without one, leave it out here too: exclude=[{site!r}]."
            )
        return here

    def give_to(self, bottleneck: Bottleneck, site: str) -> None:
        """Copy the values at ``site`` into ``bottleneck``.

        Raises:
            ValueError: if they are of another shape, or not finite.
        """
        values, wanted = self.at(site), dict(bottleneck.named_parameters())
        for key in {**values, **wanted}:
            shapes = [tuple(each[key].shape) if key in each else None for each in (values, wanted)]
            if shapes[0] != shapes[1] or not values[key].isfinite().all():
                raise ValueError(
                    f"`adapters` names {str(self.path)!r}, whose `{site}.bottleneck.{key}` must be finite and of shape "
                    f"{shapes[1]}, but has shape {shapes[0]} there, or values that are not finite."
                )
            wanted[key].data.copy_(values[key])

    def check_base(self, present: Fingerprint) -> None:
        """Raise unless ``present`` is the base that the run was on, but for what trained in it.

        Raises:
            ValueError: naming the first difference.
        """
        wrong = other_base(self.base, {name: sums for name, sums in present.items() if name in self.base})
        if wrong is not None:
            raise ValueError(
                f"`adapters` names {str(self.path)!r}, which was trained on another base: {wrong}. Load the base it "
                "was trained on first."
            )


def read_all(adapters: Mapping[str, str] | Sequence[str]) -> dict[str, TrainedBottlenecks]:
    """The bottlenecks by the names that they get.

    Raises:
        FileNotFoundError: if there is nothing at a path.
        ValueError: if a file holds no bottlenecks, two have one name, or their arguments differ.
    """
    if isinstance(adapters, Mapping):
        named = {name: read(path) for name, path in adapters.items()}
    else:
        every = [read(path) for path in adapters]
        named = {each.config.name: each for each in every}
        if len(named) < len(every):
            raise ValueError(
                f"`adapters` has {len(every)} files with the names {[each.config.name for each in every]}, which must "
                "differ. Name them: adapters={'first': PATH, 'second': PATH}."
            )
    _check_alike(named)
    return named


def _check_alike(named: Mapping[str, TrainedBottlenecks]) -> None:
    first_name, first = next(iter(named.items()))
    for name, each in named.items():
        for key in ALIKE:
            here, there = getattr(each.config, key), getattr(first.config, key)
            if here != there:
                raise ValueError(
                    f"`adapters` must hold bottlenecks of one kind, but {name!r} has {key}={here!r} and {first_name!r} "
                    f"has {key}={there!r}. Fuse those that are alike."
                )


def read(path: str) -> TrainedBottlenecks:
    """The bottlenecks in one checkpoint, or in the one checkpoint of a directory.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: if it holds no bottlenecks.
    """
    file = _checkpoint_at(Path(path))
    checkpoint = _open(file)
    try:
        recorded, state = checkpoint[KEY], checkpoint["state_dict"]
        method, base = recorded["method"], recorded["base"]
        if method != "bottleneck":
            raise ValueError(f"its method is {method!r:.50}")
        if not is_fingerprint(base):
            raise ValueError("its fingerprint is damaged")
        config = BottleneckConfig.from_file(recorded["config"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"`adapters` names {str(file)!r}, which is no checkpoint of AdapterCallback ({printable(str(error))})."
        ) from error
    return TrainedBottlenecks(file, config, base, _bottlenecks(state))


def _open(file: Path) -> Any:
    try:
        return read_torch_file(file, weights_only=True)
    except ObjectRefusedError as error:
        raise ValueError(
            f"`adapters` names {str(file)!r}, which holds an object of {printable(str(error))}, perhaps a "
            "hyperparameter, and was not opened: making such an object can run any code. If you trust the file, copy "
            "what a fusion reads: torch.save({key: torch.load(PATH, weights_only=False)[key] for key in "
            f"{NEEDED}}}, NEW_PATH)."
        ) from error
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"`adapters` names {str(file)!r}, which cannot be read: {printable(str(error))}.") from error


def _bottlenecks(state: Mapping[str, Any]) -> dict[str, Tensor]:
    named = {clean(name): value for name, value in state.items() if isinstance(value, Tensor)}
    return {name: value for name, value in named.items() if name.split(".")[-2:-1] == ["bottleneck"]}


def _checkpoint_at(path: Path) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"`adapters` names {str(path)!r}, where there is no file.")
        return path
    files = sorted(path.glob("*.ckpt"))
    if len(files) != 1:
        raise ValueError(
            f"`adapters` names the directory {str(path)!r}, which must hold one checkpoint (*.ckpt), but it holds "
            f"{len(files)}. Name a file."
        )
    return files[0]
