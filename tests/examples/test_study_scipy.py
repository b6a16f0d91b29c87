"""The study's rank correlation equals scipy's where there are ties."""

import pytest
import torch
from study import stats

scipy_stats = pytest.importorskip("scipy.stats")


def test_spearman_with_ties():
    tied = torch.tensor([1.0, 1.0, 2.0, 3.0, 3.0, 3.0]), torch.tensor([2.0, 1.0, 2.0, 5.0, 4.0, 4.0])
    assert stats.spearman(*tied) == pytest.approx(scipy_stats.spearmanr(*(t.numpy() for t in tied)).statistic)
