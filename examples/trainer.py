"""Draws a ticket in one run of transformers' Trainer: an epoch of the whole model, then the ticket from the start.

python examples/trainer.py
"""

import copy
import tempfile

from made_up import make_model, make_rows, pad
from transformers import Trainer, TrainingArguments

import ticketops

model, rows = make_model(), make_rows()
pretrained = copy.deepcopy(model.state_dict())
handle = ticketops.patch(model)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=3,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        # One that falls would be low when the ticket begins.
        lr_scheduler_type="constant",
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model, arguments, train_dataset=rows[64:], eval_dataset=rows[:64], data_collator=pad)
    callback = ticketops.TicketCallback(handle, sparsity=0.25, epoch=1, rewind=pretrained, log=trainer.log)
    trainer.add_callback(callback)
    trainer.train()
print(callback.ticket)
ticketops.shrink(model, callback.ticket)
print(f"{model.num_parameters():,} weights are left")
