"""What a model will see of a corpus: some of its text, with the bounds of the tokens."""

from typing import TYPE_CHECKING

from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import printable

if TYPE_CHECKING:
    from jaxlm.data.corpus import Documents

EXAMPLES = 3
TOKENS = 40  # read for an example, at most
WIDTH = 66  # letters shown of it
BOUND = "|"


def examples(documents: "Documents", tokenizer: Tokenizer) -> list[str]:
    """The first tokens of three documents, or of three places in a single one, decoded, with a mark between any two.

    Control characters are escaped (\\n); special tokens stand as [eos]. A character that takes several tokens is
    followed by as many marks.
    """
    number, tokens = documents.num_documents, documents.num_tokens
    if number >= EXAMPLES:
        starts = [int(documents.offsets[number * place // EXAMPLES]) for place in range(EXAMPLES)]
    else:
        starts = sorted({tokens * place // EXAMPLES for place in range(EXAMPLES)})
    return [example(tokenizer, documents.read(start, min(start + TOKENS, tokens)).tolist()) for start in starts if start < tokens]


def example(tokenizer: Tokenizer, ids: list[int]) -> str:
    while len(ids) > 1 and tokenizer.decode(ids).startswith("\ufffd"):  # it begins inside a character
        ids = ids[1:]
    line = ""
    for piece in pieces(tokenizer, ids):
        longer = f"{line}{BOUND if line else ''}{piece}"
        if len(longer) > WIDTH and line:
            return f"{line}{BOUND}..."
        line = longer
    return line


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text, as it is shown; '' where a character is not complete yet.

    Tokens are decoded together with those before: alone, some would lose their blank, or be no character.
    """
    special: dict[int | None, str] = {}
    for role, token in vars(tokenizer.special).items():
        special.setdefault(token, f"[{role}]")  # one that ends documents may also be their separator
    shown, begin, before = [], 0, ""
    for place, token in enumerate(ids):
        if token in special:
            shown.append(special[token])
            begin, before = place + 1, ""
            continue
        text = tokenizer.decode(ids[begin:place + 1])
        whole = text.startswith(before) and not (text.endswith("\ufffd") and len(text) - len(before) <= 1)
        shown.append(printable(text[len(before):]) if whole else "")
        before = text if whole else before
    return shown
