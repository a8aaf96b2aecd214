"""MNIST with a latent space of 2 dimensions, which can be plotted directly.

python -m trainer.main --config=configs/mnist_z2.py --config.data_dir=DIR --workdir=DIR
"""

import ml_collections

from configs import mnist


def get_config() -> ml_collections.ConfigDict:
    """mnist.py with 2 latents; a derived beta is six times that of 12."""
    return mnist.get_config("latent_dim=2")
