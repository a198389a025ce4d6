"""causal_lm: each token from those before it (Radford et al. 2018)."""

from typing import TYPE_CHECKING

from jaxlm.data.corpus import Documents
from jaxlm.data.rows import Sequences, Spec, row_spec
from jaxlm.data.sequences import ShiftedDocuments, ShiftedWindows, start_token
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.tasks.task import Task

if TYPE_CHECKING:
    from jaxlm.models.objectives import Objectives


class CausalLM(Task):
    """Rows are windows of the text, or whole documents packed together (data.packing)."""

    name = "causal_lm"
    is_causal = True
    continues_text = True

    def spec(self) -> Spec:
        kind = ShiftedDocuments if self.data.packing == "documents" else ShiftedWindows
        return row_spec(self.data.sequence_length, kind.ARRAYS)

    def cut(self, documents: Documents, tokenizer: Tokenizer, training: bool) -> Sequences:
        special, length = tokenizer.special, self.data.sequence_length
        if self.data.packing == "documents":
            start = start_token(special, self.data.packing) if self.data.start_token else None
            return ShiftedDocuments(documents, special, length, start)
        return ShiftedWindows(documents, special, length, training)

    def objectives(self) -> "Objectives":
        from jaxlm.models.objectives import NextToken, Routing

        return (NextToken(), *([Routing()] if self.model.num_experts is not None else []))
