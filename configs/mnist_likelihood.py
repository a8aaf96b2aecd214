"""The usual setting of published MNIST likelihoods: one stochastic layer of 50 latents.

Burda, Grosse and Salakhutdinov (2016), "Importance Weighted Autoencoders", table 1: pixels are
binarised anew at each visit; encoder and decoder have two hidden layers of 200 tanh units. They
reach -86.76 nats with k = 1 (the VAE) and -84.78 with k = 50, estimated with 5,000 samples an
image.

python -m pipeline.preprocess --source=idx:DIR --validation_fraction=0 --output_dir=/tmp/mnist
python -m trainer.main --config=configs/mnist_likelihood.py --config.data_dir=/tmp/mnist \
    --workdir=/tmp/vae
python -m trainer.main --config=configs/mnist_likelihood.py:num_importance_samples=5 \
    --config.warm_start_from=/tmp/vae/export --config.data_dir=/tmp/mnist --workdir=/tmp/iwae5
python -m trainer.main --config=configs/mnist_likelihood.py:num_importance_samples=50 \
    --config.warm_start_from=/tmp/iwae5/export --config.data_dir=/tmp/mnist --workdir=/tmp/iwae50
python -m trainer.evaluate --model_dir=/tmp/vae/export --data_dir=/tmp/mnist --split=test \
    --num_importance_samples=5000

docs/benchmarks.md has the results.
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
    config.batch_size, config.num_epochs, config.learning_rate = 100, 100, 1e-3
    if config.num_importance_samples == 1:
        config.num_epochs, config.learning_rate = 1700, 2e-3
        config.beta_warmup_steps = 90_000  # 150 epochs; without them more latents stay unused.
    config.learning_rate_schedule = "cosine"  # In place of the paper's eight stages.
    config.steps_per_loop = 100
    config.checkpoint_every_steps = 5000
    return config
