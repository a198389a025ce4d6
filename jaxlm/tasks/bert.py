"""bert: hidden tokens, and whether the second text of a pair follows the first (Devlin et al. 2019)."""

from typing import TYPE_CHECKING

from jaxlm.data.corpus import Documents
from jaxlm.data.rows import Sequences
from jaxlm.data.sequences import SentencePairs
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import UserError
from jaxlm.tasks.masked_lm import MaskedLM
from jaxlm.tasks.task import about

if TYPE_CHECKING:
    from jaxlm.models.objectives import Objectives


class Bert(MaskedLM):
    """Rows are [CLS] A [SEP] B [SEP], one pair in each."""

    name = "bert"

    def arrays(self) -> tuple[str, ...]:
        return SentencePairs.ARRAYS

    def whole(self, documents: Documents, tokenizer: Tokenizer, training: bool) -> Sequences:
        pairs = SentencePairs(documents, tokenizer.special, self.data.sequence_length)
        if pairs.num_documents < 2:
            raise UserError(f"{about(documents)}; model.next_sentence=true needs at least 2 documents of 2 tokens or more "
                            "(data.document=line makes one of each line)")
        return pairs

    def objectives(self) -> "Objectives":
        from jaxlm.models.objectives import NextSentence

        return (*super().objectives(), NextSentence())
