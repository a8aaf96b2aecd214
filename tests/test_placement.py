import collections

import hypothesis
import hypothesis.strategies as st
import pytest

from pipeline import placement

ids = st.lists(st.binary(min_size=1, max_size=30), unique=True, max_size=50)


def test_places_stay_what_they_were():
    # Golden integers: a change here moves every record of every data set.
    assert placement.shard_and_order(0, b"train-0000000") == (
        15272242036262064193,
        12498536201827432157,
    )
    assert placement.shard_and_order(1, b"train-0000000")[0] % 16 == 14
    splits = [placement.split_of("train", b"train-%07d" % i, 0.5) for i in range(5)]
    assert splits == ["train", "validation", "train", "validation", "train"]


@hypothesis.given(ids, st.integers())
def test_order_is_a_permutation_that_ignores_the_order_of_arrival(record_ids, seed):
    order = placement.sort_order(seed, record_ids)
    assert sorted(order) == list(range(len(record_ids)))
    placed = [record_ids[i] for i in order]
    arrived = record_ids[::-1]
    assert [arrived[i] for i in placement.sort_order(seed, arrived)] == placed


@hypothesis.given(st.binary(), st.floats(0, 0.5), st.floats(0, 0.4))
def test_a_larger_validation_share_only_adds_to_it(record_id, fraction, more):
    if placement.split_of("train", record_id, fraction) == "validation":
        assert placement.split_of("train", record_id, fraction + more) == "validation"


def test_only_train_is_divided():
    assert placement.split_of("test", b"x", 0.99) == "test"
    assert placement.splits_made(["train", "test"], 0.1) == ["train", "validation", "test"]
    assert placement.splits_made(["train", "test"], 0) == ["train", "test"]
    assert placement.splits_made([placement.UNSPLIT], 0.1) == ["train", "validation", "test"]
    assert placement.splits_made(["test"], 0.1) == ["test"]


@pytest.mark.parametrize(("split", "share"), [("train", 0.8), ("validation", 0.1), ("test", 0.1)])
def test_a_set_without_splits_is_divided_80_10_10(split, share):
    counts = collections.Counter(
        placement.split_of(placement.UNSPLIT, b"sample-%07d" % i, 0.1) for i in range(10_000)
    )
    assert counts[split] / 10_000 == pytest.approx(share, abs=0.01)
