"""LoRA for any existing LightningModule, by one callback.

``Trainer(callbacks=[LoRACallback(r=8, targets="attn")])`` adapts the module of any Lightning project, with no change to
its code; ``apply_lora(model, LoRAConfig(r=8))`` does the same to any ``nn.Module``, without a trainer.

The package is three rings, and a file imports from its own ring and those below.

Ring 0, the method: torch, Triton beside it, and the standard library.

    version              the version, which files tell
    config               what the user asks for, validated
    patterns             how a pattern names modules
    names                module names as the user wrote them, whatever wraps the modules
    quantized            weights in few bits: no matrix to read, a map to add to
    part                 which matrix of a layer a pair adapts: a parameter, some of its rows, a stack for experts
    initialization       where A starts
    op                   y + scale * B A x
    products             the products of which its nodes are made
    serving              where the kernels serve
    gated                an input that is a product, of which the factors are kept
    one_node             the frozen map and the term as one node
    dropped              the same with dropout inside
    adapter              A and B of one layer, a module of its own
    shared_input         the nodes of layers that read the same input
    reading              what those find of each other's work
    traced_input         the same while a compiler traces
    kernels              Triton kernels for passes over activations
    dropout_kernels      Triton kernels that draw a mask again
    layer                what every adapted layer is: the same object, its class swapped
    linear               nn.Linear
    transposed_linear    Hugging Face's Conv1D
    embedding            nn.Embedding
    embedding_bag        nn.EmbeddingBag
    conv                 nn.Conv1d, nn.Conv2d, nn.Conv3d
    transposed_conv      nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
    bilinear             nn.Bilinear
    on_weight            W0 + scale * B A in place of the weight, while code that is not ours reads it
    attention            nn.MultiheadAttention
    transformer          the fast paths of nn.TransformerEncoder and its layers
    recurrent            nn.LSTM, nn.GRU, nn.RNN and their cells
    experts              the same sum for many experts, never built
    on_read              any parameter by name, wherever it is read
    kinds                which layers can be adapted, by which class, and why others cannot
    source               the source of the user's classes
    raw_reads            whether code around a layer reads its weight instead of calling it
    fused                which rows of a fused projection are query, key and value
    roles                what the maps of a model do: attention, MLP, experts, routers, output heads
    siblings             which layers read the same input
    presets              what "attn", "qv", "mlp" and "all" mean on a model
    choice               what presets and patterns choose
    base_dtype           frozen weights in the dtype in which autocast computes
    targets              which matrices a configuration means, and what is wrong with it
    record               what is remembered on a module
    shared               which parameters several modules have
    sharded              parameters of which each rank holds a part
    replicas             gradients of what every rank has whole, averaged
    freeze               what trains
    checkpointing        reentrant activation checkpointing behind frozen layers
    loading              base checkpoints load into an adapted model
    originals            what of the base moves all the same
    adapter_loading      adapter state dicts load by a module's own load_state_dict
    apply                apply, remove and disable
    bits                 tensors compared by their bits
    exact                adding delta so that it can be taken away bit for bit
    merge                merge and unmerge
    merged_values        what a merged model would hold
    state                what belongs in a file
    fingerprint          which base an adapter belongs to
    table                rows of adapted matrices as text
    plan                 the dry run
    summary              the table at the start of a run
    gram                 norms of B A, and of the difference of two, without building it
    low_rank             the pair nearest to a matrix
    json_object          JSON files that hold an object
    architecture         the shapes of a transformer, from the numbers in its configuration
    skeleton             names and shapes as modules on the meta device
    costs                parameters and bytes, with LoRA and without

Ring 1, the world around it: one library or format each.

    random_state         the random generators of Python, NumPy and torch
    zero                 DeepSpeed's ZeRO optimizers, read and written as torch's
    merged_file          a merged model as one safetensors file, written tensor by tensor
    tensor_file          safetensors files read some rows at a time, and copied with other values
    weights_on_disk      a model in safetensors files, one or several
    adapter_on_disk      a PEFT directory, without a model
    tied                 tied weights, told from files
    targets_on_disk      which tensors of a base in files an adapter changes
    output               files and directories that appear when they are whole
    merge_files          merge from files to files
    diff_files           two adapters or two models compared
    extract              an adapter from a full fine-tune
    plan_files           the dry run without a model
    safe_file            files read as from a stranger, written whole or not at all
    provenance           where an adapter comes from, told in its file
    peft_config          PEFT's adapter_config.json
    peft_checks          what of it is read, and what is refused
    peft_targets         which modules peft means by it
    peft_layers          A and B of one layer as PEFT has them
    peft_contents        what a model puts into a PEFT directory
    peft_loading         such a directory onto a model
    peft_files           save_adapter and load_adapter

Ring 2, Lightning.

    lightnings           lightning.pytorch and pytorch_lightning
    compatibility        what goes together with the callback, and what does not
    wraps                methods replaced for the length of a run
    optimizers           the user's optimizers, restricted
    rates                lr_scale, through every scheduler
    checkpoints          files of a run
    liveness             adapters that do not run, or get no gradient
    strategies           what each strategy needs: one device and DDP, FSDP1, FSDP2
    deepspeed            the same for DeepSpeed
    exchange             adapters into a run and out of it
    files                between the module and its files
    from_checkpoint      a file back into a module, without a Trainer
    run                  one run over a module
    callback             LoRACallback
    inspect_files        what an adapter's files hold
    checkpoint_files     a run's checkpoint to a PEFT directory, and back
    reports              what the commands found, as text and as data
    command_options      what lightning-lora takes
    command_line         lightning-lora
    __main__             python -m lightning_lora
"""

from lightning_lora.apply import apply_lora, disable_lora, remove_lora
from lightning_lora.callback import LoRACallback
from lightning_lora.config import LoRAConfig
from lightning_lora.from_checkpoint import load_from_checkpoint
from lightning_lora.merge import merge_lora, unmerge_lora
from lightning_lora.peft_files import load_adapter, save_adapter
from lightning_lora.plan import plan_lora
from lightning_lora.state import load_lora_state_dict, lora_parameters, lora_state_dict
from lightning_lora.version import __version__ as __version__

__all__ = [
    "LoRACallback",
    "LoRAConfig",
    "apply_lora",
    "disable_lora",
    "load_adapter",
    "load_from_checkpoint",
    "load_lora_state_dict",
    "lora_parameters",
    "lora_state_dict",
    "merge_lora",
    "plan_lora",
    "remove_lora",
    "save_adapter",
    "unmerge_lora",
]
