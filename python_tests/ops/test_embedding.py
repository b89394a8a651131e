"""What a CPU computes before the layers, against torch's own embedding and the shared dropout rule."""

import pytest
import torch
from torch.nn import functional

from ticketops.errors import InputError
from ticketops.ops import backends, embedding
from ticketops.ops.dropout import keep_elements

from .cases import need, poisoned, threads

SEED = torch.tensor([0x0123_4567_89AB_CDEF])
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def native():
    need("native", "residual", torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding_idx", [None, 0, 4])
@pytest.mark.parametrize("channels", [1, 37, 64, 384])
def test_embedding_is_torchs(dtype, padding_idx, channels):
    torch.manual_seed(0)
    weight = torch.randn(50, channels, dtype=dtype).requires_grad_()
    # Most ids occur several times, the padding among them.
    ids, dout = torch.randint(12, (3, 40)), torch.randn(3, 40, channels, dtype=dtype)
    with poisoned():
        out = embedding.embedding(weight, ids, padding_idx)
        (gradient,) = torch.autograd.grad(out, weight, dout)
    plain = functional.embedding(ids, weight, padding_idx)
    assert torch.equal(out, plain)
    exact = functional.embedding(ids, weight.double(), padding_idx)
    (expected,) = torch.autograd.grad(exact, weight, dout.double())
    (same_dtype,) = torch.autograd.grad(plain, weight, dout)
    bound = 3 * (same_dtype - expected).abs().max() + 4 * torch.finfo(dtype).eps * expected.abs().max()
    assert (gradient - expected).abs().max() <= bound
    assert gradient.dtype == dtype
    assert not gradient[12:].any()
    assert padding_idx is None or not gradient[padding_idx].any()
    with threads(1):
        (single,) = torch.autograd.grad(embedding.embedding(weight, ids, padding_idx), weight, dout)
    assert torch.equal(single, gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "channels"), [(6000, 384), (60001, 37)])
def test_the_gradient_of_a_large_table_is_zeros_but_for_its_rows_in_use(dtype, rows, channels):
    ids = torch.tensor([[rows - 1, 0, 5], [5, 3000, rows - 1]])
    dout = torch.randn(2, 3, channels).to(dtype)
    want = torch.zeros(rows, channels).index_add_(0, ids.flatten(), dout.flatten(0, 1).float())
    for number in (1, 2):
        with threads(number), poisoned():
            got = torch.ops.ticketops.embedding_backward(dout, ids, rows, -1)
        torch.testing.assert_close(got, want.to(dtype), rtol=0.01, atol=0)


def test_embedding_of_nothing_and_of_32_bit_ids():
    weight = torch.randn(5, 3).requires_grad_()
    for ids in (torch.empty(2, 0, dtype=torch.int64), torch.tensor([[1, 4], [4, 0]], dtype=torch.int32)):
        dout = torch.randn(*ids.shape, 3)
        (gradient,) = torch.autograd.grad(embedding.embedding(weight, ids, None), weight, dout)
        (expected,) = torch.autograd.grad(functional.embedding(ids, weight), weight, dout)
        torch.testing.assert_close(gradient, expected)


def test_ids_that_are_no_rows_are_refused_forward_and_backward():
    weight = torch.randn(5, 3).requires_grad_()
    with pytest.raises(IndexError):
        embedding.embedding(weight, torch.tensor([5]), None)
    with pytest.raises(InputError, match="id 5 is not among the 5 rows"):
        torch.ops.ticketops.embedding_backward(torch.randn(1, 3), torch.tensor([5]), 5, -1)


def all_of(dtype, channels, tokens, types=True, positions=True):
    """Tables of words, token types and positions with their ids, gamma and beta, and a gradient."""
    torch.manual_seed(0)
    tables = [torch.randn(rows, channels).to(dtype) for rows in (50, 2, 130)]
    ids = [torch.randint(rows, (1, tokens)) for rows in (12, 2, 130)]
    vectors = [torch.randn(channels).to(dtype) for _ in range(2)]
    for place, there in ((1, types), (2, positions)):
        if not there:
            tables[place] = ids[place] = None
    return tables, ids, vectors, torch.randn(1, tokens, channels).to(dtype)


def by_torch(tables, ids, padding, gamma, beta, dropout_p):
    embedded = [
        functional.embedding(places, table, row)
        for table, places, row in zip(tables, ids, padding, strict=True)
        if table is not None
    ]
    out = functional.layer_norm(sum(embedded), gamma.shape, gamma, beta, 1e-5)
    if not dropout_p:
        return out
    kept = keep_elements(SEED, ids[0].numel(), len(gamma), dropout_p, gamma.device).view(out.shape)
    return out * kept / (1 - dropout_p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("types", [False, True])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize(("channels", "tokens"), [(5, 3), (37, 70), (64, 0), (384, 131)])
def test_embeddings_are_torchs(dtype, dropout_p, types, positions, channels, tokens, monkeypatch):
    monkeypatch.setattr(embedding, "draw_seed", lambda device: SEED)
    tables, ids, vectors, dout = all_of(dtype, channels, tokens, types, positions)
    padding = (3, None, 1)

    def results(embed, dtype=dtype):
        leaves = [None if x is None else x.to(dtype, copy=True).requires_grad_() for x in (*tables, *vectors)]
        out = embed(leaves[:3], leaves[3:])
        there = [leaf for leaf in leaves if leaf is not None]
        return [out.detach(), *torch.autograd.grad(out, there, dout.to(dtype))]

    def ours(leaves, vectors):
        return embedding.embeddings(leaves, ids, padding, *vectors, dropout_p=dropout_p, eps=1e-5)

    plain = lambda leaves, vectors: by_torch(leaves, ids, padding, *vectors, dropout_p)  # noqa: E731
    exact, theirs = results(plain, torch.float64), results(plain)
    runs = []
    for number in (1, 2):
        with threads(number), poisoned():
            runs.append(results(ours))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    for got, other, want in zip(runs[0], theirs, exact, strict=True):
        assert got.dtype == dtype
        assert got.shape == want.shape
        if want.numel():
            bound = 3 * (other - want).abs().max() + 8 * torch.finfo(dtype).eps * want.abs().max()
            assert (got - want).abs().max() <= bound


def test_embeddings_equal_the_ops_in_turn():
    tables, ids, vectors, _ = all_of(torch.float32, 100, 67)
    torch.manual_seed(5)
    out = embedding.embeddings(tables, ids, (None, None, None), *vectors, dropout_p=0.1, eps=1e-12)
    torch.manual_seed(5)
    words, types, positions = (embedding.embedding(*pair, None) for pair in zip(tables, ids, strict=True))
    assert torch.equal(out, embedding.dropout(embedding.layer_norm(words + types + positions, *vectors, 1e-12), 0.1))


def test_only_tables_that_want_a_gradient_get_one():
    tables, ids, vectors, dout = all_of(torch.float32, 8, 9)
    tables[2].requires_grad_()
    out = embedding.embeddings(tables, ids, (None, None, None), *vectors, dropout_p=0.0, eps=1e-12)
    out.backward(dout)
    assert tables[2].grad is not None
    assert all(x.grad is None for x in (*tables[:2], *vectors))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_table_without_rows_has_no_row_for_an_id(place):
    tables, ids, vectors, _ = all_of(torch.float32, 8, 9)
    tables[place] = tables[place].detach()[:0]
    with pytest.raises(InputError, match="is not among the 0 rows"):
        embedding.embeddings(tables, ids, (None, None, None), *vectors, dropout_p=0.0, eps=1e-12)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("wrong", [-1, 130])
def test_embeddings_refuse_ids_that_are_no_rows(place, wrong):
    tables, ids, vectors, _ = all_of(torch.float32, 8, 9)
    ids[place][0, 4] = wrong
    with pytest.raises(InputError, match=f"id {wrong} is not among the {len(tables[place])} rows"):
        embedding.embeddings(tables, ids, (None, None, None), *vectors, dropout_p=0.0, eps=1e-12)


def test_embeddings_of_strided_tensors_and_32_bit_ids():
    tables, ids, vectors, dout = all_of(torch.float32, 8, 9)
    views = [torch.empty(8, len(table)).t().copy_(table) for table in tables]
    spaced = [torch.stack([vector, vector + 1], 1)[:, 0] for vector in vectors]

    def results(tables, ids, vectors, dout):
        leaves = [table.requires_grad_() for table in (*tables, *vectors)]
        out = embedding.embeddings(leaves[:3], ids, (0, None, None), *vectors, dropout_p=0.0, eps=1e-12)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    want = results(tables, ids, vectors, dout)
    apart = dout.transpose(1, 2).contiguous().transpose(1, 2)
    got = results(views, [places.int() for places in ids], spaced, apart)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 100), (2, 3, 17), (1, 5), (0, 8), (65, 384)])
def test_layer_norm_is_torchs(dtype, shape):
    torch.manual_seed(0)
    tensors = [torch.randn(*size, dtype=dtype) for size in (shape, shape[-1:], shape[-1:])]
    dout = torch.randn(shape, dtype=dtype)

    def results(norm, dtype=dtype):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]
        out = norm(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]

    plain = lambda x, weight, bias: functional.layer_norm(x, shape[-1:], weight, bias, 1e-5)  # noqa: E731
    exact, theirs = results(plain, torch.float64), results(plain)
    for number in (1, 2):
        with threads(number), poisoned():
            ours = results(lambda *leaves: embedding.layer_norm(*leaves, 1e-5))
        for got, other, want in zip(ours, theirs, exact, strict=True):
            assert got.dtype == dtype
            assert got.shape == want.shape
            if want.numel():
                bound = 3 * (other - want).abs().max() + 4 * torch.finfo(dtype).eps * want.abs().max()
                assert (got - want).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 100), (2, 3, 17), (1, 1), (0, 8), (65, 384)])
def test_dropout_is_the_shared_rule_and_replayed(dtype, shape):
    torch.manual_seed(0)
    x, dout = torch.randn(shape, dtype=dtype).requires_grad_(), torch.randn(shape, dtype=dtype)
    with poisoned():
        out = torch.ops.ticketops.dropout(x, SEED, 0.25)
        (gradient,) = torch.autograd.grad(out, x, dout)
    kept = keep_elements(SEED, x[..., 0].numel(), shape[-1], 0.25, x.device).view(shape)
    for got, given in ((out, x), (gradient, dout)):
        torch.testing.assert_close(got, (given.float() / 0.75 * kept).to(dtype))


def test_strided_inputs():
    x = torch.randn(6, 10).t().requires_grad_()
    out = torch.ops.ticketops.dropout(x, SEED, 0.5)
    assert torch.equal(out, torch.ops.ticketops.dropout(x.contiguous(), SEED, 0.5))
    weight, ids = torch.randn(9, 8)[:, ::2].requires_grad_(), torch.randint(9, (4, 3)).t()
    dout = torch.randn(4, 3, 4).transpose(0, 1)
    (gradient,) = torch.autograd.grad(embedding.embedding(weight, ids, 1), weight, dout)
    (expected,) = torch.autograd.grad(functional.embedding(ids, weight, 1), weight, dout)
    torch.testing.assert_close(gradient, expected)


def test_float64_is_refused():
    x, ids = torch.randn(2, 3, dtype=torch.float64), torch.tensor([0, 1])
    for call in (
        lambda: torch.ops.ticketops.embedding_backward(x, ids, 5, -1),
        lambda: torch.ops.ticketops.dropout(x, SEED, 0.5),
        lambda: torch.ops.ticketops.layer_norm(x, x[0], x[0], 1e-5),
        lambda: torch.ops.ticketops.embeddings(x, None, x, ids, None, ids, x[0], x[0], None, [-1, -1, -1], 0.0, 1e-5),
    ):
        with pytest.raises(InputError, match="float64"):
            call()


def test_opcheck():
    ids = torch.tensor([[0, 3], [3, 1]])
    torch.library.opcheck(torch.ops.ticketops.embedding.default, (torch.randn(4, 3).requires_grad_(), ids, 0))
    norm = (torch.randn(4, 3).requires_grad_(), torch.randn(3).requires_grad_(), torch.randn(3).requires_grad_(), 1e-5)
    torch.library.opcheck(torch.ops.ticketops.layer_norm.default, norm)
    torch.library.opcheck(torch.ops.ticketops.dropout.default, (torch.randn(4, 3).requires_grad_(), SEED, 0.5))
    tables, ids, vectors, _ = all_of(torch.float32, 8, 9)
    for table in (*tables, *vectors):
        table.requires_grad_()
    arguments = (*tables, *ids, *vectors, SEED, [0, -1, -1], 0.5, 1e-5)
    torch.library.opcheck(torch.ops.ticketops.embeddings.default, arguments)


def test_another_backend_leaves_it_to_torch(monkeypatch):
    monkeypatch.setenv("TICKETOPS_BACKEND", "reference")
    assert backends.choose("residual", torch.device("cpu"), torch.float32)[0] == "reference"
    assert not embedding.serves_embedding(torch.randn(2, 2))


def test_gradients_that_live_at_once_share_no_memory_and_a_freed_one_leaves_nothing_behind():
    weight, ids = torch.randn(40, 8).requires_grad_(), torch.tensor([3])

    def gradient():
        return torch.autograd.grad(embedding.embedding(weight, ids, None), weight, torch.ones(1, 8))[0]

    expected = torch.zeros(40, 8).index_fill_(0, ids, 1.0)
    first = gradient()
    held = first.data_ptr()
    view = first[5:]
    second = gradient()
    assert second.data_ptr() != held
    # Written everywhere, freed by its last holder, and taken again.
    first.fill_(float("nan"))
    del first
    assert gradient().data_ptr() != held
    del view
    assert all(torch.equal(each, expected) for each in [gradient() for _ in range(20)])
    assert torch.equal(second, expected)
