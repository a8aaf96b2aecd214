"""MNIST, 12 latents, convolutional VAE with a small beta.

    python -m pipeline.preprocess --source=idx:DIR --validation_fraction=0 --output_dir=/tmp/mnist
    python -m trainer.main --config=configs/mnist.py --config.data_dir=/tmp/mnist --workdir=/tmp/run

The other files here are small edits of this one.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The reference configuration; each key is explained on its line."""
    config = ml_collections.ConfigDict()

    # Data
    config.data_dir = ""  # output directory of preprocess; local path or URL
    config.batch_size = 256  # examples in a global batch, over all replicas together
    config.num_epochs = 40  # passes over the split `train`
    config.seed = 0  # of initial weights, order and noise

    # Model. The decoder mirrors the encoder: filters and strides in reverse order.
    config.latent_dim = 12  # size of z
    config.filters = (32, 64, 128)  # filters of each convolution of the encoder
    config.strides = (1, 2, 2)  # strides of the same; their product divides height and width
    config.kernel_size = 3  # height and width of every convolution
    config.activation = "leaky_relu"  # any name that keras.activations knows

    # Objective, in nats per image: reconstruction_loss + beta * kl
    # The articles' factor on a KL term averaged over latents, beside a mean over pixels:
    # 2 * fact * num_pixels / latent_dim, with fact = 6.5e-4.
    config.beta = 2 * 6.5e-4 * 28 * 28 / 12
    config.kl_route = "gradient_tape"  # how the KL term enters training
    config.learning_rate = 1e-3  # of Adam

    # Machine
    config.strategy = "mirrored"  # mirrored: all GPUs, else the CPU; one_device: the first of them
    config.num_virtual_devices = 0  # n ≥ 1: n replicas on the CPU, for tests; 0: real devices
    config.precision = "float32"  # float32 or mixed_bfloat16; weights and losses stay float32
    config.jit_compile = False  # compile each replica's forward and backward pass with XLA
    config.deterministic = False  # forbid operations whose result depends on timing

    # Loop
    config.steps_per_loop = 20  # steps on the device between two looks of the host
    config.checkpoint_every_steps = 500  # one is also saved after each epoch and on SIGTERM
    config.keep_checkpoints = 2  # newest checkpoints that stay
    return config.lock()
