import numpy as np
import pytest
import tensorflow as tf

from configs import mnist
from pipeline.cli.errors import UsageError
from pipeline.formats import tf_example
from tests.conftest import smoke_config
from trainer.model.networks import VAE
from trainer.runs import config as config_lib


def test_the_model_of_the_articles():
    vae = VAE(mnist.get_config(), (28, 28, 1))
    # Counted by hand: kernels 3×3, strides 1, 2, 2, then 2, 2, 1.
    convolutions = [1 * 32, 32 * 64, 64 * 128, 128 * 64, 64 * 32, 32 * 1]
    biases = [32, 64, 128, 64, 32, 1]
    dense = 2 * (6272 * 12 + 12) + 12 * 6272 + 6272
    assert (
        sum(np.prod(v.shape) for v in vae.variables) == 9 * sum(convolutions) + sum(biases) + dense
    )


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 16, 3), (4, 8, 2)])
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("architecture", ["convolutional", "mlp"])
def test_any_shape_that_the_strides_divide(shape, precision, architecture):
    config = smoke_config("unused", precision=precision, architecture=architecture)
    config_lib.check_image_shape(config, shape)
    pixels = np.random.default_rng(0).integers(0, 256, (5, *shape)).astype(np.uint8)
    vae = VAE(config, shape)
    mean, log_var = vae.encoder(tf_example.to_floats(pixels))
    logits = vae.decoder(mean)
    assert logits.shape == (5, *shape)
    assert mean.shape == log_var.shape == (5, 3)
    assert {t.dtype for t in (mean, log_var, logits)} == {tf.float32}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((27, 28, 1), "image height 27 is 27 before convolution 1, which its stride 2 does not"),
        ((28, 30, 1), "image width 30 is 15 before convolution 2"),
    ],
)
def test_strides_that_do_not_divide(shape, message):
    with pytest.raises(UsageError, match=message):
        config_lib.check_image_shape(smoke_config("unused"), shape)


def test_weights_are_a_function_of_the_seed_alone():
    def weights(seed):
        return [v.numpy() for v in VAE(smoke_config("unused", seed=seed), (8, 8, 1)).variables]

    first, again, other = weights(0), weights(0), weights(1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    kernels = [v for v in first if v.any()]
    assert len(kernels) == 7
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True) if a.any())
    assert len({v.tobytes()[:8] for v in kernels}) == len(kernels)  # No two layers alike.


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
def test_our_leaky_relu_is_that_of_keras(dtype):
    import keras

    from trainer.model import networks

    x = tf.cast(tf.linspace(-3.0, 3.0, 101), dtype)
    results = []
    for function in (networks._activation("leaky_relu"), keras.activations.leaky_relu):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        results.append((y.numpy(), tape.gradient(y, x).numpy()))
    np.testing.assert_array_equal(results[0], results[1])
