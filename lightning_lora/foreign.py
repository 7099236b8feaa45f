"""Names of other libraries that are matched as text, because the libraries are not imported or hold a class twice.

Every such name is here, so that a release that renames one of them is met in this file. Private names of torch that are
called are in :mod:`lightning_lora.torch_internals`; the keys of PEFT's files are in :mod:`lightning_lora.peft_format`.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

# Lightning, which ships every class twice, in `lightning.pytorch` and in `pytorch_lightning`.
SEED_VARIABLE = "PL_GLOBAL_SEED"  # set by `seed_everything`
SHARDING_STRATEGIES = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")
REPLICATING_STRATEGY = "DDPStrategy"
UNTRIED_STRATEGIES = ("XLAFSDPStrategy",)
SPLITTING_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy")  # their weights are pieces of flat buffers
SPAWNING_LAUNCHERS = ("_MultiProcessingLauncher", "_XLALauncher")
AVERAGING_CALLBACKS = ("WeightAveraging", "StochasticWeightAveraging")
AVERAGING_IN_SETUP = "StochasticWeightAveraging"  # copies the module before `configure_model`
AVERAGED_MODEL = "_average_model"  # their attribute
UNFREEZING_CALLBACK = "BaseFinetuning"
TUNER_FILES = (".lr_find_", ".scale_batch_size_")  # which a tuner writes before its steps and loads after them
RATE_FINDER = "LearningRateFinder"
MIXED_PRECISION = "MixedPrecision"
QUANTIZING_PRECISION = "BitsandbytesPrecision"
UNTRIED_PRECISION = "TransformerEnginePrecision"
PLAIN_CHECKPOINT_IO = "TorchCheckpointIO"
LIGHTNING_MODULE = "LightningModule"
LIGHTNING_HOOKS = frozenset(  # methods of a LightningModule that compute, besides its forward
    {
        *(
            "training_step",
            "validation_step",
            "test_step",
            "predict_step",
            "on_train_batch_start",
            "on_train_batch_end",
        ),
        *("on_validation_batch_start", "on_validation_batch_end", "on_test_batch_end", "on_before_zero_grad"),
        *("on_train_epoch_end", "on_validation_epoch_end", "on_test_epoch_end"),
    }
)

# torch: modules that wrap another one, and classes that torch makes optional.
COMPILED = "_orig_mod"
WRAPPERS = frozenset({COMPILED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
AVERAGED_CLASS = "AveragedModel"
ATTENTION_OUTPUT = {"NonDynamicallyQuantizableLinear": "Linear"}  # `out_proj` of nn.MultiheadAttention, for people
IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"  # names, an attribute of the module that it wraps
PARTITIONED_OPTIMIZER = "ZeroRedundancyOptimizer"
SPARSE_OPTIMIZER = "SparseAdam"
CHECKPOINT_FUNCTIONS = {"checkpoint", "checkpoint_sequential", "checkpoint_seq"}  # torch's and timm's
PARAMETRIZATIONS = "parametrizations"

# transformers.
CONV1D = "Conv1D"
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")  # as `model_type`
CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")  # in these models
BASE_NAME = "name_or_path"
MODELS_WITH_HEAD = re.compile(r".*(?:LMHeadModel|ForCausalLM|ForMaskedLM|ForConditionalGeneration|ForPreTraining)")

# How attention is computed: torch's kernel, the switch in a configuration, and whether a model has it; timm's switch.
SDPA, EAGER = "sdpa", "eager"
ATTENTION_SWITCH = "_attn_implementation_internal"
SUPPORTS_SDPA = "_supports_sdpa"
FUSED_SWITCH = "fused_attn"

TRANSFORMERS = "transformers"
# The ends of the names of its classes, with peft's word for the task.
TASK_CLASSES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}

# The library whose linear layers hold quantized weights.
QUANTIZING_LIBRARY = "bitsandbytes"
# Its module and the function in it that decides on a GPU whether a product is computed by 4-bit codes.
PRODUCT_BY_CODES = ("bitsandbytes.backends.cuda.ops", "_gemm_4bit_use_custom_fn")
# What its linear layers have in addition to those of torch. transformers adds the class that it replaced.
SOURCE_CLASS = "source_cls"
QUANTIZED_ATTRIBUTES = (
    *("compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu"),
    *("state", "index", SOURCE_CLASS),
)
# What a model of transformers, and its configuration, know of its quantization.
QUANTIZED_MODEL = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
QUANTIZED_CONFIG = ("quantization_config", "_is_quantized")
# Its list of what was done to the names and values of a checkpoint when it was loaded, which saving does in reverse.
CONVERSIONS = "_weight_conversions"
# Its names of modules that stay in fp32 whatever the dtype of the model.
KEPT_IN_FP32 = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")

# Libraries whose weight is a subclass of torch.Tensor. torchao leaves the layer as it is; quanto, which is a part of
# optimum, has a class of its own.
TENSOR_QUANTIZERS = ("torchao", "optimum")
QUANTO = "optimum"
QUANTIZING_LIBRARIES = (QUANTIZING_LIBRARY, QUANTO)  # with linear layers of their own
TERNARY_LINEAR = "AutoBitLinear"  # of transformers: it rounds its input, and its weight or scales its output
OUTPUT_QUANTIZATION = "activation_qtype"  # quanto's, an attribute of a layer

# Layers of other libraries that are adapters already, by library.
ADAPTER_LAYERS = {
    "peft": {"BaseTunerLayer"},
    "loralib": {"LoRALayer"},
    "adapters": {"AdapterLayerBase"},
    "litgpt": {"LoRALayer"},
    "torchtune": {"AdapterModule", "LoRALinear", "DoRALinear"},
    "lycoris": {"LycorisBaseModule"},
}

# Libraries whose classes are no models: their code is not read for what it does with weights.
FRAMEWORKS = frozenset({"torch", "lightning", "lightning_fabric", "pytorch_lightning", "lightning_lora", "builtins"})


def is_a(thing: object, *class_names: str) -> bool:
    """Whether ``thing`` is an instance of a class of one of these names, or of a sub-class of one.

    Example:
        >>> is_a(3, "int"), is_a(True, "int"), is_a(3, "str")
        (True, True, False)
    """
    return any(cls.__name__ in class_names for cls in type(thing).__mro__)


@cache
def adapter_library(cls: Any) -> str | None:
    """The library whose adapters are of the class ``cls``, or ``None`` if it is none of :data:`ADAPTER_LAYERS`."""
    libraries = ((base.__module__.partition(".")[0], base.__name__) for base in cls.__mro__)
    return next((library for library, name in libraries if name in ADAPTER_LAYERS.get(library, ())), None)


def is_from(cls: type, *libraries: str) -> bool:
    """Whether ``cls``, or a class that it derives from, is defined in one of ``libraries``."""
    return any(base.__module__.partition(".")[0] in libraries for base in cls.__mro__)


def is_compiled(module: Any) -> bool:
    """Whether ``torch.compile`` compiled ``module``: by a wrapper, or in place."""
    in_place = getattr(module, "_compiled_call_impl", None) or getattr(module, "_compiler_ctx", None)
    return hasattr(module, "_orig_mod") or in_place is not None


def checkpoints_reentrantly(module: Any) -> bool | None:
    """Whether ``module`` is set to checkpoint what is in it with ``use_reentrant=True``.

    Returns:
        ``None`` if it carries neither a flag, as of transformers or timm, nor that of torch's ``CheckpointWrapper``.
    """
    if getattr(module, "grad_checkpointing", None) is False or getattr(module, "gradient_checkpointing", None) is False:
        return False
    if getattr(module, "gradient_checkpointing", False) is True:
        keywords = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        return keywords.get("use_reentrant", True) is not False
    if hasattr(module, "checkpoint_impl"):
        return str(module.checkpoint_impl).endswith(".REENTRANT")
    return None
