"""Line 11: FLOPs of compiled programs, in the forms in which XLA's compilers write products, against 2 m n k."""

import base64
import subprocess
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest

from jaxlm.models.attention import _splash
from jaxlm.models.sizes import visible_blocks
from jaxlm.planning.flops import Arithmetic, executed_flops, kernels_of
from jaxlm.planning.hlo import parse
from jaxlm.settings import ModelSettings

M, N, K = 512, 256, 1024
PRODUCT = 2 * M * N * K


def entry(*operations: str) -> str:
    return "ENTRY %main (p: f32[8]) -> f32[8] {\n  " + "\n  ".join(operations) + "\n}\n"


def operands(kind: str, first=(M, K), second=(K, N)) -> list[str]:
    return [f"%a = {kind}[{','.join(map(str, first))}] parameter(0)", f"%b = {kind}[{','.join(map(str, second))}] parameter(1)"]


def dot(kind: str, how: str = "") -> str:
    contracted = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    return entry(*operands(kind), f"ROOT %c = {kind}[{M},{N}] dot(%a, %b), {contracted}{how}")


def convolution(kind: str, how: str = "") -> str:
    return entry(*operands(kind), f"ROOT %c = {kind}[{M},{N}] convolution(%a, %b), dim_labels=bf_io->bf{how}")


HIGHEST = ", operand_precision={highest,highest}"


@pytest.mark.parametrize(("text", "platform", "expected"), [
    (dot("bf16"), "gpu", Arithmetic(bfloat16=PRODUCT)),
    (dot("f32"), "gpu", Arithmetic(tfloat32=PRODUCT)),
    (dot("f32", HIGHEST), "gpu", Arithmetic(float32=PRODUCT)),
    (dot("f32", ", algorithm=dot_f32_f32_f32"), "gpu", Arithmetic(float32=PRODUCT)),
    (dot("f32", ", algorithm=dot_tf32_tf32_f32_x3"), "gpu", Arithmetic(tfloat32=3 * PRODUCT)),
    (dot("f32", ", algorithm=dot_bf16_bf16_f32_x6"), "gpu", Arithmetic(bfloat16=6 * PRODUCT)),
    (dot("f32"), "cpu", Arithmetic(float32=PRODUCT)),
    (convolution("bf16"), "tpu", Arithmetic(bfloat16=PRODUCT)),
    (convolution("bf16", HIGHEST), "tpu", Arithmetic(bfloat16=PRODUCT)),
    (convolution("f32"), "tpu", Arithmetic(bfloat16=PRODUCT)),
    (convolution("f32", ", operand_precision={high,high}"), "tpu", Arithmetic(bfloat16=3 * PRODUCT)),
    (convolution("f32", HIGHEST), "tpu", Arithmetic(bfloat16=6 * PRODUCT)),  # libtpu expects 5.9 times the cycles
])
def test_what_multiplies_and_how_often(text, platform, expected):
    """Lines 10 and 11: the precision that stands in a program decides which unit works, and how many passes it
    takes."""
    assert executed_flops(parse(text), platform) == expected


def test_mixed_operands_take_three_passes_on_a_tpu():
    text = convolution("f32", HIGHEST).replace("%b = f32", "%b = bf16")
    assert executed_flops(parse(text), "tpu").total == 3 * PRODUCT


def test_cublas_counts_like_a_dot():
    config = ('custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
              '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]},"precision_config":{"operand_precision":'
              '["PRECISION","PRECISION"],"algorithm":"ALG_UNSET"}}}')
    for precision, unit in (("DEFAULT", "tfloat32"), ("HIGHEST", "float32")):
        call = f"%c = (f32[{M},{N}], s8[4194304]) custom-call(%a, %b), {config.replace('PRECISION', precision)}"
        assert executed_flops(parse(entry(*operands("f32"), call)), "gpu") == Arithmetic(**{unit: PRODUCT})


@pytest.mark.parametrize(("first", "second", "result", "how", "flops"), [
    # batches as windows that meet no number but their own, as libtpu writes bij,bjk->bik and bqhd,bkhd->bhqk
    ("8,512,128", "8,128,256", "8,512,256", "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
     2 * 8 * 512 * 128 * 256),
    ("8,512,16,64", "8,512,16,64", "8,16,512,512", "window={size=8x16 stride=7x15 lhs_dilate=8x16}, dim_labels=0b1f_0o1i->01bf",
     2 * 8 * 16 * 512 * 512 * 64),
    ("4,1024,12288", "12288,3072,1", "4,1024,3072", "window={size=1}, dim_labels=0bf_io0->0bf", 2 * 4 * 1024 * 12288 * 3072),
    # a real one, 3 x 3 in steps of 2 over 32 x 32: of 16 x 3 places along a side one is padding
    ("8,32,32,64", "3,3,64,128", "8,16,16,128", "window={size=3x3 stride=2x2 pad=0_1x0_1}, dim_labels=b01f_01io->b01f",
     2 * 8 * 64 * 128 * 47 * 47),
])
def test_convolutions_that_libtpu_makes_of_products(first, second, result, how, flops):
    text = entry(f"%a = bf16[{first}] parameter(0)", f"%b = bf16[{second}] parameter(1)",
                 f"ROOT %c = bf16[{result}] convolution(%a, %b), {how}")
    assert executed_flops(parse(text), "tpu").total == flops


NESTED = """
%inner (a: bf16[512,512]) -> bf16[512,512] {
  %a = bf16[512,512] parameter(0)
  ROOT %dot.1 = bf16[512,512] dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%outer (b: bf16[512,512]) -> bf16[512,512] {
  %b = bf16[512,512] parameter(0)
  %first = bf16[512,512] fusion(%b), kind=kOutput, calls=%inner
  ROOT %dot.2 = bf16[512,512] dot(%first, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%long (c: bf16[512,512]) -> bf16[512,512] {
  %c = bf16[512,512] parameter(0)
  ROOT %both = bf16[512,512] fusion(%c), kind=kOutput, calls=%outer
}
%short (d: bf16[512,512]) -> bf16[512,512] {
  ROOT %d = bf16[512,512] parameter(0)
}
%body (t: bf16[512,512]) -> bf16[512,512] {
  %t = bf16[512,512] parameter(0)
  ROOT %choice = bf16[512,512] conditional(%t, %t, %t), branch_computations={%short, %long}
}
ENTRY %main (p: bf16[512,512]) -> bf16[512,512] {
  %p = bf16[512,512] parameter(0)
  ROOT %w = bf16[512,512] while(%p), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"7"}}
}
"""


def test_fusions_in_fusions_choices_and_loops():
    assert executed_flops(parse(NESTED), "gpu").total == 7 * 2 * 2 * 512**3


def test_a_product_over_groups_that_became_a_dense_one_counts_as_dense():
    """XLA's GPU compiler: 2,048 rows over 4 experts of 512 x 256, each row through all four."""
    text = entry("%w = bf16[4,512,256] parameter(0)", "%x = bf16[2048,4,512] parameter(1)",
                 "ROOT %d = f32[4,2048,256] dot(%x, %w), lhs_batch_dims={1}, lhs_contracting_dims={2}, rhs_batch_dims={0}, "
                 "rhs_contracting_dims={1}, metadata={op_name=\"jit(f)/ragged_dot_general\"}")
    assert executed_flops(parse(text), "gpu").total == 4 * 2 * 2048 * 512 * 256


COMPILES = """
import jax, jax.numpy as jnp
from jaxlm.planning.devices import devices_of
from jaxlm.planning.flops import executed_flops
from jaxlm.planning.hlo import parse
from jaxlm.planning.targets import find_target
target = find_target("{target}")
place = jax.sharding.SingleDeviceSharding(devices_of(target).all[0])
shapes = [((2048, 512), jnp.bfloat16), ((4, 512, 256), jnp.bfloat16), ((4,), jnp.int32)]
arguments = [jax.ShapeDtypeStruct(*one, sharding=place) for one in shapes]
text = jax.jit(jax.lax.ragged_dot).lower(*arguments).compile().as_text()
print(executed_flops(parse(text), target.platform).total)
"""


@pytest.mark.parametrize(("target", "compiler", "times"), [("h100:1", "jax_cuda13_plugin", 4), ("v5e:2x2", "libtpu", 1)])
def test_grouped_products_through_the_real_compilers(target, compiler, times):
    """Line 11, where the compiler is installed: dense on GPUs, libtpu has a kernel for it."""
    if not find_spec(compiler):
        pytest.skip(f"{compiler} is not installed")
    done = subprocess.run([sys.executable, "-c", COMPILES.format(target=target)], capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) == times * 2 * 2048 * 512 * 256


@pytest.mark.parametrize(("target", "mask", "products"), [
    ("__cudnn$fmhaSoftmax", "NO_MASK", 2), ("__cudnn$fmhaSoftmax", "CAUSAL", 1), ("__cudnn$fmhaSoftmaxBackward", "CAUSAL", 2.5),
    ("__cudnn$fmhaScaleBiasSoftmaxDropoutBackward", "NO_MASK", 5)])
def test_cudnns_attention(target, mask, products):
    """Two products forward, five backward, half of each where the mask is causal."""
    text = entry("%q = bf16[4,1024,16,64] parameter(0)",
                 f'%o = (bf16[4,16,1024,64], u8[0]) custom-call(%q, %q, %q), custom_call_target="{target}", backend_config='
                 '{"cudnn_fmha_backend_config": {"fmha_scale": 0.125, "intermediate_tensor_shape": {"element_type": "BF16", '
                 f'"dimensions": ["4", "16", "1024", "1024"]}}, "mask_type": "{mask}"}}}}')
    assert executed_flops(parse(text), "gpu").total == products * 2 * 4 * 16 * 1024 * 1024 * 64


def test_libtpus_own_kernels_say_what_they_do():
    def call(body):
        return entry("%x = f32[2048,512] parameter(0)", "%w = f32[4,512,256] parameter(1)",
                     '%d = f32[2048,256] custom-call(%x, %w), custom_call_target="tpu_custom_call", backend_config={"custom_call_'
                     f'config":{{"body":"{base64.b64encode(body).decode()}","cost_estimate":{{"flops":"{PRODUCT}"}}}}}}')

    assert executed_flops(parse(call(b"precision = #tpu.contract_precision<bf16>")), "tpu").total == PRODUCT
    assert executed_flops(parse(call(b"precision = #tpu.contract_precision<fp32>")), "tpu").total == 6 * PRODUCT


def test_splash_attention_counts_what_its_mask_leaves():
    """Nine products of scores: two forward, four for keys and values, three for queries; the name stands over
    several lines."""
    shape, length = (2, 2048, 4, 128), 2048
    array = jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def loss(*arrays):
        return _splash(*arrays, None, True).astype(jnp.float32).sum()

    visible = visible_blocks(ModelSettings(), length)
    kernels = kernels_of(jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(array, array, array).jaxpr, visible)
    call = ('%{}.1 = bf16[2,4,2048,128] custom-call(%q), custom_call_target="tpu_custom_call", frontend_attributes='
            '{{kernel_metadata={{\n{{"block_q": 512}}\n}}}}, metadata={{op_name="jit(f)/jvp()"}}')
    text = entry("%q = bf16[2,4,2048,128] parameter(0)", *map(call.format, kernels))
    assert len(kernels) == 3
    assert executed_flops(parse(text), "tpu", kernels).total == pytest.approx(visible * 9 * 2 * 2 * 4 * length**2 * 128)
