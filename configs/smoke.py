"""A tiny run of a few seconds that uses every part of the trainer; the tests train it.

python -m trainer.main --config=configs/smoke.py --config.data_dir=DIR --workdir=DIR
"""

import ml_collections

from configs import mnist


def get_config() -> ml_collections.ConfigDict:
    """mnist.py with a tiny model and two epochs."""
    config = mnist.get_config()
    config.filters = (4, 8)
    config.strides = (2, 2)
    config.hidden_units = (16, 8)
    config.latent_dim = 3
    config.beta = 2 * 6.5e-4 * 28 * 28 / 12  # Not derived: ids of earlier versions' runs stay.
    config.batch_size = 32
    config.num_epochs = 2
    config.steps_per_loop = 4
    config.checkpoint_every_steps = 5
    return config
