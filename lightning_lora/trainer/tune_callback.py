"""TuneCallback: a part of the module itself trains."""

from __future__ import annotations

from lightning_lora.config import RunConfig
from lightning_lora.methods.tune.config import TuneConfig
from lightning_lora.methods.tune.method import TuneMethod
from lightning_lora.trainer.method_callback import MethodCallback


class TuneCallback(MethodCallback):
    """Training of a part of the LightningModule of this Trainer: its biases, norms, head, all of it, or what is named.

    The module's code stays as it is. During a run the rest is frozen bit for bit; the user's optimizers are restricted
    to what trains; checkpoints hold that alone, with a fingerprint of the rest, and resume exactly.

    Nothing is added and nothing merges: after ``fit`` the module is the plain one and holds the trained values of the
    last step. A second ``fit`` continues them; ``remove_adapted(module)`` brings the initial values back.

    "bias" is BitFit (Ben-Zaken et al. 2021, arXiv 2106.10199), "head" a linear probe, "all" full fine-tuning with the
    same files. Models without biases, such as Llama, have no "bias". A head of a new task is drawn at random: with
    "bias" or "norm" name it in also_train.

    What trains has the dtype that it has in a plain run: bf16 with precision="bf16-true". FSDPStrategy shards only what
    is frozen, and is refused where everything trains; ModelParallelStrategy shards all as the module says.

    Args:
        train: What trains. "bias" (every bias), "norm" (weights and biases of every normalization layer of whatever
            class), "head" (the output head, if there is exactly one), "all", or a list of these words and of names of
            modules and parameters: suffixes ("fc", "q_proj.bias"), globs ("layers.*.norm1") and regular expressions for
            the whole name ("re:.*[.]bias"). In a list a name of the model takes precedence over a word.
        exclude: Names of modules or parameters that stay frozen, with all that is inside them. None excludes nothing.
        also_train: Names of modules or parameters to train as well, such as a new head. None adds nothing.
        lr_scale: Factor on the learning rate of the optimizer groups that hold what trains, schedulers included.
        name: Name of the callback in checkpoints.
        liveness: Check in the first steps that everything that trains gets a gradient, and that frozen parameters do
            not change.
        init_from: Checkpoint of another run of TuneCallback whose values the run starts from. The arguments and the
            base must be the same, and a ckpt_path takes precedence. None starts from the module as it is.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument has the wrong type.
        MisconfigurationException: At the start of a run, if a part of the Trainer does not work with the callback; the
            message names the part and what to change.

    Example:
        >>> import lightning
        >>> trainer = lightning.Trainer(callbacks=[TuneCallback("bias", also_train=["head"])], logger=False)
    """

    def __init__(
        self,
        train: list[str] | str = "bias",
        *,
        exclude: list[str] | None = None,
        also_train: list[str] | None = None,
        lr_scale: float = 1.0,
        name: str = "default",
        liveness: bool = True,
        init_from: str | None = None,
    ) -> None:
        config = TuneConfig(train, exclude=exclude, also_train=also_train, name=name)
        run_config = RunConfig(lr_scale=lr_scale, liveness=liveness, init_from=init_from)
        super().__init__(TuneMethod(config), run_config)
        self.config = config
