"""The recurrent trunk: layers of LSTM cells (Hochreiter & Schmidhuber 1997; forget gates: Gers et al. 2000).

    i, f, g, o = x W + h R + b
    c = sigmoid(f) c + sigmoid(i) tanh(g)
    h = sigmoid(o) tanh(c)

The four gates stand in this order, as in torch.nn.LSTM, whose two biases are one here: their sum. A causal model reads
from left to right. One that is not reads both ways in every layer, each direction with half of the width, and the
halves stand side by side (Graves & Schmidhuber 2005), as with bidirectional=True and hidden_size = D / 2 in torch.
Tokens are read document by document: where a segment begins, the state is zeros again.

Shapes: `jaxlm.parallel.shapes`; H = D / R units of one direction, h of them on one device.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlm.models.layers import Auxiliary, Context, Embedding, Execution, Linear, column_parallel, run_stack, stack
from jaxlm.models.sizes import padded_vocab_size, recurrent_width
from jaxlm.models.states import States
from jaxlm.parallel.dropout import dropout, fold_in, token_keys
from jaxlm.parallel.products import TOKENS, MeshAxes, gather, residual_axes
from jaxlm.parallel.shapes import Array, Batch, Cache, Float, Float32, Int32, RowKeys, Shaped
from jaxlm.parallel.sharding import constrain, mesh_axes, per_device
from jaxlm.settings import ModelSettings

GATES = 4
UNITS = "mlp"  # units are cut as the inner width of an MLP is
STATE = ("batch", None, UNITS)


class Recurrent(NamedTuple):
    """What a layer knows of the tokens before."""

    hidden: Float[Array, "B R H"]  # in the compute type
    cell: Float32[Array, "B R H"]


class Layer(nnx.Module):
    """One layer, in one direction or both; then dropout (Zaremba et al. 2014: between layers, not between tokens)."""

    def __init__(self, settings: ModelSettings, rngs: nnx.Rngs):
        width = recurrent_width(settings)
        self.directions = settings.hidden_size // width
        gates, stddev = {None: GATES * self.directions, UNITS: width}, 1 / math.sqrt(3 * width)  # of torch's +-1 / sqrt(H)
        self.input = Linear({"embed": settings.hidden_size}, gates, bias=bool(settings.bias), stddev=stddev, rngs=rngs)
        self.recurrent = Linear({"embed": width}, gates, bias=False, stddev=stddev, rngs=rngs)
        if settings.bias:  # forget gates begin open (Jozefowicz et al. 2015)
            self.input.bias[...] = self.input.bias[...].at[1::GATES].set(1.0)
        self.dropout_rate = settings.dropout

    @jax.named_scope("lstm")
    def __call__(self, x: Float[Array, "B T D"], context: Context, cache: Cache | None = None
                 ) -> tuple[Float[Array, "B T D"], Auxiliary]:
        """`cache`: the state after the tokens before, as `LSTM.empty_cache` has it."""
        [gates] = column_parallel(x, self.input)  # [B, T, 4 R, H], of all tokens at once: only h R waits for the token before
        gates = checkpoint_name(gates, "mlp_hidden")
        rows, length, _, units = gates.shape
        zeros = jnp.zeros((rows, self.directions, units), x.dtype)
        before = Recurrent(zeros, zeros.astype(jnp.float32)) if cache is None else Recurrent(**cache)
        read = functools.partial(_read, kernel_cut=mesh_axes("embed"), units_cut=mesh_axes(UNITS))
        run = per_device(read, ((*TOKENS, None, UNITS), ("embed", None, UNITS), TOKENS, Recurrent(STATE, STATE)),
                         ((*TOKENS, None, UNITS), Recurrent(STATE, STATE)))
        segments = jnp.zeros((rows, length), jnp.int32) if context.segment_ids is None else context.segment_ids
        y, after = run(gates, self.recurrent.kernel[...], segments, before)
        y = constrain(y, *residual_axes(length), None).reshape(rows, length, -1)
        return dropout(y, self.dropout_rate, context.dropout_keys, site=1), Auxiliary(None if cache is None else after._asdict())


def _read(gates: Float[Array, "B T gates h"], kernel: Float[Array, "H_own gates h"], segments: Int32[Array, "B T"],
          before: Recurrent, *, kernel_cut: MeshAxes, units_cut: MeshAxes) -> tuple[Float[Array, "B T R h"], Recurrent]:
    """One device's rows and units: what x gives to the gates, to the states of all tokens, and the last ones.
    `kernel_cut`, `units_cut`: mesh axes of the kernel's rows, and of its columns and the units."""
    rows, length, _, units = gates.shape
    directions = before.hidden.shape[1]
    kernel = gather(kernel.astype(gates.dtype), kernel_cut, axis=0).reshape(-1, directions, GATES, units)
    gates = _in_order(gates.reshape(rows, length, directions, GATES, units))
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    ends = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (0, 1)))
    resets = _in_order(jnp.stack([begins, ends], axis=2)[:, :, :directions])

    def one_token(state: Recurrent, token: tuple[Array, Array]) -> tuple[Recurrent, Float[Array, "B R h"]]:
        given, reset = token
        hidden, cell = (jnp.where(reset[..., None], 0, array) for array in state)
        hidden = gather(hidden, units_cut, axis=-1)  # every unit reads all of them
        own = jnp.einsum("brk,krgh->brgh", hidden, kernel, preferred_element_type=jnp.float32)
        i, f, g, o = jnp.moveaxis(given.astype(jnp.float32) + own, 2, 0)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = (jax.nn.sigmoid(o) * jnp.tanh(cell)).astype(gates.dtype)
        return Recurrent(hidden, cell), hidden

    after, states = jax.lax.scan(one_token, before, (jnp.moveaxis(gates, 1, 0), jnp.moveaxis(resets, 1, 0)))
    return _in_order(jnp.moveaxis(states, 0, 1)), after


def _in_order(array: Shaped[Array, "B T R *rest"]) -> Shaped[Array, "B T R *rest"]:
    """The second direction the other way round, so that both are read from the left; and back again."""
    return jnp.concatenate([array[:, :, :1], array[:, ::-1, 1:]], axis=2)


class LSTM(nnx.Module):
    """Embedding and layers."""

    def __init__(self, settings: ModelSettings, *, dtype: jnp.dtype, execution: Execution, rngs: nnx.Rngs):
        rows, width = padded_vocab_size(settings.vocab_size), settings.hidden_size
        self.token_embedding = Embedding(rows, width, "vocab", stddev=width**-0.5, rngs=rngs)
        self.blocks = stack(lambda rngs: Layer(settings, rngs), settings.num_layers, rngs)
        self.settings, self.dtype, self.execution = settings, dtype, execution

    @jax.named_scope("embedding")
    def embed(self, tokens: Int32[Array, "B T"], context: Context) -> Float[Array, "B T D"]:
        """What gates read begins with a variance of 1, and so do the logits of the
        same table: the factor is for the input alone (Vaswani et al. 2017, section 3.4)."""
        x = math.sqrt(self.settings.hidden_size) * self.token_embedding(tokens, self.dtype)
        x = constrain(x.astype(self.dtype), *residual_axes(x.shape[1]))
        return dropout(x, self.settings.dropout, fold_in(context.dropout_keys, 2**31), site=0)

    def states(self, batch: Batch, dropout_keys: RowKeys | None = None) -> States:
        """States of a batch {tokens int32 [B, T], optionally segment_ids}. `dropout_keys`: None: no dropout."""
        indices = jnp.arange(batch["tokens"].shape[1])
        context = Context(indices[None], indices[None], batch.get("segment_ids"), token_keys(dropout_keys, indices))
        x, _ = run_stack(self.blocks, self.embed(batch["tokens"], context), context, remat=self.execution.remat)
        return States(x, None, None)

    def hidden_with_cache(self, tokens: Int32[Array, "B T"], context: Context, cache: Cache
                          ) -> tuple[Float[Array, "B T D"], Cache]:
        """States of tokens that follow those before; and the state after them."""
        x, aux = run_stack(self.blocks, self.embed(tokens, context), context, cache=cache)
        return x, aux.cache

    def empty_cache(self, rows: int, slots: int) -> Cache:
        """The state before the first token, [L, B, 1, D], whatever the number of tokens to come."""
        shape = (self.settings.num_layers, rows, 1, self.settings.hidden_size)
        hidden, cell = (constrain(jnp.zeros(shape, dtype), "layers", *STATE) for dtype in (self.dtype, jnp.float32))
        return {"hidden": hidden, "cell": cell}


Trunk = LSTM
