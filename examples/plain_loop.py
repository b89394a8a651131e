"""Draws a ticket in a training loop of plain PyTorch.

python examples/plain_loop.py
"""

import copy

import torch
from made_up import make_model, make_rows, pad
from torch.utils.data import DataLoader

import ticketops

model = make_model()
loader = DataLoader(make_rows(), batch_size=16, shuffle=True, collate_fn=pad)


def train(epochs: int) -> None:
    """Trains the model with a new optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")


pretrained = copy.deepcopy(model.state_dict())
handle = ticketops.patch(model)
# Importance is recorded inside; behind it the ticket is drawn and applied, and the weights are the pre-trained ones.
with ticketops.draw(handle, sparsity=0.25, rewind=pretrained) as drawing:
    train(epochs=1)
train(epochs=2)
ticketops.shrink(model, drawing.ticket)
print(drawing.ticket, f"{model.num_parameters():,} weights are left")
