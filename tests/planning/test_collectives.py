"""What is read from a compiled program, against programs of which it is known."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxlm.parallel.mesh import make_mesh
from jaxlm.planning.collectives import Collective, collectives
from jaxlm.planning.hlo import parse
from jaxlm.settings import MeshSettings

MESH = MeshSettings(data=2, fsdp=2, tensor=2)
SIZE = 4 * 64 * 32  # bytes of what each device holds


def compiled(function):
    """[64, 32] float32 on each of 8 devices through `function`."""
    mesh = make_mesh(MESH, jax.devices())
    spec = PartitionSpec(("data", "fsdp", "tensor"))
    with jax.set_mesh(mesh):
        run = jax.jit(jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False))
        return parse(run.lower(jax.ShapeDtypeStruct((8 * 64, 32), jnp.float32)).compile().as_text()), mesh


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
    module, mesh = compiled(lambda x: jax.lax.while_loop(lambda x: x.sum() < 100, body, x))
    with pytest.raises(ValueError, match="does not say how often it runs"):
        collectives(module, mesh)


# ---- forms that only the compilers of GPUs and TPUs write ------------------------------------------------------------

PAIRS = "replica_groups={{0,1},{2,3},{4,5},{6,7}}"  # along tensor
SHIFT = "source_target_pairs={{0,2},{2,0},{1,3},{3,1},{4,6},{6,4},{5,7},{7,5}}"  # along fsdp
GPU_LOOP = f"""
%product (a: f32[8,8]) -> f32[8,8] {{
  %a = f32[8,8] parameter(0)
  ROOT %dot.1 = f32[8,8] dot(%a, %a)
}}
%body (t: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {{
  %x = f32[8,8] get-tuple-element(%t), index=1
  %all-gather-start = (f32[4,8], f32[8,8]) all-gather-start(%x), {PAIRS}, dimensions={{0}}
  %gemm = f32[8,8] fusion(%x), kind=kCustom, calls=%product
  %all-gather-done = f32[8,8] all-gather-done(%all-gather-start)
  %permute-start = (f32[8,8], f32[8,8]{{1,0:T(8,128)}}, u32[]{{:S(2)}}, u32[]) collective-permute-start(%x), {SHIFT}
  %permute-done = f32[8,8] collective-permute-done(%permute-start)
  %all-reduce-start = f32[8,8] all-reduce-start(%x), {PAIRS}, to_apply=%sum
  %all-reduce-done = f32[8,8] all-reduce-done(%all-reduce-start)
}}
ENTRY %main (p: f32[8,8]) -> f32[8,8] {{
  %w = (s32[], f32[8,8]) while(%p), condition=%cond, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
}}
"""
TPU_LOOP = f"""
%start (a: f32[4,8]) -> f32[8,8] {{
  ROOT %all-gather.1 = f32[8,8]{{1,0:T(8,128)}} all-gather(%a), channel_id=14, {PAIRS}, dimensions={{0}}
}}
%async_collective_fusion (a: f32[4,8]) -> f32[8,8] {{
  %convolution.1 = f32[8,8] convolution(%a, %a), dim_labels=bf_io->bf
  %all-gather.2 = f32[8,8] all-gather(%a), channel_id=14, {PAIRS}, dimensions={{0}}
}}
%done (a: f32[4,8]) -> f32[8,8] {{
  ROOT %all-gather.3 = f32[8,8] all-gather(%a), channel_id=14, {PAIRS}, dimensions={{0}}
}}
%all-reduce-scatter (a: f32[8,8]) -> f32[4,8] {{
  %all-reduce.1 = f32[8,8] all-reduce(%a), {PAIRS}, to_apply=%sum
}}
%condition (t: (s32[], f32[8,8])) -> pred[] {{
  %constant.1 = s32[]{{:T(128)}} constant(5)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}}
%body (t: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {{
  %async-collective-start.1 = (f32[4,8], f32[8,8], s32[2]) fusion(%t), kind=kCustom, calls=%start
  %fusion.1 = (f32[8,8], f32[8,8]) fusion(%async-collective-start.1), kind=kOutput, calls=%async_collective_fusion
  %async-collective-done.1 = f32[8,8] fusion(%fusion.1), kind=kCustom, calls=%done
  %fusion.2 = f32[4,8] fusion(%async-collective-done.1), kind=kCustom, calls=%all-reduce-scatter
}}
ENTRY %main (p: f32[8,8]) -> f32[8,8] {{
  %w = (s32[], f32[8,8]) while(%p), condition=%condition, body=%body
}}
"""


def test_what_a_product_runs_beside_is_hidden():
    half = 8 * 8 * 4 / 2
    assert collectives(parse(GPU_LOOP), make_mesh(MESH, jax.devices())) == [
        Collective("collective-permute", ("fsdp",), 6 * half, 3, 6 * half),
        Collective("all-reduce", ("tensor",), 6 * half, 3, 6 * half), Collective("all-gather", ("tensor",), 3 * half, 3, 0)]


def test_an_exchange_that_libtpu_fuses_into_products_counts_once():
    half = 8 * 8 * 4 / 2
    assert collectives(parse(TPU_LOOP), make_mesh(MESH, jax.devices())) == [
        Collective("all-gather", ("tensor",), 5 * half, 5, 0), Collective("reduce-scatter", ("tensor",), 5 * half, 5, 5 * half)]


SPARSECORE = f"""
%called (a: f32[4,8]) -> f32[8,8] {{
  %a = f32[4,8] parameter(0)
  ROOT %all-gather.1 = f32[8,8] all-gather(%a), channel_id=14, {PAIRS}, dimensions={{0}}
}}
ENTRY %main (p: f32[4,8]) -> f32[8,8] {{
  %p = f32[4,8] parameter(0)
  %start = ((), s32[8]) custom-call-start(), async_execution_thread="sparsecore", called_computations={{%called}}
  %update = ((f32[4,8]), f32[8,8]) custom-call-update(%start, %p)
  BESIDE
  ROOT %done = f32[8,8] custom-call-done(%update)
}}
"""


@pytest.mark.parametrize(("beside", "exposed"), [("%c = f32[8,8] convolution(%p, %p), dim_labels=bf_io->bf", 0), ("", 128)])
def test_an_exchange_that_a_tpu7x_gives_to_its_sparsecore(beside, exposed):
    text = SPARSECORE.replace("BESIDE", beside)
    assert collectives(parse(text), make_mesh(MESH, jax.devices())) == [Collective("all-gather", ("tensor",), 128, 1, exposed)]


PADDED = f"""
%in_place (zeros: bf16[1,8,64], piece: bf16[1,4,64]) -> bf16[1,8,64] {{
  %zeros = bf16[1,8,64] parameter(0)
  %piece = bf16[1,4,64] parameter(1)
  ROOT %put = bf16[1,8,64] dynamic-update-slice(%zeros, %piece, %i, %i, %i)
}}
%inner (a: f32[8,64]) -> f32[8,64] {{
  %a = f32[8,64] parameter(0)
  ROOT %same = f32[8,64] bitcast(%a)
}}
%own (b: f32[8,64]) -> f32[4,64] {{
  %b = f32[8,64] parameter(0)
  %inside = f32[8,64] fusion(%b), kind=kLoop, calls=%inner
  ROOT %cut = f32[4,64] dynamic-slice(%inside, %i, %i), dynamic_slice_sizes={{4,64}}
}}
ENTRY %main (p: bf16[1,4,64], g: f32[8,64], s: f32[8,64]) -> f32[8,64] {{
  %p = bf16[1,4,64] parameter(0)
  %g = f32[8,64] parameter(1)
  %s = f32[8,64] parameter(2)
  %zero = bf16[] constant(0)
  %zeros = bf16[1,8,64] broadcast(%zero), dimensions={{}}
  %kernel = bf16[1,8,64] fusion(%zeros, %p), kind=kLoop, calls=%in_place
  %all-reduce.1 = (bf16[1,8,64]{{2,1,0:T(8,128)}}, f32[8,64]{{1,0:T(8,128)}}, f32[8,64]{{1,0:T(8,128)}}) all-reduce(%kernel, %g, %s), {PAIRS}, to_apply=%sum, metadata={{op_name="jit(f)/optimizer/all_gather"}}
  %whole = bf16[1,8,64] get-tuple-element(%all-reduce.1), index=0
  %gradient = f32[8,64] get-tuple-element(%all-reduce.1), index=1
  %copied = f32[8,64] copy(%gradient)
  %mine = f32[4,64] fusion(%copied), kind=kLoop, calls=%own
  %norm = f32[8,64] get-tuple-element(%all-reduce.1), index=2
  ROOT %out = f32[8,64] add(%norm, %norm)
}}
"""  # noqa: E501


def test_a_sum_of_several_arrays_is_told_apart_array_by_array():
    """Line 11: libtpu sums at once what is gathered (a piece among zeros), scattered (each device takes its piece)
    and summed, under one name. Two devices: a gather and a scatter send half of the array, a sum all of it."""
    found = {one.kind: one.bytes_per_device for one in collectives(parse(PADDED), make_mesh(MESH, jax.devices()))}
    assert found == {"all-gather": 8 * 64 * 2 / 2, "reduce-scatter": 8 * 64 * 4 / 2, "all-reduce": 8 * 64 * 4}


@pytest.mark.parametrize(("words", "instead"), [
    ("%zero = bf16[] constant(0)", "%zero = bf16[] constant(1)"),  # not among zeros
    ("bf16[1,4,64]", "bf16[1,6,64]"),  # not one of two pieces
    ("dynamic-slice(%inside", "slice(%inside"),  # every device takes the same
    ("f32[4,64]", "f32[6,64]")])
def test_what_only_looks_like_a_gather_or_a_scatter_is_a_sum(words, instead):
    kinds = {one.kind for one in collectives(parse(PADDED.replace(words, instead)), make_mesh(MESH, jax.devices()))}
    assert len(kinds) == 2 and "all-reduce" in kinds


@pytest.mark.parametrize("form", ["(f32[8,8], f32[8,8])", "((f32[8,8], f32[8,8]), (f32[8,8], f32[8,8]))"])
def test_a_started_sum_of_several_arrays_counts_each_once(form):
    """Older XLA writes the results, newer operands and results."""
    text = GPU_LOOP.replace("%all-reduce-start = f32[8,8] all-reduce-start(%x)",
                            f"%all-reduce-start = {form} all-reduce-start(%x, %x)")
    [found] = [one for one in collectives(parse(text), make_mesh(MESH, jax.devices())) if one.kind == "all-reduce"]
    assert found.bytes_per_device == 3 * 2 * 8 * 8 * 4
