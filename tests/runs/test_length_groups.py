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


def grouped(seed: int = 1) -> LengthGroupedSampler:
    return LengthGroupedSampler(SIZE, lengths=LENGTHS, generator=torch.Generator().manual_seed(seed))


def shuffled(seed: int = 1, epoch: int = 0) -> ShuffledLengthGroups:
    found = ShuffledLengthGroups(SIZE, LENGTHS, seed)
    found.set_epoch(epoch)
    return found


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
    plain, found = split(list(grouped())), split(list(shuffled()))
    assert sorted(found) == sorted(plain) != found
    assert found[-1] == plain[-1]
    assert len(found[-1]) == ROWS % SIZE
    assert sorted(row for batch in found for row in batch) == list(range(ROWS))


def test_lengths_have_no_trend_within_an_epoch() -> None:
    assert trend(split(list(grouped()))) < -0.9
    assert abs(sum(trend(split(list(shuffled(seed)))) for seed in range(20)) / 20) < 0.1


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    orders = [list(shuffled(*which)) for which in ((1, 0), (1, 1), (3, 0))]
    assert len({tuple(order) for order in orders}) == 3
    torch.manual_seed(5)  # processes differ in torch's own generator
    assert list(shuffled(1, 1)) == orders[1]


LONGER = ("protocol.max_steps=10", "protocol.patience=null")


def test_each_setting_has_an_order_of_its_own(tiny: Tiny) -> None:
    orders = ("shuffled", "true", "false")
    assert len({str(curves(run(tiny(f"train.group_by_length={order}", *LONGER))[0])) for order in orders}) == 3


@pytest.mark.parametrize("stops", [(9,), (7,), (9, 10)], ids=["in the second epoch", "before it", "twice in it"])
@pytest.mark.parametrize("order", ["shuffled", "true"])
def test_a_run_is_resumed_to_the_bit(tiny: Tiny, order: str, stops: tuple[int, ...]) -> None:
    """An epoch has 6 steps, and every second one writes a checkpoint."""
    config = tiny(f"train.group_by_length={order}", *LONGER)
    whole, _ = run(config)
    config.record_path.unlink()
    for step in stops:
        with pytest.raises(KeyboardInterrupt):
            run(config, callbacks=[Stop(step)])
    again = Stop()
    record, _ = run(config, callbacks=[again])
    assert again.began == (stops[0] - 1) // 2 * 2
    assert curves(record) == curves(whole)
    assert record["result"] == whole["result"]
