"""The setting in which likelihoods of MNIST are published: one stochastic layer of 50 latents.

Burda, Grosse and Salakhutdinov (2016), "Importance Weighted Autoencoders", table 1: pixels
binarised anew at each visit, two hidden layers of 200 tanh units on both sides. They reach
-86.76 nats with k = 1 (the VAE) and -84.78 with k = 50, estimated with 5,000 samples an image.

python -m pipeline.preprocess --source=idx:DIR --validation_fraction=0 --output_dir=/tmp/mnist
python -m trainer.main --config=configs/mnist_likelihood.py --config.data_dir=/tmp/mnist \
    --workdir=/tmp/vae
python -m trainer.main --config=configs/mnist_likelihood.py:num_importance_samples=50 \
    --config.data_dir=/tmp/mnist --workdir=/tmp/iwae
python -m trainer.main --config=configs/mnist_likelihood.py:num_importance_samples=50 \
    --config.warm_start_from=/tmp/vae/export --config.batch_size=64 --config.num_epochs=8 \
    --config.learning_rate=5e-4 --config.data_dir=/tmp/mnist --workdir=/tmp/iwae_from_vae
python -m trainer.evaluate --model_dir=/tmp/iwae/export --data_dir=/tmp/mnist --split=test \
    --num_importance_samples=5000
"""

import ml_collections

from configs import mnist, parse_arguments


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """mnist.py with their model and objective; `num_importance_samples=K` after the colon."""
    given = parse_arguments(arg, num_importance_samples=int)
    config = mnist.get_config("latent_dim=50,beta=1.0")
    config.architecture = "mlp"
    config.hidden_units = (200, 200)
    config.activation = "tanh"
    config.binarize = "dynamic"
    config.num_importance_samples = given.get("num_importance_samples", 1)
    # What two CPU cores do in half an hour each; they trained 3,280 epochs in batches of 20.
    alone = config.num_importance_samples == 1
    config.batch_size, config.num_epochs = (128, 500) if alone else (32, 64)
    config.learning_rate_schedule = "cosine"  # In place of their eight stages.
    config.steps_per_loop = 100
    config.checkpoint_every_steps = 5000
    return config
