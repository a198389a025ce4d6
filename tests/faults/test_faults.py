"""The short form of the fault suite (`suite.py` is the long one): real processes, broken while they run."""

import os
import random
from pathlib import Path

import pytest
from breaking import (
    a_full_disk_is_one_line,
    a_stuck_process_is_named,
    a_wrong_copy_is_named,
    bad_steps_are_skipped,
    damaged_checkpoints_are_noticed,
    every_mesh_sees_the_same_examples,
    repeatable_faults_are_told_from_transient_ones,
)
from harness import write_workload
from kills import Reference, kill_until_done, stop_until_done

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in /proc")]
ROOT = os.name == "posix" and os.geteuid() == 0


@pytest.fixture(scope="session")
def faults(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def reference(faults) -> Reference:
    return Reference(faults, write_workload(faults, train__steps=60))


def test_killed_at_random_moments_it_ends_with_the_same_bits(reference, faults):
    kills = kill_until_done("killed", "2x2", reference, faults, random.Random(0), print, at_most=2)
    assert kills


def test_told_to_stop_it_saves_and_repeats_nothing(reference, faults):
    stops = stop_until_done("stopped", "1x2", reference, faults, random.Random(0), print, at_most=2)
    assert stops and all(stop.more <= 1 for stop in stops)


def test_damage_to_any_file_of_a_checkpoint_is_noticed(reference, faults):
    told = damaged_checkpoints_are_noticed(reference["1x2"], faults, random.Random(0), 100)
    assert len(told) == 100


def test_bad_gradients_never_reach_the_parameters(reference, faults):
    bad_steps_are_skipped(reference.run_file, faults, "gradient")


def test_bad_data_stops_the_run_with_a_diagnosis(reference, faults):
    repeatable_faults_are_told_from_transient_ones(reference.run_file, faults, transient=False)


def test_a_device_that_computes_wrongly_is_named(reference, faults):
    a_wrong_copy_is_named(reference.run_file, faults)


def test_a_stuck_process_is_named_and_the_run_starts_again(reference, faults):
    a_stuck_process_is_named(reference.run_file, faults, "step")


@pytest.mark.skipif(not ROOT, reason="mounts a small disk")
def test_a_full_disk_ends_the_run_with_one_line(reference, faults):
    a_full_disk_is_one_line(reference.run_file, faults)


def test_fewer_devices_and_more_processes_see_the_same_examples(reference, faults):
    every_mesh_sees_the_same_examples(reference.run_file, faults, [(1, 8), (1, 2), (2, 2)])
