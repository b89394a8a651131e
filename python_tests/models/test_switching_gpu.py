"""Another ticket at every step, without waiting for the GPU."""

import pytest
import torch
from transformers import BertForSequenceClassification

import ticketops
from models.conftest import tiny_config
from models.test_apply import draw_ticket

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_switching_tickets_never_waits_for_the_gpu():
    # Widths that the Triton kernels serve; every token real, since packing a mask asks for the number of tokens.
    model = BertForSequenceClassification(tiny_config(hidden_size=64, hidden_dropout_prob=0.1)).cuda().train()
    batch = {
        "input_ids": torch.randint(0, 100, (5, 17), device="cuda"),
        "labels": torch.arange(5, device="cuda") % 3,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tickets = [draw_ticket(seed) for seed in range(4)]
    with ticketops.patch(model) as handle, handle.record_importance():

        def step(ticket):
            handle.apply(ticket)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for ticket in tickets:
            step(ticket)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for ticket in tickets:
                step(ticket)
        finally:
            torch.cuda.set_sync_debug_mode("default")
