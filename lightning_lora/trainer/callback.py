"""The callback: hooks of a few lines over :mod:`lightning_lora.trainer.run`."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import override

from lightning_lora.config import LoRAConfig, RunConfig
from lightning_lora.layers.base import is_adapted
from lightning_lora.model.apply import remove_lora
from lightning_lora.model.hooks import start_graphs
from lightning_lora.model.merge import merge_lora, quantized_layers, unwritable
from lightning_lora.trainer import checkpoints
from lightning_lora.trainer.checkpoint_io import export_merged, load_best
from lightning_lora.trainer.compatibility import check_compatibility, is_spawned
from lightning_lora.trainer.imports import CallbackBase, pl, rank_zero_info, rank_zero_warn
from lightning_lora.trainer.init_and_export import export
from lightning_lora.trainer.run import Run


class LoRACallback(CallbackBase):
    """LoRA for the LightningModule of this Trainer (Hu et al. 2021, arXiv 2106.09685).

    The module's code stays as it is. At the start of a run adapters are put on the layers that ``targets`` means and
    everything else is frozen; the user's optimizers are restricted to the adapters; checkpoints hold adapters alone; at
    the end of ``fit`` the adapters are merged into the weights, and the module is the plain one again.

    Surprising, perhaps: after a merge ``trainer.test(model)`` runs the merged module, and ``trainer.test(model,
    ckpt_path=...)`` takes the merge out, loads the file, runs, and leaves the module merged as it found it. A second
    ``fit`` continues the adapters on the original base.

    Args:
        r: Rank of the update. A has shape (r, in_features), B has shape (out_features, r).
        alpha: Numerator of the scale alpha / r in front of B A. None means alpha = r, a scale of 1.
        targets: What to adapt. "attn" (every projection of every attention block), "qv" (query and value, the paper's
            choice), "mlp", "all" (every linear layer but output heads), or a list of module names: suffixes
            ("q_proj"), globs ("layers.*.q_proj") and regular expressions for the whole name ("re:.*[qv]_proj").
        exclude: Names of modules to leave alone, with all that is inside them.
        dropout: Probability with which the input of an adapter is dropped in training; embeddings have none.
        init: How A starts, "kaiming" (as nn.Linear) or "gaussian" (standard deviation 1 / r). B starts at zero.
        rslora: Scale by alpha / sqrt(r) instead.
        bias: Which biases train too, "none", "lora_only" (those of adapted layers) or "all".
        also_train: Names of modules or parameters to train in full and to save with the adapters, such as a new head.
        rank_pattern: Ranks that differ from r, by module name.
        alpha_pattern: Alphas that differ from alpha, by module name.
        seed: Seed of A. None takes the one that seed_everything set, else 0. The global random stream is not used.
        lr_scale: Factor on the learning rate of the optimizer groups that hold adapters, schedulers included. LoRA
            wants about ten times the rate of full fine-tuning.
        merge: What to merge at the end of fit: True or "last", "best" (what the best checkpoint holds), or False.
        name: Name of the adapter. Its parameters are called <layer>.lora.<name>.A and .B.
        liveness: Check in the first steps and the first evaluation that every adapter runs and gets a gradient.
        init_from: Directory in PEFT's format, or checkpoint of another run, that fresh adapters start from; only their
            values, of the same arguments and on the same base. A ckpt_path goes before it.
        export: Directory in which to write the adapters in PEFT's format at the end of fit: those that merge says, or
            the last. It holds where they come from: package, arguments, fingerprint of the base, step, metrics.
        base_dtype: Under mixed precision, hold the frozen weights of linear layers and convolutions on the device in
            the dtype to which autocast casts them at every use: "bf16" with bf16-mixed, "fp16" with 16-mixed. The
            numbers are the same; a weight takes two bytes instead of six, the fp32 weight and the cast kept for
            backward. The fp32 values wait in CPU memory and return after the run. Other layers stay as they are; a
            cast layer called outside autocast raises. Not with FSDP, DeepSpeed or weight averaging.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import lightning
        >>> trainer = lightning.Trainer(callbacks=[LoRACallback(r=8, targets="attn")], logger=False)
    """

    def __init__(
        self,
        r: int = 8,
        alpha: float | None = None,
        targets: list[str] | str = "attn",
        *,
        exclude: list[str] | None = None,
        dropout: float = 0.0,
        init: Literal["kaiming", "gaussian"] = "kaiming",
        rslora: bool = False,
        bias: Literal["none", "lora_only", "all"] = "none",
        also_train: list[str] | None = None,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        seed: int | None = None,
        lr_scale: float = 1.0,
        merge: bool | Literal["last", "best"] = True,
        name: str = "default",
        liveness: bool = True,
        init_from: str | None = None,
        export: str | None = None,
        base_dtype: Literal["bf16", "fp16"] | None = None,
    ) -> None:
        super().__init__()
        self.config = LoRAConfig(
            r=r,
            alpha=alpha,
            targets=targets,
            exclude=exclude,
            dropout=dropout,
            init=init,
            rslora=rslora,
            bias=bias,
            also_train=also_train,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            seed=seed,
            name=name,
        )
        self.run_config = RunConfig(
            lr_scale=lr_scale,
            merge=merge,
            liveness=liveness,
            init_from=init_from,
            export=export,
            base_dtype=base_dtype,
        )
        self._run: Run | None = None

    @property
    def state_key(self) -> str:
        """The name by which Lightning knows the callback; r is not in it, as a changed r must fail, not be skipped."""
        return f"LoRACallback[{self.config.name}]"

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Adapt the module, and wrap what the run will call."""
        check_compatibility(trainer, self, stage)
        self._run = Run(trainer, pl_module, self.config, self.run_config, stage)
        self._run.begin()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue a resumed run's random stream, and log the configuration."""
        assert self._run is not None
        start_graphs(pl_module)  # checkpointing may have been switched on since
        self._run.keep_averages_exact()
        self._run.files.restore_random_state()
        for logger in trainer.loggers:
            logger.log_hyperparams({"lora": {**self.config.to_dict(), **self.run_config.to_dict()}})

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the adapters in the first steps."""
        if self._run is not None and self.run_config.liveness:
            self._run.watch(trainer.optimizers)

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """At each optimizer's first step, name the adapters without a gradient."""
        if self._run is not None and self._run.liveness is not None:
            self._run.liveness.check_step(optimizer, trainer.optimizers)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the adapters in the first evaluation."""
        if self._run is not None and self._run.liveness is not None:
            self._run.liveness.begin_evaluation()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Name the adapters that did not run in it."""
        if self._run is not None and self._run.liveness is not None:
            self._run.liveness.check_evaluation()

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave in ``checkpoint`` what an adapter file holds; calling it again changes nothing more.

        Lightning calls it for full saves only. During a run every kind of save is filtered where it is written as well.
        A merged module is the plain model, and its state dict stays whole.
        """
        if is_adapted(pl_module):
            adapter_only = checkpoints.without_base(checkpoint, pl_module)
            checkpoint.clear()
            checkpoint.update(adapter_only)

    @override
    def on_fit_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        """Merge; the strategy is torn down, and the module is back on the CPU."""
        if is_spawned(trainer):
            remove_lora(pl_module)
            rank_zero_info(
                "Processes started by spawn or fork do not give adapters back, so nothing is merged: the module in the "
                "starting process stays the base, and the trained adapters are in the checkpoints. Use them with "
                "ckpt_path='best'."
            )
        else:
            self._finish(trainer, pl_module)

    def _finish(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        wants_best = self.run_config.merge == "best" and not trainer.fast_dev_run
        weights_only = None if self._run is None else self._run.files.weights_only
        best = load_best(trainer, pl_module, weights_only) if wants_best else None
        if wants_best and best is None:
            rank_zero_warn("`merge='best'` found no best checkpoint: nothing is merged or exported, the adapters stay.")
            return
        if self.run_config.export is not None and not trainer.fast_dev_run:
            export(trainer, pl_module, self.run_config.export, best)
        if self.run_config.merge:
            self._merge(trainer, pl_module)

    def _merge(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        if quantized_layers(pl_module):
            rank_zero_info(
                "Quantized weights cannot hold the sum, so nothing is merged: the module keeps its adapters, and the "
                "checkpoints hold them. Merge a file into the base in full precision, and quantize that."
            )
            return
        where = unwritable(pl_module)
        if where is not None and self._run is not None:
            path = export_merged(trainer, self._run.files.base_fingerprint())
            rank_zero_info(
                f"{where} The merged weights are in {path}, for `safetensors.torch.load_file`, and the module keeps "
                "its adapters."
            )
            return
        lost = merge_lora(pl_module)
        if self._run is not None:
            self._run.strategy_adapter.after_merge()
        worst = max(lost, key=lost.__getitem__, default="")
        if lost.get(worst, 0) > 0.01:
            rank_zero_info(
                f"Merged {len(lost)} layers. Rounding to the weights' dtype lost up to {lost[worst]:.1%} of the update "
                f"(in `{worst}`); for the exact sum merge into an fp32 model."
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the run; one that has not ended by now was only to tune a batch size or a learning rate."""
        if self._run is not None and not self._run.ended:
            self._run.abandoned = True
        self._run = None
