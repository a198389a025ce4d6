"""Names of devices that are not here."""

import pytest

from jaxlm.errors import UserError
from jaxlm.planning.targets import find_target, topology


@pytest.mark.parametrize(("name", "shape", "islands", "devices"), [
    ("cpu:8", (8,), 1, 8),
    ("v5p:4x4x8", (4, 4, 8), 1, 128),
    ("2xv5e:16x16", (16, 16), 2, 512),
    ("h100:8x4", (8,), 4, 32),
    ("a100:1", (1,), 1, 1),
    ("tpu7x:4x4x4", (4, 4, 4), 1, 128),  # two devices of each chip
    ("tpu7x-128", (4, 4, 4), 1, 128),  # the cloud counts TensorCores, as of v4 and v5p
    ("v5p-128", (4, 4, 4), 1, 64),  # the cloud counts v5p's cores, two of each chip
    ("v5e-256", (16, 16), 1, 256),
    ("v5litepod-16", (4, 4), 1, 16),
    ("4xv6e-256", (16, 16), 4, 1024),
])
def test_what_a_name_says(name, shape, islands, devices):
    target = find_target(name)
    assert (target.shape, target.islands, target.num_devices) == (shape, islands, devices)


@pytest.mark.parametrize(("kind", "sizes"), [  # docs.cloud.google.com/tpu/docs/v5p and /v6e
    ("v5p", {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8),
             512: (8, 8, 8), 768: (8, 8, 12), 1024: (8, 8, 16), 1536: (8, 12, 16), 3072: (12, 16, 16), 6144: (16, 16, 24)}),
    ("v6e", {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}),
])
def test_the_clouds_topologies(kind, sizes):
    assert {size: topology(kind, size) for size in sizes} == sizes


@pytest.mark.parametrize(("target", "message"), [
    ("h10:8", r"unknown kind 'h10', .*did you mean 'h100'\?"),
    ("v5p", "expected KIND:SHAPE"),
    ("2xh100:8", "expected h100:GPUs of a node x nodes"),
    ("h100:8x2x2", "expected h100:GPUs of a node x nodes"),
    ("cpu:2x2", "expected cpu:N"),
    ("2xcpu:4", "expected cpu:N"),
    ("v5e:0x4", "sizes are positive"),
    ("0xv5e:4x4", "sizes are positive"),
    ("v5p:8x8", r"a v5p slice has 3 dimensions, for example v5p:4x4x4"),
    ("v5e:4x4x4", r"a v5e slice has 2 dimensions, for example v5e:8x8"),
    ("v5p-100", r"no v5p slice has 100 \(TensorCores, 2 of each chip\); use v5p-128"),
    ("v5p-7", r"no v5p slice has 7 .*; use v5p-8"),
    ("v5e-1024", r"no v5e slice has 1024 \(chips\); use v5e-256"),
    ("v5q-128", r"unknown kind 'v5q', .*did you mean 'v5p'\?"),
    ("h100-8", r"did you mean 'h100:8'"),
    ("", "expected KIND:SHAPE"),
    ("v5e:3x5", "sides of a v5e slice are 1, 2 or multiples of 4, at most 16"),
    ("v5e:16x32", "at most 16; several slices are written 2xv5e:"),
    ("h100:64", "a node has at most 8 GPUs; use h100:8x8"),
])
def test_targets_that_are_none(target, message):
    with pytest.raises(UserError, match=message):
        find_target(target)
