"""Bad numbers: which steps must not reach the parameters. Pure functions inside the compiled step; nothing waits for
the host."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WINDOW = 128  # good steps that a spike is measured by
LEAST = 32  # good steps before anything is called a spike


class Recent(NamedTuple):
    """What the guards know of the steps before, a part of the training state: a run that goes on judges as it would
    have."""

    losses: jax.Array  # float32 [WINDOW], of the last good steps, in a ring
    grad_norms: jax.Array  # float32 [WINDOW]
    good: jax.Array  # int32 []: good steps so far
    skipped: jax.Array  # int32 []: skipped steps so far
    in_a_row: jax.Array  # int32 []: skipped steps since the last good one


def nothing_yet() -> Recent:
    """Of a run that begins."""
    ring, zero = jnp.zeros(WINDOW, jnp.float32), jnp.zeros((), jnp.int32)
    return Recent(ring, ring, zero, zero, zero)


def is_good(recent: Recent, loss: jax.Array, grad_norm: jax.Array, count: jax.Array, spike_sigma: float | None) -> jax.Array:
    """Whether a step may be taken: it has predicted something (`count`; not so where all rows were damaged), its
    loss and its gradient are finite and, with `spike_sigma`, neither lies more than so many standard deviations
    above its mean over the window. A sum of squares that overflows counts as not finite."""
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (count > 0)
    if spike_sigma is not None:
        for value, ring in ((loss, recent.losses), (grad_norm, recent.grad_norms)):
            mean, deviation = _moments(ring, recent.good)
            good &= (value <= mean + spike_sigma * deviation) | (recent.good < LEAST)
    return good


def remembered(recent: Recent, loss: jax.Array, grad_norm: jax.Array, good: jax.Array) -> Recent:
    """The same with one more step; what is skipped does not move the window."""
    place = recent.good % WINDOW
    counted = good.astype(jnp.int32)
    return Recent(
        losses=recent.losses.at[place].set(jnp.where(good, loss, recent.losses[place])),
        grad_norms=recent.grad_norms.at[place].set(jnp.where(good, grad_norm, recent.grad_norms[place])),
        good=recent.good + counted, skipped=recent.skipped + 1 - counted, in_a_row=(recent.in_a_row + 1) * (1 - counted))


def _moments(ring: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the filled part of a ring."""
    filled = jnp.arange(WINDOW) < count
    number = jnp.maximum(filled.sum(), 1)
    mean = jnp.where(filled, ring, 0).sum() / number
    return mean, jnp.sqrt(jnp.where(filled, jnp.square(ring - mean), 0).sum() / number)
