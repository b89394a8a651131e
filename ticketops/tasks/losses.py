"""Losses that weigh classes, for data sets in which some are rare."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torch.nn import functional

from ticketops.errors import InputError, spelled

#: "balanced", or a weight for each label, in the labels' order.
ClassWeights = Literal["balanced"] | Sequence[float]


@dataclass(frozen=True, eq=False)
class WeightedLoss:
    """Cross entropy with a weight for each class, as a Trainer's `compute_loss_func` is called.

    It is the mean over all labels of weight times loss, so that an example's part in it does not depend on the other
    examples of its batch, and its importance neither.

    Attributes:
        weights: float32 [num_labels]; in a multi-label task those of the rows that have a label.
        several: True if any number of labels can be right (binary cross entropy).
    """

    weights: np.ndarray
    several: bool = False

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Computes the loss.

        Args:
            outputs: of the model, with logits [..., num_labels].
            labels: class ids [...], -100 where none counts; or multi-hot [rows, num_labels].
            num_items_in_batch: number of labels to divide by, where several batches make a step.
        """
        logits = outputs["logits"].float()
        weights = torch.as_tensor(self.weights, device=logits.device)
        if self.several:
            total = functional.binary_cross_entropy_with_logits(
                logits, labels.float(), pos_weight=weights, reduction="sum"
            )
        else:
            total = functional.cross_entropy(
                logits.flatten(0, -2), labels.flatten(), weight=weights, ignore_index=-100, reduction="sum"
            )
        return total / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)


def read_weights(class_weights: ClassWeights, labels: Sequence[str], balanced: np.ndarray) -> np.ndarray:
    """Reads the weights of a task's labels.

    Args:
        class_weights: "balanced", or a weight for each label.
        labels: label names by id.
        balanced: weights for "balanced", [labels].

    Returns:
        float32 [labels].

    Raises:
        InputError: there is not one weight for each label.
    """
    if isinstance(class_weights, str):
        return balanced.astype(np.float32)
    if len(class_weights) != len(labels):
        names = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
        raise InputError(
            f"{spelled('class_weights')} has {len(class_weights)} numbers, and the task has {len(labels)} labels "
            f"({names}): give one for each, in this order"
        )
    return np.asarray(class_weights, np.float32)


def balanced_weights(labels: np.ndarray, count: int) -> np.ndarray:
    """Weights by which all classes have the same part in a loss: rows / (classes * rows of the class).

    Args:
        labels: class ids of the training rows, or of all their words.
        count: number of classes; one that never occurs has weight 1.

    Returns:
        float64 [count].

    Source: scikit-learn's "balanced".
    """
    weights, found = np.ones(count), np.unique(labels)
    weights[found] = compute_class_weight("balanced", classes=found, y=labels)
    return weights
