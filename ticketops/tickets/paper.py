"""The levels of the super tickets paper (arXiv 2105.12002) for BERT-base, and how it counts weights."""

from ticketops.tickets.weights import WeightCounts

# Sparsity -> (heads pruned of 144, FFNs pruned of 12). A table: no formula gives the FFNs, half of 12 would be 6.
PAPER_LEVELS: dict[float, tuple[int, int]] = {
    0.1: (14, 1),
    0.2: (28, 2),
    0.3: (43, 3),
    0.4: (57, 4),
    0.5: (72, 5),
    0.6: (86, 6),
    0.7: (100, 7),
    0.8: (115, 8),
}

# The paper takes matrices without their biases off BERT-base with all eight task heads (16 outputs of 768 weights and a
# bias). Found by fitting: it gives the eight printed percentages to the decimal; true counts differ by < 0.1 point.
PAPER_WEIGHTS = WeightCounts(head=4 * 768 * 64, ffn=2 * 768 * 3072, encoder=85_054_464, total=109_482_240 + 16 * 769)
