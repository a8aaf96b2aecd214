"""The usual setting of published MNIST likelihoods: one stochastic layer of 50 latents.

Burda, Grosse and Salakhutdinov (2016), "Importance Weighted Autoencoders", table 1: pixels are
binarised anew at each visit; encoder and decoder have two hidden layers of 200 tanh units. They
reach -86.76 nats with k = 1 (the VAE) and -84.78 with k = 50, estimated with 5,000 samples an
image.

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
    """mnist.py with the paper's model and objective; takes `num_importance_samples=K`."""
    arguments = parse_arguments(arg, num_importance_samples=int)
    config = mnist.get_config("latent_dim=50,beta=1.0")
    config.architecture = "mlp"
    config.hidden_units = (200, 200)
    config.activation = "tanh"
    config.binarize = "dynamic"
    config.num_importance_samples = arguments.get("num_importance_samples", 1)
    # Half an hour on two CPU cores for either; the paper has 3,280 epochs in batches of 20.
    is_vae = config.num_importance_samples == 1
    config.batch_size, config.num_epochs = (128, 500) if is_vae else (32, 64)
    config.learning_rate_schedule = "cosine"  # In place of the paper's eight stages.
    config.steps_per_loop = 100
    config.checkpoint_every_steps = 5000
    return config
