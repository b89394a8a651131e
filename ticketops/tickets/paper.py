"""Sparsity levels and weight counts of the super tickets paper (arXiv 2105.12002) for BERT-base."""

from ticketops.tickets.weights import WeightCounts

# Sparsity -> (heads pruned of 144, FFNs pruned of 12). The FFNs follow no formula: at 50 % it would give 6.
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

# The paper subtracts matrices without their biases from BERT-base with all eight task heads (16 outputs of 768 weights
# and a bias). This was found by fitting: it reproduces the eight printed percentages to the decimal. True counts differ
# by less than 0.1 percentage points.
PAPER_WEIGHTS = WeightCounts(head=4 * 768 * 64, ffn=2 * 768 * 3072, encoder=85_054_464, total=109_482_240 + 16 * 769)
