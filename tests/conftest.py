"""What all tests share: no network, a fixed seed, and the list of tests that run only in `make test-all`."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():  # read when triton is imported, by whichever test comes first
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


# Expensive tests that only `make test-all` runs. Beside each stands what covers its subject in `make test`.
FULL = {
    "tests/distributed/test_deepspeed.py::test_zero_trains_as_fsdp2": "rules of engine deepspeed; test_fsdp.py",
    "tests/distributed/test_fsdp.py::test_any_split_trains_alike[4_": "the same on two ranks",
    "tests/distributed/test_fsdp.py::test_any_split_trains_alike[2_ode]": "tests/trainer/test_ode.py, on one rank",
    "tests/distributed/test_fsdp.py::test_any_split_trains_alike[2_sid]": "test_any_split_trains_alike[2_sharded]",
    "tests/distributed/test_fsdp.py::test_any_split_trains_alike[2_muon]": "test_any_split_trains_alike[2_sharded]",
    "tests/distributed/test_fsdp.py::test_any_split_trains_alike[2_replayed]": "test_any_split_trains_alike[2_sharded]",
    "tests/distributed/test_data_parallel.py::test_defect_11_ranks_share": "test_any_split_trains_alike[2_sharded]",
    "tests/benchmarks/test_gpu_check.py::test_each_failure_is_written_with_its_text[xdist]": "[plain]",
    "tests/benchmarks/test_gpu_check.py::test_a_file_that_cannot_be_imported": "test_each_failure_is_written[plain]",
    "tests/benchmarks/test_benchmarks.py::test_what_is_not_done_in_time": "test_a_worker_that_fails",
    "tests/trainer/test_methods.py::test_weights_are_of_the_whole_batch_however_it_is_split[reward]": "other objectives",
    "tests/trainer/test_multires.py::test_resume_is_exact_with_sizes_mixed[self_forcing_gan]": "the other recipes",
    "tests/trainer/test_image_training.py::test_a_plan_of_an_i2v_run": "tests/planning/test_plan.py",
    "tests/distributed/test_watchdog.py::test_a_mistake_is_one_line_though_a_rank_comes_late[before]": "[after]",
    "tests/serving/browser/test_demo_browser.py::test_two_at_once": "tests/serving/test_demo.py, without a browser",
    "tests/serving/browser/test_demo_browser.py::test_what_the_page_never_says": "tests/serving/test_demo_messages.py",
    "tests/serving/browser/test_demo_browser.py::test_nothing_is_drawn_after_a_stop": "tests/serving/test_demo.py",
    "tests/serving/browser/test_demo_browser.py::test_page_fits_and_reads_well_without_a_mouse[size1]": "[size0]",
    "tests/serving/browser/test_demo_browser.py::test_a_restart_in_mid_stream": "test_a_video_has_an_end",
    "tests/tasks/test_text_cache.py::test_the_command": "its other tests; test_named_prompts.py",
    "tests/importers/test_translate.py::test_no_value_is_an_error_of_ours": "test_what_a_table_refuses",
    "tests/importers/test_training.py": "test_translate.py: each recipe loads, and the tests of its dialect",
    "tests/distributed/test_data_parallel.py::test_ranks_that_ran_other_networks": "test_checkpoint_dcp.py",
    "tests/distributed/test_fsdp.py::test_ranks_hold_their_part[4_": "the same on two ranks",
    "tests/distributed/test_fsdp.py::test_hybrid_sharding_sums": "test_gradients_are_reduced, on two ranks",
    "tests/distributed/test_fsdp.py::test_ode_pairs_are_shared_out": "tests/trainer/test_ode.py, on one rank",
    "tests/distributed/test_plan.py": "test_plan.py::test_peak_is_that_of_a_real_run, on one rank",
    "tests/distributed/test_launcher.py": "tests/utils/test_launcher.py, on one rank",
    "tests/slurm/test_slurm.py": "test_settle.py; tests/distributed for kill, resume and signals",
    "tests/model/attention/test_backends.py::test_defect_05_flex_agrees_over_shapes": "test_vsa.py::test_flex_agrees_eagerly",
    "tests/benchmarks/test_benchmarks.py::test_one_configuration_end_to_end": "test_streaming_end_to_end",
    "tests/benchmarks/test_benchmarks.py::test_operations_are_those_of_every_layer": "test_streaming_end_to_end",
    "tests/benchmarks/test_gpu_check.py::test_results_of_the_benchmarks": "test_streaming_end_to_end",
    "tests/scripts/test_quickstart.py::test_the_whole_way": "test_report.py; test_stages.py",
    "tests/scripts/test_methods_page.py::test_quick_trains": "test_methods.py, row by row",
    "tests/utils/test_parallel.py::test_compiled_blocks_are_the_blocks": "test_acceleration.py::test_compiled_blocks",
    "tests/planning/test_doctor.py::test_every_program_says": "test_a_program_ends_before_it_imports_what_is_absent",
    "tests/planning/test_plan.py::test_shapes_are_those_of_fake_tensor_mode": "test_peak_is_that_of_a_real_run",
    "tests/planning/test_plan.py::test_what_would_make_it_fit": "test_a_plan_needs_no_weights_and_leaves_no_files",
    "tests/planning/test_plan.py::test_few_layers_of_a_sparse_student": "test_few_layers_tell_of_many",
    "tests/pipeline/test_streaming.py::test_recorded_passes_are_those_that_run[0-": "[2-True]",
    "tests/pipeline/test_streaming.py::test_recorded_passes_are_those_that_run[2-False": "[2-True]",
    "tests/planning/test_plan.py::test_a_discriminator_is_planned": "test_peak_is_that_of_a_real_run",
    "tests/planning/test_plan.py::test_few_layers_tell_of_many": "test_cost_is_affine_in_the_exit_step",
    "tests/planning/test_plan.py::test_offloaded_state_is_not_the_gpus": "test_peak_is_that_of_a_real_run",
    "tests/planning/test_plan.py::test_peak_is_that_of_a_real_run[checkpointed": "[plain]",
    "tests/test_extending.py::test_a_walk_runs[An_attention_backend]": "test_a_walk_runs[An_objective]",
    "tests/test_extending.py::test_a_walk_runs[An_optimizer]": "test_a_walk_runs[An_objective]",
    "tests/utils/test_wandb_files.py::test_wandbs_files_have": "test_the_last_step; test_wandb_is_not_told_a_step_twice",
    "tests/utils/test_metrics.py::test_the_judge_is_trained_once": "test_real_videos_score_as_real",
    "tests/trainer/test_methods.py::test_it_trains_what_it_should_and_goes_on_exactly[reward]": "other objectives",
    "tests/trainer/test_trainer.py::test_defect_10_accumulation_gives_the_same_losses[distillation]": "[diffusion]",
    "tests/worlds/test_digits.py::test_a_recipe_resumes_exactly[digits/": "the same of digits_edm",
    "tests/trainer/test_trainer.py::test_flow_matching_learns_in_every_mode[diffusion_forcing": "teacher_forcing",
    "tests/trainer/test_trainer.py::test_flow_matching_learns_in_every_mode[bidirectional": "teacher_forcing",
    "tests/trainer/test_trainer.py::test_signal_saves_and_the_run_goes_on_exactly[2]": "another signal",
    "tests/trainer/test_trainer.py::test_signal_saves_and_the_run_goes_on_exactly[10]": "another signal",
    "tests/model/attention/test_vsa.py::test_flex_with_blocks_of_several_tiles_agrees_compiled": "test_flex_agrees_eagerly",
    "tests/model/attention/test_vsa.py::test_flex_agrees_compiled": "test_flex_agrees_eagerly",
    **{
        f"tests/model/wan/test_released.py::test_the_bytes_of_a_source_are_those_of_its_geometry_in_fp32[{preset}]": "[1.3b]"
        for preset in ("14b", "a14b", "i2v-14b", "i2v-a14b")
    },
    "tests/model/wan/test_released.py::test_the_bytes_of_its_other_parts": "the network's bytes, [1.3b]",
    "tests/generation/test_push.py::test_the_program_pushes": "test_what_arrives_is_what_was_exported",
    "tests/generation/test_card.py::test_the_code_of_the_card_loads_and_samples_the_export[native]": "[diffusers]",
    "tests/generation/test_card.py::test_the_code_of_an_adapters_card": "[diffusers]",
    "tests/generation/test_card.py::test_the_code_of_a_teachers_card": "[diffusers]",
    "tests/generation/test_card.py::test_both_experts_are_native_folders": "[diffusers]",
    "tests/generation/test_card.py::test_what_nobody_samples_with_diffusers": "[diffusers]",
    "tests/generation/test_card.py::test_a_base_is_found_through_earlier_runs": "test_a_base_is_named_where_it_is_certain",
    "tests/generation/test_average.py::test_each_use_of_an_average": "tests/model/test_ema.py",
    "tests/scripts/test_shapes_teacher.py::test_its_first_steps": "test_the_weights_are_those_of_the_record",
    "tests/test_wan_from_zero.py::test_as_typed": "its other tests, and those of each program",
    "tests/trainer/test_room.py::test_the_size_of_a_save": "test_a_run_warns_once_and_saves_once_it_fits",
    "tests/fuzz/test_programs.py": "test_readers.py; test_hostile_recipes",
    "tests/fuzz/test_schema.py::test_many_hostile_values": "test_a_hostile_value, a few of each kind",
    "tests/fuzz/test_readers.py::test_many_damaged_files": "test_a_damaged_file_is_one_line, one of each reader",
    "tests/model/attention/test_vsa.py::test_kernels_build_for_hopper": "the kernels in Triton's interpreter",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts tests of several processes, the long ones, first, then those that wait, and marks the tests of FULL.

    An entry of FULL whose file was collected whole and that names no test is an error.
    """
    first = ("tests/distributed/", "tests/slurm/"), ("tests/serving/",)
    items.sort(key=lambda item: next((i for i, rooms in enumerate(first) if item.nodeid.startswith(rooms)), len(first)))
    files = {item.nodeid.split("::")[0] for item in items}
    for prefix in FULL:
        found = [item for item in items if item.nodeid.startswith(prefix)]
        for item in found:
            item.add_marker("full")
        if not found and len(items) > 1000 and prefix.split("::")[0] in files:
            raise pytest.UsageError(f"tests/conftest.py: FULL names '{prefix}', and no test begins like it")
