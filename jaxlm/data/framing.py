"""What stands around the texts of a row: [CLS] A [SEP], or [CLS] A [SEP] B [SEP], as each model was trained."""

from dataclasses import dataclass
from typing import Any

from jaxlm.data.special_tokens import SpecialTokens

PROBES = ("a", "A", "0", ".", "!", " a")  # one of them is a token of nearly every tokenizer


@dataclass(frozen=True)
class Framing:
    """One text is start + A + end; two are start + A + middle + B + end.

    start, middle, end: token ids. token_types: of A with what stands before and behind it, and of B with its end.
    """

    start: tuple[int, ...] = ()
    middle: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    token_types: tuple[int, int] = (0, 1)


def usual_framing(special: SpecialTokens) -> Framing:
    """BERT's (Devlin et al. 2019, section 3); nothing for a tokenizer without cls and sep."""
    if special.cls is None or special.sep is None:
        return Framing()
    return Framing((special.cls,), (special.sep,), (special.sep,))


def framing_of(tokenizer: Any) -> Framing | None:
    """What a `tokenizers.Tokenizer` puts around texts; None where its file says nothing of it."""
    for probe in PROBES:
        if tokenizer.encode(probe, add_special_tokens=False).ids:
            pair = tokenizer.encode(probe, probe)
            break
    else:
        return None
    sides = pair.sequence_ids  # None where a token is of neither text
    if all(side is not None for side in sides):
        return None
    first, last = sides.index(0), len(sides) - 1 - sides[::-1].index(1)
    behind, second = len(sides) - sides[::-1].index(0), sides.index(1)
    return Framing(tuple(pair.ids[:first]), tuple(pair.ids[behind:second]), tuple(pair.ids[last + 1:]),
                   (pair.type_ids[first], pair.type_ids[second]))
