"""One trial: what a package gives back is compared with sums that are made here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

TRAINER = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_model_summary": False}
LIGHTNING = {"pl": None}  # the package of Lightning that the tried package imports


class Watch:
    """Keeps what an independent sum needs: the base before the run, the adapters in the last and the best checkpoint.

    It stands before LoRACallback in the list of callbacks.
    """

    def __init__(self) -> None:
        self.base: dict[str, torch.Tensor] = {}
        self.best: dict[str, torch.Tensor] = {}
        self.last: dict[str, torch.Tensor] = {}
        self.adapted: list[str] = []
        self.parameters: set[str] = set()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.base:  # as of the first batch: some modules fill their weights in `on_train_start`
            self.base = copy.deepcopy(pl_module.state_dict())
            self.parameters = {name for name, _ in pl_module.named_parameters(remove_duplicate=False)}
            self.adapted = sorted({key.split(".lora.")[0] for key in self.base if ".lora." in key})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.last = copy.deepcopy(dict(pl_module.state_dict()))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        checkpoint = trainer.checkpoint_callback
        path = getattr(checkpoint, "best_model_path", "") if checkpoint else ""
        if path:
            file = torch.load(path, map_location="cpu", weights_only=False)
            self.best = file.get("lightning_lora", {}).get("state_dict", file["state_dict"])  # save="merged" has both

    def __deepcopy__(self, memo: Any) -> Watch:
        return self  # a package may train a copy of what it was given

    def __reduce__(self) -> Any:
        return new_watch, ()


def new_watch() -> Any:
    """A watch that is a callback of the Lightning which the package imports."""
    return type("Watch", (Watch, LIGHTNING["pl"].Callback), {"__module__": __name__})()


def expected(base: dict[str, torch.Tensor], adapters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``W0 + B A`` in fp64 for every plain pair (alpha = r, so the scale is 1)."""
    sums = {}
    for key in adapters:
        layer, _, rest = key.partition(".lora.default.")
        if rest in ("A", "weight.A") or (rest.endswith(".A") and f"{layer}.{rest[:-2]}" in base):
            name = f"{layer}.{rest[:-2] or 'weight'}"  # a pair of a parameter has the parameter's name
            A, B = adapters[key].double(), adapters[f"{key[:-1]}B"].double()
            W, delta = base[name].double(), B @ A
            if W.shape == delta.T.shape != delta.shape:
                delta = delta.T
            if W.numel() == delta.numel():
                sums[name] = W + delta.reshape(W.shape)  # of a convolution, too
    return sums


@dataclass
class Row:
    """What is written of one class of a package."""

    name: str
    targets: str
    adapted: int = 0
    notes: list[str] = field(default_factory=list)

    def compare(self, watch: Watch, module: torch.nn.Module, restored: bool) -> None:
        """Compare what the package gave back with sums that are made here."""
        self.adapted = len(watch.adapted)
        adapters = watch.best if restored and watch.best else watch.last
        sums = expected(watch.base, adapters)
        state = module.state_dict()
        if not sums:
            self.notes.append("weights NOT CHECKED: no plain pair")
            return
        missing = [key for key in sums if key not in state]
        if missing:
            self.notes.append(f"weights MISSING {missing[0]}")
            return
        moved = max((float((sums[k] - watch.base[k].double()).abs().max()) for k in sums), default=0.0)
        error = max((float((state[k].cpu().double() - sums[k]).abs().max()) for k in sums), default=0.0)
        self.notes.append(
            f"weights {'ok' if error < 1e-6 and moved > 0 else 'WRONG'} (moved {moved:.1e}, error {error:.0e})"
        )
        changed = [
            k
            for k, v in watch.base.items()
            if k in state
            and k in watch.parameters
            and k not in sums
            and not torch.equal(state[k].cpu(), v.cpu())
            and not any(k.startswith(layer + ".") for layer in watch.adapted)
        ]
        self.notes.append("frozen ok" if not changed else f"frozen CHANGED {len(changed)}: {changed[0]}")

    def same(self, what: str, first: Any, second: Any) -> None:
        error = float(np.abs(np.asarray(first, dtype=float) - np.asarray(second, dtype=float)).max())
        self.notes.append(f"{what} {'ok' if error < 1e-5 else f'WRONG by {error:.1e}'}")


def callbacks(targets: Any, **arguments: Any) -> tuple[Any, list[Any]]:
    """The two callbacks of a trial, for a Trainer of the Lightning that the package imports."""
    from lightning_lora import LoRACallback

    watch = new_watch()
    return watch, [watch, LoRACallback(r=2, targets=targets, **arguments)]


Trial = tuple[str, Any, Callable[[Row, Any], None]]
