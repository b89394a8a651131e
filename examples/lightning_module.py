"""Draws a ticket around a fit of Lightning (`pip install lightning`).

python examples/lightning_module.py
"""

import copy
from typing import Any

import lightning
import torch
from made_up import make_model, make_rows, pad
from torch.utils.data import DataLoader

import ticketops


class Classifier(lightning.LightningModule):
    """A transformers model in a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        """Returns the loss of a batch."""
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        """Returns a new optimizer for each fit."""
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)


module = Classifier()
loader = DataLoader(make_rows(), batch_size=16, shuffle=True, collate_fn=pad)


def fit(epochs: int) -> None:
    """Trains the module."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lightning.Trainer(max_epochs=epochs, enable_model_summary=False, **quiet).fit(module, loader)


pretrained = copy.deepcopy(module.model.state_dict())
handle = ticketops.patch(module.model)
with ticketops.draw(handle, sparsity=0.25, rewind=pretrained) as drawing:
    fit(epochs=1)
fit(epochs=2)
ticketops.shrink(module.model, drawing.ticket)
print(drawing.ticket, f"{module.model.num_parameters():,} weights are left")
