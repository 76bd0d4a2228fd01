"""What goes wrong in systems of this kind, and the tests that would turn red if it did here.

Shown by docs/RELIABILITY.md, which `python tests/reliability.py` makes.
"""

from __future__ import annotations

from typing import NamedTuple


class Hazard(NamedTuple):
    """Something that goes wrong in such systems.

    tests    ids of tests, from `tests/` on
    open     what of it none of these tests shows
    """

    name: str
    tests: tuple[str, ...]
    open: str = ""


KERNELS = (
    Hazard(
        "A token, page or partition is left out, or is another's",
        (
            "support/attention_suite.py::test_needle_at_every_page_and_partition_edge",
            "gpu/test_attention.py::test_needles_in_long_contexts",
            "test_fuzz.py::test_random_cases",
            "gpu/test_fuzz.py::test_random_cases",
        ),
    ),
    Hazard(
        "The offset of an element wraps at 2^31: another's memory is read or written",
        (
            "gpu/test_large_pool.py::test_a_pool_of_more_elements",
            "gpu/test_large_pool.py::test_slots_past_as_many_elements",
            "gpu/test_block_ops.py::test_copies_and_swaps_past_two_to_the_31_elements",
            "gpu/test_block_ops.py::test_gathers_past_two_to_the_31_elements",
            "gpu/test_block_ops.py::test_layouts_past_two_to_the_31_elements",
            "gpu/test_large_pool.py::test_slots_of_latents_past_as_many_elements",
            "gpu/test_large_pool.py::test_states_of_more_elements",
            "gpu/test_large_pool.py::test_states_far_apart",
            "gpu/test_large_pool.py::test_conversions_of_more_elements",
        ),
    ),
    Hazard(
        "Block ids are widened to 64 bits, and strides or scratch offsets are not",
        (
            "test_attention_plan.py::test_strides_past_two_to_the_32_elements_reach_the_kernel_whole",
            "test_compile.py::test_kernels_are_told_distances_in_64_bits",
            "test_compile.py::test_params_have_the_layout_that_python_packs",
            "gpu/test_large_pool.py::test_blocks_far_apart",
            "gpu/test_large_pool.py::test_scratch_of_more_than_two_to_the_31_elements",
        ),
    ),
    Hazard(
        "Block ids are cut to 16 bits",
        (
            "gpu/test_large_pool.py::test_block_ids_around_two_to_the_16",
            "gpu/test_large_pool.py::test_a_pool_of_more_elements",
            "gpu/test_large_pool.py::test_slots_past_as_many_elements",
        ),
    ),
    Hazard(
        "NaN behind a sequence's end, or in blocks of nobody, reaches a result by way of 0 * NaN",
        (
            "support/attention_suite.py::test_dead_slots_and_wild_ids_change_nothing",
            "test_reference.py::test_poison_changes_no_bit",
            "support/kv_cache_suite.py::test_random_story_through_attention",
        ),
    ),
    Hazard(
        "A mask hides the NaN of a live token, or spreads it to other rows and heads",
        (
            "support/attention_suite.py::test_nan_stays_with_its_row_and_head",
            "support/attention_suite.py::test_nan_that_block_sparsity_hides_from_a_head",
            "support/merge_suite.py::test_nan_stays_with_its_token_and_head",
        ),
    ),
    Hazard(
        "Infinity minus infinity where nothing was attended to, or a finite number in its place",
        (
            "support/attention_suite.py::test_block_sparsity_that_leaves_no_token",
            "support/merge_suite.py::test_an_empty_side_is_selected_away",
            "support/merge_suite.py::test_lse_far_from_zero",
            "support/attention_suite.py::test_large_logits",
        ),
    ),
    Hazard(
        "Sequences of no token are left unwritten, or a launch of no block fails",
        (
            "support/attention_suite.py::test_rows_without_tokens_are_zero",
            "support/attention_suite.py::test_an_empty_batch",
            "support/attention_suite.py::test_a_table_without_columns",
            "support/merge_suite.py::test_counts",
            "support/cache_suite.py::test_skipped_tokens_change_nothing",
            "support/gather_suite.py::test_nothing_to_gather",
        ),
    ),
    Hazard(
        "Padding rows of a CUDA graph read what an older step left, or write at slot -1",
        (
            "gpu/test_graphs.py::test_ten_thousand_replays",
            "gpu/test_graphs.py::test_attention",
            "gpu/test_graphs.py::test_cache_writers",
            "gpu/test_kv_cache.py::test_decode_steps_replayed_from_a_graph",
            "support/cache_suite.py::test_key_may_be_longer_than_slot_mapping",
        ),
    ),
    Hazard(
        "Long contexts need more shared memory than a chip has",
        (
            "test_prepared.py::test_shared_memory_does_not_grow_with_the_context",
            "test_compile.py::test_kernels_compile_without_spills",
            "gpu/test_attention.py::test_a_million_tokens",
            "gpu/test_attention.py::test_long_contexts_with_little_shared_memory",
        ),
    ),
    Hazard(
        "`max_seq_len` is an estimate: too high it changes results, too low it overruns scratch",
        (
            "support/attention_suite.py::test_the_estimate_of_max_seq_len_changes_no_bit",
            "support/attention_suite.py::test_rows_longer_than_max_seq_len_are_nan",
            "support/attention_suite.py::test_rows_longer_than_their_table_are_nan",
            "support/attention_suite.py::test_what_an_estimate_leaves_out_is_nan_and_the_rest_is_whole",
            "gpu/test_bitwise.py::test_estimates_and_widths_change_no_bit",
            "gpu/test_graphs.py::test_rows_that_outgrow_their_estimate_in_a_replay",
        ),
    ),
    Hazard(
        "Block ids out of range are followed",
        (
            "support/attention_suite.py::test_dead_slots_and_wild_ids_change_nothing",
            "support/checked_suite.py::test_blocks",
            "support/checked_suite.py::test_what_is_not_live_may_be_anything",
            "test_attention.py::test_a_live_block_outside_the_cache_is_named",
            "gpu/test_checked_mode.py::test_a_fault_ends_its_process_and_no_other",
        ),
        "outside of checked mode, wrong ids that lead to memory of others: it is read",
    ),
    Hazard(
        "Slots, blocks and pairs out of range are written",
        (
            "gpu/test_cache_ops.py::test_slots_past_the_end_are_skipped",
            "gpu/test_block_ops.py::test_slots_past_the_end_are_skipped",
            "gpu/test_block_ops.py::test_pairs_past_the_end_are_skipped",
            "support/checked_suite.py::test_slots",
            "support/checked_suite.py::test_copied_blocks",
        ),
    ),
    Hazard(
        "Strided queries and caches are read as if they were contiguous",
        (
            "test_attention.py::test_matches_oracle",
            "gpu/test_attention.py::test_matches_oracle",
            "test_attention_plan.py::test_the_kernel_is_told_where_everything_is",
            "test_prepared.py::test_a_good_change_is_seen",
            "support/block_suite.py::test_all_layers_of_one_allocation",
        ),
    ),
    Hazard(
        "FP8 scales are exchanged, lost or applied twice",
        (
            "gpu/test_attention.py::test_matches_oracle",
            "support/attention_suite.py::test_scales_as_one_element_arrays",
            "support/cache_suite.py::test_written_tokens_are_attended",
            "support/gather_suite.py::test_dequantises",
            "support/kv_cache_suite.py::test_random_story_through_attention",
        ),
    ),
    Hazard(
        "FP8 writes round twice, multiply by a reciprocal, or make NaN of what is too large",
        (
            "support/cache_suite.py::test_quotients_that_are_ties_round_to_even",
            "support/cache_suite.py::test_quantised_infinities_saturate_and_nan_stays",
            "support/cache_suite.py::test_every_half_to_float8",
            "support/cache_suite.py::test_float32_is_rounded_once",
        ),
    ),
    Hazard(
        "ALiBi counts distances from the wrong token, or with the wrong sign or slope",
        (
            "test_reference.py::test_alibi",
            "test_attention.py::test_lengths_around_partitions",
            "gpu/test_attention.py::test_matches_oracle",
        ),
    ),
    Hazard(
        "Only some numbers of query heads per KV head work",
        (
            "test_support.py::test_every_axis_of_the_cases_is_covered",
            "test_support.py::test_every_axis_of_the_cases_for_tensor_cores_is_covered",
            "gpu/test_attention.py::test_matches_oracle",
            "test_errors.py::test_a_bad_call_is_refused_and_writes_nothing",
        ),
    ),
    Hazard(
        "Only some head sizes work, and others fail in the compiler",
        (
            "test_support.py::test_every_axis_of_the_cases_is_covered",
            "gpu/test_attention.py::test_matches_oracle",
            "test_errors.py::test_a_bad_call_is_refused_and_writes_nothing",
        ),
    ),
    Hazard(
        "A row's bits depend on the other rows, or on the size of the device",
        (
            "gpu/test_bitwise.py::test_a_row_has_the_same_bits_in_any_batch",
            "gpu/test_bitwise.py::test_a_smaller_device_gives_the_same_bits",
            "gpu/test_bitwise.py::test_the_placement_of_blocks_changes_no_bit",
            "support/attention_suite.py::test_row_alone_has_the_bits_it_has_in_a_batch",
        ),
    ),
    Hazard(
        "Scratch or shared memory of an earlier launch is read, or a barrier is missing",
        (
            "gpu/test_bitwise.py::test_many_runs_give_the_same_bits",
            "gpu/test_graphs.py::test_ten_thousand_replays",
            "gpu/test_streams.py::test_concurrent_streams_do_not_disturb_each_other",
            "support/attention_suite.py::test_scratch_of_v2",
            "test_counters.py::test_every_call_in_a_graph_has_counters_of_its_own",
            "gpu/test_shared_memory.py::test_kernels_do_find_what_others_left",
            "gpu/test_shared_memory.py::test_attention",
            "gpu/test_shared_memory.py::test_gather",
            "gpu/test_shared_memory.py::test_convert_layout",
            "gpu/test_shared_memory.py::test_merge",
        ),
        "that the `__syncwarp` before a warp's signal is there; compute-sanitizer is a command, "
        "`python tests/sanitize.py`",
    ),
    Hazard(
        "States of partitions are rounded to half precision, so that errors grow with their number",
        (
            "test_prepared.py::test_scratch_is_cut_into_pieces_that_follow_each_other",
            "gpu/test_attention.py::test_long_contexts",
            "gpu/test_bitwise.py::test_every_operator_gives_the_same_bits",
        ),
    ),
    Hazard(
        "Kernels get a double where they read a float, or a field one place further",
        (
            "test_compile.py::test_params_have_the_layout_that_python_packs",
            "test_attention_plan.py::test_the_kernel_is_told_where_everything_is",
            "test_prepared.py::test_each_array_is_where_its_kernel_looks_for_it",
        ),
    ),
    Hazard(
        "Flushed subnormals, or a little added to sums, become part of results",
        (
            "support/attention_suite.py::test_one_token_gives_its_value_bit_by_bit",
            "support/attention_suite.py::test_bfloat16_queries_beyond_the_range_of_float16",
            "support/cache_suite.py::test_every_code_to_float",
            "test_errors.py::test_a_bad_call_is_refused_and_writes_nothing",
        ),
    ),
    Hazard(
        "Block-sparse patterns shift by a block, or by the heads of a rank",
        (
            "test_support.py::test_block_sparse_rule_by_hand",
            "test_reference.py::test_block_sparse",
            "gpu/test_attention.py::test_matches_oracle",
        ),
    ),
    Hazard(
        "An op overwrites what it reads",
        (
            "test_errors.py::test_a_bad_call_is_refused_and_writes_nothing",
            "test_overlap.py::test_random_arrays_share_what_their_elements_share",
        ),
    ),
    Hazard(
        "A wrong call runs, or its error does not say what is wrong",
        (
            "test_errors.py::test_a_bad_call_is_refused_and_writes_nothing",
            "test_errors.py::test_the_table_is_long",
        ),
    ),
)

COMPILATION = (
    Hazard(
        "An edited header meets an old binary",
        (
            "test_kernel_cache.py::test_an_edited_header_never_meets_an_old_binary",
            "test_kernel_cache.py::test_what_else_a_binary_depends_on",
            "gpu/test_kernel_cache.py::test_an_edited_header_is_compiled_and_what_it_was_is_found_again",
        ),
    ),
    Hazard(
        "A later process compiles again",
        (
            "test_kernel_cache.py::test_what_was_compiled_once_is_found",
            "gpu/test_kernel_cache.py::test_a_second_process_compiles_nothing",
        ),
    ),
    Hazard(
        "Processes that start together spoil the cache, or wait for one that died",
        (
            "test_kernel_cache.py::test_processes_that_start_together_need_no_lock",
            "test_kernel_cache.py::test_writers_of_one_entry_do_not_disturb_each_other",
            "test_kernel_cache.py::test_a_process_that_is_killed_while_it_writes_harms_nobody",
            "gpu/test_kernel_cache.py::test_processes_that_start_together_are_all_right",
        ),
        "file systems of a network",
    ),
    Hazard(
        "An import, or an op, needs a home directory that can be written",
        (
            "test_package.py::test_host_arrays_need_no_home",
            "test_info.py::test_unusable_home_names_the_variable",
            "test_kernel_cache.py::test_a_process_without_a_cache_compiles_and_says_so_once",
            "test_kernel_cache.py::test_a_folder_that_is_missing_is_made",
            "test_kernel_cache.py::test_a_write_that_fails_leaves_nothing_behind",
            "gpu/test_kernel_cache.py::test_where_nothing_can_be_kept_ops_run_and_say_so_once",
        ),
    ),
    Hazard(
        "A damaged entry of the cache is loaded, or stays",
        (
            "test_kernel_cache.py::test_a_damaged_entry_is_compiled_again_and_mended",
            "test_kernel_cache.py::test_a_folder_in_the_place_of_an_entry_is_left_there",
            "gpu/test_kernel_cache.py::test_a_damaged_entry_is_compiled_again",
        ),
    ),
    Hazard(
        "NVRTC is newer than the driver, whose refusal says nothing of that",
        (
            "test_loading.py::test_an_image_that_the_driver_refuses",
            "test_loading.py::test_a_driver_older_than_cupy_is_refused_before_it_is_asked",
            "test_info.py::test_nvrtc_newer_than_the_driver_is_named",
            "test_info.py::test_a_driver_that_is_too_old_is_named",
        ),
    ),
    Hazard(
        "What pip installs lacks headers of CUDA, or NVRTC",
        (
            "test_kernel_cache.py::test_kernels_need_no_header_of_cuda",
            "test_kernel_cache.py::test_a_process_without_nvrtc_is_told_what_to_install",
            "test_package.py::test_installed_wheel_finds_its_sources",
            "test_requirements.py::test_what_fits_stays_and_all_else_goes",
        ),
    ),
    Hazard(
        "Kernels do not compile for a chip, or spill registers there",
        (
            "test_compile.py::test_kernels_compile_without_spills",
            "test_kernel_cache.py::test_a_chip_that_nvrtc_does_not_know_gets_ptx",
            "test_kernel_cache.py::test_a_chip_too_old_for_nvrtc_is_named",
            "gpu/test_attention.py::test_matches_oracle_on_the_paths_of_older_chips",
            "gpu/test_attention.py::test_matches_oracle_on_the_paths_of_an_ampere",
            "gpu/test_attention.py::test_matches_oracle_with_little_shared_memory",
        ),
        "runs on other chips: their code paths are run on the one of the last run",
    ),
    Hazard(
        "What was set up for one device is used on another",
        (
            "test_loading.py::test_each_device_loads_a_kernel_for_itself_once",
            "test_loading.py::test_every_device_is_asked_for_shared_memory_of_its_own",
            "test_prepared.py::test_devices_and_streams_are_told_apart",
            "gpu/test_devices.py::test_attention",
            "gpu/test_devices.py::test_the_device_may_be_the_current_one_and_the_other_by_turns",
        ),
    ),
    Hazard(
        "Threads that call first compile many times; children of a fork use CUDA, or hang",
        (
            "test_loading.py::test_threads_that_need_a_kernel_first_compile_it_once",
            "test_loading.py::test_cuda_that_was_used_before_a_fork_is_refused_in_the_child",
            "test_loading.py::test_a_lock_that_was_held_at_the_fork_does_not_hang_the_child",
            "gpu/test_kernel_cache.py::test_threads_that_call_first_compile_each_kernel_once",
            "gpu/test_kernel_cache.py::test_an_import_uses_no_cuda_so_that_children_can",
            "gpu/test_kernel_cache.py::test_cuda_used_before_a_fork_is_a_clear_error_in_the_child",
        ),
        "Python without a global lock",
    ),
    Hazard(
        "A call like an earlier one is not checked again, and is not the same",
        (
            "test_prepared.py::test_a_call_that_changed_is_checked_again",
            "test_prepared.py::test_a_good_change_is_seen",
            "test_prepared.py::test_a_good_change_of_another_op_is_seen",
            "test_prepared.py::test_an_array_that_was_changed_in_place_is_checked_again",
            "test_prepared.py::test_threads_never_share_a_struct",
        ),
    ),
)

STREAMS = (
    Hazard(
        "No stream, stream 0 and stream 1 mean different things to producers",
        (
            "test_devices.py::test_a_dlpack_producer_exports_on_its_device_and_stays_out_of_a_capture",
            "gpu/test_protocols.py::test_attention_over_arrays_of_a_producer",
            "gpu/test_protocols.py::test_a_dlpack_array_that_orders_itself_is_awaited",
        ),
    ),
    Hazard(
        "A kernel runs on another stream than its inputs are written on, or its output is read on",
        (
            "gpu/test_streams.py::test_the_current_stream_of_the_framework_is_used",
            "gpu/test_streams.py::test_a_given_stream_is_used",
            "gpu/test_streams.py::test_a_write_on_the_stream_of_another_framework_is_awaited",
            "gpu/test_handoffs.py::test_an_input_of_another_framework_is_awaited",
            "gpu/test_handoffs.py::test_an_output_of_another_framework_is_awaited_there",
            "test_devices.py::test_frameworks_wait_for_each_other_on_the_device_of_the_arrays",
        ),
    ),
    Hazard(
        "Arrays known by the CUDA array interface are read before their stream is done",
        (
            "test_devices.py::test_a_cuda_array_interface_is_awaited_on_its_device",
            "gpu/test_protocols.py::test_the_stream_of_a_numba_array_is_awaited",
        ),
    ),
    Hazard(
        "Memory is reused before the work on it is done, or never given back",
        (
            "gpu/test_handoffs.py::test_memory_may_be_reused_right_after_the_call",
            "gpu/test_streams.py::test_inputs_may_be_dropped_and_their_memory_reused_at_once",
            "test_in_flight.py::test_an_array_lives_until_its_op_has_run",
            "test_in_flight.py::test_nothing_is_left_of_a_stream_that_is_done",
            "test_prepared.py::test_what_is_kept_keeps_no_array_alive",
            "test_prepared.py::test_calls_leave_nothing_behind",
            "gpu/test_memory.py::test_many_calls_leave_nothing_behind",
            "gpu/test_memory.py::test_arrays_kept_for_their_producers_are_given_back",
        ),
    ),
    Hazard(
        "Immutable or read-only arrays are written",
        (
            "test_frameworks.py::test_jax_arrays_are_not_written",
            "gpu/test_frameworks.py::test_jax_arrays_are_not_written",
            "test_frameworks.py::test_read_only_arrays_known_by_dlpack_alone_are_not_written",
            "support/jax_ops_suite.py::test_what_is_not_donated_is_left_as_it_is",
        ),
    ),
    Hazard(
        "A result that JAX still reads is overwritten",
        ("gpu/test_handoffs.py::test_a_result_that_jax_still_reads_is_not_overwritten",),
    ),
    Hazard(
        "bfloat16 and float8 are lost on the way from a framework",
        (
            "support/framework_suite.py::test_the_bits_do_not_depend_on_the_framework",
            "support/framework_suite.py::test_float8_arrays",
            "test_frameworks.py::test_a_bfloat16_query_known_by_dlpack_alone",
            "test_errors.py::test_a_dtype_of_no_argument_names_what_this_one_needs",
        ),
    ),
    Hazard(
        "The size of an imported array is taken for what it is not",
        (
            "test_frameworks.py::test_an_array_known_by_dlpack_alone_is_as_large_as_its_shape_says",
            "test_devices.py::test_what_a_cuda_array_interface_says",
        ),
    ),
    Hazard(
        "A capture of a graph meets a compilation, a wait or memory that is lent to others later",
        (
            "test_loading.py::test_a_capture_that_is_the_first_to_need_a_kernel_is_left_as_it_is",
            "test_prepared.py::test_a_capture_is_checked_and_gets_memory_of_its_own",
            "test_devices.py::test_a_capture_is_asked_for_on_the_device_of_the_stream",
            "gpu/test_graphs.py::test_every_mode_of_capture",
            "gpu/test_graphs.py::test_attention_captured_by_another_framework",
            "gpu/test_graphs.py::test_a_kernel_that_was_never_loaded_leaves_a_capture_whole",
            "gpu/test_graphs.py::test_replays_touch_no_memory_that_was_handed_out_since",
        ),
    ),
    Hazard(
        "Each thread's own default stream is taken for the default stream of all",
        (
            "gpu/test_streams.py::test_threads_on_default_streams_of_their_own",
            "gpu/test_streams.py::test_threads_where_their_own_streams_are_the_default",
            "test_counters.py::test_streams_devices_and_threads_on_their_default_streams_are_apart",
        ),
    ),
    Hazard(
        "Arrays of several devices are taken together",
        (
            "test_prepared.py::test_an_array_on_another_device_is_refused",
            "test_prepared.py::test_an_op_that_is_checked_each_time_refuses_arrays_of_two_devices",
            "test_prepared.py::test_blocks_are_not_swapped_between_two_devices",
            "gpu/test_frameworks.py::test_an_array_on_the_host_among_those_on_a_device_is_named",
            "gpu/test_frameworks.py::test_out_on_the_host_is_named",
            "gpu/test_devices.py::test_an_array_on_another_device_is_named",
        ),
    ),
    Hazard(
        "Strides of imported arrays mislead: dimensions of one, outputs that lie on themselves",
        (
            "test_attention.py::test_the_stride_of_a_dimension_of_one_says_nothing",
            "test_attention_plan.py::test_alignment_is_that_of_every_row",
            "test_errors.py::test_a_bad_call_is_refused_and_writes_nothing",
        ),
    ),
    Hazard(
        "XLA orders, copies or records an op otherwise than it was called",
        (
            "support/jax_ops_suite.py::test_reads_around_a_write_are_of_before_and_after",
            "support/jax_ops_suite.py::test_what_is_donated_is_written_in_place",
            "test_interop_jax.py::test_kernels_alone_are_queued_on_the_stream_of_xla",
            "gpu/test_interop_jax.py::test_slow_work_around_an_op_is_ordered_by_xla_alone",
            "gpu/test_interop_jax.py::test_xla_replays_what_it_has_recorded",
        ),
    ),
    Hazard(
        "torch.compile misses that an op writes, or copies a cache for it",
        (
            "support/torch_ops_suite.py::test_reads_after_a_write_are_not_those_before",
            "support/torch_ops_suite.py::test_inductor_copies_no_cache",
            "gpu/test_interop_torch.py::test_in_graphs_that_the_compiler_captures",
        ),
    ),
)

ALLOCATOR = (
    Hazard(
        "A block is freed twice, or two hold it who should not",
        (
            "test_block_allocator.py::test_pool_agrees_with_a_simple_model",
            "test_block_allocator.py::test_wrong_calls_change_nothing",
            "test_block_allocator.py::test_shared_block_is_freed_by_each_holder_once",
            "test_sequences.py::test_pool_agrees_with_a_simple_model",
        ),
    ),
    Hazard(
        "A block that was evicted is still found",
        (
            "test_sequences.py::test_pool_agrees_with_a_simple_model",
            "test_sequences.py::test_one_block_too_few_costs_a_kept_prefix_its_end_alone",
        ),
    ),
    Hazard(
        "A block that is shared is written without a copy",
        (
            "test_sequences.py::test_fork_at_every_offset",
            "test_sequences.py::test_block_that_was_found_is_not_written_after_a_truncation",
            "support/kv_cache_suite.py::test_fork_at_every_offset",
            "test_kv_cache.py::test_copies_that_touch_are_not_done_side_by_side",
        ),
    ),
    Hazard(
        "Prefixes of one hash are taken for each other",
        (
            "test_sequences.py::test_collisions_of_hashes_change_nothing",
            "test_sequences.py::test_salts_share_nothing",
            "test_sequences.py::test_same_tokens_after_another_beginning_are_not_found",
        ),
    ),
    Hazard(
        "An allocation that fails leaves half of it, or one that can never fit is tried for ever",
        (
            "test_sequences.py::test_every_allocation_fails_once_and_changes_nothing",
            "test_sequences.py::test_out_of_blocks_says_how_many",
            "test_sequences.py::test_what_can_never_fit_is_refused_before_room_is_made_for_it",
            "test_block_allocator.py::test_never_fits_is_another_error_than_out_of_blocks",
        ),
    ),
    Hazard(
        "What a block held before is read",
        (
            "support/kv_cache_suite.py::test_dead_blocks_are_nan",
            "support/kv_cache_suite.py::test_random_story_through_attention",
            "test_soak.py::test_a_short_soak",
        ),
    ),
    Hazard(
        "A prefix is found before it is written, or written by a step that is over",
        (
            "test_sequences.py::test_what_is_not_written_is_not_found",
            "test_kv_cache.py::test_a_written_batch_cannot_change_what_others_find",
            "test_kv_cache.py::test_a_step_whose_blocks_were_given_away_cannot_be_written",
        ),
    ),
    Hazard(
        "Steps overtake copies to or from the host, or copies overtake steps",
        (
            "test_offload.py::test_random_story_whose_streams_run_in_any_order",
            "test_offload.py::test_copies_wait_for_the_steps_and_only_steps_that_touch_their_blocks_wait",
            "gpu/test_kv_cache.py::test_a_copy_out_waits_for_the_steps_before_it",
            "gpu/test_kv_cache.py::test_a_copy_in_waits_for_the_steps_before_it",
            "gpu/test_kv_cache.py::test_whoever_writes_into_a_block_that_is_copied_out_waits",
        ),
    ),
    Hazard(
        "A cache is dropped with work on its way",
        (
            "test_offload.py::test_a_cache_dropped_with_copies_on_their_way_keeps_its_memory_until_they_are_done",
            "gpu/test_kv_cache.py::test_a_cache_dropped_while_blocks_come_back_writes_into_no_others_memory",
            "gpu/test_kv_cache.py::test_a_cache_dropped_behind_a_queued_step",
        ),
    ),
    Hazard(
        "A batch on its way to the device is overwritten by the next one",
        ("test_kv_cache.py::test_staging_sends_rows_and_never_overwrites_what_is_on_its_way",),
    ),
    Hazard(
        "Two threads step one cache, and read each other's batches",
        (
            "test_one_thread.py::test_a_second_thread_is_refused_while_one_is_inside",
            "test_one_thread.py::test_threads_whose_steps_mix_get_errors_and_no_wrong_numbers",
            "test_one_thread.py::test_threads_that_take_turns_get_what_they_wrote",
            "test_one_thread.py::test_a_cache_that_a_thread_was_in_at_a_fork_works_in_the_child",
            "test_one_thread.py::test_a_finalizer_in_the_middle_of_a_method_waits_for_the_next",
            "test_one_thread.py::test_a_thread_waits_for_a_finalizer_of_another",
        ),
        "writers of one's own and replays of graphs, which read a batch by themselves",
    ),
)

MERGE = (
    Hazard(
        "Log-sum-exps are to base 2 on one side and to base e on the other",
        (
            "gpu/test_attention.py::test_matches_oracle",
            "support/merge_suite.py::test_parts_of_a_sequence_merge_to_the_whole",
            "support/merge_suite.py::test_one_side_far_above_the_other",
        ),
    ),
    Hazard(
        "A rank without tokens spoils the others, or the order of ranks decides",
        (
            "support/merge_suite.py::test_ranks_of_which_any_may_be_empty_in_any_order",
            "support/merge_suite.py::test_an_empty_side_is_selected_away",
            "support/merge_suite.py::test_sides_may_be_exchanged",
        ),
    ),
    Hazard(
        "A result is written over the side that is still to be read",
        (
            "support/merge_suite.py::test_the_result_may_replace_either_side",
            "gpu/test_merge.py::test_many_rows_replaced_in_place",
        ),
    ),
)

TESTS = (
    Hazard(
        "Inputs so even, or tolerances so wide, that a kernel that does nothing passes",
        (
            "test_support.py::test_a_wrong_kernel_is_seen_at_every_length",
            "test_support.py::test_a_dropped_or_shifted_needle_shows",
            "test_support.py::test_comparison_finds_one_wrong_element",
            "test_fuzz.py::test_needles_decide_their_rows",
        ),
    ),
    Hazard(
        "A test that cannot fail hides a fault",
        (
            "test_mutants.py::test_there_are_enough_of_every_kind",
            "test_mutants.py::test_the_runner_tells_them_apart",
            "test_fuzz.py::test_a_wrong_token_is_found_and_can_be_run_again",
            "test_soak.py::test_a_fault_is_found",
            "test_accuracy.py::test_a_fault_is_found",
        ),
        "the mutants themselves are a command, `python -m tests.mutants`",
    ),
    Hazard(
        "Tests are skipped, left out or run on other sources, and nobody notices",
        (
            "test_receipt.py::test_failures_errors_and_skips_are_recorded_and_refused",
            "test_receipt.py::test_partial_run_writes_nothing",
            "test_receipt.py::test_receipt_that_does_not_vouch_is_refused",
            "test_frameworks.py::test_named_frameworks_are_installed",
        ),
    ),
    Hazard(
        "A crash takes the device from the tests that follow, which are blamed",
        (
            "test_fuzz.py::test_cases_behind_a_lost_device_are_not_judged",
            "test_fuzz.py::test_a_worker_that_dies_is_no_success",
            "gpu/test_checked_mode.py::test_the_device_is_usable_after_a_call_that_was_refused",
            "gpu/test_checked_mode.py::test_a_fault_ends_its_process_and_no_other",
        ),
        "`tests/gpu` is one process: whatever follows a kernel that faults there fails, too",
    ),
    Hazard(
        "Figures are of other sources, or of runs that failed",
        (
            "test_scoreboard.py::test_failed_tests_are_not_passed_over",
            "test_scoreboard.py::test_a_run_of_other_sources_says_so",
            "test_scoreboard.py::test_a_target_is_met_or_not",
            "test_sanitize.py::test_tests_that_did_not_run_or_failed_are_no_clean_bill",
        ),
    ),
)

SECTIONS = {
    "Kernels": KERNELS,
    "Compilation": COMPILATION,
    "Streams, DLPack and graphs": STREAMS,
    "Allocator and prefix cache": ALLOCATOR,
    "Merge": MERGE,
    "The tests themselves": TESTS,
}
