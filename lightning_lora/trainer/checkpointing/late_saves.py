"""Saves between the strategy's teardown and the end of the run, when the patches of the run are off.

A callback that saves on an exception would replace a file of adapters by one of the whole module, which no run resumes
from. So what is saved because of an exception holds adapters, merged or not, as all files of the run. A file that the
user saves of the merged module is the plain model.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning_lora.trainer.checkpointing.checkpoint_io import CheckpointFiles
from lightning_lora.trainer.patching import patch_method


def save_adapters_until_the_end(files: CheckpointFiles) -> ExitStack:
    """Let saves hold adapters until the module's ``teardown``, the last hook, or the teardown after an exception.

    Returns:
        What closes then.
    """
    stack = ExitStack()
    saves = LateSaves(files, stack)
    files.strategy_adapter.at_setup(stack)
    patch_method(stack, files.strategy, "lightning_module_state_dict", saves.module_state)
    patch_method(stack, files.strategy, "save_checkpoint", saves.save)
    patch_method(stack, files.strategy, "teardown", saves.end)
    patch_method(stack, files.module, "teardown", saves.end)
    return stack


class LateSaves:
    """The saves of one run after its end.

    Args:
        files: of the run.
        stack: which takes the patches off.
    """

    def __init__(self, files: CheckpointFiles, stack: ExitStack) -> None:
        self.files, self.stack = files, stack

    def module_state(self, original: Any) -> dict[str, Any]:
        """What hooks see: the module, and where it is merged its adapters in addition."""
        if self.is_plain():
            return original()  # type: ignore[no-any-return]
        state = self.files.module_state(original)
        state.update(self.files.method.state(self.files.module))
        return state

    def save(self, original: Any, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> Any:
        """Write adapters, or the plain merged model."""
        if self.is_plain():
            return original(checkpoint, filepath, storage_options=storage_options)
        return self.files.write(original, checkpoint, filepath, storage_options)

    def is_plain(self) -> bool:
        """Whether the module is merged, and no exception makes a callback save it."""
        return self.files.method.is_merged(self.files.module) and self.files.trainer.state.status != "interrupted"

    def end(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Take the patches off after ``original``; after an error in the module's hook a callback may still save."""
        result = original(*args, **kwargs)
        self.stack.close()
        return result
