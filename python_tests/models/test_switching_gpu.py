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


def test_a_sharing_step_never_waits_for_the_gpu():
    # A step as multi-task training takes it: another task's head, ticket and loss, clipping, the optimizer.
    configs = [tiny_config(hidden_size=64, hidden_dropout_prob=0.1, num_labels=labels) for labels in (3, 1)]
    models = {str(config.num_labels): BertForSequenceClassification(config) for config in configs}
    tickets = dict(zip(models, map(draw_ticket, range(2)), strict=True))
    shared = ticketops.SharedModel(models, tickets).cuda().train()
    ids = torch.randint(0, 100, (5, 17), device="cuda")
    labels = {"3": torch.arange(5, device="cuda") % 3, "1": torch.rand(5, device="cuda")}
    optimizer = torch.optim.AdamW(shared.parameters(), lr=1e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)

    def step(task):
        shared(task, input_ids=ids, labels=labels[task]).loss.backward()
        torch.nn.utils.clip_grad_norm_(shared.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    for task in ("3", "1", "3", "1"):
        step(task)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for task in ("1", "3", "3", "1"):
            step(task)
    finally:
        torch.cuda.set_sync_debug_mode("default")
