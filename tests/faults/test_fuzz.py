"""The short form of the fuzz tests (`fuzz.py` is the long one): random input, the same at every time."""

import pytest
from fuzzed import KINDS
from fuzzed.world import World
from hypothesis import HealthCheck, Phase, given, settings


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", KINDS)
def test_random_input_is_taken_or_refused_in_one_line(world, name):
    kind = KINDS[name]

    @settings(max_examples=kind.short, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck),
              phases=[Phase.generate, Phase.shrink])
    @given(kind.examples)
    def check(example):
        assert kind.check(world, example) in (0, 1, 2)

    check()
