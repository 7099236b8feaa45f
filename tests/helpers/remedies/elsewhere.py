"""Messages that need no case in the table: those whose remedy another test tries, and those that give no remedy."""

from __future__ import annotations

# By file and the first words: the test that does what the message says.
TRIED = {
    ("layers/registry.py", "is an {}, which computes with weights of -1, 0 and 1"): (
        "layers/quantized/test_quantized_tensors.py",
        "test_layers_that_would_round_an_update_are_refused_by_name",
    ),
    ("layers/registry.py", "has a weight that is a {}, which LoRA adapts only in linear layers"): (
        "layers/quantized/test_quantized_tensors.py",
        "test_a_layer_that_reads_its_weight_is_refused_by_name",
    ),
    ("trainer/checkpointing/base_weights.py", "is of {} in it and a {} here"): (
        "trainer/test_quantized_tensor_runs.py",
        "test_a_base_of_another_form_is_refused_by_name",
    ),
    ("trainer/compatibility.py", "{} averages every parameter, and the model has quantized weights"): (
        "trainer/test_quantized_tensor_runs.py",
        "test_an_average_of_codes_is_refused_by_name",
    ),
    ("trainer/watching/lost_gradients.py", "Quantize the weights alone"): (
        "trainer/watching/test_lost_gradients.py",
        "test_the_remedy_of_another_config_trains",
    ),
    ("trainer/watching/kept_layers.py", "`{}` was replaced during the run"): (
        "trainer/watching/test_kept_layers.py",
        "test_layers_that_setup_replaces_are_adapted",
    ),
    ("trainer/strategies/quantized.py", "`{}` is quantized by {}"): (
        "trainer/strategies/test_ddp.py",
        "test_quantized_weights_are_those_of_the_first_rank_on_all",
    ),
    ("files/renaming.py", "Of some models transformers writes other names"): (
        "model/quantized/test_flags.py",
        "test_a_model_whose_files_have_other_names_merges_into_a_copy_with_its_own",
    ),
    ("trainer/checkpointing/base_weights.py", "is quantized in it and plain here"): (
        "trainer/checkpointing/test_quantized_base.py",
        "test_a_quantized_base_is_not_copied",
    ),
    ("trainer/checkpointing/base_weights.py", "is of {} in it and quantized here"): (
        "trainer/checkpointing/test_quantized_base.py",
        "test_a_quantized_base_is_not_copied",
    ),
    ("cli/base_values.py", "`{}` was merged with the adapter at `{}` before"): (
        "cli/test_base_values.py",
        "test_a_merged_base_is_not_merged_with_the_same_adapter_again",
    ),
    ("cli/base_match.py", "`{}` is quantized, and its few bits"): (
        "cli/test_base_values.py",
        "test_a_quantized_base_is_refused_and_both_remedies_work",
    ),
    ("cli/dequantized_base.py", "`--dequantize` is for a base"): (
        "cli/test_dequantized_base.py",
        "test_a_base_in_full_precision_has_nothing_to_dequantize",
    ),
    ("cli/options.py", "OUT gets the same files as BASE"): ("cli/test_dequantized_base.py", "test_the_command"),
    ("analysis/sources.py", " A state dict has no scale"): (
        "analysis/test_sources.py",
        "test_a_state_dict_has_no_scale",
    ),
    ("analysis/sources.py", "`{}` is no PEFT directory."): (
        "analysis/test_sources.py",
        "test_a_checkpoint_by_its_state_dict_or_its_module",
    ),
    ("analysis/sources.py", "No layer is adapted on both sides."): (
        "analysis/test_sources.py",
        "test_an_attention_is_compared_through_a_model",
    ),
    ("analysis/updates.py", "{} has no LoRA adapters"): ("analysis/test_updates.py", "test_without_adapters"),
    ("analysis/updates.py", "{} has several adapters"): ("analysis/test_updates.py", "test_which_adapter"),
    ("analysis/updates.py", "`{}` has a quantized weight"): (
        "analysis/test_updates.py",
        "test_a_quantized_weight_in_pieces_is_refused_and_the_spectrum_can_be_taken",
    ),
    ("analysis/updates.py", "`{}` is on the meta device"): (
        "analysis/test_updates.py",
        "test_a_base_on_the_meta_device",
    ),
    ("cli/inspect_plot.py", "`{}`, the folder of {}, is no directory"): (
        "cli/test_inspect_plot.py",
        "test_refusals",
    ),
    ("cli/inspect_plot.py", "`{}` holds no A and B"): ("cli/test_inspect_plot.py", "test_a_method_without_pairs"),
    ("arguments.py", "`{}={}` and `dequantize=True` name two bases"): (
        "model/quantized/test_merge.py",
        "test_arguments_that_are_refused",
    ),
    ("arguments.py", "`{}` and `dequantize` say what adapters"): (
        "trainer/checkpointing/test_quantized_base.py",
        "test_arguments_that_contradict_each_other",
    ),
    ("model/mergeable.py", "`{}` is for a base that is quantized"): (
        "model/quantized/test_merge.py",
        "test_a_base_that_is_not_quantized_has_nothing_to_dequantize",
    ),
    ("model/merged_values.py", "`{}` is quantized, and its few bits"): (
        "model/quantized/test_merge.py",
        "test_the_state_dict_of_the_merged_model_is_the_plain_one",
    ),
    ("model/quantized/base_file.py", "`{}` of {} is not what this base was quantized from"): (
        "model/quantized/test_base_file.py",
        "test_another_model_is_refused_by_name",
    ),
    ("model/quantized/base_file.py", "{} has the layers of this model at {}"): (
        "model/quantized/test_base_file.py",
        "test_a_file_with_the_layers_at_two_places_is_refused",
    ),
    ("model/quantized/base_file.py", "{} cannot be read as weights"): (
        "model/quantized/test_base_file.py",
        "test_a_file_that_cannot_be_read_is_named",
    ),
    ("model/quantized/base_file.py", "{} holds adapters of a run"): (
        "model/quantized/test_base_file.py",
        "test_a_checkpoint_of_adapters_is_no_base",
    ),
    ("model/quantized/base_file.py", "{} has no tensor `{}`"): (
        "model/quantized/test_base_file.py",
        "test_another_model_is_refused_by_name",
    ),
    ("model/quantized/base_file.py", "`{}` of {} is of {}"): (
        "model/quantized/test_base_file.py",
        "test_another_model_is_refused_by_name",
    ),
    ("model/quantized/base_file.py", "`{}` of {} has shape {}"): (
        "model/quantized/test_base_file.py",
        "test_another_model_is_refused_by_name",
    ),
    ("model/quantized/merge.py", "`{}` of a {} is quantized, and only linear layers"): (
        "model/quantized/test_merge.py",
        "test_quantized_layers_that_are_no_linear_ones_are_refused_by_name",
    ),
    ("model/quantized/merge.py", "`{}` is a layer of quanto, which cannot become a plain one"): (
        "layers/quantized/test_quantized_tensors.py",
        "test_quanto_is_merged_in_the_model_in_full_precision",
    ),
    ("layers/quantized/packing.py", "{} of the model ran in evaluation"): (
        "layers/quantized/test_packing.py",
        "test_a_step_after_an_evaluation_has_the_gradients_of_the_dequantized_weights",
    ),
    ("layers/registry.py", "is quantized, and no code reads it"): (
        "layers/quantized/test_linear.py",
        "test_codes_that_are_to_train_are_refused_by_name",
    ),
    ("trainer/strategies/quantized.py", "`{}` stores its 4-bit weight as {}, and precision"): (
        "trainer/strategies/test_quantized.py",
        "test_codes_that_a_precision_would_cast_are_refused",
    ),
    ("trainer/strategies/quantized.py", "`{}` stores its 4-bit weight as {}, and {} shards"): (
        "trainer/strategies/test_quantized.py",
        "test_ranks_are_equal_and_a_run_resumes_bit_for_bit",
    ),
    ("trainer/optimizers.py", "`{}` trains in float16"): (
        "trainer/test_optimizers.py",
        "test_an_eps_that_is_zero_in_the_dtype_of_what_trains_is_refused",
    ),
    ("trainer/strategies/quantized.py", "`{}` is an 8-bit layer"): (
        "trainer/strategies/test_quantized.py",
        "test_ranks_are_equal_and_a_run_resumes_bit_for_bit",
    ),
    ("targets/problems.py", "`also_train` has {}, and the weight of"): (
        "layers/quantized/test_linear.py",
        "test_codes_that_are_to_train_are_refused_by_name",
    ),
    ("ops/dispatch.py", "A, B or W0 of a LoRA layer, needed for gradient"): (
        "ops/sums/test_weight_sums.py",
        "test_a_second_derivative_after_a_write_is_refused",
    ),
    ("ops/stacked.py", "A parameter of three dimensions"): (
        "layers/test_parameter.py",
        "test_a_stack_that_goes_through_an_autograd_function_gets_its_gradient",
    ),
    ("targets/resolve.py", "fuses query, key and value"): (
        "targets/test_role_names.py",
        "test_the_rows_of_a_fused_convolution_are_not_known",
    ),
    ("targets/left_alone.py", "'all' means linear layers"): (
        "targets/test_left_alone.py",
        "test_what_all_leaves_alone_is_said_with_a_remedy_that_works",
    ),
    ("targets/problems.py", "{} Take targets='attn'"): (
        "targets/test_role_names.py",
        "test_which_of_these_are_query_and_value_is_not_known",
    ),
    ("trainer/monitor.py", "LoRAMonitor logs to"): ("trainer/test_monitor.py", "test_without_a_logger"),
    ("trainer/monitor.py", "LoRAMonitor measures LoRA"): ("trainer/test_monitor.py", "test_without_adapters"),
    ("trainer/checkpointing/file_contents.py", "Files of this run are not small"): (
        "trainer/checkpointing/test_file_contents.py",
        "test_a_module_in_the_hyperparameters_is_named_and_the_remedy_works",
    ),
    ("trainer/checkpointing/from_checkpoint.py", "{} has a `load_from_checkpoint` of its own"): (
        "trainer/checkpointing/test_from_checkpoint.py",
        "test_a_class_with_a_loader_of_its_own",
    ),
    ("trainer/checkpointing/init_and_export.py", "`export={}` cannot be written: {} Leave `export` out"): (
        "trainer/checkpointing/test_init_and_export.py",
        "test_an_adapted_twin_that_moves_is_refused_in_the_first_steps",
    ),
    ("trainer/checkpointing/reading.py", "{} holds an object of {}"): (
        "trainer/test_trust.py",
        "test_an_object_in_a_file_is_named_and_the_remedy_works",
    ),
    ("trainer/end_of_fit.py", "Processes started by spawn or fork"): (
        "trainer/strategies/test_ddp.py",
        "test_forked_workers_do_not_merge_and_say_where_the_adapters_are",
    ),
    ("trainer/learning_rates.py", "; give what trains in full a group"): (
        "trainer/test_learning_rates.py",
        "test_following_the_advice_leaves_the_rate_of_a_head_alone",
    ),
    ("trainer/watching/nothing_trains.py", "`{}` is frozen, and an optimizer held it before"): (
        "trainer/watching/test_nothing_trains.py",
        "test_lora_on_one_of_two_networks",
    ),
    ("trainer/watching/nothing_trains.py", "Every gradient is exactly zero"): (
        "trainer/watching/test_nothing_trains.py",
        "test_a_frozen_head_of_zeros_is_named_and_the_remedy_trains",
    ),
    ("trainer/compatibility.py", "{} changes weights where code reads them"): (
        "trainer/test_subspace_callback.py",
        "test_two_processes_hold_one_z_and_shards_give_what_whole_weights_give",
    ),
    ("trainer/strategies/ddp.py", "`{}` got its gradient in several parts"): (
        "trainer/test_subspace_callback.py",
        "test_two_processes_hold_one_z_and_shards_give_what_whole_weights_give",
    ),
    ("trainer/watching/start_of_training.py", "`{}` or what it is tied to is adapted"): (
        "trainer/watching/test_frozen_watch.py",
        "test_an_adapted_weight_that_a_hook_ties_is_refused",
    ),
    ("trainer/watching/start_of_training.py", "`{}` is adapted, and was removed or parametrized"): (
        "trainer/watching/test_frozen_watch.py",
        "test_an_adapted_weight_that_a_hook_parametrizes_is_refused",
    ),
    ("trainer/watching/untrained_targets.py", "{} has the parameters of {}"): (
        "trainer/watching/test_untrained_targets.py",
        "test_a_teacher_that_tune_callback_means_is_named",
    ),
    ("trainer/watching/untrained_targets.py", "{} `targets` means {}, so adapters"): (
        "trainer/watching/test_untrained_targets.py",
        "test_a_teacher_is_named_and_the_advice_leaves_it",
    ),
}

# By file and the first words: why nothing is tried.
NOT_TRIED = {
    ("cli/options.py", "BASE is quantized by bitsandbytes"): "the help of an option",
    ("cli/quantized_weights.py", "`{}` of `{}` is quantized, and its parts do not fit"): "the file is damaged",
    ("model/quantized/base_file.py", "`{}` does not exist"): "needs a download; a directory is what others give",
    ("trainer/several/routed_callback.py", "{} gives an adapter that no sample used"): (
        "needs a DeepSpeed engine; the others are what two processes run"
    ),
    ("trainer/strategies/fsdp.py", "FSDPStrategy shards what is frozen"): "needs processes; both are what others run",
    ("trainer/strategies/fsdp.py", "`{}=True` cannot step"): "needs a sharded model; without it is what others run",
    (
        "layers/weight_view.py",
        "A weight of shape {} is sharded",
    ): "needs a sharded model; sharded rows are what others run",
    ("methods/subspace/sites.py", "`{}` cannot be projected: {}"): "needs what the next three need",
    ("methods/subspace/sites.py", "its few bits cannot be summed"): "needs bitsandbytes; without it is what others run",
    ("methods/subspace/sites.py", "FSDP1 or ZeRO 3 keeps it in pieces"): "needs processes, as the next",
    ("methods/subspace/sites.py", "tensor parallelism splits it"): "needs processes; without it is what others run",
    ("cli/options.py", "Add adapters to a model's weights"): "the help of a command",
    ("cli/options.py", "Compare two adapters, or two models"): "the help of a command",
    ("cli/options.py", "Make an adapter of a full fine-tune"): "the help of a command",
    ("cli/options.py", "Make a PEFT directory of a run's checkpoint"): "the help of a command",
    ("cli/options.py", "Make a checkpoint of a PEFT directory"): "the help of a command",
    ("model/report/plan.py", "and train in full"): "a part of a table",
    ("methods/base.py", "`{}` cannot be merged into the weights: leave"): "nothing is to be done",
    ("methods/base.py", "`{}` cannot be merged into the weights: save"): "the checkpoints of every run hold it",
    ("methods/plan.py", "and train in full"): "a part of a table",
    ("trainer/watching/liveness.py", ": name the weight itself"): "a part of a message that is tried",
    (
        "model/several/combine.py",
        "The adapters of `{}` are sharded",
    ): "needs two processes; take another model",
    (
        "model/initial_values.py",
        "`{}` is partitioned by ZeRO 3",
    ): "needs a DeepSpeed engine; the remedy is another model",
    ("model/quantized/merge.py", "`{}` is quantized and sharded"): "needs processes; one device is what others run",
    (
        "trainer/checkpointing/quantized_base.py",
        "`{}` makes quantized layers plain ones",
    ): "needs processes; one device is what others run",
    ("peft_format/attention.py", "peft {} wrote an adapter"): "the remedy is to look at outputs",
    ("peft_format/config.py", "it adapts parameters by name"): "merged by peft as in the cases of DoRA and of rows",
    ("peft_format/config.py", "it repeats layers of the base"): "needs a decoder of transformers; the run is a new one",
    (
        "peft_format/config.py",
        "it ties the adapters of two layers",
    ): "merged by peft as in the cases of DoRA and of rows",
    ("peft_format/placement.py", "`{}` {}. Load this adapter with peft."): "the remedy is peft's own loader",
    (
        "targets/resolve.py",
        "is called as a layer, and code around it",
    ): "tried for each layer in layers/test_weight_reads",
    (
        "trainer/checkpointing/base_weights.py",
        "is of {} in it and of {} here",
    ): "needs a layer of bitsandbytes",
    (
        "trainer/same_on_ranks.py",
        "`{}`{}{}. All processes must adapt alike",
    ): "needs processes; equal is what others run",
    (
        "trainer/strategies/fsdp.py",
        "{} was set up for FSDPStrategy",
    ): "needs processes; fresh is what others run",
    (
        "trainer/strategies/fsdp.py",
        "{} is wrapped in FullyShardedDataParallel already",
    ): "needs two processes, as above",
}
