"""One run of a Trainer over a module: what is patched for its length, and how the module is left after it.

A run does not know its method. What is adapted, what trains, what a file holds and whether it merges are asked of a
:class:`~lightning_lora.methods.base.Method`.
"""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from typing import Any

from torch import nn

from lightning_lora.config import BASE_DTYPES, RunConfig
from lightning_lora.foreign import QUANTIZING_PRECISION, is_a
from lightning_lora.methods.base import Method
from lightning_lora.model.base_dtype import LoweredWeights, cast_by_autocast
from lightning_lora.model.freeze import is_frozen, unfreeze
from lightning_lora.model.record import Record, all_records, place_again, record_of
from lightning_lora.model.several.strengths import set_strengths, strengths_of
from lightning_lora.ops.exact_sum import same_bits
from lightning_lora.trainer.checkpointing.checkpoint_io import CheckpointFiles
from lightning_lora.trainer.checkpointing.files_at_end import check_files
from lightning_lora.trainer.checkpointing.init_and_export import start_from
from lightning_lora.trainer.checkpointing.late_saves import save_adapters_until_the_end
from lightning_lora.trainer.compatibility import gpu_of, overrides
from lightning_lora.trainer.imports import MisconfigurationException, rank_zero_info, rank_zero_warn
from lightning_lora.trainer.kept_copies import merge_copies, unmerge_copies
from lightning_lora.trainer.optimizers import restrict
from lightning_lora.trainer.patching import call_on_close, patch_method
from lightning_lora.trainer.replaced_layers import layers_of, move_to_replaced
from lightning_lora.trainer.same_on_ranks import check_same_on_ranks
from lightning_lora.trainer.several.update_scale import scale_learning_rates
from lightning_lora.trainer.strategies.selection import strategy_adapter_for
from lightning_lora.trainer.watching.first_steps import FirstSteps
from lightning_lora.trainer.watching.liveness import listed
from lightning_lora.trainer.watching.untrained_targets import untrained_targets, warn_of_untrained


class Run:
    """From ``setup`` to ``strategy.teardown``, the only hook that is also called after an exception or Ctrl-C.

    Args:
        trainer: the Trainer.
        module: its LightningModule.
        method: what the module is adapted by.
        run_config: what the run does with it.
        stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        callback_key: the callback's key in checkpoints.
    """

    def __init__(
        self, trainer: Any, module: Any, method: Method, run_config: RunConfig, stage: str, callback_key: str
    ) -> None:
        leave_unfinished_run(module)
        self.trainer, self.module, self.method, self.run_config, self.stage = trainer, module, method, run_config, stage
        self.strategy, self.strategy_adapter = trainer.strategy, strategy_adapter_for(trainer.strategy, module)
        self.files = CheckpointFiles(
            trainer, module, method, run_config, self.strategy_adapter, callback_key, self.adapt_late
        )
        self.ended = self.has_left = self.abandoned = self.completed = False
        self.was_merged, self.was_bare = method.is_merged(module), method.present(module) is None
        self.was_frozen, self.strengths = is_frozen(module), dict[str, float]()
        self.snapshot, self.records = dict[str, Any](), dict[str, Record]()
        self.known, self.released = list(module.modules()), set[str]()
        self.first_steps = FirstSteps(trainer, self.files, self.strategy_adapter.watches_gradients, self.was_bare)
        self.stack, self.optimizer_edits = ExitStack(), ExitStack()
        self.late_saves: ExitStack | None = None

    def begin(self) -> None:
        """Adapt the module; a merged one runs as it is, unless a file is loaded."""
        check_same_on_ranks(self.method, self.run_config)
        self.method.check_same(self.module)
        patch_method(self.stack, self.strategy, "teardown", self.end)
        self.files.at_setup(self.stack)
        if not self.was_merged or self.stage == "fit":
            self.adapt()
        else:
            patch_method(self.stack, self.module, self.builds_in, self.keep_merged)

    @property
    def builds_in(self) -> str:
        """The last hook in which the module may build a part of itself, or replace one."""
        return "configure_model" if overrides(self.module, "configure_model") else "setup"

    def keep_merged(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the hook of a merged module, whose records stay where it replaces layers by equal ones."""
        before = layers_of(self.module, self.method)
        result = original(*args, **kwargs)
        move_to_replaced(before, self.module, self.method)
        return result

    def adapt(self) -> None:
        """Adapt what exists, and patch what is called between here and the end."""
        self.strategy_adapter.before_injection(self.was_bare)
        self.unmerge()
        self.strengths = strengths_of(self.module)
        self.files.take_module(self.stack)
        patch_method(self.stack, self.module, "configure_optimizers", self.configure_optimizers)
        # Some models are built in `setup`, which comes after every callback's, or in `configure_model` after that.
        # What exists is adapted now, so that callbacks which copy the module in their `setup` see the adapters.
        if self.builds_in == "setup":
            self.convert()
            self.method.adapt(self.module, self.strategy.broadcast)
        patch_method(self.stack, self.module, self.builds_in, self.complete)

    def convert(self) -> None:
        """Let a plug-in that replaces layers by quantized ones do so first: it would drop adapters."""
        plugin = self.trainer.precision_plugin
        is_built = any(isinstance(module, nn.Linear) for module in self.module.modules())
        if is_built and is_a(plugin, QUANTIZING_PRECISION) and self.method.present(self.module) is None:
            plugin.convert_module(self.module)

    def unmerge(self) -> None:
        """Take a merge out, and keep what is needed to put it back."""
        self.merged_as = self.method.merged_as(self.module)
        if self.method.is_merged(self.module):
            self.snapshot = deepcopy(self.method.state(self.module))
            self.method.unmerge(self.module, gpu_of(self.trainer))
            unmerge_copies(self.trainer, self.module, self.method)

    def complete(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """After the user's hook the model is whole: adapt what the hook made, and report what is adapted."""
        known, before = list(self.module.modules()), layers_of(self.module, self.method)
        unfreeze(self.module)  # the user's code sees, and copies, the flags that it set
        result = original(*args, **kwargs)
        self.method.make_plain_unless_meant(self.module, known)
        lost = move_to_replaced(before, self.module, self.method, self.inject)
        self.first_steps.lost |= lost or set()
        self.inject()
        if self.completed:  # called again, by the module's own `on_load_checkpoint`
            return result
        self.completed = True
        if self.stage == "fit" or self.strategy_adapter.loads_late:
            self.files.base_fingerprint()  # while the base is as the user built it
        self.strategy_adapter.before_wrap(self.stack)
        self.check_export_and_start()
        self.lower_base()
        if self.stage == "fit":
            rank_zero_info(self.method.describe(self.module, self.run_config.save))
        return result

    def adapt_late(self) -> None:
        """Adapt a module that ran merged until a file is to be loaded, or was built anew in ``setup``."""
        # The base of the file has copies of the base, as `setup` made them before there was an update.
        self.method.make_base_unless_meant(self.module, self.known)
        self.adapt()
        self.inject()
        self.completed = True

    def inject(self) -> None:
        """Adapt all that the configuration means, or raise."""
        self.strategy_adapter.before_injection(self.was_bare)
        self.convert()
        with self.strategy_adapter.during_injection():
            self.method.complete(self.module, self.strategy.broadcast)
        self.strategy_adapter.after_injection()
        self.records, self.known = all_records(self.module), list(self.module.modules())

    def release_copies(self) -> None:
        """Take the adapters off copies that hooks after ``setup`` made: no optimizer holds them, and no file does."""
        copies = self.method.make_plain(self.module, self.known)
        if copies:
            self.records = all_records(self.module)
        if set(copies) - self.released:
            self.released.update(copies)
            rank_zero_info(
                f"{listed(copies)} came after `setup` as a copy of adapted layers. A late copy is plain, and computes "
                "what they computed then. Make it in `setup` to adapt it too."
            )

    def check_export_and_start(self) -> None:
        """See that the adapters can be exported at the end, and give fresh ones the values of ``init_from``."""
        path, fits = self.run_config.init_from, self.stage == "fit"
        if fits:
            check_files(self.trainer, self.module, self.method, self.run_config)
        if path is not None and self.was_bare:
            self.files.before_load = deepcopy(self.method.state(self.module))
            start_from(self.module, path, self.method, self.files.base_fingerprint())
            record_of(self.module).started_from = path
            self.files.loaded = True
            self.snapshot = deepcopy(self.method.state(self.module))  # a run that changes none of these trained nothing
        elif path is not None and fits and record_of(self.module).started_from != path:
            rank_zero_warn(f"`init_from={path!r}` was not read: the module has adapters, and trains them further.")

    def lower_base(self) -> None:
        """Keep the frozen weights in the dtype that the user asks for, until the end of the run."""
        if self.run_config.base_dtype is None:
            return
        parameters = list(cast_by_autocast(self.module))
        if not parameters:
            rank_zero_warn(
                f"`base_dtype={self.run_config.base_dtype!r}` changes nothing: no frozen fp32 weight belongs to a "
                "linear layer or a convolution of torch's own."
            )
        lowered = LoweredWeights(BASE_DTYPES[self.run_config.base_dtype])
        call_on_close(self.stack, lowered.restore)
        lowered.lower(parameters)

    def configure_optimizers(self, original: Any) -> Any:
        """Make the user's optimizers as without adapters, then restrict them to what trains."""
        from lightning.pytorch.core.optimizer import _configure_optimizers

        self.files.restore_random_state()
        self.optimizer_edits.close()  # a tuner calls it again, and the user may return the same optimizer
        place_again(self.module, self.records)  # SyncBatchNorm's conversion replaces modules
        with self.method.as_found(self.module):
            result = original()
            optimizers, schedulers, _ = _configure_optimizers(result) if result is not None else ([], [], [])
            untrained, trained = untrained_targets(optimizers, self.module, self.method)
        if result is None:
            rank_zero_warn("`configure_optimizers` returned None, so nothing trains the adapters.")
            return result
        self.first_steps.named = warn_of_untrained(untrained, trained, self.method, self.module, self.run_config)
        self.first_steps.snapshots = restrict(optimizers, self.module, self.method)
        for snapshot in self.first_steps.snapshots:
            self.optimizer_edits.callback(snapshot.restore)
        self.strategy_adapter.after_optimizers(self.stack, optimizers, schedulers)
        scale, of_run = self.run_config.lr_scale, (self.method, self.module)
        self.optimizer_edits.callback(scale_learning_rates(optimizers, schedulers, scale, *of_run))
        self.first_steps.watch_frozen()
        return result

    def begin_batch(self, index: int) -> None:
        """Before the first batch the base is complete; an error about it comes before anything was trained."""
        try:
            if index == 0:  # the module's `on_train_start` and `on_train_epoch_start` have run
                self.release_copies()
            self.first_steps.begin_batch(index)
        except (ValueError, MisconfigurationException):
            self.abandoned = True  # so that the module does not keep what was loaded
            raise

    def end(self, original: Any) -> None:
        """After the strategy's teardown, take every patch of this run off."""
        try:
            try:
                original()
            finally:
                self.leave()
        finally:
            self.leave()  # an interrupt may have cut the first call short

    def leave(self) -> None:
        """Leave the module as a run does; after an interrupt it is called again and goes on."""
        if self.has_left:
            return
        self.stack.close()
        self.first_steps.close()
        self.ended = True
        self.files.frozen = None  # from here on the user's flags are back
        place_again(self.module, self.records)
        if not self.was_frozen:
            unfreeze(self.module)
        interrupted = self.trainer.state.status == "interrupted"
        if self.stage == "fit" and not self.abandoned and not interrupted and self.late_saves is None:
            self.late_saves = save_adapters_until_the_end(self.files)
            self.late_saves.callback(self.optimizer_edits.close)  # a late save holds the states of the adapters
        elif self.late_saves is None:
            self.optimizer_edits.close()
        if self.stage != "fit" or self.abandoned or (interrupted and self.is_untrained()):
            self.restore()
        self.has_left = True

    def is_untrained(self) -> bool:
        """Whether the run changed nothing of what it trains: manual optimization may step uncounted."""
        if not self.snapshot and self.method.is_untrained(self.module):
            return True
        now = {name: parameter.detach() for name, parameter in self.method.main_parameters(self.module)}
        starts = (start for start in (self.snapshot, self.files.loaded_state) if start)
        return any(all(same_bits(start[name], now[name]) for name in start.keys() & now.keys()) for start in starts)

    def restore(self) -> None:
        """After a run that trained nothing: merged if it was merged, bare if it was bare and no file was loaded.

        A fit that failed before its first step gives back the values that it had before it loaded a file.
        """
        self.files.adapt_replaced()  # where the load of a file failed
        if self.method.is_merged(self.module):
            self.method.make_plain_unless_meant(self.module, self.known)
        if self.stage == "fit" and self.files.can_go_back() and self.method.is_adapted(self.module):
            self.method.load(self.module, self.files.before_load)
        set_strengths(self.module, self.strengths)
        if self.was_merged and self.method.is_adapted(self.module) and self.snapshot:
            state = self.method.state(self.module)  # a head that `setup` built anew is in this alone, and stays
            needed = {key: state[key] for key in self.method.needed_names(self.module)}
            self.method.load(self.module, {**needed, **self.snapshot})
            self.method.merge(self.module, gpu_of(self.trainer), self.merged_as)
            merge_copies(self.trainer, self.module, self.method)
        elif self.was_bare and (self.stage == "fit" or self.abandoned or not self.files.loaded):
            self.method.drop(self.module)


def leave_unfinished_run(module: nn.Module) -> None:
    """Complete the end of an earlier run of ``module`` that an interrupt at its first line left undone."""
    patched = vars(module).get("configure_optimizers")
    run = getattr(getattr(patched, "replacement", None), "__self__", None)
    if isinstance(run, Run) and run.trainer.state.status == "interrupted":
        run.leave()
