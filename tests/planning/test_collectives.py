"""What is read from a compiled program, against programs of which it is known."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxlm.parallel.mesh import make_mesh
from jaxlm.planning.collectives import collectives
from jaxlm.settings import MeshSettings

MESH = MeshSettings(data=2, fsdp=2, tensor=2)
SIZE = 4 * 64 * 32  # bytes of what each device holds


def compiled(function):
    """[64, 32] float32 on each of 8 devices through `function`."""
    mesh = make_mesh(MESH, jax.devices())
    spec = PartitionSpec(("data", "fsdp", "tensor"))
    with jax.set_mesh(mesh):
        run = jax.jit(jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False))
        return run.lower(jax.ShapeDtypeStruct((8 * 64, 32), jnp.float32)).compile().as_text(), mesh


@pytest.mark.parametrize(("function", "kind", "axes", "sent"), [
    (lambda x: jax.lax.psum(x, "tensor"), "all-reduce", ("tensor",), SIZE),  # 2 (N - 1) / N
    (lambda x: jax.lax.psum(x, ("data", "tensor")), "all-reduce", ("data", "tensor"), 1.5 * SIZE),
    (lambda x: jax.lax.all_gather(x, "fsdp", tiled=True)[:64], "all-gather", ("fsdp",), SIZE),
    (lambda x: jnp.tile(jax.lax.psum_scatter(x, ("data", "fsdp"), tiled=True), (4, 1)), "reduce-scatter", ("data", "fsdp"),
     0.75 * SIZE),
    (lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True), "all-to-all", ("data",), SIZE / 2),
    (lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]), "collective-permute", ("fsdp",), SIZE),
], ids=["sum", "sum2", "gather", "scatter", "exchange", "shift"])
def test_each_kind_inside_loops(function, kind, axes, sent):
    def looped(x):
        def outer(x, _):
            return jax.lax.scan(lambda x, _: (jnp.sin(function(x)), None), x, None, length=5)[0], None

        return function(jax.lax.scan(outer, x, None, length=3)[0])

    [one] = collectives(*compiled(looped))
    assert (one.kind, one.axes, one.count) == (kind, axes, 16)
    assert one.bytes_per_device == pytest.approx(16 * sent)


def test_axes_are_told_apart_and_the_largest_comes_first():
    def several(x):
        x = jax.lax.psum(x, "tensor") + jax.lax.psum(x[:1], "data")
        return jax.lax.ppermute(x, "data", [(0, 0), (1, 1)])  # to itself

    assert [(one.kind, one.axes) for one in collectives(*compiled(several))] == [
        ("all-reduce", ("tensor",)), ("all-reduce", ("data",))]


def test_a_loop_of_unknown_length_is_refused():
    body = functools.partial(jax.lax.psum, axis_name="tensor")
    text, mesh = compiled(lambda x: jax.lax.while_loop(lambda x: x.sum() < 100, body, x))
    with pytest.raises(ValueError, match="does not say how often it runs"):
        collectives(text, mesh)
