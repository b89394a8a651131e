"""Searches with the user's own Trainer."""

from typing import Any

import pytest
import torch
import transformers

import ticketops
from ticketops.errors import InputError, StoreError
from ticketops.searching.store import Store

from .tiny import FIELDS

OPTIONS = FIELDS | {"epochs": 1, "kinds": "winning", "sparsities": "0.25"}


class DoubledLoss(transformers.Trainer):
    """A loss that a recipe cannot say."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, **kwargs)
        return (2 * loss, outputs) if return_outputs else 2 * loss


def still(**options: Any) -> transformers.Trainer:
    """A Trainer that moves nothing."""
    return transformers.Trainer(**(options | {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.0})}))


def still_doubled(**options: Any) -> transformers.Trainer:
    return DoubledLoss(**(options | {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.0})}))


def of_another_model(model: Any, **options: Any) -> transformers.Trainer:
    return transformers.Trainer(model=transformers.BertForSequenceClassification(model.config), **options)


def without_callbacks(callbacks: Any, **options: Any) -> transformers.Trainer:
    return transformers.Trainer(**options)


def test_a_trainer_of_ones_own_trains_and_scores(inputs, tmp_path):
    runs = {}
    for name, factory in (("doubled", still_doubled), ("plain", still)):
        result = ticketops.search(**inputs, **OPTIONS, output=str(tmp_path / name), trainer_factory=factory)
        assert len(result.records) == 2
        runs[name] = Store.read(result.folder).importance(0, "pass")
    # Nothing has moved, so importance differs by the loss alone.
    torch.testing.assert_close(runs["doubled"].head, 2 * runs["plain"].head)
    torch.testing.assert_close(runs["doubled"].ffn, 2 * runs["plain"].ffn)
    with pytest.raises(StoreError, match=r"doubled holds another search .trainer is .*still_doubled' there"):
        ticketops.search(**inputs, **OPTIONS, output=str(tmp_path / "doubled"))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda **options: None, r"trainer_factory .*<lambda> returns None: return a transformers.Trainer"),
        (of_another_model, r"of_another_model makes a Trainer of another model: pass model= on"),
        (without_callbacks, r"makes a Trainer without the callback Steps: pass callbacks= on"),
    ],
)
def test_what_is_no_trainer_of_the_trial_is_refused_before_any_training(factory, message, inputs, tmp_path):
    with pytest.raises(InputError, match=message):
        ticketops.search(**inputs, **OPTIONS, output=str(tmp_path), trainer_factory=factory)
    assert not list((tmp_path / "trials").glob("*.json"))


def test_early_stopping_belongs_into_the_trainer_of_ones_own(inputs, tmp_path):
    with pytest.raises(InputError, match=r"early_stopping_patience goes with ticketops' own Trainer"):
        ticketops.search(
            **inputs, **OPTIONS, output=str(tmp_path), trainer_factory=DoubledLoss, early_stopping_patience=1
        )
