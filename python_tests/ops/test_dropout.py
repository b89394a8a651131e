import pytest
import torch

from ticketops.ops.dropout import draw_seed, keep_mask


def reference_keep(seed, row, heads, head, key, p):
    """The documented rule in Python's unbounded integers."""

    def mix(x):
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    row_key = mix((row * heads + head + low) & 0xFFFFFFFF) ^ high
    return mix((row_key + key * 0x9E3779B9) & 0xFFFFFFFF) >> 8 >= p * 2**24


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, 2**61 + 12345])
@pytest.mark.parametrize("first_row", [0, 7, 2**29])
def test_the_mask_follows_the_documented_rule(seed, first_row):
    heads = torch.tensor([0, 3])
    kept = keep_mask(torch.tensor([seed]), first_row, 5, heads, 4, 6, 0.3)
    for i, head in enumerate(heads.tolist()):
        for query in range(5):
            for key in range(6):
                assert kept[i, query, key] == reference_keep(seed, first_row + query, 4, head, key, 0.3)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_dropped_is_p_and_neighbours_are_independent(p):
    kept = keep_mask(torch.tensor([1234567]), 0, 500, torch.arange(4), 4, 500, p).double()
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * deviation
    centred = (kept - kept.mean()) / kept.std()
    for a, b in (
        (centred[:, :, 1:], centred[:, :, :-1]),
        (centred[:, 1:], centred[:, :-1]),
        (centred[1:], centred[:-1]),
    ):
        assert abs((a * b).mean()) < 5 / a.numel() ** 0.5


def test_masks_of_different_seeds_differ_and_torch_governs_the_seed():
    torch.manual_seed(3)
    first, second = draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(draw_seed(torch.device("cpu")), first)
    masks = [keep_mask(seed, 0, 30, torch.arange(2), 2, 30, 0.5) for seed in (first, second)]
    assert 0.4 < (masks[0] == masks[1]).double().mean() < 0.6


def test_a_subset_of_heads_draws_what_all_heads_draw():
    seed = torch.tensor([99])
    every = keep_mask(seed, 3, 4, torch.arange(6), 6, 4, 0.4)
    assert torch.equal(keep_mask(seed, 3, 4, torch.tensor([1, 4]), 6, 4, 0.4), every[[1, 4]])
