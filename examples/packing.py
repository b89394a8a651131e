"""Fine-tunes a classifier on batches without padding, and predicts.

python examples/packing.py
"""

import tempfile

from made_up import make_model, make_rows
from transformers import Trainer, TrainingArguments

import ticketops

model, rows = make_model(), make_rows()
ticketops.patch(model)
packed = ticketops.PackingCollator()
batch = packed(rows[:16])
print({name: list(value.shape) for name, value in batch.items()})
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=2,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model, arguments, train_dataset=rows[64:], data_collator=packed)
    trainer.train()
    found = trainer.predict(rows[:64])
# Rows are in the order of the data.
accuracy = (found.predictions.argmax(1) == found.label_ids).mean()
print(f"accuracy {accuracy:.2f}")
