"""The default model and its objective in PyTorch, channels last: what training is compared with.

    python -m tests.benchmarks.torch_process eager|compiled NUM_RECORDS

Trains an epoch for each line on standard input, and answers each with a line.
"""

import os
import sys
from collections.abc import Callable

import torch
from torch import nn

from configs import mnist

_BATCH_SIZE = 256


def _up(inputs: int, outputs: int, stride: int) -> nn.Module:
    about = {"stride": stride, "padding": 1, "output_padding": stride - 1}
    return nn.ConvTranspose2d(inputs, outputs, 3, **about)


class _Model(nn.Module):
    """From images to the mean loss of a batch."""

    def __init__(self, config):
        super().__init__()
        act = nn.LeakyReLU(0.2)
        self.beta = 0.0849  # as trainer/runs/config.py derives it for MNIST and 12 latents
        self.down = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, 1, 1), act, nn.Conv2d(32, 64, 3, 2, 1), act),
            *(nn.Conv2d(64, 128, 3, 2, 1), act, nn.Flatten()),
        )
        self.mean = nn.Linear(6272, config.latent_dim)
        self.log_var = nn.Linear(6272, config.latent_dim)
        self.up = nn.Sequential(
            *(nn.Linear(config.latent_dim, 6272), nn.Unflatten(1, (128, 7, 7))),
            *(_up(128, 64, 2), act, _up(64, 32, 2), act, _up(32, 1, 1)),
        )

    def forward(self, x):
        hidden = self.down(x)
        mean, log_var = self.mean(hidden), self.log_var(hidden)
        logits = self.up(mean + torch.exp(log_var / 2) * torch.randn_like(mean))
        negative_log = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        kl = 0.5 * (torch.exp(log_var) + mean**2 - 1 - log_var).sum()
        return (negative_log + self.beta * kl) / len(x)


def _prepare(num_records: int, *, compiled: bool) -> Callable[[], None]:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = _Model(mnist.get_config()).to(memory_format=torch.channels_last)
    loss_of = torch.compile(model) if compiled else model
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    pixels = torch.randint(0, 256, (num_records, 1, 28, 28), dtype=torch.uint8)

    def train() -> None:
        order = torch.randperm(num_records)
        for first in range(0, num_records, _BATCH_SIZE):
            x = pixels[order[first : first + _BATCH_SIZE]].float() / 255
            loss = loss_of(x.contiguous(memory_format=torch.channels_last))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return train


def main() -> None:
    """Answers each line by an epoch."""
    train = _prepare(int(sys.argv[2]), compiled=sys.argv[1] == "compiled")
    for _ in sys.stdin:
        train()
        print("done", flush=True)


if __name__ == "__main__":
    main()
