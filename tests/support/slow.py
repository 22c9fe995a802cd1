"""Tests that `make test` leaves out and `make test-all` runs: the dearest ones, of what others cover, too."""

FAMILIES = ("Phi3", "Roberta", "DistilBert", "OPT", "Mistral", "Qwen2", "Qwen3", "Gemma", "Olmo2")

SLOW: dict[str, tuple[str, ...]] = {
    "test_what_can_be_held": FAMILIES,
    "test_a_uniform_plan_reloads": FAMILIES,
    "test_plain_transformers_loads_what_was_pruned": ("llama as mistral", "mistral", "vit"),
    "test_a_per_layer_folder_is_the_pruned_model": ("gpt2", "t5", "mistral"),
    "test_padded_equals_masked": ("llama as mistral", "gpt2", "vit", "t5"),
    "test_plain_transformers_loads_a_padded_folder": ("llama as mistral",),
    "test_transformers_are_cut_and_proven_there": ("bert", "gpt2", "mps-llama-True"),
    "test_prune_gives_what_it_does_on_the_cpu": ("distortion", "taylor", "True-2048"),
    "test_every_prunable_group_can_be_cut": ("mobilevit",),
    "test_layers_run_on_another_device": ("bert", "mps-tied"),
    "test_layer_by_layer_gives_what_pruning_in_memory_gives": ("distortion", "tied-2147483648", "bert-1"),
    "test_rounds_give_what_rounds_in_memory_give": ("gpt2", "llama-1", "llama-2147483648", "tied-1"),
    "test_the_command_goes_on_where_it_was_stopped": ("",),
    "test_an_interrupted_pruning_goes_on_with_the_same_bits": ("",),
    "test_after_a_sigkill_the_same_bits_come_out_and_no_finished_turn_is_recorded_again": ("",),
    "test_a_folder_that_was_nearer_as_cut_is_put_back": ("",),
    "test_two_processes_give_what_one_gives": ("",),
    "test_a_run_keeps_what_its_report_needs": ("",),
    "test_after_a_sigkill_the_same_bits_come_out_and_no_finished_round_is_run_again": ("",),
    "test_a_result_is_pruned_again_in_rounds_and_its_plan_is_of_the_dense_model": ("",),
    "test_run_and_eval_llama": ("",),
    "test_the_command_prunes_a_folder_in_rounds": ("",),
    "test_a_part_of_the_digits_suite_runs_whole": ("",),
    "test_shards_and_tokenizer_load_where_cria_cannot_be_imported": ("",),
    "test_every_setting_that_is_read_changes_the_scores": ("",),
    "test_any_size_is_what_one_round_gives_and_nothing_is_recorded": ("taylor", "distortion"),
    "test_a_wrong_cut_is_seen_and_shrunk": ("",),
    "test_prune_by_scores_is_one_round_of_prune": ("",),
    "test_without_matplotlib_it_prunes_and_says_what_draws": ("",),
    "test_a_dispatched_model_is_recorded_and_scored_as_in_memory": ("tied",),
    "test_a_result_is_pruned_again_and_its_plan_is_of_the_dense_model": ("",),
    "test_the_usual_sizes_that_are_beyond_reach_are_left_out": ("",),
    "test_an_ablation_of_a_checkpoint_scores_what_is_there": ("",),
    "test_what_a_sweep_cuts_is_what_prune_cuts_alone": ("",),
    "test_much_can_be_pruned_and_pruning_moves_the_output": ("",),
    "test_half_types_are_tuned_in_float32_and_twins_are_left_alone": ("",),
    "test_a_command_captures_its_model_once": ("sweep", "--reduce 0.2"),
    "test_a_folder_is_captured_once": ("sweep",),
    "test_a_compiled_language_model_is_asked_for_its_own_loss_at_many_lengths": ("",),
    "test_random_networks_masked_equals_pruned": ("1", "2", "3", "4", "5", "6", "7", "8", "9"),
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
