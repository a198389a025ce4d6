"""masked_lm: hidden tokens from those around them (Devlin et al. 2019; without sentence pairs Liu et al. 2019)."""

from typing import TYPE_CHECKING

from jaxlm.data import masking
from jaxlm.data.corpus import Documents
from jaxlm.data.masking import Masked, Masker, num_predictions
from jaxlm.data.rows import Sequences, Spec, row_spec
from jaxlm.data.sequences import MarkedDocuments, MarkedWindows
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.tasks.task import Task

if TYPE_CHECKING:
    from jaxlm.models.objectives import Objectives


class MaskedLM(Task):
    """Rows are [CLS] text [SEP]: windows of the text, or whole documents packed together (data.packing)."""

    name = "masked_lm"
    special = ("cls", "sep", "mask")
    least_length = 5
    is_causal = False

    def spec(self) -> Spec:
        data = self.data
        masked = row_spec(num_predictions(data.masking, data.sequence_length), masking.ARRAYS, positions=data.sequence_length)
        return row_spec(data.sequence_length, self.arrays()) | masked

    def arrays(self) -> tuple[str, ...]:
        """Of a row before it is masked."""
        return MarkedDocuments.ARRAYS if self.data.packing == "documents" else MarkedWindows.ARRAYS

    def cut(self, documents: Documents, tokenizer: Tokenizer, training: bool) -> Sequences:
        masker = Masker(tokenizer, self.data.masking, self.data.sequence_length)
        return Masked(self.whole(documents, tokenizer, training), masker)

    def whole(self, documents: Documents, tokenizer: Tokenizer, training: bool) -> Sequences:
        """The split before it is masked."""
        special, length = tokenizer.special, self.data.sequence_length
        if self.data.packing == "documents":
            return MarkedDocuments(documents, special, length)
        return MarkedWindows(documents, special, length, training)

    def objectives(self) -> "Objectives":
        from jaxlm.models.objectives import MaskedToken

        return (MaskedToken(),)
