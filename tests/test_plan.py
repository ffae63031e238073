"""The plan: the same data for any number of ranks and any resume point."""

from typing import Any

import numpy as np
import pytest

from pipelines.index import DatasetIndex
from pipelines.plan import ORDERS, PAGE_SAMPLES, WINDOW_PAGES, EpochPlan, RankPlan, order
from pipelines.views import RandomResizedCrop


def index_of(count: int) -> DatasetIndex:
    rng = np.random.default_rng(0)
    return DatasetIndex(
        classes=("a", "b"),
        labels=rng.integers(0, 2, count),
        sizes=rng.integers(50, 500, (count, 2)).astype(np.int32),
        names=[f"{i}.png" for i in range(count)],
    )


def plan_of(count: int, batch_size: int, *, epoch: int = 0, kind: str = "random") -> EpochPlan:
    return EpochPlan(
        index=index_of(count),
        family=RandomResizedCrop(),
        view_seed=5,
        view=epoch,
        order=order(count, seed=1, epoch=epoch, kind=kind),
        batch_size=batch_size,
    )


def rows_of(rank_plan: RankPlan, batch: int) -> list[tuple[Any, ...]]:
    """What a batch shows, row by row: id, box and flip of every rendering."""
    rows = rank_plan.rows(batch)
    return [
        (int(sample), *((*r.boxes[rows][n].tolist(), bool(r.flips[rows][n]), r.size) for r in rank_plan.crops))
        for n, sample in enumerate(rank_plan.ids[rows])
    ]


@pytest.mark.parametrize("count", [1, 7, 64, 65, 67, 1000])
@pytest.mark.parametrize("batch_size", [4, 13, 64])
def test_any_ranks_and_resume_point_see_the_same_data(count: int, batch_size: int) -> None:
    plan = plan_of(count, batch_size)
    whole = plan.for_rank((32, 48))
    batches = [rows_of(whole, step) for step in range(plan.steps)]
    assert [len(batch) for batch in batches] == [plan.rows(step) for step in range(plan.steps)]
    assert sorted(row[0] for batch in batches for row in batch) == list(range(count)), "each sample once"
    for world_size in (1, 2, 3, 4):
        for start in {0, 1, plan.steps // 2, plan.steps - 1, plan.steps}:
            works = [
                plan.for_rank((32, 48), rank=rank, world_size=world_size, start_step=start)
                for rank in range(world_size)
            ]
            for step in range(start, plan.steps):
                shares = [rows_of(rank_plan, step - start) for rank_plan in works]
                assert [row for share in shares for row in share] == batches[step]
                assert max(map(len, shares)) - min(map(len, shares)) <= 1, "even shares"
            assert all(rank_plan.batches == plan.steps - start for rank_plan in works), (
                "every rank takes every step"
            )


def test_more_ranks_than_rows_in_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size: got 2 for 4 processes"):
        plan_of(10, 2).for_rank((32,), world_size=4)


@pytest.mark.parametrize("kind", ORDERS)
def test_an_order_is_a_permutation_and_a_function_of_its_arguments(kind: str) -> None:
    first = order(3001, seed=4, epoch=2, kind=kind)
    assert sorted(first) == list(range(3001))
    assert (first == order(3001, seed=4, epoch=2, kind=kind)).all()
    if kind != "sequential":
        for other in (order(3001, seed=4, epoch=3, kind=kind), order(3001, seed=5, epoch=2, kind=kind)):
            assert (first != other).mean() > 0.5


def test_golden_orders() -> None:
    """An interrupted run resumes with the order it began with, whatever the version: do not change them."""
    assert order(10, seed=0, epoch=0).tolist() == GOLDEN_RANDOM
    assert order(1_000, seed=7, epoch=3)[:6].tolist() == GOLDEN_LATER
    assert order(100_000, seed=7, epoch=3, kind="paged")[:6].tolist() == GOLDEN_PAGED


GOLDEN_RANDOM = [1, 3, 0, 6, 8, 7, 9, 5, 4, 2]
GOLDEN_LATER = [650, 67, 601, 58, 899, 202]
GOLDEN_PAGED = [12901, 6704, 6715, 68286, 57548, 4171]


def test_a_random_order_is_uniform() -> None:
    """Every sample reaches every tenth of the epoch equally often."""
    count, epochs = 1000, 400
    tenth = np.zeros((count, 10))
    for epoch in range(epochs):
        tenth[order(count, seed=0, epoch=epoch), np.arange(count) * 10 // count] += 1
    expected = epochs / 10
    chi = ((tenth - expected) ** 2 / expected).sum(1)  # 9 degrees of freedom a sample
    assert abs(chi.mean() - 9) < 5 * (18 / count) ** 0.5


def test_paged_order_reads_few_pages_at_a_time() -> None:
    count = 3 * PAGE_SAMPLES * WINDOW_PAGES  # whole windows
    paged = order(count, seed=0, epoch=0, kind="paged")
    window = PAGE_SAMPLES * WINDOW_PAGES
    for start in range(0, count, window):
        pages = np.unique(paged[start : start + window] // PAGE_SAMPLES)
        assert len(pages) <= WINDOW_PAGES
    batches = paged.reshape(-1, 256) // PAGE_SAMPLES
    assert np.mean([len(np.unique(batch)) for batch in batches]) > 0.9 * WINDOW_PAGES, "a batch mixes its window"


def test_an_unknown_order_is_named() -> None:
    with pytest.raises(ValueError, match="got 'shuffled', expected one of random, paged, sequential"):
        order(10, seed=0, epoch=0, kind="shuffled")
