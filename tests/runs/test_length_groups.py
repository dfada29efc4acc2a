"""Training in batches of rows of similar length, whose order is random."""

from __future__ import annotations

import pytest
import torch
from run_fixtures import Tiny
from test_runs import Stop, curves
from transformers.trainer_pt_utils import LengthGroupedSampler

from sparsegrad.runs.runner import run
from sparsegrad.trainer.length_groups import ShuffledLengthGroups

ROWS, SIZE = 1003, 8
LENGTHS = torch.randint(5, 120, (ROWS,), generator=torch.Generator().manual_seed(0)).tolist()


def sampler(kind: type[LengthGroupedSampler], seed: int = 1) -> LengthGroupedSampler:
    return kind(SIZE, lengths=LENGTHS, generator=torch.Generator().manual_seed(seed))


def split(rows: list[int]) -> list[tuple[int, ...]]:
    return [tuple(rows[start : start + SIZE]) for start in range(0, len(rows), SIZE)]


def trend(batches: list[tuple[int, ...]], window: int = ROWS // (4 * SIZE)) -> float:
    """How a batch's mean length correlates with its place among those that the sampler sorts together; the mean."""
    means = torch.tensor([sum(LENGTHS[row] for row in batch) / len(batch) for batch in batches])
    parts = [means[start : start + window] for start in range(0, len(means) - window, window)]
    return float(
        torch.stack([torch.corrcoef(torch.stack([part, torch.arange(window)]))[0, 1] for part in parts]).mean()
    )


def test_the_batches_are_those_of_the_sampler_in_another_order_and_the_incomplete_one_is_last() -> None:
    grouped, shuffled = split(list(sampler(LengthGroupedSampler))), split(list(sampler(ShuffledLengthGroups)))
    assert sorted(shuffled) == sorted(grouped) != shuffled
    assert shuffled[-1] == grouped[-1]
    assert len(shuffled[-1]) == ROWS % SIZE
    assert sorted(row for batch in shuffled for row in batch) == list(range(ROWS))


def test_lengths_have_no_trend_within_an_epoch() -> None:
    assert trend(split(list(sampler(LengthGroupedSampler)))) < -0.9
    assert abs(sum(trend(split(list(sampler(ShuffledLengthGroups, seed)))) for seed in range(20)) / 20) < 0.1


def test_each_epoch_and_seed_has_an_order_of_its_own() -> None:
    one = sampler(ShuffledLengthGroups)
    epochs = [list(one), list(one), list(sampler(ShuffledLengthGroups, 2))]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert list(sampler(ShuffledLengthGroups)) == epochs[0]


def test_a_run_visits_the_shuffled_batches_and_is_resumed_to_the_bit(tiny: Tiny) -> None:
    by_order = {order: run(tiny(f"train.group_by_length={order}"))[0] for order in ("shuffled", "true", "false")}
    assert len({str(curves(record)) for record in by_order.values()}) == 3
    config = tiny("train.group_by_length=shuffled")
    config.record_path.unlink()
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[Stop(3)])
    again = Stop()
    record, _ = run(config, callbacks=[again])
    assert again.began == 2
    assert curves(record) == curves(by_order["shuffled"])
