"""Checkpoints of format 1, which earlier versions wrote: heads stood beside the trunk, under names of their own."""

OLD_FORMAT = 1

# Where a head's parameters are now, and where they were.
HEADS = {
    ("heads", "next_token"): ("head",),
    ("heads", "masked_token", "transform"): ("mlm_transform",),
    ("heads", "masked_token", "norm"): ("mlm_norm",),
    ("heads", "masked_token", "bias"): ("mlm_bias",),
    ("heads", "next_sentence", "pooler"): ("pooler",),
    ("heads", "next_sentence", "classifier"): ("next_sentence_head",),
}


def old_place(place: tuple[str, ...]) -> tuple[str, ...]:
    """The path that an array of today's tree (parameters, or an optimizer's copies of them) had in format 1."""
    for start in range(len(place)):
        for now, before in HEADS.items():
            if place[start : start + len(now)] == now:
                return (*place[:start], *before, *place[start + len(now) :])
    return place
