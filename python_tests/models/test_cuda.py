"""A model's whole way through the CUDA kernels, against the same way through plain PyTorch."""

import torch
from ops.cases import launches
from transformers import BertForSequenceClassification

import ticketops
from models.conftest import tiny_batch, tiny_config


def fine_tune_prune_and_shrink(device: torch.device) -> tuple[list[torch.Tensor], list[list[str]]]:
    """Trains two steps that leave importance behind and two under the ticket, and shrinks with the optimizer's state.

    Returns:
        What came out on the way and at the end, and the CUDA kernels that each part launched.
    """
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_config(hidden_size=64)).to(device).train()
    # With the usual eps, gradients that are rounding alone, as those of key biases, would move parameters as others do.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    batches = [{key: value.to(device) for key, value in tiny_batch(seed=seed).items()} for seed in range(2)]
    results, launched = [], []

    def step(batch: dict[str, torch.Tensor]) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    handle = ticketops.patch(model)
    for batch in batches:
        with launches() as names, handle.record_importance() as importance:
            step(batch)
        launched.append(list(names))
        results += [importance.head, importance.ffn]
    with launches() as names:
        ticket = ticketops.prune(importance, 0.5)
    launched.append(list(names))
    results += [ticket.head_mask, ticket.ffn_mask]
    handle.apply(ticket)
    for batch in batches:
        with launches() as names:
            step(batch)
        launched.append(list(names))
    with launches() as names:
        ticketops.shrink(model, ticket, optimizer=optimizer)
    launched.append(list(names))
    step(batches[0])
    results += [parameter.detach() for parameter in model.parameters()]
    results += [value for state in optimizer.state.values() for value in state.values()]
    return [result.cpu() for result in results], launched


def test_a_models_way_equals_plain_pytorch_and_launches_little(cuda_device, monkeypatch):
    found, launched = fine_tune_prune_and_shrink(cuda_device)
    recording, pruning, *ticket_steps, shrinking = launched[1:]
    # On a CPU the tokens are packed before they are embedded; on a GPU behind that, and so on the way back, too.
    # Nothing is unpacked, since the head reads first tokens only.
    packing, back = ["number_tokens", "move_rows"], ["move_rows"]
    if cuda_device.type == "cpu":
        packing, back = [*packing, "move_rows"], []
    assert recording == [*packing, "importance", *back]
    assert pruning == ["importance"]
    # Before the optimizer's step and after it, whatever the number of layers and of the optimizer's moments.
    assert ticket_steps == [[*packing, *back, "copy_table", "copy_table"]] * 2
    assert shrinking == ["copy_table"]

    monkeypatch.setenv("TICKETOPS_BACKEND", "reference")
    expected, launched = fine_tune_prune_and_shrink(cuda_device)
    assert not any(launched)
    exact = cuda_device.type == "cpu"
    for one, other in zip(found, expected, strict=True):
        # On a GPU attention and FFN run through Triton, which adds up in another order.
        tolerance = {"rtol": 1e-13, "atol": 1e-13} if exact else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(one, other, **tolerance)
