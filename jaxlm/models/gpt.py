"""GPT: GPT-2 exactly (Radford et al. 2019), and by its settings GPT-3 and Llama shapes."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.models.attention import causal_order
from jaxlm.models.layers import (
    MLP,
    Attention,
    Beside,
    Context,
    Embedding,
    Execution,
    Experts,
    Norm,
    embed_and_run,
    norm_epsilon,
    output_stddev,
    run_stack,
    stack,
)
from jaxlm.models.loss import Head, RouterLoss, Sums, cross_entropy
from jaxlm.models.sizes import padded_vocab_size
from jaxlm.parallel.dropout import dropout, fold_in, token_keys
from jaxlm.parallel.experts import RouterSums
from jaxlm.parallel.products import residual_axes
from jaxlm.parallel.sharding import constrain
from jaxlm.settings import ModelSettings


class Block(nnx.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, settings: ModelSettings, rngs: nnx.Rngs):
        stddev = output_stddev(settings)
        self.attention_norm = _norm(settings)
        self.attention = Attention(settings, causal=True, output_stddev=stddev, rngs=rngs)
        self.mlp_norm = _norm(settings)
        kind = MLP if settings.num_experts is None else Experts
        self.mlp = kind(settings, activation=settings.activation or "gelu_tanh", output_stddev=stddev, rngs=rngs)
        self.dropout_rate = settings.dropout

    def __call__(self, x: jax.Array, context: Context, cache: dict | None = None) -> tuple[jax.Array, Beside]:
        attended, cache = self.attention(self.attention_norm(x), context, cache)
        x = x + dropout(attended, self.dropout_rate, context.dropout_keys, site=1)
        y, router = self.mlp(self.mlp_norm(x)), None
        if isinstance(self.mlp, Experts):
            y, router = y
        return x + dropout(y, self.dropout_rate, context.dropout_keys, site=2), Beside(cache, router)


class GPT(nnx.Module):
    """Causal language model."""

    def __init__(self, settings: ModelSettings, *, dtype: jnp.dtype, execution: Execution, loss_chunk: int | None,
                 logits_memory: float, rngs: nnx.Rngs):
        rows, width, stddev = padded_vocab_size(settings.vocab_size), settings.hidden_size, settings.initializer_range
        self.token_embedding = Embedding(rows, width, "vocab", stddev=stddev, rngs=rngs)
        learned = settings.positions == "learned"
        self.position_embedding = (
            Embedding(settings.max_length, width, "positions", stddev=stddev, rngs=rngs) if learned else None)
        self.blocks = stack(lambda rngs: Block(settings, rngs), settings.num_layers, rngs)
        self.final_norm = _norm(settings)
        tied = settings.tied_embeddings
        self.head = None if tied else Embedding(rows, width, "vocab", stddev=stddev, rngs=rngs)
        self.settings, self.dtype, self.execution = settings, dtype, execution
        self.head_facts = Head(settings.vocab_size, settings.logit_soft_cap, settings.z_loss, loss_chunk, logits_memory)

    @jax.named_scope("embedding")
    def embed(self, tokens: jax.Array, context: Context) -> jax.Array:
        """int32 tokens [B, T] to what the first block reads, [B, T, D]."""
        x = self.token_embedding(tokens, self.dtype)
        if self.position_embedding is not None:
            x = x + self.position_embedding(context.positions, self.dtype)
        x = constrain(x.astype(self.dtype), *residual_axes(x.shape[1]))
        return dropout(x, self.settings.dropout, fold_in(context.dropout_keys, 2**31), site=0)

    def hidden(self, tokens: jax.Array, context: Context) -> tuple[jax.Array, RouterSums | None]:
        """int32 tokens [B, T] to the states [B, T, D] that the head reads, and the sums of the routers of experts."""
        x, router = embed_and_run(self, (tokens,), context, self.execution)
        return self.final_norm(x), router

    def hidden_with_cache(self, tokens: jax.Array, context: Context, cache: dict) -> tuple[jax.Array, dict]:
        """The same for tokens that go to the slots from context.cache_index on; and the updated KV cache."""
        x, beside = run_stack(self.blocks, self.embed(tokens, context), context, cache=cache)
        return self.final_norm(x), beside.cache

    def logits(self, x: jax.Array) -> jax.Array:
        """States [B, T, D] to float32 logits [B, T, vocab_size]. For generation; training never calls it."""
        logits = jnp.einsum("btd,vd->btv", x, self._output_table().astype(x.dtype), preferred_element_type=jnp.float32)
        if self.settings.logit_soft_cap:
            logits = self.settings.logit_soft_cap * jnp.tanh(logits / self.settings.logit_soft_cap)
        return logits[..., : self.settings.vocab_size]

    def losses(self, batch: dict[str, jax.Array], dropout_keys: jax.Array | None = None) -> dict[str, Sums | RouterLoss]:
        """Loss sums of a batch {tokens, targets, loss_mask [B, T], optionally segment_ids, positions}."""
        length = batch["tokens"].shape[1]
        places = causal_order(length, self.settings.attention)
        if places is None:
            places = jnp.arange(length)
        else:  # the loss is a sum over positions: their order is free
            batch = {name: array[:, places] for name, array in batch.items()}
        places = places[None]
        positions = batch.get("positions", jnp.broadcast_to(places, batch["tokens"].shape))
        context = Context(positions, places, batch.get("segment_ids"), token_keys(dropout_keys, places[0]))
        x, router = self.hidden(batch["tokens"], context)
        table = self._output_table()
        no_bias = jnp.zeros(table.shape[0])
        sums = {"next_token": cross_entropy(x, table, no_bias, batch["targets"], batch["loss_mask"], self.head_facts)}
        if router is not None:
            layers = self.settings.num_layers
            loss = (self.settings.balance_loss * router.balance.sum() + self.settings.router_z_loss * router.z.sum()) / layers
            rows = jnp.asarray(len(batch["tokens"]), jnp.float32)
            sums["router"] = RouterLoss(loss, rows, router.load, router.dropped.sum())
        return sums

    @staticmethod
    def counts(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """How many predictions (and sequences) a batch holds; what `losses` is to be divided by."""
        return {"next_token": batch["loss_mask"].sum(), "router": jnp.asarray(len(batch["tokens"]))}

    def _output_table(self) -> jax.Array:
        return (self.token_embedding if self.head is None else self.head).embedding[...]


def _norm(settings: ModelSettings) -> Norm:
    return Norm(settings.hidden_size, "residual", kind=settings.normalization, epsilon=norm_epsilon(settings), bias=settings.bias)
