"""text_classification: one label, several, or a score of a text or a pair (Devlin et al. 2019, section 4.1)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlm.data.corpus import Corpus, Documents
from jaxlm.data.labelled import LabelledRows
from jaxlm.data.labelling import label_counts
from jaxlm.data.labels import REGRESSION, SINGLE, Labels
from jaxlm.data.rows import Field, Rows, Sequences, Spec, row_spec
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import UserError
from jaxlm.settings import Settings
from jaxlm.tasks.labels import PROBLEMS, Words
from jaxlm.tasks.shown import with_marks, without_marks
from jaxlm.tasks.task import Task

if TYPE_CHECKING:
    from jaxlm.models.objectives import Objectives

UNKNOWN_LABELS = ("0", "1")  # where no corpus has said yet which there are: `plan` and `bench`
MOST_MISTAKES = 20  # that a report shows


class TextClassification(Task):
    """Rows are records: [CLS] text [SEP], or [CLS] text [SEP] pair [SEP]; of causal models between start and end."""

    name = "text_classification"
    least_length = 5
    answers_records = True

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.problem, self.names = settings.task.problem or SINGLE, tuple(settings.task.labels or UNKNOWN_LABELS)
        self.needs_corpus = settings.task.labels is None and self.problem != REGRESSION
        self.labels = PROBLEMS[self.problem](self.names)
        self.figures, self.special = self.labels.figures, () if self.model.causal else ("cls", "sep")
        self.types = self.model.type_vocab_size > 1

    def spec(self) -> Spec:
        tokens = ("tokens", "segment_ids", "positions", *(["token_types"] if self.types else []))
        last = {"last_position": Field((), np.dtype(np.int32), "position", bound=self.data.sequence_length)}
        return row_spec(self.data.sequence_length, tokens) | (last if self.model.causal else {}) | self.labels.spec()

    def cut(self, documents: Documents, tokenizer: Tokenizer, training: bool) -> Sequences:
        """Also of `HeldRecords`."""
        special, causal = tokenizer.special, self.model.causal
        # RoBERTa, and what learned from it: <s> A </s></s> B </s>
        roberta = not causal and tokenizer.vocabulary.get("</s>", -1) == special.sep
        return LabelledRows(documents, special, self.data.sequence_length, causal=causal, token_types=self.types,
                            separators=1 + roberta)

    def objectives(self) -> "Objectives":
        return (self.labels.objective(),)

    def filled(self, corpora: Sequence[Corpus]) -> Settings:
        """With the labels of the corpora."""
        first, *others = corpora
        for corpus in others:
            if (corpus.problem, corpus.labels, corpus.streams) != (first.problem, first.labels, first.streams):
                raise UserError(f"data.corpus: {corpus.directory} and {first.directory} have different labels; the corpora of a "
                                "mixture must share theirs")
        task = dataclasses.replace(self.settings.task, problem=first.problem, labels=first.labels)
        return dataclasses.replace(self.settings, task=task)

    def notes(self, corpora: Sequence[Corpus]) -> list[str]:
        """How many records have which label, how many are cut, and one of them as the model reads it."""
        counts = {}
        for split in ("train", "validation"):
            column = np.concatenate([getattr(corpus, split).column("label") for corpus in corpora])
            counts[split] = label_counts(Labels(self.problem, self.names), column)
        told = {split: ", ".join(f"{name} {count:,}" for name, count in of.items()) for split, of in counts.items()}
        rows, key = self.sequences(corpora[0], training=True), np.zeros(1, np.uint64)
        first = {name: array[0] for name, array in rows.rows(np.zeros(1, np.int64), key, key).items()}
        return [f"{self.problem}, training records: {told['train']}; validation: {told['validation']}", *rows.truncation_note(),
                f"for example: {with_marks(corpora[0].tokenizer, first)} -> {self.labels.said(first)}"]

    def answer(self, answers: Rows) -> Words:
        return self.labels.answer(answers)

    def judged(self, terms: Any, verdicts: Rows, row: Callable[[int], Rows], tokenizer: Tokenizer) -> Words:
        [counted] = terms.values()
        worst = np.argsort(-verdicts["error"], kind="stable")[:MOST_MISTAKES]
        mistakes = [self.labels.mistake({name: array[place] for name, array in verdicts.items()}) | {
            "text": without_marks(tokenizer, row(int(verdicts["row"][place])))}
            for place in worst if verdicts["error"][place] > 0]
        return {"rows": int(counted.count), **self.labels.classes(counted), "mistakes": mistakes}
