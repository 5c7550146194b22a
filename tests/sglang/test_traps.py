"""Where every trap met with SGLang on a CPU, and every promise of the pool, has its test. Starts no server.

`TRAPS`: what went wrong once -> the tests that fail when it comes back. `PROMISES`: what the pool says it does -> the tests that
fail when it does not. The names are checked against the files, so a test that is renamed or lost is found here.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
CONTRACT, FAULTS, WEIGHTS, TWINS, GENERATION, ROUTER, DRAFTS, FLEET, P2P, LATENT, RANKS = (
    f"sglang/test_{name}.py"
    for name in (
        "pool_contract", "server_faults", "server_weights", "server_twins", "server_generation", "server_router", "server_drafts",
        "fleet", "p2p", "server_latent", "server_ranks",
    )
)  # fmt: skip
ARGUMENTS, INTERFACE, COLLECT = "test_sglang_arguments.py", "test_sglang_interface.py", "test_collect.py"

TRAPS: dict[str, list[str]] = {
    "tensor and distributed updates are refused outside of a session": [
        f"{WEIGHTS}::test_stock_updates_outside_of_a_session_are_refused",
        f"{FLEET}::test_an_update_is_a_session_between_pause_and_resume_and_flushes",
    ],
    "a rejected update leaves the broadcasting side hanging until its timeout": [
        f"{FLEET}::test_an_engine_that_refuses_a_broadcast_does_not_leave_the_driver_waiting",
    ],
    "tensor updates over HTTP kill the server unless the sender shares through the file system": [
        f"{GENERATION}::test_an_update_never_sends_pickles_and_flushes",
    ],
    "without a flush, answers mix old and new weights": [
        f"{CONTRACT}::test_an_update_is_seen_by_cached_prompts",
        f"{GENERATION}::test_an_update_never_sends_pickles_and_flushes",
    ],
    "the router drops routes and knows no pause": [
        f"{ROUTER}::test_the_router_passes_on_neither_routes_nor_pauses",
        f"{ARGUMENTS}::test_what_sglang_does_not_do_here_is_refused_with_the_reason",
    ],
    "speculation on a CPU ignores temperature": [
        f"{ARGUMENTS}::test_what_sglang_does_not_do_here_is_refused_with_the_reason",
    ],
    "a tree of n-gram drafts gives wrong routes": [
        f"{ARGUMENTS}::test_greedy_speculation_is_mapped_and_its_routes_must_fit_their_buffer",
        f"{TWINS}::test_greedy_ngram_speculation_changes_neither_tokens_nor_routes",
    ],
    "a Qwen3-MoE draft model is rewritten to its multi-token-prediction layer": [
        f"{ARGUMENTS}::test_a_draft_model_that_sglang_would_rewrite_is_refused",
    ],
    "a scheduler that fails takes the process along that owns it": [
        f"{ROUTER}::test_a_dead_engine_leaves_the_router_and_comes_back_with_weights",
        f"{FAULTS}::test_killing_an_engine_in_the_middle_loses_and_doubles_nothing",
    ],
    "shutdown prints KeyErrors of the resource tracker": [f"{GENERATION}::test_a_run_ends_without_a_word"],
    "INT4 of linear layers cannot be loaded again on CUDA": [f"{ARGUMENTS}::test_dense_int4_on_gpus_can_be_planned_and_not_run"],
    "an expert that is not sent again keeps repacked bits": [
        f"{CONTRACT}::test_what_is_wrong_with_a_sync_is_named_and_changes_no_version",
    ],
    "what is restored for loading and not loaded is lost: a draft model that is not updated": [
        f"{DRAFTS}::test_another_model_drafts_with_its_own_weights_over_updates",
    ],
    "latent attention is not served on a CPU": [
        f"{LATENT}::test_latent_attention_computes_what_transformers_does_and_follows_its_weights",
    ],
    "files of killed servers stay in shared memory": [f"{FAULTS}::test_a_driver_that_is_killed_takes_its_servers_along"],
    "a draft model sees the text without its first token": [
        f"{DRAFTS}::test_another_model_drafts_with_its_own_weights_over_updates",
        f"{DRAFTS}::test_a_model_equal_to_the_policy_is_always_right_where_the_first_token_does_not_matter",
    ],
    "whatever is called an EAGLE head is loaded as one": [
        f"{ARGUMENTS}::test_what_sglang_would_silently_draft_badly_with_is_refused",
    ],
    "retract loses routes": [f"{ARGUMENTS}::test_what_sglang_does_not_do_here_is_refused_with_the_reason"],
    "logprobs come after the temperature": [f"{CONTRACT}::test_logprobs_and_routes_equal_transformers"],
    "sequences x drafts overflow the buffer of routes": [
        f"{ARGUMENTS}::test_greedy_speculation_is_mapped_and_its_routes_must_fit_their_buffer",
    ],
    "torch's rendezvous and gloo listen on every interface": [
        f"{INTERFACE}::test_a_broadcast_listens_on_its_address_alone",
        f"{ROUTER}::test_nothing_listens_elsewhere_and_nobody_gets_in_without_the_key",
        f"{FAULTS}::test_nobody_gets_in_without_the_key_and_the_key_is_nowhere_to_be_read",
    ],
    "a pause by abort looks once a second whether requests ended": [
        f"{FLEET}::test_running_requests_are_aborted_before_sglangs_own_pause_waits_for_them",
    ],
}

PROMISES: dict[str, list[str]] = {
    "samples reach the loop as they finish": [f"{GENERATION}::test_samples_come_as_they_finish"],
    "concurrency is bounded, requests are pulled as room appears, a run can be abandoned": [
        f"{CONTRACT}::test_requests_are_pulled_lazily_and_a_run_can_be_abandoned",
        f"{ROUTER}::test_abandoned_requests_end_in_the_engines",
    ],
    "partial rollouts: kept prefix, spans per token and per row of routes": [
        f"{CONTRACT}::test_new_weights_in_the_middle_of_a_run_start_a_new_span",
        f"{FLEET}::test_an_aborted_request_goes_on_from_what_it_kept",
        f"{WEIGHTS}::test_other_pause_modes_keep_requests_inside_the_server",
    ],
    "oversampling with the dynamic filter": [
        f"{COLLECT}::test_dynamic_sampling_replaces_flat_groups_and_fills_up_when_rounds_run_out",
        f"{COLLECT}::test_oversampling_asks_for_more_and_keeps_what_carries_an_advantage",
    ],
    "load is balanced by outstanding tokens, a prompt's group stays together": [
        f"{FLEET}::test_load_is_balanced_by_outstanding_tokens_not_by_requests",
        f"{FLEET}::test_a_prompts_group_stays_together_until_its_engine_is_far_busier",
        f"{FAULTS}::test_both_engines_work_and_groups_stay_together",
    ],
    "retries with backoff, then a failed sample with its reason": [
        f"{FLEET}::test_a_failed_request_is_tried_again_and_counted_once",
        f"{FLEET}::test_a_request_that_fails_too_often_is_a_failed_sample_with_the_reason",
        f"{FLEET}::test_what_a_server_may_answer",
    ],
    "timeouts": [f"{GENERATION}::test_a_request_that_takes_too_long_is_tried_again_and_then_failed"],
    "requests of a dead engine are asked for again, none lost or doubled": [
        f"{FAULTS}::test_killing_an_engine_in_the_middle_loses_and_doubles_nothing",
        f"{FAULTS}::test_an_update_while_an_engine_is_down_reaches_it_later",
    ],
    "a hanging server is started again": [
        f"{FAULTS}::test_a_hanging_engine_is_started_again",
        f"{FLEET}::test_an_engine_that_hangs_in_an_update_is_started_again",
        f"{FLEET}::test_a_server_that_never_answers_is_one_message",
    ],
    "a server that loads weights is not taken for hanging; one that does not come back is tried again": [
        f"{FLEET}::test_an_engine_that_loads_weights_is_not_taken_for_hanging",
        f"{FLEET}::test_a_start_that_fails_is_tried_again_and_then_the_engine_is_broken",
    ],
    "a failed sync is tried again, then stops the run": [
        "test_sync.py::test_a_sync_that_fails_is_tried_again_with_everything",
        "test_sync.py::test_the_run_stops_with_the_tensors_name_when_the_retry_fails_too",
        f"{FLEET}::test_an_engine_that_saw_less_than_was_sent_is_a_problem_and_stays_paused",
    ],
    "versions are monotonic": [f"{FLEET}::test_labels_of_updates_always_grow"],
    "a port in use is replaced": [f"{FAULTS}::test_a_port_that_another_program_took_is_replaced"],
    "out of memory and a wrong checkpoint are one message": [
        f"{GENERATION}::test_an_engine_that_runs_out_of_memory_is_one_message_and_leaves_no_process",
        f"{FAULTS}::test_a_wrong_checkpoint_is_one_message_with_the_log",
    ],
    "no orphans after the driver is killed": [
        f"{FAULTS}::test_a_driver_that_is_killed_takes_its_servers_along",
        f"{ROUTER}::test_a_driver_that_is_killed_takes_its_router_along",
    ],
    "drafts take part in weight sync": [
        f"{DRAFTS}::test_a_new_mtp_layer_drafts_after_the_update_that_brought_it",
        f"{DRAFTS}::test_the_drafts_tensors_are_sent_and_verified_like_the_policys",
    ],
    "what is accepted of drafts is what they have right": [
        f"{DRAFTS}::test_an_mtp_layer_drafts_from_its_own_cache",
        f"{DRAFTS}::test_an_eagle_head_drafts_and_keeps_its_weights_over_updates",
    ],
    "the program itself runs, in bf16 and packed INT4, and sharing GPUs changes nothing": [
        "sglang/test_end_to_end_sglang.py::test_bf16_and_packed_int4_run_and_sharing_gpus_changes_nothing",
    ],
    "the CPU's parts refuse to load beside CUDA": [
        "sglang/test_plugin_guards.py::test_the_twins_parts_refuse_to_load_beside_cuda",
    ],
    "engines sleep while the trainer has their GPUs": [
        f"{GENERATION}::test_engines_that_slept_compute_as_before",
        f"{GENERATION}::test_what_runs_is_aborted_before_engines_sleep_and_goes_on_when_they_wake",
        f"{FLEET}::test_engines_give_their_memory_back_and_take_it_around_a_load",
        f"{FLEET}::test_an_engine_that_dies_asleep_is_started_again_when_the_others_wake",
        "test_colocation.py::test_a_step_hands_the_gpus_over_in_the_middle_of_the_sync",
    ],
    "logprobs that are no numbers are a failure": [f"{FLEET}::test_a_logprob_that_is_no_number_is_a_failure"],
    "engines of several ranks: shards, experts and transports": [
        f"{RANKS}::test_two_ranks_compute_what_transformers_does_over_every_transport",
        f"{RANKS}::test_a_bit_that_differs_on_one_rank_is_named_with_it",
        "test_sglang_residency.py::test_overlaps_gaps_and_lost_tensors_are_named",
    ],
    "the engine's quantized set is read back and audited against the plan": [
        f"{WEIGHTS}::test_a_plan_that_the_engine_does_not_follow_stops_the_start",
        f"{RANKS}::test_every_ranks_formats_are_read_back",
    ],
    "transports": [
        f"{WEIGHTS}::test_other_transports_bring_the_same_weights",
        f"{WEIGHTS}::test_bf16_follows_over_every_transport",
        f"{TWINS}::test_fp8_blocks_compute_with_their_effective_weights_over_every_transport",
        f"{ROUTER}::test_samples_through_the_router_are_those_of_the_engines",
        f"{P2P}::test_every_rank_reads_the_same_bits",
        f"{P2P}::test_memory_is_out_of_reach_when_the_action_is_over",
        f"{WEIGHTS}::test_weights_that_cannot_be_read_are_a_problem_and_the_next_sync_is_whole",
        f"{ARGUMENTS}::test_rdma_is_refused_where_the_hardware_does_not_have_it",
    ],
}


@pytest.mark.parametrize("names", [*TRAPS.values(), *PROMISES.values()], ids=[*TRAPS, *PROMISES])
def test_it_has_its_tests(names: list[str]) -> None:
    for name in names:
        path, _, function = name.partition("::")
        tree = ast.parse((TESTS / path).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
