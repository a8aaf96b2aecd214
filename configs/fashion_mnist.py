"""Fashion-MNIST, 16 latents.

python -m pipeline.preprocess --source=idx:DIR --name=fashion_mnist --output_dir=DIR
python -m trainer.main --config=configs/fashion_mnist.py --config.data_dir=DIR --workdir=DIR
"""

import ml_collections

from configs import mnist


def get_config() -> ml_collections.ConfigDict:
    """mnist.py with 16 latents; beta is derived for 16."""
    return mnist.get_config("latent_dim=16")
