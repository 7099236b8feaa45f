"""How a run writes and reads its checkpoints: adapters alone, one file under every strategy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import distributed

from lightning_lora.config import RunConfig
from lightning_lora.distributed import random_state
from lightning_lora.foreign import PLAIN_CHECKPOINT_IO, SHARDING_STRATEGIES, TUNER_FILES, is_a
from lightning_lora.methods.base import Method
from lightning_lora.model.fingerprint import Fingerprint, fingerprint, other_base
from lightning_lora.model.written import set_written, written_parameters
from lightning_lora.names import counted
from lightning_lora.peft_format.contents import kinds
from lightning_lora.peft_format.task import CLASSES, classes_in
from lightning_lora.trainer.checkpointing import contents, reading
from lightning_lora.trainer.checkpointing.adapters_by_name import for_resume, kept_adapters
from lightning_lora.trainer.checkpointing.checks import ENTRIES
from lightning_lora.trainer.checkpointing.file_contents import warn_of_modules
from lightning_lora.trainer.checkpointing.hook_state import fill_in, trained_entries, whole_state
from lightning_lora.trainer.checkpointing.hyperparameters import plain_callbacks
from lightning_lora.trainer.checkpointing.kept_states import with_base_values
from lightning_lora.trainer.checkpointing.merged_saves import with_merged_state
from lightning_lora.trainer.checkpointing.optimizer_states import load_by_names, matched, names_of
from lightning_lora.trainer.checkpointing.resumed_adapters import compare_runs
from lightning_lora.trainer.imports import rank_zero_warn
from lightning_lora.trainer.patching import patch_method
from lightning_lora.trainer.replaced_layers import Layers, layers_of, move_to_replaced
from lightning_lora.trainer.strategies.base import StrategyAdapter
from lightning_lora.trainer.watching.frozen_facts import LATE, WRITTEN, names_in
from lightning_lora.trainer.watching.frozen_watch import FrozenWatch
from lightning_lora.trainer.watching.start_of_training import StartOfTraining

# Absolute paths that this process wrote: opened again as they were written, hyperparameters of any class included.
_WRITTEN_HERE: set[str] = set()


def is_written_here(path: Any) -> bool:
    """Whether a run of this process wrote the file at ``path``."""
    return str(Path(path).resolve()) in _WRITTEN_HERE


class CheckpointFiles:
    """Reads and writes the checkpoints of one run.

    Args:
        trainer: the Trainer.
        module: its LightningModule.
        method: what the module is adapted by.
        run_config: what the run does with it.
        strategy_adapter: of the Trainer's strategy.
        callback_key: the callback's key in checkpoints.
        adapt_late: adapts a module that is merged, or was built anew.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        method: Method,
        run_config: RunConfig,
        strategy_adapter: StrategyAdapter,
        callback_key: str,
        adapt_late: Callable[[], None],
    ) -> None:
        self.trainer, self.strategy, self.module = trainer, trainer.strategy, module
        self.method, self.run_config = method, run_config
        self.strategy_adapter, self.callback_key, self.adapt_late = strategy_adapter, callback_key, adapt_late
        self.base: Fingerprint = {}
        self.frozen: FrozenWatch | None = None
        self.start: StartOfTraining | None = None  # until the first batch
        self.late: list[str] = []  # parameters that were set after `setup`
        self.expected: Callable[[Fingerprint], None] | None = None
        self.random_states: list[random_state.State] | None = None
        self.loaded = False
        self.before_load: dict[str, Any] = {}  # what the module held before the first load, and what was loaded last
        self.loaded_state: dict[str, Any] = {}
        self.before_hook: Layers | None = None  # the module's `on_load_checkpoint` comes between `load` and its state
        self.plain_files: set[str] = set()
        self.weights_only: bool | None = None  # as the user gave it for this run
        self.is_sharded = is_a(self.strategy, *SHARDING_STRATEGIES)
        self.seen_by_hooks: dict[str, Any] | None = None  # the state dict of the save that is under way
        self.warned_of_modules = False
        self.filled_in: dict[str, Any] = {}  # the base's entries that hooks see at a load

    def at_setup(self, stack: ExitStack) -> None:
        """Save and load by this class until ``stack`` closes."""
        self.strategy_adapter.at_setup(stack)
        patch_method(stack, self.strategy, "save_checkpoint", self.save)
        patch_method(stack, self.strategy, "load_checkpoint", self.load)

    def take_module(self, stack: ExitStack) -> None:
        """Give and load the state of the module by this class, too, until ``stack`` closes."""
        patch_method(stack, self.strategy, "lightning_module_state_dict", self.module_state)
        patch_method(stack, self.strategy, "load_model_state_dict", self.load_module_state)
        load_by_names(stack, self.strategy, self.module)

    def base_fingerprint(self) -> Fingerprint:
        """The fingerprint of the base, taken once; every rank must call it.

        It is that of rank 0, which alone may have loaded the base: DDP gives the others its values when it wraps.
        """
        self.base = self.base or self.strategy.broadcast(fingerprint(self.module, self.strategy.root_device))
        return self.base

    def can_go_back(self) -> bool:
        """Whether there are values from before the first load; on the meta device there were none."""
        return bool(self.before_load) and not any(
            getattr(value, "is_meta", False) for value in self.before_load.values()
        )

    def start_training(self) -> None:
        """At the first batch: the base is complete, also what a resumed file says was set after ``setup``.

        Raises:
            ValueError: if the file was trained on another base.
        """
        self.check_frozen()
        self.start = None
        if self.expected is not None:
            self.expected(self.base)

    def check_frozen(self) -> None:
        """Before a save: take the base as it is if no batch has begun, else name what moves though it is frozen."""
        if self.frozen is None or not self.method.is_adapted(self.module):
            return
        if self.start is not None:
            self.late = list(dict.fromkeys([*self.late, *self.start.settle()]))
        else:
            self.frozen.check_values(thorough=False)
            self.frozen.check_gradients()

    def module_state(self, original: Any) -> dict[str, Any]:
        """What the hooks of a save see. The base is removed after them, in :meth:`save`.

        Where the strategy shards the module these are the adapters alone, as no save gathers the base.
        """
        self.check_frozen()
        if self.is_sharded:
            return self.method.state(self.module)
        # A `state_dict` method of the user's may rename the base, which then looks like something that trains.
        self.seen_by_hooks = original() if self.run_config.save == "merged" else whole_state(self.module)
        return self.seen_by_hooks

    def load_module_state(self, original: Any, checkpoint: dict[str, Any], strict: bool = True) -> None:
        """Load the adapters: all of them, or an error before anything is loaded."""
        if self.adapt_replaced() and contents.KEY in checkpoint:
            self._check_replaced(checkpoint[contents.KEY]["base"])
        state = trained_entries(checkpoint, self.filled_in, self.method, self.module)
        self.filled_in = {}
        path = self.trainer.ckpt_path
        is_tuned = path is not None and Path(path).name.startswith(TUNER_FILES)  # then the module has trained already
        if path is not None and not is_tuned and not self.before_load:
            self.before_load = deepcopy(self.method.state(self.module))
        self.loaded_state = state
        self.method.load(self.module, state)
        if self.strategy_adapter.loads_late and self.trainer.state.fn == "fit":
            states = matched(checkpoint, self.strategy.optimizers, self.module)
            self.strategy_adapter.load_optimizers({**states, "state_dict": state})
        self.loaded = True

    def save(self, original: Any, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> Any:
        """Write adapters alone: every save ends here, also weights-only saves and those of other callbacks."""
        if self.method.is_merged(self.module):  # a merged module is evaluated as it is
            _WRITTEN_HERE.add(str(Path(filepath).resolve()))
            self.plain_files.add(str(filepath))
            return original(checkpoint, filepath, storage_options=storage_options)
        return self.write(original, checkpoint, filepath, storage_options)

    def write(self, original: Any, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> Any:
        """Write the adapters of a module that is adapted, or is merged after the run; every rank must call it."""
        _WRITTEN_HERE.add(str(Path(filepath).resolve()))
        checkpoint = self.contents(checkpoint)
        plain = type(self.strategy.checkpoint_io).__name__ == PLAIN_CHECKPOINT_IO and "://" not in str(filepath)
        if not plain or storage_options is not None:  # the user's own may write anywhere
            return original(checkpoint, filepath, storage_options=storage_options)
        if self.trainer.is_global_zero:
            contents.write_checkpoint(checkpoint, filepath)
        return None

    def contents(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """What is written of ``checkpoint``, which the hooks of the user have seen; every rank must call it."""
        seen, self.seen_by_hooks = self.seen_by_hooks, None
        whole = checkpoint["state_dict"]
        checkpoint = contents.without_base(checkpoint, self.method, self.module, seen)
        contents.check_complete(checkpoint, self.method, self.module, seen)
        checkpoint = plain_callbacks(checkpoint)
        checkpoint[contents.KEY] = contents.facts(
            self.method, self.run_config, self.base_fingerprint(), kinds(self.module), kept_adapters(self.module)
        )
        checkpoint[contents.KEY] |= self._not_of_the_base() | self.classes
        checkpoint[contents.KEY][ENTRIES] = sorted(checkpoint["state_dict"])
        if "optimizer_states" in checkpoint:
            checkpoint[contents.KEY]["random_states"] = self._random_states()
            checkpoint[contents.KEY][contents.OPTIMIZER_NAMES] = names_of(self.strategy.optimizers, self.module)
        if not self.warned_of_modules and self.run_config.save == "adapter" and self.trainer.is_global_zero:
            self.warned_of_modules = warn_of_modules(checkpoint, self.module)
        if self.run_config.save == "merged":
            writes = self.trainer.is_global_zero
            return with_merged_state(checkpoint, whole, seen, self.method, self.module) if writes else checkpoint
        if "callbacks" in checkpoint:  # so that Lightning warns where a run without the callback loads the file
            checkpoint["callbacks"] = {**checkpoint["callbacks"], self.callback_key: {"method": self.method.key}}
        return checkpoint

    @cached_property
    def classes(self) -> dict[str, Any]:
        """What the command ``export`` needs to know of the transformers models in the module, if there are any."""
        classes = classes_in(self.module)
        return {CLASSES: classes} if classes else {}

    def _not_of_the_base(self) -> dict[str, list[str]]:
        written = [name for name, _ in written_parameters(self.module)]
        facts = {WRITTEN: written, LATE: self.late}
        return {key: value for key, value in facts.items() if value}

    def _random_states(self) -> list[random_state.State]:
        own = random_state.random_state(self.strategy.root_device)
        # After an exception the other ranks may never come to this point.
        return [own] if self.trainer.state.status == "interrupted" else random_state.states_of_all_ranks(own)

    def load(self, original: Any, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Check the file before Lightning loads it; a file of another process is opened as plain data."""
        if self.weights_only is None:  # a tuner loads its own file during the run, and gives nothing
            self.weights_only = weights_only
        if weights_only is None:
            weights_only = not is_written_here(checkpoint_path)
        if str(checkpoint_path) in self.plain_files:
            return dict(reading.open_file(checked(self.strategy, original), checkpoint_path, weights_only))
        load = self.strategy.checkpoint_io.load_checkpoint if self.strategy_adapter.loads_late else original
        read = checked(self.strategy, load)
        checkpoint = reading.read(read, checkpoint_path, weights_only)
        if not self.method.is_adapted(self.module):
            self.adapt_late()
        self._check(checkpoint, checkpoint_path)
        compare_runs(checkpoint, checkpoint_path, self.method, self.module, self.run_config, self.callback_key)
        self.random_states = checkpoint[contents.KEY].get("random_states")
        if self.strategy_adapter.loads_late and self.trainer.state.fn == "fit":  # after `on_fit_start`
            self.restore_random_state()
        if "callbacks" in checkpoint:
            checkpoint["callbacks"] = with_base_values(checkpoint["callbacks"], self.module)
        self.before_hook = layers_of(self.module, self.method)
        checkpoint = contents.fit_to(for_resume(checkpoint, self.method, self.module), self.module)
        self.filled_in = {} if self.is_sharded else fill_in(checkpoint, self.module)
        return checkpoint

    def adapt_replaced(self) -> bool:
        """Adapt the layers that the module's ``on_load_checkpoint`` replaced; whether there are any."""
        before, self.before_hook = self.before_hook, None
        return before is not None and move_to_replaced(before, self.module, self.method) is not None

    def _check_replaced(self, trained_on: Fingerprint) -> None:
        wrong = other_base(trained_on, fingerprint(self.module, self.strategy.root_device))
        if wrong is not None:
            raise ValueError(
                f"`on_load_checkpoint` of {type(self.module).__name__} replaced layers, and the adapters were trained "
                f"on other weights: {wrong}. Copy the old weights into the new layers, or name them in `also_train`."
            )

    def _check(self, checkpoint: dict[str, Any], path: Any) -> None:
        """Check the file; in ``fit``, what its run set after ``setup`` is checked when this run has set it, too."""
        if set_written(self.module, names_in(checkpoint[contents.KEY], WRITTEN)):
            self.base = {}
        base = self.base_fingerprint()
        if self.frozen is not None:
            self.frozen.rebase(base)
        late = names_in(checkpoint[contents.KEY], LATE) if self.trainer.state.fn == "fit" else []
        reading.check(checkpoint, path, self.method, base, except_for=late)
        self.expected = partial(reading.check_late, checkpoint, path) if late else None
        self.late = [*late]

    def restore_random_state(self) -> None:
        """Continue the random stream of the run that is resumed: after the load, before the first batch is drawn.

        A module that asks for ``estimated_stepping_batches`` in ``configure_optimizers`` makes the data loader there.
        So this is called before ``configure_optimizers`` as well as at the start of fitting.
        """
        states, ranks = self.random_states, distributed.get_world_size() if distributed.is_initialized() else 1
        if states is None or self.trainer.train_dataloader is not None:
            return
        if len(states) == ranks:
            random_state.set_random_state(states[self.trainer.global_rank], self.strategy.root_device)
        else:
            self.random_states = None
            rank_zero_warn(
                f"The checkpoint holds the random state of {counted(len(states), 'process', 'processes')} and this run "
                f"has {ranks}: it is not restored, so dropout and shuffling will differ from the uninterrupted run."
            )


def checked(strategy: Any, load: Callable[..., Any]) -> Callable[..., Any]:
    """``load`` after a check of the file, unless an IO plug-in of the user's reads a format of its own."""
    is_plain = type(strategy.checkpoint_io).__name__ == PLAIN_CHECKPOINT_IO
    return reading.by_torch(load) if is_plain else load
