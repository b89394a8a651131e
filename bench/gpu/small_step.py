"""Runs every kernel once on small ragged shapes, for compute-sanitizer."""

import torch

from ticketops import ops
from ticketops.ops import copies, importance


def main() -> None:
    for lengths in ([17, 64, 1, 100], [300, 33]):
        packed = ops.Sequences.from_lengths(lengths)
        sequences = ops.Sequences(packed.starts.cuda(), packed.lengths.cuda(), packed.max_length)
        tokens = sum(lengths)
        x = torch.randn((tokens, 256), device="cuda", dtype=torch.bfloat16, requires_grad=True)
        w1 = torch.randn((512, 256), device="cuda", dtype=torch.bfloat16, requires_grad=True)
        b1 = torch.zeros(512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        heads = torch.zeros((len(lengths), 4), device="cuda", requires_grad=True)
        neurons = torch.zeros((len(lengths), 512), device="cuda", requires_grad=True)
        q = x.view(tokens, 4, 64)
        mask = torch.tensor([1.0, 0.0, 0.5, 1.0], device="cuda")
        context = ops.attention(q, q, q, sequences, head_mask=mask, dropout_p=0.1, importance=heads)
        table = torch.randn((4, 2 * packed.max_length + 1), device="cuda", requires_grad=True)
        context = context + ops.attention(q, q, q, sequences, position_bias=table, window=20)
        hidden = ops.residual_norm(context.flatten(1), x, b1[:256], b1[:256], bias=b1[:256], dropout_p=0.1)
        out = ops.ffn(hidden, w1, b1, w1.t(), b1[:256], sequences, neuron_importance=neurons)
        out.float().square().mean().backward()
        whole_layers(sequences, tokens)
        around_the_layers(lengths, x.detach())
    torch.cuda.synchronize()


def whole_layers(sequences: ops.Sequences, tokens: int) -> None:
    """Runs whole layers as one op under autocast: with all heads and neurons, with some, and without an FFN; for all
    tokens and for first tokens only."""

    def parameter(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", requires_grad=True)

    square, vector = [parameter(256, 256) for _ in range(4)], [parameter(256) for _ in range(9)]
    attention = (*square[:3], *vector[:3], square[3], *vector[3:6])
    feeds = (parameter(512, 256), parameter(512), parameter(256, 512), vector[8])
    some = [torch.tensor(places, device="cuda") for places in ([0, 2, 3], [1, 2, 300, 511])]
    for ffn, kept in ((feeds, (None, None)), (feeds, some), ((None,) * 4, (None, None))):
        weights = ops.Weights(*attention, *ffn, *vector[6:8], *[None] * 3, *kept)
        for first_tokens in (False, True):
            x = torch.randn((tokens, 256), device="cuda", requires_grad=True)
            count = 4 if kept[0] is None else len(kept[0])
            heads = torch.zeros((len(sequences), count), device="cuda", requires_grad=True)
            with torch.autocast("cuda", torch.bfloat16):
                out = ops.encoder_layer(
                    x,
                    weights,
                    sequences,
                    head_dim=64,
                    scale=0.125,
                    activation="gelu",
                    dropouts=(0.1, 0.1, 0.1),
                    head_importance=heads,
                    ffn_importance=None if ffn[0] is None else torch.zeros_like(heads[:, 0], requires_grad=True),
                    first_tokens=first_tokens,
                )
            out.square().mean().backward()


def around_the_layers(lengths: list[int], tokens: torch.Tensor) -> None:
    """Runs packing, the ranking of importance, and copies of slices: the CUDA extension's kernels, if it is built."""
    width = max(lengths) + 3
    mask = torch.arange(width, device="cuda") < torch.tensor(lengths, device="cuda")[:, None]
    packing = ops.Packing.from_mask(mask, *mask.shape, mask.device)
    padded = packing.unpack(tokens).requires_grad_()
    packing.pack(padded).float().square().sum().backward()
    partials = importance.Partials(
        [torch.randn((len(lengths), 4), device="cuda") for _ in range(3)],
        [torch.randn(len(lengths), device="cuda") for _ in range(3)],
    )
    totals = torch.zeros((3, 4), device="cuda", dtype=torch.float64)
    importance.rank(importance.Sums(totals, totals[:, 0].contiguous(), [1] * 3, [1] * 3), partials)
    kept = torch.tensor([0, 2, 3], device="cuda")
    slices = [
        copies.Slices(torch.randn(8, 33, device="cuda"), 0, 4, kept),
        copies.Slices(tokens[:, :8].t(), 0, 4, kept),
    ]
    copies.scatter(slices, copies.gather(slices))


if __name__ == "__main__":
    main()
