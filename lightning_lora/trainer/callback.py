"""LoRACallback: LoRA for the module of a Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning_lora.arguments import strengths_of
from lightning_lora.config import LoRAConfig, RunConfig
from lightning_lora.methods.lora import LoRAMethod
from lightning_lora.model.quantized.merge import MergeBase
from lightning_lora.trainer.several.routed_callback import RoutedCallback


class LoRACallback(RoutedCallback):
    """LoRA for the LightningModule of this Trainer (Hu et al. 2021, arXiv 2106.09685).

    The module's code stays as it is. At the start of a run the layers that ``targets`` selects get adapters and the
    rest is frozen; the user's optimizers are restricted to the adapters; checkpoints hold the adapters alone; at the
    end of ``fit`` the adapters are merged into the weights, and the module is the plain one again.

    After a merge ``trainer.test(model)`` runs the merged module. ``trainer.test(model, ckpt_path=...)`` unmerges it,
    loads the file, runs, and merges again. A second ``fit`` continues the adapters on the original base. After Ctrl-C,
    or with ``merge=False``, the module keeps its adapters. Save them with ``save_adapter`` or ``lora_state_dict``:
    outside a run ``trainer.save_checkpoint`` writes the base and the adapters together.

    The base is as of the first batch: weights that a hook sets before, as in ``on_fit_start``, belong to it. Frozen
    parameters that other code moves, such as a momentum teacher's, are named in a warning, and checkpoints hold them.

    Checkpoints hold the adapters alone unless ``save="merged"``. But the ``on_save_checkpoint`` and
    ``on_load_checkpoint`` of the module and of other callbacks see the state dict of the whole module, and may read,
    remove or fill in entries of the base. Under FSDP and DeepSpeed, where no process holds the base, they see the
    adapters alone. In the middle of a run ``module.state_dict()`` holds the base and the adapters together: code that
    writes a file for the plain model should write ``merged_state_dict(module)``.

    Presets: in transformer blocks a convolution of kernel size 1 counts as a linear layer. "all" leaves other
    convolutions and recurrent layers alone, and a message says so; if the only linear layer is the output, it means the
    convolutions. A model without attention (Mamba, ConvNeXt) has no "attn": the error lists the linear layers to name.
    "qv" of a fused projection trains the rows of query and value; where a trial run of the attention block does not
    show these rows, name the projection to adapt all of it.

    Several adapters: ``adapters`` trains some side by side. With ``route`` each sample of a batch uses the one that its
    entry names, in training, validation, test and prediction; what no sample of any process used since the last step
    has no gradient, so that no optimizer moves it. A loss that is a sum over the samples trains each adapter as a run
    of its own on its own samples would; a mean over the batch divides each adapter's gradient by the whole batch, which
    ``balance`` undoes. Without ``route`` all act at once, unless ``use_adapters`` in ``training_step`` says which;
    under DDP that needs DDPStrategy(find_unused_parameters=True).

    Callbacks: averaging ones (WeightAveraging, StochasticWeightAveraging) copy the module in ``setup``, so they come
    after this one. BaseFinetuning unfreezes what must stay frozen and is refused, as is a second LoRACallback.

    Strategies: FSDP1 and ZeRO 3 keep weights in pieces. There the merged weights are written to merged.safetensors in
    the folder of the checkpoints, and the module keeps its adapters. Spawned workers (ddp_spawn, ddp_notebook) do not
    give their module back: nothing is merged, and a ModelCheckpoint is required. With ``also_train`` DeepSpeed needs
    precision="32-true", FSDP1 takes precision="bf16-mixed" and no mixed_precision of the strategy, and FSDP2 needs
    optimizers without fused=True or foreach=True if these modules are sharded. Of frozen parameters that FSDP shards,
    the first rank compares a few values of its own part; under DeepSpeed neither they nor gradients are watched.

    Args:
        r: Rank of the update. A has shape (r, in_features), B has shape (out_features, r).
        alpha: Numerator of the scale alpha / r in front of B A. None means alpha = r, a scale of 1.
        targets: What to adapt. "attn" (every projection of every attention block), "qv" (query and value, the paper's
            choice), "mlp" (the other linear layers of transformer blocks), "all" or "all-linear" (every linear layer
            but output heads), or a list of presets and module names: suffixes ("q_proj"), globs ("layers.*.q_proj") and
            regular expressions for the whole name ("re:.*[qv]_proj").
        exclude: Names of modules that get no adapters, with all that is inside them, such as a teacher. None excludes
            nothing.
        dropout: Probability with which the input of an adapter is dropped in training. Embeddings and layers in eval
            mode ignore it; layers whose weight is read without a call, such as recurrent ones, refuse it.
        init: How A starts, "kaiming" (as nn.Linear) or "gaussian" (standard deviation 1 / r). B starts at zero.
        rslora: Scale by alpha / sqrt(r) instead of alpha / r.
        bias: Which biases train too, "none", "lora_only" (those of adapted layers) or "all".
        also_train: Names of modules or parameters to train in full and to save with the adapters, such as a new head.
            None trains only adapters.
        rank_pattern: Ranks that differ from r, by module name, such as {"q_proj": 16}. The first key that matches
            counts.
        alpha_pattern: Alphas that differ from alpha, by module name, as in rank_pattern.
        seed: Seed of A. None takes the one that seed_everything set, else 0. The global random stream is not used.
        lr_scale: Factor on the learning rate of the optimizer groups that hold adapters, schedulers included. LoRA
            needs about ten times the rate of full fine-tuning. A LearningRateFinder finds the rate before this factor.
        merge: What to merge into the weights at the end of fit: True or "last", "best" (the adapters of the best
            checkpoint of a ModelCheckpoint with a monitor), or False. Quantized weights cannot hold the sum: nothing is
            merged unless dequantize or merge_base says into what. Of several adapters nothing is merged unless a dict
            says which, with the factor of each update, such as {"fr": 1.0}.
        name: Name of the adapter. Its parameters are called <layer>.lora.<name>.A and .B.
        liveness: Check in the first steps and the first evaluation that every adapter runs and gets a gradient, and
            that frozen parameters do not change.
        init_from: Directory in PEFT's format, or checkpoint of another run, whose values fresh adapters start from. The
            arguments and the base must be the same, and a ckpt_path takes precedence. Where a run trains several
            adapters, the directory has a sub-directory for each. None starts from the base.
        export: Directory in which to write the adapters in PEFT's format at the end of fit, several into
            sub-directories of their names: the best ones with merge="best", else the last. None writes nothing.
        base_dtype: Under mixed precision, keep the frozen weights of linear layers and convolutions in the dtype to
            which autocast casts them: "bf16" with bf16-mixed, "fp16" with 16-mixed. The results are the same with less
            memory on the device; the fp32 values wait in CPU memory until the end of the run. None changes nothing.
        save: What the checkpoints of the run hold. "adapter": the adapters alone. "merged": the state dict of the
            merged model, which loads into the plain module without this package, and the adapters to resume from; a
            file is then larger than one of the base. To resume from it fit needs this callback: a plain fit(ckpt_path)
            raises that the file holds only the model. FSDP, DeepSpeed, quantized weights, adapted weights that are
            tied, and base_dtype are refused.
        merged: File into which the end of fit writes the merged model: safetensors, with the keys of
            module.state_dict(), tied tensors once. It holds the best adapters with merge="best", else the last. None
            writes nothing.
        dequantize: For a quantized base, merge into the dequantized weights, on which the adapters were trained. Every
            quantized layer becomes a plain linear layer, in the dtype of most of the other parameters; a second fit,
            and a test with ckpt_path, run on the quantized base again.
        merge_base: For a quantized base, the path of the weights in full precision that were quantized, to merge into
            these: a safetensors file, a directory with one or with shards, or a state dict or checkpoint of torch.save.
            Names and shapes are compared before the first step, values at the merge. The adapters were trained on the
            quantized weights, so measure the merged model: trainer.test(model) does, and with a ckpt_path it measures
            the quantized one. None with dequantize=False merges nothing.
        compute: Which side of the equation layers compute. "activations" is W0 x + scale B (A x), a few small products
            for each layer. "weights" is (W0 + scale B A) x, where neighbouring layers are summed together; it takes a
            gradient and a copy of each adapted weight, as in full fine-tuning. "auto" takes the weight's side on a GPU
            for small layers and short inputs, where launching kernels takes longer than computing them, unless the sums
            of the model would take more than 3 GiB. Both give the same to rounding. Dropout, sharded weights and
            base_dtype need the activations' side. Write values under torch.no_grad(): a layer on the weight's side may
            see a write through .data only at its second call.

        adapters: Several adapters by name in place of the one called name, each with the arguments in which it differs:
            r, alpha, targets, dropout, rslora, rank_pattern, alpha_pattern, lr_scale. An example is {"fr": {}, "de":
            {"r": 4, "lr_scale": 2.0}}, on the command line as JSON. Its lr_scale comes on top of the callback's: it
            multiplies the updates of SGD, Adam and their like, and a LearningRateMonitor shows the rate without it.
        route: Key of the batch, attribute, or index in a sequence, of the entry that says which adapter acts: a name or
            an index into adapters (then into keep), one for the whole batch or one for each sample. In evaluation
            "dataloader" takes the index of the data loader instead. None lets every adapter act.
        balance: Multiply the gradient of each adapter by all samples over its own, counted since the last step and over
            all processes. With a loss that is a mean over batches of one size it is then the mean over the adapter's
            own samples, whatever accumulate_grad_batches and the number of processes are. A route that gives one
            adapter for a whole batch counts the batch as one sample. What also_train names is not changed.
        keep: Adapters that the module has from earlier runs, as a list of names, or as a dict from names to the
            strength with which they act, such as {"fr": 1.0}. They stay as they are, with the biases and also_train
            modules that trained with them; checkpoints hold both. What this run's own also_train and bias name trains,
            which changes what kept adapters compute, and a warning says so. A list lets the adapters rest, as 0.0 does.
            The strengths stay after fit, and a merge follows them.

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
        merge: bool | Literal["last", "best"] | dict[str, float] = True,
        name: str = "default",
        liveness: bool = True,
        init_from: str | None = None,
        export: str | None = None,
        base_dtype: Literal["bf16", "fp16"] | None = None,
        save: Literal["adapter", "merged"] = "adapter",
        merged: str | None = None,
        dequantize: bool = False,
        merge_base: str | None = None,
        compute: Literal["auto", "activations", "weights"] = "auto",
        adapters: dict[str, dict[str, Any]] | None = None,
        route: str | int | None = None,
        balance: bool = False,
        keep: list[str] | dict[str, float] | None = None,
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
            adapters=adapters,
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
            dequantize=dequantize,
            merge_base=merge_base,
            compute=compute,
            route=route,
            balance=balance,
            keep=strengths_of(keep),
        )
        # A sum with a weight that `base_dtype` has rounded would differ from the sum without it.
        factors = run_config.merge if isinstance(run_config.merge, Mapping) else None
        into = MergeBase(run_config.merge_base) if dequantize or run_config.merge_base is not None else None
        method = LoRAMethod(config, "activations" if base_dtype else compute, run_config.keep, factors, into)
        super().__init__(method, run_config)
        self.config = config
