"""What the tests of drawing tokens have in common.

Legend: B samples, V vocabulary.
"""

import torch

from megatron_safe.kernels.sample import philox_uniform


def philox4x32_10(counter, key, rounds=10):
    """Salmon et al. (2011), figure 2 and table 2, in Python's own integers."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (second >> 32) ^ c[1] ^ k[0], second & 0xFFFFFFFF, (first >> 32) ^ c[3] ^ k[1], first & 0xFFFFFFFF,
        ]  # fmt: skip
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def chi_square(cells, expected):
    counts = torch.bincount(cells, minlength=len(expected)).double()
    return float(((counts - expected) ** 2 / expected).sum())


def draw(rows, vocabulary, scale=3.0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    logits_BV = scale * torch.randn(rows, vocabulary, generator=generator)
    return logits_BV, philox_uniform(seed, torch.arange(rows), torch.tensor(0))


def full_log_probs(logits_BV, tokens_B, temperature):
    """log softmax(logits / temperature) over the whole vocabulary in float64; at temperature 0, of the logits."""
    return torch.log_softmax(logits_BV.double() / (temperature or 1.0), dim=1).gather(1, tokens_B[:, None])[:, 0]
