"""What a task has to say: which rows are made of a corpus, and which objectives are learned from them.

This half needs no JAX; `objectives` imports what does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxlm.data.batches import Batches, training_batches, validation_batches
from jaxlm.data.corpus import Corpus, Documents
from jaxlm.data.rows import Rows, Sequences, Spec
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import UserError, nearest
from jaxlm.settings import Settings

if TYPE_CHECKING:
    from jaxlm.models.objectives import Objectives


class Task:
    """One task of a run; each is a file of this room."""

    name = ""
    special: tuple[str, ...] = ()  # tokens that the tokenizer must have
    least_length = 2  # tokens that a row needs
    is_causal: bool | None = None  # what model.causal has to be; None: any
    continues_text = False  # whether what it learns can go on from a prompt
    answers_records = False  # whether `predict` has something to say of a record
    needs_corpus = False  # whether only a corpus says what a head is to tell apart
    figures: Mapping[str, str] = {"loss": "min"}  # that task.best may name, and whether more is better; first: the usual

    def __init__(self, settings: Settings):
        self.settings, self.data, self.model = settings, settings.data, settings.model

    # ---- to be said by each ------------------------------------------------------------------------------------------

    def spec(self) -> Spec:
        """The arrays of a row of a training batch, known without a corpus."""
        raise NotImplementedError

    def cut(self, documents: Documents, tokenizer: Tokenizer, training: bool) -> Sequences:
        """A split, cut into sequences. Raises UserError."""
        raise NotImplementedError

    def objectives(self) -> "Objectives":
        """What is learned, in the order in which losses are summed."""
        raise NotImplementedError

    # ---- to be said by those that read records -----------------------------------------------------------------------

    def filled(self, corpora: Sequence[Corpus]) -> Settings:
        """The settings with what the corpora decide. Raises UserError: they do not go together."""
        return self.settings

    def notes(self, corpora: Sequence[Corpus]) -> list[str]:
        """Lines to be told before the first step."""
        return []

    def answer(self, answers: Rows) -> dict[str, Any]:
        """What `predict` writes of a record, of whose row a model says this (`Objective.answers`)."""
        raise NotImplementedError

    def judged(self, terms: Any, verdicts: Rows, row: Callable[[int], Rows], tokenizer: Tokenizer) -> dict[str, Any]:
        """What RUN_DIR/evaluation.json holds (`jaxlm.reporting.evaluated`); {}: there is none.

        Args:
          terms: of each objective, over the whole validation set.
          verdicts: of all its rows (`Objective.verdicts`).
          row: gives the arrays of one of them.
        """
        return {}

    # ---- the same for all --------------------------------------------------------------------------------------------

    def problems(self) -> Iterator[str]:
        """What of the settings does not fit the task."""
        model = self.model
        if self.is_causal is not None and self.is_causal != model.causal:
            kind, fitting = ("is", "causal_lm") if model.causal else ("is not", "masked_lm")
            yield f"{self} and model.family={model.family}, which {kind} causal: expected task.name={fitting}, or another family"
        if self.data.sequence_length < self.least_length:
            yield f"data.sequence_length={self.data.sequence_length} is too short; at least {self.least_length}"

    @property
    def best(self) -> tuple[str, str]:
        """By which column of an evaluation one checkpoint is better than another, and whether `min` or `max` is best.
        Raises UserError for a figure that the task does not have."""
        name = (self.settings.task.best or next(iter(self.figures))).removeprefix("val_")
        if name not in self.figures:
            raise UserError(f"task.best={self.settings.task.best}: no figure of {self}; expected one of "
                            f"{', '.join(self.figures)}{nearest(name, self.figures)}")
        return f"val_{name}", self.figures[name]

    def check_tokenizer(self, tokenizer: Tokenizer, where: str) -> None:
        """Raises UserError unless the tokenizer has the tokens that are needed."""
        missing = [name for name in self.special if getattr(tokenizer.special, name) is None]
        if missing:
            raise UserError(f"{where}: the tokenizer has no {', '.join(missing)} token, which {self} needs "
                            "(data.tokenizer=wordpiece trains one that has)")

    def sequences(self, corpus: Corpus, training: bool) -> Sequences:
        """A split of the corpus, cut into sequences. Raises UserError when the corpus cannot be used."""
        for problem in self.problems():
            raise UserError(problem)
        self.check_tokenizer(corpus.tokenizer, str(corpus.directory))
        sequences = self.cut(corpus.train if training else corpus.validation, corpus.tokenizer, training)
        if not sequences.count:
            documents, length = corpus.train if training else corpus.validation, self.data.sequence_length
            raise UserError(f"{about(documents)}, too few for one sequence of data.sequence_length={length:,}; expected more "
                            "text" + (" or a shorter sequence" if documents.num_tokens > 1 else ""))
        return sequences

    def training_batches(self, corpora: Sequence[tuple[Corpus, float]]) -> Batches:
        """`batch(step)` of the whole run. Raises UserError."""
        return training_batches(corpora, self.sequences, batch_size=self.data.global_batch_size, seed=self.settings.seed,
                                skip_damaged=self.data.damaged == "skip")

    def validation_batches(self, corpora: Sequence[Corpus], batch_size: int) -> Batches | None:
        """The validation set, once through, in whole batches; None when nothing is held out. Raises UserError."""
        if not any(corpus.validation.num_tokens for corpus in corpora):
            return None
        return validation_batches(corpora, self.sequences, batch_size=batch_size, skip_damaged=self.data.damaged == "skip")

    def __str__(self) -> str:
        """For messages: the key and value that chose it."""
        chosen = self.settings.task.name
        return f"task.name={chosen}" if chosen else f"model.family={self.model.family}"


def about(documents: Documents) -> str:
    """A split's size, for messages."""
    return (f"{documents.directory}: the {documents.split} split has {documents.num_tokens:,} tokens in "
            f"{documents.num_documents:,} documents")
