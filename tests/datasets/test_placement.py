import collections

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from pipeline.datasets import placement
from pipeline.sources.splits import UNSPLIT

ids = st.lists(st.binary(min_size=1, max_size=30), unique=True, max_size=50)


def split_of(source_split, record_id, fraction):
    return placement.splits_of(source_split, [record_id], fraction)[0]


def test_places_stay_what_they_were():
    # Golden integers: a change here moves every record of every data set.
    numbers, keys = placement.id_hashes(0, [b"train-0000000", b"train-0000001"]).T
    assert numbers.tolist() == [10378694781982638984, 5061672532802633337]
    assert keys.tolist() == [6110762441482872555, 3570255273968522519]
    splits = placement.splits_of("train", [b"train-%07d" % i for i in range(5)], 0.5)
    assert splits.tolist() == ["train", "validation", "train", "validation", "train"]


@hypothesis.given(ids, st.integers(0, 2**63 - 1))
def test_order_is_a_permutation_that_ignores_the_order_of_arrival(record_ids, seed):
    def placed(arrived):
        keys = placement.id_hashes(seed, arrived)[:, 1]
        return [arrived[i] for i in placement.sorted_by(keys, arrived)]

    assert sorted(placed(record_ids)) == sorted(record_ids)
    assert placed(record_ids) == placed(record_ids[::-1])


@hypothesis.given(st.lists(st.binary(min_size=1, max_size=4), max_size=20), st.data())
def test_equal_keys_are_ordered_by_id(record_ids, data):
    keys = data.draw(
        st.lists(st.integers(0, 2), min_size=len(record_ids), max_size=len(record_ids))
    )
    order = placement.sorted_by(np.array(keys, np.uint64), record_ids)
    in_order = [(keys[i], record_ids[i]) for i in order]
    assert in_order == sorted(zip(keys, record_ids, strict=True))


@hypothesis.given(ids, st.integers(0, 2**63 - 1), st.integers(1, 9))
def test_a_record_s_shard_depends_on_no_other_record(record_ids, seed, num_shards):
    def shard_of(some):
        numbers = placement.id_hashes(seed, some)[:, 0]
        return (numbers % num_shards).tolist()

    assert shard_of(record_ids) == [shard_of([record_id])[0] for record_id in record_ids]


def test_shards_are_of_about_one_size():
    numbers = placement.id_hashes(3, [b"train-%07d" % i for i in range(64_000)])[:, 0]
    counts = np.bincount(numbers % np.uint64(16))
    assert abs(counts - 4_000).max() < 300  # Five standard deviations.


@hypothesis.given(st.binary(), st.floats(0, 0.5), st.floats(0, 0.4))
def test_a_larger_validation_share_only_adds_to_it(record_id, fraction, more):
    if split_of("train", record_id, fraction) == "validation":
        assert split_of("train", record_id, fraction + more) == "validation"


def test_only_train_is_divided():
    assert split_of("test", b"x", 0.99) == "test"
    for source_splits, fraction, expected in (
        (["train", "test"], 0.1, ["train", "validation", "test"]),
        (["train", "test"], 0, ["train", "test"]),
        ([UNSPLIT], 0.1, ["train", "validation", "test"]),
        (["test"], 0.1, ["test"]),
    ):
        sizes = placement.expected_sizes(dict.fromkeys(source_splits, 0), fraction)
        assert list(sizes) == expected


@pytest.mark.parametrize(("split", "share"), [("train", 0.8), ("validation", 0.1), ("test", 0.1)])
def test_a_set_without_splits_is_divided_80_10_10(split, share):
    counts = collections.Counter(
        placement.splits_of(UNSPLIT, [b"sample-%07d" % i for i in range(10_000)], 0.1).tolist()
    )
    assert counts[split] / 10_000 == pytest.approx(share, abs=0.01)
