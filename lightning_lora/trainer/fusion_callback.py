"""FusionCallback: AdapterFusion for the module of a Trainer."""

from __future__ import annotations

from typing import Literal

from lightning_lora.config import RunConfig
from lightning_lora.methods.fusion.config import FusionConfig
from lightning_lora.methods.fusion.method import FusionMethod
from lightning_lora.trainer.method_callback import MethodCallback


class FusionCallback(MethodCallback):
    """AdapterFusion for the LightningModule of this Trainer (Pfeiffer et al. 2021, arXiv 2005.00247).

    The second stage after several runs of AdapterCallback on one base: their bottlenecks act together, frozen, and an
    attention in each place learns which of them to use. The query is the output of the sublayer, keys and values are
    the updates of the bottlenecks. With one bottleneck the module starts as that run left it, bit for bit. The loss is
    the module's own: no term keeps the value matrices near the identity.

    Checkpoints hold the attention and the frozen bottlenecks, so they need no other file. Heads and other modules of
    the base that the runs trained are not read: name the head of the new task in also_train.

    A fusion cannot be merged: after fit the module keeps it. remove_adapted(module) takes it off.

    Args:
        adapters: Checkpoints of AdapterCallback, or directories that hold one. In a list each has the name that its run
            gave; a dict gives names, such as {"fr": "runs/fr/last.ckpt"}. They must be of one base, placement, size,
            activation and scale.
        init_std: Standard deviation of the initial query and key matrices. The value matrix starts as the identity.
        exclude: Names of modules that get no fusion and no bottleneck, with all that is inside them. None excludes
            only what the runs excluded.
        also_train: Names of modules or parameters of the base to train in full, such as a new head. None trains only
            fusions.
        bias: Which biases of the base train too, "none" or "all".
        seed: Seed of the initial values. None takes the one that seed_everything set, else 0. The global random stream
            is not used.
        lr_scale: Factor on the learning rate of the optimizer groups that hold fusions, schedulers included.
        name: Name of the callback in checkpoints.
        liveness: Check in the first steps and the first evaluation that every fusion runs and gets a gradient, and that
            frozen parameters do not change.
        init_from: Checkpoint of another run of FusionCallback whose values the run starts from. The arguments and the
            base must be the same, and a ckpt_path takes precedence. None starts from the bottlenecks.

    Raises:
        ValueError: If an argument is out of its range; at the start of a run, if a file holds no bottlenecks, or others
            than those that are asked for.
        TypeError: If an argument has the wrong type.
        MisconfigurationException: At the start of a run, if a part of the Trainer does not work with the callback; the
            message names the part and what to change.

    Example:
        >>> import lightning
        >>> fusion = FusionCallback({"fr": "runs/fr/last.ckpt", "de": "runs/de/last.ckpt"})
        >>> trainer = lightning.Trainer(callbacks=[fusion], logger=False)
    """

    def __init__(
        self,
        adapters: list[str] | dict[str, str],
        *,
        init_std: float = 0.02,
        exclude: list[str] | None = None,
        also_train: list[str] | None = None,
        bias: Literal["none", "all"] = "none",
        seed: int | None = None,
        lr_scale: float = 1.0,
        name: str = "default",
        liveness: bool = True,
        init_from: str | None = None,
    ) -> None:
        config = FusionConfig(
            adapters,
            init_std,
            exclude=exclude,
            also_train=also_train,
            bias=bias,
            seed=seed,
            name=name,
        )
        run_config = RunConfig(lr_scale=lr_scale, liveness=liveness, init_from=init_from)
        super().__init__(FusionMethod(config), run_config)
        self.config = config
