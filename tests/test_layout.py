"""Where tests are: a file for every source file, of the same name; toy models and shared code in the helpers."""

from __future__ import annotations

import re
from pathlib import Path

import lightning_lora

PACKAGE, TESTS = Path(lightning_lora.__file__).parent, Path(__file__).parent
SOURCES = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")) if not path.name.startswith("__")]
TEST_FILES = sorted(TESTS.rglob("test_*.py"))

# Source files without a test file of their name: which file tests them, and why there.
ELSEWHERE = {
    "model/quantized/live": ("layers/quantized/test_devices", "each of what it does has a test file in that folder"),
    "arguments": ("test_config", "the configurations show what its checks refuse"),
    "methods/base": ("methods/test_lora", "an abstract class is tested by its methods"),
    "methods/adapt": ("methods/test_life_of_a_run", "every method is put on and taken off by the two verbs"),
    "methods/recorded": ("methods/test_added", "the smallest method has nothing else"),
    "methods/plan": ("methods/test_life_of_a_run", "what it counts is what then trains"),
    "methods/known": ("methods/test_life_of_a_run", "files of every method are read there"),
    "methods/tune/method": ("methods/test_life_of_a_run", "its answers are those of a run"),
    "trainer/tune_callback": ("methods/test_life_of_a_run", "every callback goes through one table of cases"),
    "methods/added_config": ("methods/test_added", "the smallest method shows its arguments"),
    "methods/bottleneck/places": ("methods/bottleneck/test_layer", "its classes call a bottleneck"),
    "methods/fast_paths": ("methods/bottleneck/test_method", "a method is bypassed there or is not"),
    "model/merge_layer": ("model/test_merge", "the verbs merge layer by layer"),
    "targets/problems": ("targets/test_resolve", "its sentences are the errors of resolving"),
    "layers/sums/group": ("layers/sums/test_summed_weight", "its layers read the sums"),
    "layers/sums/members": ("layers/sums/test_summed_weight", "a group is made of them"),
    "layers/sums/reading": (
        "layers/sums/test_summed_weight_around",
        "compiled, traced, and chosen sums are read by it",
    ),
    "layers/sums/sizes": ("layers/sums/test_summed_weight_around", "which layers of a group are summed"),
    "torch_internals": ("ops/test_linear", "the ops ask it"),
    "trainer/method_callback": ("trainer/test_callback", "LoRACallback is one"),
    "trainer/batches/each_batch": ("trainer/batches/test_segments", "segments are set for each batch"),
    "trainer/strategies/fsdp": ("trainer/strategies/test_base", "the strategies are run by one table"),
    "distributed/deepspeed_optimizer": ("trainer/strategies/test_deepspeed", "its input is a DeepSpeed engine"),
    "distributed/sharded": ("trainer/strategies/test_sharded_edges", "its input is a model that a strategy sharded"),
    "foreign": ("trainer/test_compatibility", "each name is tried where it is asked for"),
    "files/safetensors_writing": ("trainer/strategies/test_sharded_edges", "it writes what no process holds whole"),
    "files/pickle_values": ("files/test_torch_files", "a pickle comes in a file of torch.save"),
    "files/pickles": ("files/test_torch_files", "a pickle comes in a file of torch.save"),
    "layers/attention_formula": ("layers/test_attention", "it must equal torch's layer, case by case"),
    "layers/base": ("layers/test_protocol", "it is what all adapted layers have in common"),
    "layers/merged_forward": ("layers/test_protocol", "it is how layers run that read their own weight"),
    "layers/restoring": ("model/test_journal", "it is interrupted with the verbs"),
    "layers/registry": ("layers/test_linear", "its refusals are those of `apply_lora`"),
    "layers/source_code": ("layers/test_weight_reads", "it is read to answer whether a weight is read"),
    "layers/weight_view": ("targets/test_fused_qkv", "its rows are those of query, key and value"),
    "model/freeze": ("model/test_apply", "`apply_lora` freezes"),
    "model/record": ("model/test_merge", "the record is what a merge leaves, for an exact unmerge"),
    "model/mergeable": ("model/test_merge", "its refusals are those of `merge_lora`"),
    "model/quantized/packed": (
        "model/quantized/test_merge",
        "a merge makes layers plain, and its undoing packs them",
    ),
    "model/several/combined_config": ("model/several/test_combine", "a combination has its configuration"),
    "model/several/common_form": ("model/several/test_combine", "what is combined is in one form"),
    "model/several/trained_in_addition": ("model/several/test_one_adapter", "it goes with one adapter"),
    "model/several/recipe": ("model/several/test_combine", "its checks are those of the verb"),
    "model/report/table": ("model/report/test_summary", "the table is what the summary prints"),
    "ops/compiled_input": ("ops/test_shared_input", "it must equal the eager op, under a compiler"),
    "ops/dispatch": ("ops/test_linear", "which op runs is told by its values and gradients"),
    "ops/fused_linear": ("ops/test_linear", "it must equal the plain formula, case by case"),
    "ops/gated_kernels": ("ops/test_kernels", "all Triton kernels need a GPU or the interpreter"),
    "ops/fused_embedding": ("layers/test_embedding", "it must equal the plain formula, case by case"),
    "ops/dropout_kernels": ("ops/test_kernels", "all Triton kernels need a GPU or the interpreter"),
    "ops/embedding_kernels": ("ops/test_kernels", "all Triton kernels need a GPU or the interpreter"),
    "ops/mixed_products": ("ops/test_mixed_linear", "the op multiplies with them"),
    "layers/mixed/copies": ("layers/mixed/test_linear", "outputs of layers show whether a copy is stale"),
    "ops/mixture": ("ops/test_mixed_linear", "the op multiplies what it puts side by side"),
    "ops/products": ("ops/test_linear", "its products are those of the op, forward and backward"),
    "ops/stacked": ("layers/test_parameter", "stacks of experts are parameters by name"),
    "ops/packed/four_bit_kernels": ("ops/test_kernels", "all Triton kernels need a GPU or the interpreter"),
    "ops/sums/sum_kernels": ("ops/sums/test_plan", "a plan launches them"),
    "patterns/cost": ("patterns/test_expression", "what costs too much is refused there"),
    "peft_format/contents": ("peft_format/test_peft_files", "peft's outputs are the oracle, of whole directories"),
    "peft_format/placement": ("peft_format/test_peft_files", "peft's outputs are the oracle, of whole directories"),
    "peft_format/config_writer": ("peft_format/test_config", "what is written is read again, by peft too"),
    "peft_format/inner": ("peft_format/test_peft_files", "peft's outputs are the oracle, of whole directories"),
    "peft_format/layers": ("peft_format/test_peft_files", "peft's outputs are the oracle, of whole directories"),
    "peft_format/load": ("peft_format/test_peft_files", "peft's outputs are the oracle, of whole directories"),
    "peft_format/provenance": ("peft_format/test_peft_files", "it stands in the header of a saved file"),
    "peft_format/save": ("peft_format/test_peft_files", "peft's outputs are the oracle, of whole directories"),
    "peft_format/targets": ("peft_format/test_config", "it reads what a configuration names"),
    "peft_format/vllm": ("peft_format/test_peft_files", "what is written for vLLM is loaded by peft too"),
    "cli/import_directory": ("cli/test_convert", "what is exported is imported again"),
    "cli/combined_changes": ("cli/test_merge", "the merged files show what changes"),
    "cli/options": ("test_public_names", "the options are part of the public surface"),
    "targets/roles": ("targets/test_select", "a role is seen by what a preset chooses"),
    "trainer/checkpointing/base_weights": (
        "trainer/checkpointing/test_from_checkpoint",
        "a base is given to `load_from_checkpoint`",
    ),
    "trainer/checkpointing/best": ("trainer/test_end_of_fit", "the best checkpoint is loaded for the merge"),
    "trainer/checkpointing/contents": ("trainer/test_checkpoints", "its files are those of a run"),
    "trainer/checkpointing/reading": ("trainer/test_checkpoints", "its files are those of a run"),
    "trainer/checkpointing/files_at_end": (
        "trainer/checkpointing/test_merged_file",
        "it asks the writers of each file",
    ),
    "trainer/strategies/selection": ("trainer/strategies/test_base", "the strategies are run by one table"),
    "trainer/watching/first_steps": ("trainer/watching/test_frozen_watch", "each watch has a file of its own"),
    "trainer/checkpointing/checkpoint_io": ("trainer/test_checkpoints", "its files are those of a run"),
    "trainer/watching/frozen_facts": (
        "trainer/watching/test_frozen_watch",
        "its names are those that the watch gives to files",
    ),
    "trainer/watching/start_of_training": (
        "trainer/watching/test_frozen_watch",
        "what is frozen is watched from the first batch on",
    ),
    "trainer/imports": ("trainer/test_compatibility", "both packages of Lightning take the callback"),
    "version": ("test_public_names", "the version is the changelog's"),
}


def test_every_source_file_has_a_test_file_of_its_name_or_a_reason():
    for source in SOURCES:
        name = source.with_suffix("").as_posix()
        own = TESTS / source.with_name(f"test_{source.name}")
        if name not in ELSEWHERE:
            assert own.exists(), f"write {own}, or say in ELSEWHERE which file tests it and why"
            continue
        file, reason = ELSEWHERE[name]
        assert not own.exists(), f"{name} has a test file of its own: delete its entry in ELSEWHERE"
        assert (TESTS / f"{file}.py").exists() and reason, name


def test_reasons_are_of_files_that_exist():
    assert ELSEWHERE.keys() <= {source.with_suffix("").as_posix() for source in SOURCES}


def test_no_test_file_imports_from_another():
    for path in TEST_FILES:
        modules = re.findall(r"^ *(?:from|import) (tests\b[.\w]*)", path.read_text(), re.MULTILINE)
        assert all(module.startswith("tests.helpers") for module in modules), path


def test_no_toy_model_is_defined_twice():
    """Names that say nothing of what a model is for."""
    owners = {}
    for path in sorted(TESTS.rglob("*.py")):
        for name in re.findall(r"^class (Attention|Block|Net)\((?!\))", path.read_text(), re.MULTILINE):
            owners.setdefault(name, []).append(path.name)
    assert owners == {"Attention": ["models.py"], "Block": ["models.py"], "Net": ["models.py"]}
