"""DSQ's printed tables: whole, and in the zoo's names of networks and layers."""

import keras

from eval import dsq_published
from lowbit import models


def test_rows_have_bits_and_percent():
    assert [len(rows) for rows in dsq_published.TABLES.values()] == [7, 4, 2, 10, 25]
    for rows in dsq_published.TABLES.values():
        for (network, _, bits), (top1, top5) in rows.items():
            assert network in models.ZOO
            assert len(bits) == 2 and set(bits) <= {1, 2, 3, 4, 32}
            assert 50 < top1 < (100 if top5 is None else top5) <= 100
    assert set(dsq_published.TABLES[7]) > dsq_published.FULLY_QUANTIZED


def test_learnt_alphas_are_of_resnet20s_convolutions_but_the_first():
    network = models.build("resnet20", 10)
    first, *others = [x.name for x in network.layers if isinstance(x, keras.layers.Conv2D)]
    assert first == "conv1" and set(dsq_published.LEARNT_ALPHA) == set(others)
    for weights, activations in dsq_published.LEARNT_ALPHA.values():
        assert 0 < weights < activations < 0.5
