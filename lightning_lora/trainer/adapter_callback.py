"""AdapterCallback: bottleneck adapters for the module of a Trainer."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import override

from lightning_lora.config import RunConfig
from lightning_lora.methods.bottleneck.config import BottleneckConfig
from lightning_lora.methods.bottleneck.method import BottleneckMethod
from lightning_lora.trainer.batches.each_batch import EachBatchCallback
from lightning_lora.trainer.batches.segments import BatchSegments
from lightning_lora.trainer.imports import pl
from lightning_lora.trainer.patching import call_on_close


class AdapterCallback(EachBatchCallback):
    """Bottleneck adapters for the LightningModule of this Trainer: y + scale * up(act(down(x))).

    The module's code stays as it is. Where attention and MLPs end, small MLPs get added and the rest is frozen; the
    user's optimizers are restricted to them; checkpoints hold them alone. "up" starts at zero, so the module starts as
    the base bit for bit. nn.TransformerEncoder in evaluation does so only to rounding, and not at padded positions: its
    fast path, which writes zeros there, has to be disabled.

    A bottleneck cannot be merged: after fit the module keeps it, and every forward pass takes longer.
    remove_adapted(module) takes it off.

    The sublayers are found by structure and names, on any architecture where the presets of LoRACallback find attention
    and MLPs. A bottleneck acts directly after the last linear layer of its sublayer, before dropout, norm and residual;
    after nn.MultiheadAttention, and after a mixture of experts, it acts on the output of that module. A model without
    what the placement needs is refused.

    Args:
        size: Number of features inside a bottleneck. On d features it has 2 * size * d + size + d parameters.
        placement: Where they act. "houlsby" (Houlsby et al. 2019, arXiv 1902.00751): after each attention and each MLP,
            on its output. "pfeiffer" (Pfeiffer et al. 2021, arXiv 2005.00247): after each MLP. "parallel" (He et al.
            2022, arXiv 2110.04366): from the input of each MLP, in a pre-norm block after the norm, to its output.
            "block" (Versatile LM, Lin et al. 2020, arXiv 2004.03829): after each block that holds attention, with a
            LayerNorm before "down" that has 2 * d more parameters.
        activation: "gelu", "relu", "silu" or "tanh".
        init_std: Standard deviation of the initial "down", which is normal and cut off at twice that.
        scale: Factor on the update. He et al. take 4 for "parallel".
        segments: With placement "block", the entry of a batch that says to which segment each token or sample belongs,
            such as its task or its speaker: a key, an attribute or an index in a sequence. It holds integers, one for
            each sample (batch,), one for each token (batch, length), or one for the batch. None leaves it to
            use_segments in the module's own steps. Outside of a run calls of the module need use_segments too.
        segment_count: How many segments there are. Each has an embedding of d numbers in every bottleneck, added to its
            input before the LayerNorm (Versatile LM's task embedding), which starts at zero. 0 adds none.
        exclude: Names of modules that get no bottleneck, with all that is inside them. None excludes nothing.
        also_train: Names of modules or parameters of the base to train in full, such as a new head, or the norms as
            Houlsby et al. do. None trains only bottlenecks.
        bias: Which biases of the base train too, "none" or "all".
        seed: Seed of the initial values. None takes the one that seed_everything set, else 0. The global random stream
            is not used.
        lr_scale: Factor on the learning rate of the optimizer groups that hold bottlenecks, schedulers included.
        name: Name of the callback in checkpoints, and of the bottlenecks in a FusionCallback.
        liveness: Check in the first steps and the first evaluation that every bottleneck runs and gets a gradient, and
            that frozen parameters do not change.
        init_from: Checkpoint of another run of AdapterCallback whose values the run starts from. The arguments and the
            base must be the same, and a ckpt_path takes precedence. None starts from the base.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument has the wrong type.
        MisconfigurationException: At the start of a run, if a part of the Trainer does not work with the callback; the
            message names the part and what to change.

    Example:
        >>> import lightning
        >>> trainer = lightning.Trainer(callbacks=[AdapterCallback(size=16, placement="pfeiffer")], logger=False)
    """

    def __init__(
        self,
        size: int = 64,
        placement: Literal["houlsby", "pfeiffer", "parallel", "block"] = "houlsby",
        *,
        activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu",
        init_std: float = 0.01,
        scale: float = 1.0,
        segments: str | int | None = None,
        segment_count: int = 0,
        exclude: list[str] | None = None,
        also_train: list[str] | None = None,
        bias: Literal["none", "all"] = "none",
        seed: int | None = None,
        lr_scale: float = 1.0,
        name: str = "default",
        liveness: bool = True,
        init_from: str | None = None,
    ) -> None:
        config = BottleneckConfig(
            size,
            placement,
            activation,
            init_std,
            scale,
            segments,
            segment_count,
            exclude=exclude,
            also_train=also_train,
            bias=bias,
            seed=seed,
            name=name,
        )
        run_config = RunConfig(lr_scale=lr_scale, liveness=liveness, init_from=init_from)
        super().__init__(BottleneckMethod(config), run_config)
        self.config = config
        self._segments = None if segments is None else BatchSegments(segments)

    def __getstate__(self) -> dict[str, Any]:
        """As of the base class: what belongs to one run stays out."""
        fresh = None if self.config.segments is None else BatchSegments(self.config.segments)
        return super().__getstate__() | {"_segments": fresh}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Adapt the module, and be ready to set segments."""
        super().setup(trainer, pl_module, stage)
        if self._segments is not None and self._run is not None:
            self._segments.acting = None
            call_on_close(self._run.stack, self._segments.end)

    @override
    def begin_batch(
        self, pl_module: pl.LightningModule, batch: Any, dataloader_idx: int = 0, trains: bool = False
    ) -> None:
        if self._segments is not None:
            self._segments.begin(pl_module, batch)

    @override
    def end_batch(self) -> None:
        if self._segments is not None:
            self._segments.end()
