"""Softmax and the divergence of distributions in float64, over the last axis; -inf is a logit that counts nothing."""

import numpy as np


def log_softmax(z, temperature=1.0):
    """z / T - logsumexp(z / T)."""
    z = np.asarray(z, np.float64) / temperature
    z = z - z.max(axis=-1, keepdims=True, initial=-np.inf)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def softmax(z, temperature=1.0):
    """exp(z / T) / Σ exp(z / T)."""
    z = np.asarray(z, np.float64) / temperature
    exponentials = np.exp(z - z.max(axis=-1, keepdims=True, initial=-np.inf))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def kl(log_p, log_q):
    """Σ p (log p - log q), where 0 log 0 = 0; of logarithms, which tell small probabilities apart from none."""
    counted_p, counted_q = (np.where(np.isneginf(log_p), 0, x) for x in (log_p, log_q))
    return np.sum(np.exp(log_p) * (counted_p - counted_q), axis=-1)
