"""Shapes and types of arrays, written as types: `Float[Array, "B T D"]` is an array of floats, one row of D for each of
T tokens of B sequences (jaxtyping's notation). They are for the reader, and cost nothing at run time;
`tests/test_shapes.py` traces tiny models with every one of them checked.

One letter means one thing in models/ and parallel/:

    B  sequences: rows of a batch              N  query heads                     E  experts
    T  tokens of a sequence                    K  key/value heads                 L  layers
    S  keys; slots of a KV cache               G  query heads for each of those   M  micro-batches
    P  predictions of a sequence               H  width of a head                 V  vocabulary, padded
    D  hidden size                             F  width of the MLP                C  labels
    R  directions of an LSTM, with H units each

In functions that run on each device, over its own part, letters are the sizes of that part. `T_own` is then what a
device holds of T before it is gathered, or after it is scattered; `D_own` and `V_own` likewise.

`Float` is a float of any width: the compute type where nothing else is said. `Float32`, `Int32`, `UInt32` and `Bool`
are just that. `...` stands for any further dimensions, `1` for one that broadcasts.
"""

import jax
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, Shaped, UInt32

__all__ = ["Array", "Batch", "Bool", "Cache", "Float", "Float32", "Int", "Int32", "Key", "RowKeys", "Shaped", "TokenKeys",
           "UInt32"]

Batch = dict[str, jax.Array]  # arrays [B, ...] by name; which ones, the task says (`jaxlm.tasks`)
# "key" and "value" [B, S, K, H], of an LSTM "hidden" and "cell" [B, R, H]; with a leading L for a stack of layers
Cache = dict[str, Float[Array, "..."]]
RowKeys = Key[Array, " B"]  # a random key for each sequence
TokenKeys = UInt32[Array, "B T 2"]  # and for each token (`jaxlm.parallel.dropout`)
