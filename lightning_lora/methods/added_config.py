"""The arguments that all methods have in common, apart from LoRA, whose configuration is older."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from typing_extensions import Self

from lightning_lora.arguments import check_argument_names, check_choice, check_patterns, plain_data
from lightning_lora.config import BIASES


@dataclass(frozen=True, kw_only=True)
class AddedConfig:
    """Base of the configurations: a sub-class adds its own arguments and their checks.

    Args:
        exclude: patterns of modules that are left as they are, with all that is inside them.
        also_train: patterns of modules or parameters of the base that are trained in full.
        bias: which biases of the base train too: ``"none"``, ``"lora_only"`` (those of adapted modules) or ``"all"``.
        seed: of the initial values; ``None`` takes the one that ``seed_everything`` set, else 0.
        name: a word for the run, a Python identifier.

    Attributes:
        FREE: arguments that two runs of one model may have different.
    """

    FREE: ClassVar[frozenset[str]] = frozenset({"seed"})

    exclude: Sequence[str] | None = None
    also_train: Sequence[str] | None = None
    bias: str = "none"
    seed: int | None = None
    name: str = "default"

    def __new__(cls, *_: Any, **arguments: Any) -> Self:
        """Say what an argument of peft is called here."""
        check_argument_names(cls.__name__, arguments, (field.name for field in fields(cls)))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Make every argument plain data and check those that all methods have."""
        for field in fields(self):
            object.__setattr__(self, field.name, plain_data(getattr(self, field.name)))
        for argument in ("exclude", "also_train"):
            if getattr(self, argument) is not None:
                check_patterns(argument, getattr(self, argument))
        check_choice("bias", self.bias, BIASES)
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool)):
            raise TypeError(f"`seed` must be an integer or None, but got {self.seed!r}.")
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ValueError(f"`name` must be a Python identifier, but got {self.name!r}.")

    @classmethod
    def from_file(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that :meth:`to_dict` wrote."""
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The arguments as plain data that ``torch.load(weights_only=True)`` accepts."""
        return {field.name: plain_data(getattr(self, field.name)) for field in fields(self)}

    def difference(self, other: AddedConfig) -> str | None:
        """The first argument in which ``other`` means another model, as ``size=4 instead of size=8``."""
        mine, theirs = self.to_dict(), other.to_dict()
        changed = (key for key in mine if key not in self.FREE and (mine[key] or None) != (theirs[key] or None))
        key = next(changed, None)
        return None if key is None else f"`{key}={theirs[key]!r:.600}` instead of `{key}={mine[key]!r:.600}`"
