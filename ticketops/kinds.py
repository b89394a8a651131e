"""The kinds of tasks that runs train on. Imports nothing, so that a command line knows them at once."""

from typing import Literal, get_args

Kind = Literal[
    "classification",
    "regression",
    "multi-label",
    "token-classification",
    "question-answering",
    "multiple-choice",
    "sentence-similarity",
]
KINDS: tuple[str, ...] = get_args(Kind)

#: Losses of sentence-transformers for pairs of texts with a score, and for pairs or triplets without one. The first of
#: each is the default.
SCORED_LOSSES = ("CosineSimilarityLoss", "CoSENTLoss", "AnglELoss")
UNSCORED_LOSSES = ("MultipleNegativesRankingLoss", "TripletLoss")
