import hypothesis
import hypothesis.strategies as st
import numpy as np
import tensorflow as tf

from trainer.data import batches


def test_orders_stay_what_they_were():
    # Golden integers: a change here changes the path of every run.
    assert batches.permutation(0, 0, 10).tolist() == [1, 4, 7, 2, 8, 5, 6, 9, 0, 3]
    assert batches.permutation(0, 1, 10).tolist() == [7, 0, 5, 8, 1, 4, 6, 2, 3, 9]
    assert batches.permutation(1, 0, 10).tolist() == [6, 3, 0, 7, 9, 2, 4, 5, 8, 1]
    assert batches.noise_key(0, "train noise") == 983929929


@hypothesis.given(st.integers(0, 2**40), st.integers(0, 10**6), st.integers(1, 300))
def test_an_order_is_a_permutation(seed, epoch, num_examples):
    order = batches.permutation(seed, epoch, num_examples)
    assert sorted(order) == list(range(num_examples))


def test_the_next_epoch_of_one_seed_is_not_an_epoch_of_the_next_seed():
    orders = {tuple(batches.permutation(s, e, 50)) for s in range(5) for e in range(5)}
    assert len(orders) == 25


@hypothesis.given(st.integers(1, 40), st.integers(1, 15), st.integers(1, 9))
def test_replicas_together_see_each_record_of_the_epoch_once(
    num_examples, batch_size, num_replicas
):
    order = tf.constant(batches.permutation(0, 0, num_examples))
    seen = []
    for batch in range(batches.steps_per_epoch(num_examples, batch_size)):
        weight = 0.0
        for replica in range(num_replicas):
            places = batches.replica_places(replica, num_replicas, batch_size)
            rows, weights, total = batches.slice_of_batch(
                order, num_examples, batch, places, batch_size=batch_size
            )
            present = weights.numpy() == 1
            seen += rows.numpy()[present].tolist()
            weight += weights.numpy().sum()
        assert weight == total
    assert seen == order.numpy().tolist()  # In the order of the epoch, not sorted.


@hypothesis.given(st.integers(1, 15), st.integers(1, 9), st.integers(0, 2**31 - 1))
def test_noise_belongs_to_the_place_and_not_to_the_replica(batch_size, num_replicas, step):
    def draw_noise(replicas):
        parts = []
        for replica in range(replicas):
            places = batches.replica_places(replica, replicas, batch_size)
            parts.append(
                batches.noise(7, tf.constant(step), places, batch_size=batch_size, shape=(3,))
            )
        return np.concatenate(parts)[:batch_size]

    np.testing.assert_array_equal(draw_noise(1), draw_noise(num_replicas))
    other = batches.noise(7, step ^ 1, tf.range(batch_size), batch_size=batch_size, shape=(3,))
    assert not np.array_equal(draw_noise(1), other)


def test_binarising_once_keeps_the_mean_and_depends_on_seed_and_place_alone():
    images = np.repeat(np.arange(256, dtype=np.uint8), 4000).reshape(-1, 256, 1, 1).copy()
    images = np.ascontiguousarray(images.reshape(256, 4000).T)[..., None, None]  # (4000, 256, 1, 1)
    binary, first_images, other_seed = images.copy(), images.copy(), images.copy()
    batches.binarize_once(binary, seed=0, split="train")
    batches.binarize_once(first_images[:7], seed=0, split="train")
    batches.binarize_once(other_seed, seed=1, split="train")
    assert set(np.unique(binary)) == {0, 255}
    np.testing.assert_array_equal(binary[:7], first_images[:7])
    assert (binary != other_seed).mean() > 0.2
    assert not binary[:, 0].any()
    assert binary[:, 255].all()
    # Five standard deviations of a mean over 4,000.
    np.testing.assert_allclose((binary / 255).mean(0)[:, 0, 0], np.arange(256) / 255, atol=0.04)


def test_binarising_at_each_visit():
    images = tf.reshape(tf.range(256, dtype=tf.float32) / 255, (1, 256, 1, 1))
    images = tf.repeat(images, 3000, axis=0)

    def binarize(number, places):
        return batches.binarize(images[: len(places)], 5, number, places, batch_size=3000).numpy()

    batch = binarize(0, tf.range(3000))
    assert set(np.unique(batch)) == {0, 1}
    np.testing.assert_allclose(batch.mean(0)[:, 0, 0], np.arange(256) / 255, atol=0.05)
    np.testing.assert_array_equal(binarize(0, tf.range(1000, 2000)), batch[1000:2000])
    assert (binarize(1, tf.range(3000)) != batch).mean() > 0.2
