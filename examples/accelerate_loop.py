"""Draws a ticket in a loop with Accelerate. On several processes, all draw one ticket from all of their batches.

accelerate launch examples/accelerate_loop.py
"""

import copy

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from made_up import make_model, make_rows, pad
from torch.utils.data import DataLoader

import ticketops

# An FFN that is pruned gets no gradient, for which other processes would wait.
accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
model = make_model()
pretrained = copy.deepcopy(model.state_dict())
handle = ticketops.patch(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = DataLoader(make_rows(), batch_size=16, shuffle=True, collate_fn=pad)
prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)


def train(epochs: int) -> None:
    """Trains the model."""
    for _ in range(epochs):
        for batch in loader:
            loss = prepared(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.print(f"loss {loss.item():.3f}")


with ticketops.draw(handle, sparsity=0.25, rewind=pretrained) as drawing:
    train(epochs=1)
# The moments of the weights that are gone.
optimizer.state.clear()
train(epochs=2)
accelerator.wait_for_everyone()
ticketops.shrink(model, drawing.ticket)
accelerator.print(drawing.ticket, f"{model.num_parameters():,} weights are left")
