"""PrefixCallback: prefix tuning for the module of a Trainer."""

from __future__ import annotations

from typing import Literal

from lightning_lora.config import RunConfig
from lightning_lora.methods.prefix.config import PrefixConfig
from lightning_lora.methods.prefix.method import PrefixMethod
from lightning_lora.trainer.method_callback import MethodCallback


class PrefixCallback(MethodCallback):
    """Prefix tuning for the LightningModule of this Trainer (Li and Liang 2021, arXiv 2101.00190).

    Every attention block gets trained keys and values, which every query sees before those of the tokens. The
    module's code stays as it is, and the rest of it is frozen; the user's optimizers are restricted to the prefixes;
    checkpoints hold these alone.

    The output changes at the start: an untrained prefix already takes a share of the attention. Its first keys and
    values are normal with a standard deviation of 0.02. Zeros would stay equal at every position, and with small keys
    no position starts with more weight than another one. After ``fit`` the module keeps its prefixes, as they cannot be
    merged into weights; ``remove_adapted(module)`` takes them off.

    The blocks must compute by ``F.scaled_dot_product_attention`` or be ``nn.MultiheadAttention``; a trial run of each
    block alone shows whether they do, and the sizes of its heads. What computes otherwise is an error before the first
    step. In transformers the switch is attn_implementation="sdpa".

    Tokens keep their positions 0, 1, ..., and a cache for generation never holds the prefix. So the output is that of a
    cache that holds the prefix, if that is given position_ids from 0 on; peft lets the prefix shift the positions. A
    causal mask is written out, which takes torch's kernels for it off: the prefix makes attention slower than its
    length alone says.

    Args:
        length: Number of keys and values of each block. A block has 2 * heads * length * head_dim numbers more, with
            the heads of its keys.
        targets: The blocks: "attn" (every attention block), or a list of names of blocks or of modules around them:
            suffixes ("self_attn"), globs ("layers.*.self_attn") and regular expressions for the whole name
            ("re:.*decoder.*").
        exclude: Names of blocks, or of modules around them, that get no prefix. None excludes nothing.
        also_train: Names of modules or parameters to train in full and to save with the prefixes, such as a new head.
            None trains only prefixes.
        bias: Which biases train too, "none", "lora_only" (those of the blocks themselves) or "all".
        seed: Seed of the first values. None takes the one that seed_everything set, else 0. The global random stream is
            not used.
        lr_scale: Factor on the learning rate of the optimizer groups that hold prefixes, schedulers included. Prefixes
            need a far larger rate than full fine-tuning.
        name: Name of the callback in checkpoints.
        liveness: Check in the first steps and the first evaluation that every prefix is reached and gets a gradient,
            and that frozen parameters do not change.
        init_from: Checkpoint of another run of PrefixCallback whose values the run starts from. The arguments and the
            base must be the same, and a ckpt_path takes precedence. None starts from random values.

    Raises:
        ValueError: If an argument is out of its range, or at the start of a run, if a block cannot have a prefix.
        TypeError: If an argument has the wrong type.
        MisconfigurationException: At the start of a run, if a part of the Trainer does not work with the callback; the
            message names the part and what to change.

    Example:
        >>> import lightning
        >>> trainer = lightning.Trainer(callbacks=[PrefixCallback(length=16)], logger=False)
    """

    def __init__(
        self,
        length: int = 16,
        targets: list[str] | str = "attn",
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
        config = PrefixConfig(
            length=length,
            targets=targets,
            exclude=exclude,
            also_train=also_train,
            bias=bias,
            seed=seed,
            name=name,
        )
        run_config = RunConfig(lr_scale=lr_scale, liveness=liveness, init_from=init_from)
        super().__init__(PrefixMethod(config), run_config)
        self.config = config
