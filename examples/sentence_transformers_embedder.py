"""Draws a ticket while a SentenceTransformer trains (`pip install -e '.[sentence-transformers]'`).

python examples/sentence_transformers_embedder.py
"""

import copy
import tempfile

from datasets import Dataset
from made_up import make_model
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import BertTokenizerFast

import ticketops

words = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *["the", "a", "cat", "dog", "bird", "fish", "sits", "runs", "flies", "swims", "here", "there"],
]
animals = [(one, where) for one in words[7:11] for where in words[15:]]
pairs = {"anchor": [f"the {a} sits {b}" for a, b in animals], "positive": [f"a {a} runs {b}" for a, b in animals]}
with tempfile.TemporaryDirectory() as folder:
    # Yours has a name on the hub.
    make_model().bert.save_pretrained(folder)
    BertTokenizerFast(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder)
    model = SentenceTransformer(folder)
    pretrained = copy.deepcopy(model.state_dict())
    handle = ticketops.patch(model)
    arguments = SentenceTransformerTrainingArguments(
        folder, num_train_epochs=3, per_device_train_batch_size=4, save_strategy="no", report_to="none"
    )
    callback = ticketops.TicketCallback(handle, sparsity=0.25, epoch=1, rewind=pretrained)
    loss = MultipleNegativesRankingLoss(model)
    rows = Dataset.from_dict(pairs)
    SentenceTransformerTrainer(model, arguments, train_dataset=rows, loss=loss, callbacks=[callback]).train()
print(callback.ticket)
ticketops.shrink(model, callback.ticket)
print(model.encode(["a cat flies there"]).shape)
