"""Memory of the loss and its gradients: cross_entropy by chunks against Optax's over full logits.

    python benchmarks/loss_memory.py

Compiles both for one CPU device at GPT-2's size (8 x 1,024 tokens, hidden 768, 50,304 rows) and prints what the
compiler sets aside beside the arguments and the results. Nothing is run.
"""

import jax
import jax.numpy as jnp
import optax

from jaxlm.models.loss import Head, cross_entropy

ROWS, LENGTH, WIDTH, VOCABULARY = 8, 1024, 768, 50304


def chunked(x: jax.Array, table: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    sums = cross_entropy(x, table, jnp.zeros(VOCABULARY), targets, mask, Head(50257))
    return sums.loss / sums.count


def full_logits(x: jax.Array, table: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    logits = jnp.einsum("btd,vd->btv", x, table.astype(x.dtype)).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(where=mask)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    print(f"{ROWS} x {LENGTH:,} tokens, hidden {WIDTH}, vocabulary {VOCABULARY:,}; jax {jax.__version__}, "
          f"{len(jax.devices())} {jax.devices()[0].platform} device")
    print(f"{'states':10}{'chunked':>12}{'full logits':>14}{'ratio':>8}")
    for dtype in (jnp.float32, jnp.bfloat16):
        shapes = (jax.ShapeDtypeStruct((ROWS, LENGTH, WIDTH), dtype), jax.ShapeDtypeStruct((VOCABULARY, WIDTH), jnp.float32),
                  jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32), jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.bool))
        chunks, full = (jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile().memory_analysis()
                        .temp_size_in_bytes / 2**20 for loss in (chunked, full_logits))
        print(f"{jnp.dtype(dtype).name:10}{chunks:8,.0f} MiB{full:10,.0f} MiB{full / chunks:8.1f}")


if __name__ == "__main__":
    main()
