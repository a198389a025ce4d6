"""Checkpoints of format 1, which earlier versions wrote: heads stood beside the trunk, under names of their own."""

OLD_FORMAT = 1

Place = tuple[str, ...]  # of an array in a tree: the keys on the way to it

# Where a head's parameters are now, and where they were.
HEADS: dict[Place, Place] = {
    ("heads", "next_token"): ("head",),
    ("heads", "masked_token", "transform"): ("mlm_transform",),
    ("heads", "masked_token", "norm"): ("mlm_norm",),
    ("heads", "masked_token", "bias"): ("mlm_bias",),
    ("heads", "next_sentence", "pooler"): ("pooler",),
    ("heads", "next_sentence", "classifier"): ("next_sentence_head",),
}


def old_place(place: Place) -> Place:
    """Where an array of today's tree (parameters, or an optimizer's copies of them) stood in format 1."""
    return _moved(place, HEADS)


def todays_place(place: Place) -> Place:
    """The inverse of `old_place`."""
    return _moved(place, {before: now for now, before in HEADS.items()})


def _moved(place: Place, moves: dict[Place, Place]) -> Place:
    for start in range(len(place)):
        for source, target in moves.items():
            if place[start : start + len(source)] == source:
                return (*place[:start], *target, *place[start + len(source) :])
    return place
