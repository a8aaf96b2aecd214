"""MNIST, 12 latents, convolutional VAE with a small beta.

    python -m pipeline.preprocess --source=idx:DIR --validation_fraction=0 --output_dir=/tmp/mnist
    python -m trainer.main --config=configs/mnist.py --config.data_dir=/tmp/mnist --workdir=/tmp/run

--config.KEY=VALUE sets a key, so a sweep is a loop over --config.latent_dim=$d. The same values may
stand after a colon: --config=configs/mnist.py:latent_dim=16,beta=0.5. The other files here are
small edits of this file.
"""

import ml_collections
from ml_collections import config_dict

from configs import parse_arguments


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The reference configuration; the comment on its line explains each key."""
    arguments = parse_arguments(arg, latent_dim=int, beta=float)
    config = ml_collections.ConfigDict()

    # Data
    config.data_dir = ""  # output directory of preprocess; local path or URL
    config.data_placement = "auto"  # device, memory_mapped (on the host), or auto (by size)
    config.batch_size = 256  # examples in a global batch, over all replicas together
    config.num_epochs = 40  # passes over the split `train`
    config.seed = 0  # of initial weights, order and noise

    # Model. The decoder mirrors the encoder: filters, strides and units in reverse order.
    config.architecture = "convolutional"  # or mlp, a multilayer perceptron
    config.latent_dim = arguments.get("latent_dim", 12)  # size of z
    config.filters = (32, 64, 128)  # convolutional: filters of each layer of the encoder
    config.strides = (1, 2, 2)  # strides of these layers; their product divides height and width
    config.kernel_size = 3  # height and width of every convolution
    config.hidden_units = (200, 200)  # mlp: units of each hidden layer of the encoder
    config.activation = "leaky_relu"  # name of an activation in keras.activations
    config.warm_start_from = ""  # published model directory with the initial weights, if any

    # Likelihood of an image given z
    config.likelihood = "bernoulli"  # bernoulli, continuous_bernoulli or gaussian
    config.gaussian_std = 0.1  # gaussian: standard deviation of a pixel, on the scale 0 to 1
    config.binarize = "none"  # or draw pixels 0 or 1: static (once), dynamic (at each visit)

    # Objective, in nats per image: reconstruction_loss + beta * kl
    # The articles add fact = 6.5e-4 times a KL term averaged over latents to a mean over pixels. In
    # nats per image this is beta = 2 * fact * num_pixels / latent_dim. The trainer sets a beta of
    # None to this value, as soon as it knows the data set's images.
    config.beta = config_dict.placeholder(float)  # weight of the KL term
    config.beta = arguments.get("beta")
    config.beta_warmup_steps = 0  # steps over which beta rises from 0
    config.free_bits = 0.0  # nats of each latent that the KL term does not penalise
    config.num_importance_samples = 1  # k; 2 or more: the importance-weighted bound (IWAE)
    # How the KL term enters training: gradient_tape, or with Keras' fit encoder_layer,
    # multi_output, model_add_loss or output_layer. All reach the same weights; see
    # trainer/steps/kl_routes.py.
    config.kl_route = "gradient_tape"

    # Optimizer: Adam
    config.learning_rate = 1e-3  # maximum of the schedule
    config.learning_rate_schedule = "constant"  # or cosine, to 0 at the last step
    config.learning_rate_warmup_steps = 0  # steps over which the rate rises from 0
    config.clip_norm = 0.0  # maximum global norm of the gradients; 0: no clipping

    # Machine
    config.strategy = "mirrored"  # all GPUs, else the CPU; one_device; multi_worker, by TF_CONFIG
    config.num_virtual_devices = 0  # n ≥ 1: n replicas on the CPU, for tests; 0: real devices
    config.precision = "float32"  # or mixed_bfloat16, mixed_float16; losses stay float32
    config.jit_compile = False  # compile a replica's passes and its update with XLA
    config.deterministic = False  # forbid operations whose results depend on timing

    # Loop
    config.early_stopping_patience = 0  # epochs without a better validation loss; 0: all epochs
    config.steps_per_loop = 20  # steps in one call of TensorFlow; fit ignores it
    config.checkpoint_every_steps = 500  # a checkpoint also follows each epoch and SIGTERM
    config.keep_checkpoints = 2  # newest checkpoints to keep, beside the best by validation loss
    config.profile_steps = ""  # steps to profile for TensorBoard: 100:110 are the ten from 100 on
    return config.lock()
