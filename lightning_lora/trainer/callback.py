"""LoRACallback: LoRA for the module of a Trainer."""

from __future__ import annotations

from typing import Literal

from lightning_lora.config import LoRAConfig, RunConfig
from lightning_lora.methods.lora import LoRAMethod
from lightning_lora.trainer.method_callback import MethodCallback


class LoRACallback(MethodCallback):
    """LoRA for the LightningModule of this Trainer (Hu et al. 2021, arXiv 2106.09685).

    The module's code stays as it is. At the start of a run adapters are put on the layers that ``targets`` means and
    everything else is frozen; the user's optimizers are restricted to the adapters; checkpoints hold adapters alone; at
    the end of ``fit`` the adapters are merged into the weights, and the module is the plain one again.

    The base is as of the first batch: weights that a hook sets before, as in ``on_fit_start``, belong to it. Frozen
    parameters that other code moves, such as a momentum teacher's, are named in a warning, and checkpoints hold them.

    After a merge ``trainer.test(model)`` runs the merged module. ``trainer.test(model, ckpt_path=...)`` takes the merge
    out, loads the file, runs, and merges again. A second ``fit`` continues the adapters on the original base.

    Averaging callbacks (WeightAveraging, StochasticWeightAveraging) copy the module in ``setup``: put them after this
    one. BaseFinetuning unfreezes what must stay frozen and is refused, as is a second LoRACallback.

    Checkpoints hold adapters alone unless ``save="merged"``. But the ``on_save_checkpoint`` and ``on_load_checkpoint``
    of the module and of other callbacks see the state dict of the whole module, and may read, remove or fill in entries
    of the base. Under FSDP and DeepSpeed, where no process holds the base, they see the adapters alone.

    In the middle of a run ``module.state_dict()`` holds the base and the adapters together, and a plain model cannot
    use the adapters. Code that writes a file by itself should write ``merged_state_dict(module)``.

    After Ctrl-C, or with ``merge=False``, the module keeps its adapters. Save them with ``save_adapter`` or
    ``lora_state_dict``: outside a run ``trainer.save_checkpoint`` writes the base and the adapters together.

    Args:
        r: Rank of the update. A has shape (r, in_features), B has shape (out_features, r).
        alpha: Numerator of the scale alpha / r in front of B A. None means alpha = r, a scale of 1.
        targets: What to adapt. "attn" (every projection of every attention block), "qv" (query and value, the paper's
            choice), "mlp", "all" or "all-linear" (every linear layer but output heads), or a list of presets and module
            names: suffixes ("q_proj"), globs ("layers.*.q_proj") and regular expressions for the whole name
            ("re:.*[qv]_proj"). In transformer blocks a convolution of kernel size 1 counts as a linear layer. "all"
            leaves other convolutions and recurrent layers alone, and says so; in a network whose one linear layer is
            its output it means the convolutions. A model without attention (Mamba, ConvNeXt) has no "attn": the error
            lists the linear layers to name. "qv" on a fused projection trains the rows of query and value; where a
            trial run of the attention block does not show which rows these are, name the projection to adapt all of it.
        exclude: Names of modules to leave alone, with all that is inside them.
        dropout: Probability with which the input of an adapter is dropped in training. It is inactive in layers in eval
            mode, as transformers loads models; a warning says so. Embeddings ignore it: their input is one index. Where
            a weight is read and the layer not called (recurrent layers, experts, parameters by name) it is an error.
        init: How A starts, "kaiming" (as nn.Linear) or "gaussian" (standard deviation 1 / r). B starts at zero.
        rslora: Scale by alpha / sqrt(r) instead.
        bias: Which biases train too, "none", "lora_only" (those of adapted layers) or "all".
        also_train: Names of modules or parameters to train in full and to save with the adapters, such as a new head.
            DeepSpeed then needs precision="32-true"; FSDP1 takes precision="bf16-mixed" and no mixed_precision of the
            strategy; FSDP2 needs optimizers without fused=True or foreach=True if you shard these modules.
        rank_pattern: Ranks that differ from r, by module name.
        alpha_pattern: Alphas that differ from alpha, by module name.
        seed: Seed of A. None takes the one that seed_everything set, else 0. The global random stream is not used.
        lr_scale: Factor on the learning rate of the optimizer groups that hold adapters, schedulers included. LoRA
            wants about ten times the rate of full fine-tuning. A scheduler whose one eta_min is shared by groups with
            and without adapters is an error unless eta_min is 0.
        merge: What to merge at the end of fit: True or "last", "best" (what the best checkpoint holds), or False.
            "best" needs a ModelCheckpoint with a monitor. Spawned workers (ddp_spawn, ddp_notebook) do not give their
            module back: nothing is merged, and a ModelCheckpoint is required. Quantized weights cannot hold the sum and
            are not merged. FSDP1 and ZeRO 3 keep weights in pieces: the merged weights are written to
            merged.safetensors in the folder of the checkpoints, and the module keeps its adapters.
        name: Name of the adapter. Its parameters are called <layer>.lora.<name>.A and .B.
        liveness: Check in the first steps and the first evaluation that every adapter runs and gets a gradient, and
            that what is frozen stays as it is.
        init_from: Directory in PEFT's format, or checkpoint of another run, that fresh adapters start from; only their
            values, of the same arguments and on the same base. A ckpt_path takes precedence over it.
        export: Directory in which to write the adapters in PEFT's format at the end of fit: those that merge names, or
            the last. It records where they come from: package, arguments, fingerprint of the base, step, metrics.
        base_dtype: Under mixed precision, hold the frozen weights of linear layers and convolutions on the device in
            the dtype to which autocast casts them at every use: "bf16" with bf16-mixed, "fp16" with 16-mixed. The
            numbers are the same; a weight takes two bytes instead of six, the fp32 weight and the cast kept for
            backward. The fp32 values wait in CPU memory and return after the run. Other layers stay as they are; a
            cast layer called outside autocast raises. FSDP, DeepSpeed and weight averaging, which cast or copy the
            base themselves, are refused.
        save: What the checkpoints of the run hold. "adapter": the adapters alone. "merged": the state dict of the
            merged model, which Lightning and every other library load into the plain module, without this package. The
            adapters are in the file as well, and this callback resumes, tests and merges from it as from a file of
            adapters. A file is then larger than one of the base, and each save computes the sums, one layer at a time.
            FSDP, DeepSpeed, quantized weights and base_dtype are refused.
        merged: File into which the end of fit writes the merged model: safetensors, with the keys of
            module.state_dict(), tied tensors once. With merge="best" the best adapters are merged in it, else the last;
            with merge=False the module keeps its adapters all the same.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument has the wrong type.
        MisconfigurationException: At the start of a run, if a part of the Trainer does not work with the callback; the
            message names the part and what to change.

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
        save: Literal["adapter", "merged"] = "adapter",
        merged: str | None = None,
    ) -> None:
        config = LoRAConfig(
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
        run_config = RunConfig(
            lr_scale=lr_scale,
            merge=merge,
            liveness=liveness,
            init_from=init_from,
            export=export,
            base_dtype=base_dtype,
            save=save,
            merged=merged,
        )
        super().__init__(LoRAMethod(config), run_config)
        self.config = config
