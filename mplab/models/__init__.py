"""Models to cut: a GPT and an MLP, with weights seeded from their parameters' names."""

from mplab.models.gpt import GPT, GPTConfig
from mplab.models.loss import cross_entropy
from mplab.models.mlp import MLP
from mplab.models.seed import seed_parameters, seeded

__all__ = ["GPT", "MLP", "GPTConfig", "cross_entropy", "seed_parameters", "seeded"]
