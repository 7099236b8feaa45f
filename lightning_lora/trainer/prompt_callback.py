"""PromptCallback: prompt tuning for the module of a Trainer."""

from __future__ import annotations

from typing import Literal

from lightning_lora.config import RunConfig
from lightning_lora.methods.prompt.config import PromptConfig
from lightning_lora.methods.prompt.method import PromptMethod
from lightning_lora.trainer.method_callback import MethodCallback


class PromptCallback(MethodCallback):
    """Prompt tuning for the LightningModule of this Trainer (Lester et al. 2021, arXiv 2104.08691).

    Trained vectors come before the tokens, at the input of the first block of each stack or of every block. The
    module's code stays as it is, and the rest of it is frozen; the user's optimizers are restricted to the prompts;
    checkpoints hold these alone.

    The output changes at the start: an untrained prompt already takes a share of the attention. Its first vectors are
    normal with a standard deviation of 0.02; zeros would stay equal at every position. After ``fit`` the module keeps
    its prompts, as they cannot be merged into weights; ``remove_adapted(module)`` takes them off.

    Outside the blocks nothing changes: the outputs of the prompt are cut off, and tokens keep their positions, as
    positions are added before the blocks or given to them as cosine and sine, which the prompt gets as at position 0.
    Every token sees the prompt. In causal attention the prompt sees itself alone, otherwise what every token sees.

    Refused are blocks that compute positions from the length of their input (relative biases, windows, rotary
    embeddings inside), convolutions, and any argument that depends on the length and is not known, at the first batch
    at the latest. For generation set use_cache=False. PrefixCallback changes no sequence and has none of these limits.

    Without deep=True the blocks between the first and the last one see longer sequences. So hidden states that are
    collected in between include the prompt, and code between blocks that needs the length fails.

    Args:
        length: Number of vectors of a prompt.
        deep: Whether every block has a prompt of its own, cut off after it (PreLayer, VPT-deep). False has one prompt
            for each stack of blocks, which passes all of them.
        exclude: Names of blocks, or of modules around them, such as an encoder, that no prompt passes. None excludes
            nothing.
        also_train: Names of modules or parameters to train in full and to save with the prompts, such as a new head.
            None trains only prompts.
        bias: Which biases train too, "none", "lora_only" (those of the blocks themselves) or "all".
        seed: Seed of the first values. None takes the one that seed_everything set, else 0. The global random stream is
            not used.
        lr_scale: Factor on the learning rate of the optimizer groups that hold prompts, schedulers included. Prompts
            usually need a far larger rate than full fine-tuning.
        name: Name of the callback in checkpoints.
        liveness: Check in the first steps and the first evaluation that every prompt is reached and gets a gradient,
            and that frozen parameters do not change.
        init_from: Checkpoint of another run of PromptCallback whose values the run starts from. The arguments and the
            base must be the same, and a ckpt_path takes precedence. None starts from random values.

    Raises:
        ValueError: If an argument is out of its range, or at the start of a run, if a prompt cannot pass a block.
        TypeError: If an argument has the wrong type.
        MisconfigurationException: At the start of a run, if a part of the Trainer does not work with the callback; the
            message names the part and what to change.

    Example:
        >>> import lightning
        >>> trainer = lightning.Trainer(callbacks=[PromptCallback(length=16, deep=True)], logger=False)
    """

    def __init__(
        self,
        length: int = 16,
        deep: bool = False,
        *,
        exclude: list[str] | None = None,
        also_train: list[str] | None = None,
        bias: Literal["none", "lora_only", "all"] = "none",
        seed: int | None = None,
        lr_scale: float = 1.0,
        name: str = "default",
        liveness: bool = True,
        init_from: str | None = None,
    ) -> None:
        config = PromptConfig(
            length=length, deep=deep, exclude=exclude, also_train=also_train, bias=bias, seed=seed, name=name
        )
        run_config = RunConfig(lr_scale=lr_scale, liveness=liveness, init_from=init_from)
        super().__init__(PromptMethod(config), run_config)
        self.config = config
