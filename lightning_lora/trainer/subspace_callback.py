"""SubspaceCallback: training in a random subspace for the module of a Trainer."""

from __future__ import annotations

from typing import Literal

from lightning_lora.config import RunConfig
from lightning_lora.methods.subspace.config import SubspaceConfig
from lightning_lora.methods.subspace.method import SubspaceMethod
from lightning_lora.trainer.method_callback import MethodCallback


class SubspaceCallback(MethodCallback):
    """Train the LightningModule of this Trainer in a random subspace of all its parameters (intrinsic dimension).

    Every floating parameter is read as theta_0 + P z. theta_0 is the frozen base, P a fixed random matrix with columns
    of unit norm, and z a vector of a few hundred numbers for the whole module, which starts at zero (Li et al. 2018,
    arXiv 1804.08838; Aghajanyan et al. 2020, arXiv 2012.13255). The smallest dimension that solves a task tells how
    hard the task is for this model. As a way to save memory it is poor: each step takes a gradient of every weight and
    a copy of the weights, as full fine-tuning does, and P z is computed for each read of a parameter.

    P follows from the seed and the names of the parameters, and no file holds it. Checkpoints hold z alone, with what
    also_train names. At the end of fit the sums are written into the weights, and the module is the plain one again;
    the original weights wait in CPU memory, so that a second fit, or a test with ckpt_path, restores them bit for bit.

    Code that reads module.weight gets the sum. Code that keeps a list of parameters, or reads module._parameters, gets
    theta_0, and the check of liveness names modules that no code read. FSDP1, DeepSpeed and tensor parallelism split
    weights and are refused. Under DDP reentrant activation checkpointing needs DDPStrategy(static_graph=True), since
    every segment adds to the gradient of z.

    Args:
        dimension: Numbers in z.
        projection: How P is made, "fastfood" (Hadamard transforms, signs, a permutation and normal numbers, in
            O(n log(dimension)) for n parameters) or "dense" (independent normal numbers, in O(n dimension): for small
            models).
        structure: Train one factor more for each module, on its part of P z (SAID).
        targets: What is projected, "all" (every floating parameter) or a list of names of modules and parameters:
            suffixes, globs and regular expressions, as in LoRACallback.
        exclude: Names of modules and parameters that stay as they are, such as a teacher. None excludes nothing.
        also_train: Names of modules or parameters to train in full, and not in the subspace, such as a new head. None
            trains only the subspace.
        seed: Seed of P. None takes the one that seed_everything set when the callback is made, else 0.
        lr_scale: Factor on the learning rate of z. As a step of length s in z moves all parameters together by s, it
            wants a rate that is larger than that of full fine-tuning, often by a factor of 100 or more.
        merge: What to write into the weights at the end of fit, True or "last", "best" (the z of the best checkpoint of
            a ModelCheckpoint with a monitor), or False.
        name: A word for the run, in the key of the callback's state.
        liveness: Check in the first steps that every projected module is read and z gets a gradient, and that frozen
            parameters do not change.
        init_from: Checkpoint of another run whose values z starts from. The arguments and the base must be the same,
            and a ckpt_path takes precedence. None starts from the base.
        merged: File into which the end of fit writes the merged module: safetensors, with the keys of
            module.state_dict(), tied tensors once. None writes nothing.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument has the wrong type.
        MisconfigurationException: At the start of a run, if a part of the Trainer does not work with the callback.

    Example:
        >>> import lightning
        >>> trainer = lightning.Trainer(callbacks=[SubspaceCallback(dimension=200)], logger=False)
    """

    def __init__(
        self,
        dimension: int = 200,
        projection: Literal["fastfood", "dense"] = "fastfood",
        structure: bool = False,
        *,
        targets: list[str] | str = "all",
        exclude: list[str] | None = None,
        also_train: list[str] | None = None,
        seed: int | None = None,
        lr_scale: float = 1.0,
        merge: bool | Literal["last", "best"] = True,
        name: str = "default",
        liveness: bool = True,
        init_from: str | None = None,
        merged: str | None = None,
    ) -> None:
        config = SubspaceConfig(
            dimension=dimension,
            projection=projection,
            structure=structure,
            targets=targets,
            exclude=exclude,
            also_train=also_train,
            seed=seed,
            name=name,
        )
        run_config = RunConfig(lr_scale=lr_scale, merge=merge, liveness=liveness, init_from=init_from, merged=merged)
        super().__init__(SubspaceMethod(config), run_config)
        self.config = config
