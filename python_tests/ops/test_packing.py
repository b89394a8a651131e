import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ticketops.errors import InputError
from ticketops.ops import Packing, Sequences, products
from ticketops.ops.packing import TokenCounts


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=5))
def test_packing_any_mask_keeps_the_real_tokens_in_order_and_unpacks_to_zeros(rows):
    mask = torch.tensor(rows)
    padded = torch.randn(*mask.shape, 3)
    packing = Packing.from_mask(mask.int(), *mask.shape, mask.device)

    packed = packing.pack(padded)

    assert torch.equal(packed, padded[mask])
    assert packing.sequences.lengths.tolist() == mask.sum(1).tolist()
    for (start, end), row, keep in zip(packing.sequences.spans(), padded, mask, strict=True):
        assert torch.equal(packed[start:end], row[keep])
    assert torch.equal(packing.unpack(packed), padded * mask[:, :, None])


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=5), st.sampled_from([None, 1, 8]))
def test_holes_are_kept_as_rows_of_zeros_between_the_tokens(rows, bucket):
    mask = torch.tensor(rows)
    padded = torch.randn(*mask.shape, 3, requires_grad=True)
    packing = Packing.from_mask(mask.int(), *mask.shape, mask.device, bucket=bucket, close_holes=False)
    packed, sequences = packing.pack(padded), packing.sequences
    holes = 0
    for (start, end), row, keep in zip(sequences.spans(), padded, mask, strict=True):
        places = keep.nonzero().flatten().tolist() or [0, -1]
        run = slice(places[0], places[-1] + 1)
        assert torch.equal(packed[start:end], (row * keep[:, None])[run])
        assert sequences.real is None or torch.equal(sequences.real[start:end], keep[run])
        holes += int((~keep[run]).sum())
    assert (sequences.real is None) == (holes == 0)
    whole = packing.unpack(packed + 1)
    assert torch.equal(whole, (padded + 1) * mask[:, :, None])
    gradient = torch.randn_like(whole)
    assert torch.equal(torch.autograd.grad(whole, padded, gradient)[0], gradient * mask[:, :, None])


@given(
    st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=5),
    st.sampled_from([None, 8, "geometric"]),
    st.booleans(),
)
def test_counts_pack_as_reading_does(rows, bucket, close_holes):
    mask = torch.tensor(rows)
    read, known = (
        Packing.from_mask(mask, *mask.shape, mask.device, True, bucket, close_holes, counts=counts)
        for counts in (None, TokenCounts.of(mask))
    )
    for name in ("indices", "numbers"):
        assert torch.equal(getattr(read, name), getattr(known, name))
    for name in ("starts", "lengths"):
        assert torch.equal(getattr(read.sequences, name), getattr(known.sequences, name))
    # Longest runs are not shortened by their holes.
    assert read.sequences.max_length <= known.sequences.max_length <= 7
    if not close_holes:
        assert read.sequences.max_length == known.sequences.max_length
        assert (read.sequences.real is None) == (known.sequences.real is None)


@pytest.mark.parametrize("close_holes", [True, False])
def test_packing_is_differentiable(close_holes):
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]])
    packing = Packing.from_mask(mask, 2, 4, mask.device, close_holes=close_holes)
    x = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: packing.unpack(packing.pack(x) ** 2), x)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 5)])
def test_a_batch_without_padding_is_whole(mask):
    packing = Packing.from_mask(mask, 2, 5, torch.device("cpu"))
    x = torch.randn(2, 5, 3)
    assert torch.equal(packing.unpack(packing.pack(x)), x)
    assert packing.sequences.spans() == [(0, 5), (5, 10)]


def test_in_place_sequences_start_at_their_first_real_token():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
    packing = Packing.from_mask(mask, 3, 4, mask.device, unpad=False)
    assert packing.indices is None
    assert packing.sequences.spans() == [(0, 2), (6, 8), (8, 8)]


def test_a_mask_with_holes_is_refused_in_place():
    mask = torch.tensor([[1, 1, 1], [1, 0, 1]])
    with pytest.raises(InputError, match="row 1 of the attention mask has holes"):
        Packing.from_mask(mask, 2, 3, mask.device, unpad=False)


@given(
    st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=5), st.sampled_from([1, 3, 8, 64])
)
def test_a_bucket_adds_rows_that_come_back_nowhere(rows, bucket):
    mask = torch.tensor(rows)
    exact, packing = (Packing.from_mask(mask, *mask.shape, mask.device, bucket=b) for b in (None, bucket))
    padded = torch.randn(*mask.shape, 3, requires_grad=True)
    packed = packing.pack(padded)
    total = int(mask.sum())
    assert total <= len(packed) < total + bucket
    assert len(packed) % bucket == 0 or len(packed) == mask.numel()
    assert packed.isfinite().all()
    assert torch.equal(packed[:total], exact.pack(padded))
    assert packing.sequences.spans() == exact.sequences.spans()
    longest = packing.sequences.max_length
    assert exact.sequences.max_length <= longest <= 7
    assert longest in (1, 2, 4, 7)
    whole = packing.unpack(packed)
    assert torch.equal(whole, padded * mask[:, :, None])
    gradient = torch.randn_like(whole)
    assert torch.equal(torch.autograd.grad(whole, padded, gradient)[0], gradient * mask[:, :, None])


@pytest.mark.parametrize(
    ("real", "dtype", "rows"),
    [
        (37, torch.bfloat16, 48),
        (48, torch.bfloat16, 48),
        # No more than all of the batch.
        (61, torch.bfloat16, 62),
        (37, torch.float32, 48),
        (37, torch.float64, 37),
        (37, None, 37),
    ],
)
def test_rows_are_rounded_for_products_that_are_compiled(monkeypatch, real, dtype, rows):
    monkeypatch.setattr(products, "has_bf16_products", lambda: True)
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    mask = (torch.arange(62) < real).view(2, 31)
    packing = Packing.from_mask(mask, 2, 31, mask.device, dtype=dtype)
    assert packing.indices.tolist() == [*range(real), *[-1] * (rows - real)]
    assert packing.sequences.max_length == 31


@given(st.integers(0, 1 << 20))
def test_few_sizes_cost_few_rows(rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "has_bf16_products", lambda: True)
        size = products.granule(rows, torch.bfloat16, torch.device("cpu"))
    rounded = -(-rows // size) * size
    assert rounded - rows < max(16, rows / 32)
    assert size == 16 or rows < 64 * size
    assert products.granule(rows, torch.bfloat16, torch.device("cuda")) == 1


def test_what_waits_on_no_host_can_be_traced():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])

    def starts(mask):
        return Packing.from_mask(mask, 2, 4, mask.device, unpad=False).sequences.starts

    compiled = torch.compile(starts, backend="aot_eager", fullgraph=True)
    assert compiled(mask).tolist() == [0, 6]
    # As on a GPU, where the host does not look at the mask.
    with pytest.raises(RuntimeError, match="the attention mask has holes, which unpad=False cannot serve"):
        compiled(torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]]))


def test_sequences_from_lengths():
    assert Sequences.from_lengths([3, 0, 2]).spans() == [(0, 3), (3, 3), (3, 5)]
    assert Sequences.from_lengths([3, 0, 2], width=4).spans() == [(0, 3), (4, 4), (8, 10)]
    assert len(Sequences.from_lengths([])) == 0
    with pytest.raises(InputError, match="5 tokens does not fit"):
        Sequences.from_lengths([5], width=4)
    with pytest.raises(InputError, match=">= 0"):
        Sequences.from_lengths([2, -1])
