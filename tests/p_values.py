"""The p-value of Hoeffding and Bentkus by hand."""

from __future__ import annotations

import math


def p_value_by_hand(risk, n, delta):
    """Hoeffding-Bentkus from binomial coefficients."""
    entropy = (1 - risk) * math.log((1 - risk) / (1 - delta)) + (risk and risk * math.log(risk / delta))
    losses = math.ceil(round(n * risk, 9))
    tail = sum(math.comb(n, k) * delta**k * (1 - delta) ** (n - k) for k in range(losses + 1))
    return min(math.exp(-n * entropy), math.e * tail)
