"""Frozen means frozen: what moves, requires a gradient or holds one although it is frozen is named.

Where a frozen parameter moves, as that of a momentum teacher does, files hold its values from then on, so that a
resumed run is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.methods.base import Method
from lightning_lora.model.copies import copied_names
from lightning_lora.model.fingerprint import Fingerprint, shape_alone
from lightning_lora.model.frozen_values import FrozenValues, is_in_pieces
from lightning_lora.model.written import renormalized, set_written, written_parameters
from lightning_lora.names import it_or_them
from lightning_lora.trainer.imports import rank_zero_warn

FIRST_STEPS = 3
SHOWN = 8  # names in one warning
MOVING, REQUIRING, HOLDING = "moving", "requiring a gradient", "holding a gradient"


class FrozenWatch:
    """Watches the frozen parameters of ``module`` in one run.

    Args:
        module: the module that trains, adapted and frozen.
        method: what it is adapted by.
        base: the fingerprint of the base, which is corrected in place.
    """

    def __init__(self, module: nn.Module, method: Method, base: Fingerprint) -> None:
        self.module, self.method, self.base = module, method, base
        self.named: dict[str, set[str]] = {
            key: set() for key in ("moving", "requiring a gradient", "holding a gradient")
        }
        self.first_steps = FIRST_STEPS
        self.frozen = self.survey()
        self.mark()
        for parameter in self.frozen.values():
            parameter.grad = None  # left by an earlier fit, and no optimizer of this run would clear it

    def survey(self) -> dict[str, nn.Parameter]:
        """The parameters that are frozen now."""
        trained = {id(parameter) for _, parameter in self.method.trained_parameters(self.module)}
        named = names.named_parameters(self.module)
        copied = copied_names(self.module)  # copies that a hook made are no part of the base
        return {n: p for n, p in named if id(p) not in trained and n not in copied and not p.is_meta}

    def mark(self) -> None:
        """Take the present values as those that must not change."""
        changing = {id(p) for _, p in written_parameters(self.module)} | renormalized(self.module)
        still = {name: p for name, p in self.frozen.items() if id(p) not in changing and p.is_floating_point()}
        self.values = FrozenValues({name: p for name, p in still.items() if name not in self.named[MOVING]})

    def rebase(self, base: Fingerprint) -> None:
        """Compare with ``base`` from here on: a file was loaded that names other parameters as written."""
        self.base = base
        self.mark()

    def begin_batch(self, index: int) -> None:
        """Check after each of the first steps, after the first by every value; later, see what unfreezes itself."""
        if self.first_steps > 0:
            self.check_values(thorough=self.first_steps == FIRST_STEPS)
            self.check_gradients()
            self.first_steps -= 1
        elif index == 1:  # once in an epoch
            self.check_gradients()

    def check_values(self, thorough: bool) -> None:
        """Name the parameters that moved since the first batch, and let files hold them.

        Args:
            thorough: compare every value, and not only the marks.
        """
        moved = self.values.changed_exactly(self.base) if thorough else self.values.changed(self.base)
        if moved:
            self._name_moved(moved)

    def check_gradients(self) -> None:
        """Name the parameters that require a gradient or hold one."""
        self._name(
            REQUIRING,
            lambda p: p.requires_grad,
            "Something set `requires_grad` after it was frozen, and no optimizer of `configure_optimizers` has it",
        )
        self._name(
            HOLDING,
            lambda p: p.grad is not None,
            "The gradient takes memory and grows with every backward pass",
        )

    def _name(self, what: str, is_so: Callable[[nn.Parameter], bool], explanation: str) -> None:
        fresh = [name for name, p in self.frozen.items() if is_so(p) and name not in self.named[what]]
        self.named[what].update(fresh)
        if fresh:
            rank_zero_warn(
                f"Frozen, but {what}: {in_full(fresh)}. {explanation}. To train {it_or_them(fresh)} in addition to the "
                f"adapters, name {it_or_them(fresh)} in `also_train`."
            )

    def _name_moved(self, moved: list[str]) -> None:
        self.named[MOVING].update(moved)
        lost = [name for name in moved if is_in_pieces(self.frozen[name])]
        kept = [name for name in moved if name not in lost]
        set_written(self.module, {*kept, *(name for name, _ in written_parameters(self.module))})
        for name in moved:
            if name in self.base:
                self.base[name] = shape_alone(self.frozen[name])
        self.mark()
        why = (
            "Code outside of the optimizers of `configure_optimizers` writes there, such as the update of a momentum "
            "teacher or an optimizer of its own. "
        )
        if kept:
            them = it_or_them(kept)
            rank_zero_warn(
                f"Frozen, but {MOVING}: {in_full(kept)}. {why}Checkpoints hold {them} from now on, "
                f"{_megabytes(map(self.frozen.get, kept))}. To train {them}, name {them} in `also_train`; to keep "
                f"{them} unchanged, let that code skip what does not train (`if parameter.requires_grad`)."
            )
        if lost:
            rank_zero_warn(
                f"Frozen, but {MOVING}: {in_full(lost)}. {why}Checkpoints do not hold what is sharded, so a resumed "
                "run starts from the first values."
            )


def in_full(parameters: list[str]) -> str:
    """The first of ``parameters`` with their full names, and how many there are."""
    shown = ", ".join(f"`{name}`" for name in parameters[:SHOWN])
    return shown if len(parameters) <= SHOWN else f"{shown} ({len(parameters)} parameters in all)"


def _megabytes(parameters: Iterable[Tensor | None]) -> str:
    return f"{sum(p.nbytes for p in parameters if p is not None) / 1e6:,.1f} MB in each"
