"""Patched models in CUDA graphs: captured by torch.compile for a bucket of batches, and by hand for static shapes."""

import pytest
import torch
from bounds import roundings
from transformers import BertForSequenceClassification

import ticketops
from models.conftest import tiny_batch, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture
def model():
    torch.manual_seed(0)
    # Widths that the Triton kernels serve.
    config = tiny_config(hidden_size=64, problem_type="single_label_classification")
    return BertForSequenceClassification(config).cuda().train()


def batch(longest):
    some = tiny_batch()
    some["attention_mask"][0, longest:] = 0
    return {name: value.cuda() for name, value in some.items()}


def step(model, call, inputs):
    model.zero_grad()
    loss = call(**inputs).loss
    loss.backward()
    return [loss.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(got, want):
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, **roundings(1000, 100))


def test_graphs_captured_for_one_batch_serve_the_bucket(model):
    batches = [batch(longest) for longest in (10, 12, 16, 9)]
    with ticketops.patch(model, bucket=64) as handle:
        with handle.record_importance() as eager:
            want = [step(model, model, inputs) for inputs in batches * 2]
        compiled = torch.compile(model, mode="reduce-overhead")
        with handle.record_importance() as recorded:
            for inputs, expected in zip(batches * 2, want, strict=True):
                torch.compiler.cudagraph_mark_step_begin()
                assert_same(step(model, compiled, inputs), expected)
    # Sums of float32 terms, in another order.
    torch.testing.assert_close(recorded.head, eager.head, **roundings(1000, 10))
    torch.testing.assert_close(recorded.ffn, eager.ffn, **roundings(1000, 10))


def test_static_shapes_never_wait_for_the_gpu(model):
    inputs = batch(12)
    with ticketops.patch(model, unpad=False) as handle, handle.record_importance():
        step(model, model, inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(model, model, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_step_captured_by_hand_serves_other_batches(model):
    static = batch(12)
    with ticketops.patch(model, unpad=False):
        want = {longest: step(model, model, batch(longest)) for longest in (16, 3)}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(model, model, static)
        torch.cuda.current_stream().wait_stream(stream)
        model.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = model(**static).loss
            loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for longest, expected in want.items():
            for name, value in batch(longest).items():
                static[name].copy_(value)
            for gradient in gradients:
                gradient.zero_()
            graph.replay()
            assert_same([loss, *gradients], expected)
