"""What a run shows of itself on its way (logging.samples_every_steps): prompts continued, or
masks filled."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.data.tokenizers import Tokenizer
from jaxlm.models.model import Params
from jaxlm.models.objectives import MaskedToken
from jaxlm.serving.sampling import make_generator
from jaxlm.settings import AXES
from jaxlm.tasks.find import find_task
from jaxlm.training.corpora import Corpora
from jaxlm.training.feed import make_validation_batches, on_devices
from jaxlm.training.loop import Sampler
from jaxlm.training.step import Batch, Trainer, dropless, start

SHOWN = 3  # rows of masked text
SEPARATOR = "-" * 40 + "\n"


def make_sampler(trainer: Trainer, corpora: Corpora) -> Sampler | None:
    """For the parameters of `run` as they lie on its mesh; None: there is no text to show. Compiles at its first
    use, and changes nothing of the run. Every process of the run has to call it."""
    if find_task(trainer.settings).continues_text:
        return _continuing(trainer, corpora)
    return _filling(trainer, corpora) if MaskedToken() in trainer.model.objectives else None


def _continuing(trainer: Trainer, corpora: Corpora) -> Sampler:
    own = start(dropless(trainer.settings), _for_decoding(trainer))
    in_order = np.argsort(trainer.layout.layer_order)
    as_decoded = jax.jit(lambda params: own.params.reordered(params, in_order), out_shardings=own.params.shardings)
    with jax.set_mesh(own.mesh):
        generate = make_generator(own, corpora[0][0].tokenizer)

    def sample(params: Params) -> str:
        relaid = params if own.mesh is trainer.mesh else as_decoded(params)
        with jax.set_mesh(own.mesh):
            return SEPARATOR.join(f"{sample.marked()}\n" for sample in generate(relaid))

    return sample


def _for_decoding(trainer: Trainer) -> Mesh:
    """Text grows token by token through all layers: axes that cut sequences, layers or experts take rows of their
    own. The weights are then cut as finely as they can be: there is little room for a copy beside the optimizer's
    state. The devices keep their order, so that one program can move the arrays."""
    shape = trainer.mesh.shape
    if shape["stage"] == shape["context"] == shape["expert"] == 1:
        return trainer.mesh
    ways = trainer.mesh.size // shape["tensor"]
    sizes = dict.fromkeys(AXES, 1) | {"fsdp": math.gcd(ways, trainer.settings.model.hidden_size), "tensor": shape["tensor"]}
    sizes["data"] = ways // sizes["fsdp"]
    return Mesh(trainer.mesh.devices.reshape([sizes[axis] for axis in AXES]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _filling(trainer: Trainer, corpora: Corpora) -> Sampler | None:
    ways = math.prod(trainer.mesh.shape[axis] for axis in ("data", "fsdp", "expert", "stage"))
    rows = math.ceil(SHOWN / ways) * ways
    settings = dataclasses.replace(trainer.settings, eval=dataclasses.replace(trainer.settings.eval, batch_size=rows))
    validation = make_validation_batches(settings, corpora)
    if validation is None:
        return None
    tokenizer, shown = corpora[0][0].tokenizer, validation.batch(0, np.arange(min(SHOWN, rows)))
    with on_devices(validation, 0, 1, trainer.mesh, prefetch=1) as source:
        batch = next(iter(source))
    model = trainer.model

    def filled_in(params: Params, batch: Batch) -> jax.Array:
        network = model.bind(params)
        return MaskedToken().filled(network, network.states(batch), batch)

    # every process reads the whole answer
    fill = jax.jit(model.traced(filled_in), out_shardings=NamedSharding(trainer.mesh, PartitionSpec()))

    def sample(params: Params) -> str:
        filled = np.asarray(fill(params, batch))
        texts = []
        for tokens, places, wanted, mask, found in zip(*(shown[name] for name in (
                "tokens", "masked_positions", "masked_targets", "masked_mask")), filled, strict=False):
            places, wanted, found = places[mask], wanted[mask], found[mask]
            whole, hidden = tokens.copy(), np.flatnonzero(tokens == tokenizer.special.mask)
            whole[places] = wanted
            texts.append(f"text:   {tokenizer.decode(whole.tolist())}\n"
                         f"masked: {_marked(tokenizer, tokens, dict.fromkeys(hidden.tolist(), 'MASK'))}\n"
                         f"filled: {_marked(tokenizer, tokens, _decoded(tokenizer, places, found))}\n"
                         f"{(wanted == found).sum()} of {len(wanted)} right\n")
        return SEPARATOR.join(texts)

    return sample


def _decoded(tokenizer: Tokenizer, places: np.ndarray, tokens: np.ndarray) -> dict[int, str]:
    return {place: tokenizer.decode([token]).strip() for place, token in zip(places.tolist(), tokens.tolist(), strict=True)}


def _marked(tokenizer: Tokenizer, tokens: np.ndarray, words: dict[int, str]) -> str:
    """The text with `[word]` in these places: decoded piece by piece, for a tokenizer leaves out its own marks."""
    parts, begin = [], 0
    for place, word in sorted(words.items()):
        parts += [tokenizer.decode(tokens[begin:place].tolist()).strip(), f"[{word}]"]
        begin = place + 1
    return " ".join(filter(None, [*parts, tokenizer.decode(tokens[begin:].tolist()).strip()]))
