"""Tests that `make test` leaves out and `make test-all` runs: the dearest ones, of what others cover, too."""

FAMILIES = ("Roberta", "DistilBert", "OPT", "Mistral", "Qwen2", "Qwen3", "Gemma", "Olmo2")

SLOW: dict[str, tuple[str, ...]] = {
    "test_what_can_be_held": FAMILIES,
    "test_a_uniform_plan_reloads": FAMILIES,
    "test_plain_transformers_loads_what_was_pruned": ("llama as mistral", "mistral", "vit"),
    "test_a_per_layer_folder_is_the_pruned_model": ("gpt2", "t5"),
    "test_padded_equals_masked": ("llama as mistral", "gpt2", "vit"),
    "test_plain_transformers_loads_a_padded_folder": ("llama as mistral",),
    "test_transformers_are_cut_and_proven_there": ("bert", "gpt2"),
    "test_prune_gives_what_it_does_on_the_cpu": ("distortion",),
    "test_every_prunable_group_can_be_cut": ("mobilevit",),
    "test_layers_run_on_another_device": ("bert", "mps-tied"),
    "test_layer_by_layer_gives_what_pruning_in_memory_gives": ("distortion", "tied-2147483648", "bert-1"),
    "test_rounds_give_what_rounds_in_memory_give": ("gpt2", "llama-1", "llama-2147483648"),
    "test_the_command_goes_on_where_it_was_stopped": ("",),
    "test_much_can_be_pruned_and_pruning_moves_the_output": ("",),
    "test_half_types_are_tuned_in_float32_and_twins_are_left_alone": ("",),
    "test_a_command_captures_its_model_once": ("sweep", "--reduce 0.2"),
    "test_a_folder_is_captured_once": ("sweep",),
    "test_a_compiled_language_model_is_asked_for_its_own_loss_at_many_lengths": ("",),
    "test_random_networks_masked_equals_pruned": ("2", "3", "4", "5", "6", "7", "8", "9"),
    "test_a_table_fits_the_terminal": ("160",),
    "test_seven_billion_parameters_in_no_memory_are_shown_as_in_the_guide": ("",),
    "test_the_command_in_two_processes_prunes_as_in_one": ("",),
    "test_the_other_commands_take_it": ("",),
    "test_a_pruned_network_is_cut_to_sizes_again": ("",),
    "test_under_one_threshold_for_all_layers_the_share_is_met_and_the_layers_differ": ("",),
    "test_a_family_is_made_and_resumed_bit_for_bit": ("",),
    "test_a_fresh_process_loads_with_cria_what_differs_by_layer": ("",),
    "test_the_tenth_compiled_fine_tune_of_a_class_is_compiled_too": ("",),
    "test_compiled_it_ends_where_it_does_uncompiled": ("",),
    "test_whole_experts_leave_with_their_router_rows": ("qwen", "olmoe", "gpt_oss", "jamba", "one group"),
    "test_a_model_with_fewer_experts_is_saved_and_pruned_again": ("",),
    "test_a_token_classifier_by_its_commands": ("",),
    "test_prune_recover_eval_and_prune_again": ("",),
    "test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere": ("",),
}
"""Name of a test -> parts of the names of its slow cases; the empty text is in all of them."""


def is_slow(name: str) -> bool:
    """Say whether a test is slow by its name, `test_it[case]`.

    >>> is_slow("test_what_can_be_held[Olmo2]"), is_slow("test_what_can_be_held[Bert]")
    (True, False)
    """
    test, _, case = name.partition("[")
    return any(part in case for part in SLOW.get(test, ()))
