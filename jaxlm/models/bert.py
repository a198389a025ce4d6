"""BERT exactly (Devlin et al. 2019); with next_sentence=false, RoBERTa's objective (Liu et al. 2019)."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.models.layers import (
    ACTIVATIONS,
    MLP,
    Attention,
    Beside,
    Context,
    Embedding,
    Execution,
    Linear,
    Norm,
    embed_and_run,
    fan_out,
    norm_epsilon,
    output_stddev,
    stack,
    take_positions,
)
from jaxlm.models.loss import Head, Sums, cross_entropy
from jaxlm.models.sizes import padded_vocab_size
from jaxlm.parallel.dropout import dropout, fold_in, token_keys
from jaxlm.parallel.products import TOKENS, residual_axes
from jaxlm.parallel.sharding import axis_size, constrain
from jaxlm.settings import ModelSettings

FIRST_TOKEN = ("batch", None, "residual")


class Block(nnx.Module):
    """Post-norm block: norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, settings: ModelSettings, rngs: nnx.Rngs):
        stddev = output_stddev(settings)
        self.attention = Attention(settings, causal=False, output_stddev=stddev, rngs=rngs)
        self.attention_norm = _norm(settings)
        self.mlp = MLP(settings, activation=settings.activation or "gelu", output_stddev=stddev, rngs=rngs)
        self.mlp_norm = _norm(settings)
        self.dropout_rate = settings.dropout

    def __call__(self, x: jax.Array, context: Context, cache: None = None) -> tuple[jax.Array, Beside]:
        attended, _ = self.attention(x, context)
        x = self.attention_norm(x + dropout(attended, self.dropout_rate, context.dropout_keys, site=1))
        return self.mlp_norm(x + dropout(self.mlp(x), self.dropout_rate, context.dropout_keys, site=2)), Beside()


class BERT(nnx.Module):
    """Bidirectional encoder with the masked-language-model head and, on request, the next-sentence head."""

    def __init__(self, settings: ModelSettings, *, dtype: jnp.dtype, execution: Execution, loss_chunk: int | None,
                 logits_memory: float, rngs: nnx.Rngs):
        rows, width, stddev = padded_vocab_size(settings.vocab_size), settings.hidden_size, settings.initializer_range
        self.token_embedding = Embedding(rows, width, "vocab", stddev=stddev, rngs=rngs)
        self.position_embedding = Embedding(settings.max_length, width, "positions", stddev=stddev, rngs=rngs)
        self.type_embedding = Embedding(settings.type_vocab_size, width, "types", stddev=stddev, rngs=rngs)
        self.embedding_norm = _norm(settings)
        self.blocks = stack(lambda rngs: Block(settings, rngs), settings.num_layers, rngs)
        self.mlm_transform = Linear({"embed": width}, {"residual": width}, bias=True, stddev=stddev, rngs=rngs)
        self.mlm_norm = _norm(settings)
        self.mlm_bias = nnx.Param(jnp.zeros(rows), axes=("vocab",))
        paired = settings.next_sentence
        self.pooler = Linear({"embed": width}, {"residual": width}, bias=True, stddev=stddev, rngs=rngs) if paired else None
        self.next_sentence_head = Linear({"residual": width}, {None: 2}, bias=True, stddev=stddev, rngs=rngs) if paired else None
        self.settings, self.dtype, self.execution = settings, dtype, execution
        self.head_facts = Head(settings.vocab_size, settings.logit_soft_cap, settings.z_loss, loss_chunk, logits_memory)

    @jax.named_scope("embedding")
    def embed(self, tokens: jax.Array, token_types: jax.Array, context: Context) -> jax.Array:
        """int32 tokens [B, T] to what the first block reads, [B, T, D]."""
        x = self.token_embedding(tokens, self.dtype) + self.position_embedding(context.positions, self.dtype)
        x = x + self.type_embedding(token_types, self.dtype)
        x = constrain(self.embedding_norm(x).astype(self.dtype), *residual_axes(x.shape[1]))
        return dropout(x, self.settings.dropout, fold_in(context.dropout_keys, 2**31), site=0)

    def hidden(self, tokens: jax.Array, context: Context, token_types: jax.Array | None = None) -> jax.Array:
        """int32 tokens [B, T] to states [B, T, D]. Missing token types are type 0, which is added, not skipped."""
        types = jnp.zeros_like(tokens) if token_types is None else token_types
        return embed_and_run(self, (tokens, types), context, self.execution)[0]

    def transform(self, x: jax.Array) -> jax.Array:
        """The part of the masked-language-model head before the (tied) output table. [B, P, D] to [B, P, D]."""
        [transformed] = fan_out(x, self.mlm_transform, states=(*TOKENS, "residual"))
        return self.mlm_norm(ACTIVATIONS[self.settings.activation or "gelu"](transformed))

    def logits(self, x: jax.Array) -> jax.Array:
        """States [B, P, D] to float32 logits [B, P, vocab_size]. Training never calls it."""
        table = self.token_embedding.embedding[...].astype(x.dtype)
        logits = jnp.einsum("btd,vd->btv", self.transform(x), table, preferred_element_type=jnp.float32) + self.mlm_bias[...]
        if self.settings.logit_soft_cap:
            logits = self.settings.logit_soft_cap * jnp.tanh(logits / self.settings.logit_soft_cap)
        return logits[..., : self.settings.vocab_size]

    def next_sentence_logits(self, x: jax.Array) -> jax.Array:
        """States [B, T, D] to float32 [B, 2]; label 0 means that the second text follows the first."""
        [pooled] = fan_out(x[:, :1], self.pooler, states=FIRST_TOKEN)
        [logits] = fan_out(jnp.tanh(pooled), self.next_sentence_head, states=FIRST_TOKEN)
        return logits[:, 0].astype(jnp.float32)

    def losses(self, batch: dict[str, jax.Array], dropout_keys: jax.Array | None = None) -> dict[str, Sums]:
        """Loss sums of a batch; its keys are described in `jaxlm.data.batches`."""
        x = self._states(batch, dropout_keys)
        positions, targets, mask = (_cuttable(batch[f"masked_{name}"]) for name in ("positions", "targets", "mask"))
        masked = self.transform(take_positions(x, positions))  # only these reach the vocabulary
        sums = {"masked_token": cross_entropy(
            masked, self.token_embedding.embedding[...], self.mlm_bias[...], targets, mask, self.head_facts)}
        if self.next_sentence_head is not None:
            sums["next_sentence"] = _next_sentence_sums(self.next_sentence_logits(x), batch)
        return sums

    def fill_masks(self, batch: dict[str, jax.Array]) -> jax.Array:
        """The likeliest token at each of masked_positions of a batch as `losses` takes it: int32 [B, P]."""
        states = take_positions(self._states(batch, None), _cuttable(batch["masked_positions"]))
        return self.logits(states).argmax(-1)[:, : batch["masked_positions"].shape[1]]

    def _states(self, batch: dict[str, jax.Array], dropout_keys: jax.Array | None) -> jax.Array:
        tokens = batch["tokens"]
        places = jnp.arange(tokens.shape[1])[None]
        positions = batch.get("positions", jnp.broadcast_to(places, tokens.shape))
        context = Context(positions, places, batch.get("segment_ids"), token_keys(dropout_keys, places[0]))
        return self.hidden(tokens, context, batch.get("token_types"))

    @staticmethod
    def counts(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """How many predictions of each kind a batch holds; what `losses` is to be divided by."""
        counts = {"masked_token": batch["masked_mask"].sum()}
        if "next_sentence" in batch:
            counts["next_sentence"] = batch["next_sentence_mask"].sum()
        return counts


def _cuttable(array: jax.Array) -> jax.Array:
    """[B, P, ...] with zeros behind the predictions, so that they, too, can be cut as the sequence is."""
    return jnp.pad(array, ((0, 0), (0, -array.shape[1] % axis_size("sequence"))))


def _next_sentence_sums(logits: jax.Array, batch: dict[str, jax.Array]) -> Sums:
    labels, mask = batch["next_sentence"], batch["next_sentence_mask"]
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    loss, correct = jnp.where(mask, loss, 0).sum(), (mask & (logits.argmax(-1) == labels)).sum()
    return Sums(loss, loss, correct.astype(jnp.float32), mask.sum().astype(jnp.float32))


def _norm(settings: ModelSettings) -> Norm:
    return Norm(settings.hidden_size, "residual", kind="layernorm", epsilon=norm_epsilon(settings), bias=True)
