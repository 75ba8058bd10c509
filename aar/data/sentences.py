"""Sentences for speech synthesis: 240 of them, composed so that words meet in many neighbourhoods."""

from __future__ import annotations

from functools import cache

__all__ = ["sentences"]

_WHO = (
    "My younger sister", "The old ferryman", "A tall stranger in grey", "Our neighbour's dog", "The choir",
    "Every second passenger", "The jovial baker", "Someone with a cough", "The chess club", "A flock of geese",
    "The judge", "Nobody from the village", "The weather service", "A pair of cyclists", "The night watch",
    "Doctor Hughes",
)  # fmt: skip
_DID = (
    "walked past", "was looking for", "quietly admired", "has forgotten about", "could hardly see", "laughed at",
    "finally found", "will ask about", "never mentioned", "used to own", "painted", "would rather avoid",
    "photographed", "is waiting beside", "measured",
)  # fmt: skip
_WHAT = (
    "the bridge over the mill stream", "five yellow boxes", "a very thin slice of cheese",
    "the house with blue shutters", "an unfinished letter", "the third chapter", "that strange humming noise",
    "the orchard", "a jar of plum jam", "the zigzag path through the gorge", "a broken violin",
    "the shadow on the ceiling", "two wooden spoons",
)  # fmt: skip
_WHEN = (
    "before breakfast.", "on Thursday afternoon.", "while it rained.", "for the second time.", "without a word.",
    "in the thick of the fog.", "last summer.", "although the shop was closed.", "at twenty past seven.",
    "as usual.", "and then went home.",
)  # fmt: skip


@cache
def sentences() -> tuple[str, ...]:
    """The lists' sizes share no divisor, so that stepping through all at once meets every pair equally often."""
    lists = (_WHO, _DID, _WHAT, _WHEN)
    return tuple(" ".join(words[i % len(words)] for words in lists) for i in range(240))
