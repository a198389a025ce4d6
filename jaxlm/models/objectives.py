"""Objectives: what is learned from a trunk's states, and how far off the answers are.

An objective has a head, terms that add up over rows, batches, devices and hosts (so that no mean of means appears),
and figures that are read from their sum at the end. Tasks (`jaxlm.tasks`) say which objectives a run has, and make the
rows that they read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.data.masking import num_predictions
from jaxlm.models.layers import ACTIVATIONS, Embedding, Linear, column_parallel
from jaxlm.models.loss import Head, RouterLoss, Sums, cross_entropy
from jaxlm.models.sizes import norm_bias, padded_vocab_size
from jaxlm.models.states import States, cuttable
from jaxlm.models.transformer import residual_norm
from jaxlm.parallel.products import TOKENS
from jaxlm.parallel.shapes import Array, Batch, Float, Float32, Int, Int32, Shaped
from jaxlm.settings import DataSettings, ModelSettings

FIRST_TOKEN = ("batch", None, "residual")
MOST_NATS = 700  # of which the exponential is still a number

Figures = dict[str, float | None]
PerRow = dict[str, Shaped[Array, "B ..."]]


class Facts(NamedTuple):
    """What an evaluation knows beside the sums."""

    bytes_per_token: float | None  # UTF-8 bytes of text for each predicted token; None: not known
    verdicts: dict[str, Shaped[np.ndarray, " B"]]  # of all rows with a label, in their order (`Objective.verdicts`)


@dataclass(frozen=True)
class Objective:
    """What one objective has to say; those of a run are summed in their order, each divided by its own count."""

    name = ""
    is_evaluated = True  # false: a matter of training alone

    def head(self, settings: ModelSettings, rngs: nnx.Rngs) -> nnx.Module | None:
        """Its own parameters, which become `network.heads[name]`; None: it has none."""
        return None

    def terms(self, network: Any, states: States, batch: Batch) -> Any:
        """Sums over the rows of a batch, as a named tuple with `loss`, which is minimized, and `count`."""
        raise NotImplementedError

    def every_logit(self, network: Any, states: States, batch: Batch) -> Float32[Array, "B ..."]:
        """All that the head says of a batch, of every token or every row: what an export is compared by."""
        raise NotImplementedError

    def count(self, batch: Batch) -> Int[Array, ""]:
        """How many predictions a batch holds; what the sum of losses is to be divided by."""
        raise NotImplementedError

    def training_figures(self, terms: Any) -> dict[str, Float32[Array, ""]]:
        """Columns of a training row beside the loss."""
        return {}

    def loss(self, terms: Any) -> float:
        """Of an evaluation, in nats for each prediction."""
        return terms.cross_entropy / max(terms.count, 1)

    def answers(self, network: Any, states: States, batch: Batch) -> PerRow:
        """What is said of each row, whether it has a label or not; {}: of rows nothing is said."""
        return {}

    def verdicts(self, network: Any, states: States, batch: Batch) -> PerRow:
        """A few numbers for each row that tell how far off the answer is: `mask` (false: a row without a
        label), `error` (0: right), and what the task needs to say it in words. {}: nothing."""
        return {}

    def figures(self, terms: Any, facts: Facts) -> Figures:
        """Columns of an evaluation row beside `val_loss`."""
        return {}

    def predictions(self, data: DataSettings) -> int:
        """Positions of a sequence that reach the head."""
        raise NotImplementedError

    def flops(self, model: ModelSettings, predictions: int) -> float:
        """Of one sequence's forward pass through the head, matrix products only."""
        return 0.0


class NextToken(Objective):
    """Each token from those before it (Radford et al. 2018)."""

    name = "next_token"

    def head(self, settings: ModelSettings, rngs: nnx.Rngs) -> Embedding | None:
        """The output table, where it is not the embedding's."""
        return None if settings.tied_embeddings else output_table(settings, rngs)

    def terms(self, network: Any, states: States, batch: Batch) -> Sums:
        """Of a batch {targets int32 [B, T], loss_mask bool [B, T]}."""
        table = self._table(network)
        targets, mask = (states.in_order(batch[name]) for name in ("targets", "loss_mask"))
        return cross_entropy(states.x, table, jnp.zeros(table.shape[0]), targets, mask, head_facts(network))

    def count(self, batch: Batch) -> Int[Array, ""]:
        return batch["loss_mask"].sum()

    def logits(self, network: Any, x: Float[Array, "B T D"]) -> Float32[Array, "B T vocab_size"]:
        """For generation; training never calls it."""
        logits = jnp.einsum("btd,vd->btv", x, self._table(network).astype(x.dtype), preferred_element_type=jnp.float32)
        return capped(logits, network.settings)

    def every_logit(self, network: Any, states: States, batch: Batch) -> Float32[Array, "B T vocab_size"]:
        return self.logits(network, of_every_token(states, batch))[:, : batch["tokens"].shape[1]]

    def figures(self, terms: Sums, facts: Facts) -> Figures:
        nats = self.loss(terms)
        return {"val_perplexity": math.exp(min(nats, MOST_NATS)), "val_accuracy": terms.correct / max(terms.count, 1),
                "val_bits_per_byte": facts.bytes_per_token and nats / math.log(2) / facts.bytes_per_token}

    def predictions(self, data: DataSettings) -> int:
        return data.sequence_length

    def flops(self, model: ModelSettings, predictions: int) -> float:
        return 2 * predictions * model.hidden_size * model.vocab_size

    def _table(self, network: Any) -> Float[Array, "V D"]:
        return (network.token_embedding if network.settings.tied_embeddings else network.heads[self.name]).embedding[...]


class Routing(Objective):
    """Tokens spread evenly over the experts (Fedus et al. 2021), with logits that stay small (Zoph et al. 2022)."""

    name = "router"
    is_evaluated = False  # how experts are used is a matter of training

    def terms(self, network: Any, states: States, batch: Batch) -> RouterLoss:
        settings, router = network.settings, states.router
        loss = settings.balance_loss * router.balance.sum() + settings.router_z_loss * router.z.sum()
        rows = jnp.asarray(len(batch["tokens"]), jnp.float32)
        return RouterLoss(loss / settings.num_layers, rows, router.load, router.dropped.sum())

    def count(self, batch: Batch) -> Int[Array, ""]:
        return jnp.asarray(len(batch["tokens"]))

    def training_figures(self, terms: RouterLoss) -> dict[str, Float32[Array, ""]]:
        """Of the fullest and the emptiest expert of any layer, 1 being an even share."""
        share = terms.load * terms.load.shape[1] / terms.load.sum(1, keepdims=True)
        return {"expert_load_max": share.max(), "expert_load_min": share.min(),
                "dropped_fraction": terms.dropped / terms.load.sum()}

    def predictions(self, data: DataSettings) -> int:
        return 0


class MaskedTokenHead(nnx.Module):
    """What stands between the states and the output table (Devlin et al. 2019, released code)."""

    def __init__(self, settings: ModelSettings, rngs: nnx.Rngs):
        width, stddev = settings.hidden_size, settings.initializer_range
        self.transform = Linear({"embed": width}, {"residual": width}, bias=norm_bias(settings), stddev=stddev, rngs=rngs)
        self.norm = residual_norm(settings)
        self.bias = nnx.Param(jnp.zeros(padded_vocab_size(settings.vocab_size)), axes=("vocab",), role="bias")
        self.table = None if settings.tied_embeddings else output_table(settings, rngs)
        self.activation = head_activation(settings)

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        [transformed] = column_parallel(x, self.transform, states=(*TOKENS, "residual"))
        return self.norm(ACTIVATIONS[self.activation](transformed))


class MaskedToken(Objective):
    """Hidden tokens from those around them (Devlin et al. 2019, section 3.1)."""

    name = "masked_token"

    def head(self, settings: ModelSettings, rngs: nnx.Rngs) -> MaskedTokenHead:
        return MaskedTokenHead(settings, rngs)

    def terms(self, network: Any, states: States, batch: Batch) -> Sums:
        """Of a batch {masked_positions, masked_targets int32 [B, P], masked_mask bool [B, P]}."""
        head, table, bias = self._parts(network)
        masked = head(states.at(batch["masked_positions"]))  # only these reach the vocabulary
        targets, mask = (cuttable(batch[f"masked_{name}"]) for name in ("targets", "mask"))
        return cross_entropy(masked, table, bias, targets, mask, head_facts(network))

    def count(self, batch: Batch) -> Int[Array, ""]:
        return batch["masked_mask"].sum()

    def logits(self, network: Any, x: Float[Array, "B P D"]) -> Float32[Array, "B P vocab_size"]:
        """Training never calls it."""
        head, table, bias = self._parts(network)
        logits = jnp.einsum("btd,vd->btv", head(x), table.astype(x.dtype), preferred_element_type=jnp.float32) + bias
        return capped(logits, network.settings)

    def every_logit(self, network: Any, states: States, batch: Batch) -> Float32[Array, "B T vocab_size"]:
        return self.logits(network, of_every_token(states, batch))[:, : batch["tokens"].shape[1]]

    def filled(self, network: Any, states: States, batch: Batch) -> Int32[Array, "B P"]:
        """The likeliest token at each of masked_positions."""
        return self.logits(network, states.at(batch["masked_positions"])).argmax(-1)[:, : batch["masked_positions"].shape[1]]

    def figures(self, terms: Sums, facts: Facts) -> Figures:
        nats = self.loss(terms)
        return {"val_mlm_loss": nats, "val_mlm_accuracy": terms.correct / max(terms.count, 1),
                "val_mlm_perplexity": math.exp(min(nats, MOST_NATS))}

    def predictions(self, data: DataSettings) -> int:
        return num_predictions(data.masking, data.sequence_length)

    def flops(self, model: ModelSettings, predictions: int) -> float:
        return 2 * predictions * model.hidden_size * (model.vocab_size + model.hidden_size)

    def _parts(self, network: Any) -> tuple[MaskedTokenHead, Float[Array, "V D"], Float[Array, " V"]]:
        head = network.heads[self.name]
        return head, (network.token_embedding if head.table is None else head.table).embedding[...], head.bias[...]


class NextSentenceHead(nnx.Module):
    def __init__(self, settings: ModelSettings, rngs: nnx.Rngs):
        width, stddev = settings.hidden_size, settings.initializer_range
        self.pooler = Linear({"embed": width}, {"residual": width}, bias=True, stddev=stddev, rngs=rngs)
        self.classifier = Linear({"residual": width}, {None: 2}, bias=True, stddev=stddev, rngs=rngs)


class NextSentence(Objective):
    """Whether the second text of a pair follows the first (Devlin et al. 2019, section 3.1, task 2)."""

    name = "next_sentence"

    def head(self, settings: ModelSettings, rngs: nnx.Rngs) -> NextSentenceHead:
        return NextSentenceHead(settings, rngs)

    def terms(self, network: Any, states: States, batch: Batch) -> Sums:
        """Of a batch {next_sentence int32 [B], next_sentence_mask bool [B]}."""
        logits = self.logits(network, states.x)
        labels, mask = batch["next_sentence"], batch["next_sentence_mask"]
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
        loss, correct = jnp.where(mask, loss, 0).sum(), (mask & (logits.argmax(-1) == labels)).sum()
        return Sums(loss, loss, correct.astype(jnp.float32), mask.sum().astype(jnp.float32))

    def count(self, batch: Batch) -> Int[Array, ""]:
        return batch["next_sentence_mask"].sum()

    def logits(self, network: Any, x: Float[Array, "B T D"]) -> Float32[Array, "B 2"]:
        """Label 0 means that the second text follows the first."""
        head = network.heads[self.name]
        [pooled] = column_parallel(x[:, :1], head.pooler, states=FIRST_TOKEN)
        [logits] = column_parallel(jnp.tanh(pooled), head.classifier, states=FIRST_TOKEN)
        return logits[:, 0].astype(jnp.float32)

    def every_logit(self, network: Any, states: States, batch: Batch) -> Float32[Array, "B 2"]:
        return self.logits(network, states.x)

    def figures(self, terms: Sums, facts: Facts) -> Figures:
        return {"val_nsp_loss": self.loss(terms), "val_nsp_accuracy": terms.correct / max(terms.count, 1)}

    def predictions(self, data: DataSettings) -> int:
        return 0  # of a whole sequence; its products are not worth counting


Objectives = tuple[Objective, ...]
REGISTERED: Mapping[str, Objective] = {objective.name: objective for objective in (
    NextToken(), Routing(), MaskedToken(), NextSentence())}


def pretraining_objectives(settings: ModelSettings) -> Objectives:
    """What a model of this kind is pretrained on, where no task says anything else."""
    if settings.causal:
        return (NextToken(), *([Routing()] if settings.num_experts is not None else []))
    return (MaskedToken(), *([NextSentence()] if settings.next_sentence else []))


# ---- what heads share ------------------------------------------------------------------------------------------------

def output_table(settings: ModelSettings, rngs: nnx.Rngs) -> Embedding:
    """The table of an output head that does not share the embedding's."""
    return Embedding(padded_vocab_size(settings.vocab_size), settings.hidden_size, "vocab", stddev=settings.initializer_range,
                     rngs=rngs)


def of_every_token(states: States, batch: Batch) -> Float[Array, "B T_padded D"]:
    """States in the order of the tokens, as many as can be cut (`cuttable`)."""
    tokens = batch["tokens"]
    return states.at(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))


def head_facts(network: Any) -> Head:
    settings, execution = network.settings, network.execution
    return Head(settings.vocab_size, settings.logit_soft_cap, settings.z_loss, execution.loss_chunk, execution.logits_memory)


def head_activation(settings: ModelSettings) -> str:
    """A head has no gate: of a gated activation what the gate goes through."""
    return {"swiglu": "gelu", "geglu": "gelu"}.get(settings.activation, settings.activation)


def capped(logits: Float[Array, "*rows V"], settings: ModelSettings) -> Float[Array, "*rows vocab_size"]:
    """Logits with the soft cap, without the padding."""
    if settings.logit_soft_cap:
        logits = settings.logit_soft_cap * jnp.tanh(logits / settings.logit_soft_cap)
    return logits[..., : settings.vocab_size]
