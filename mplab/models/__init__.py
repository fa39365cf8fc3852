"""Models to cut: a GPT and an MLP, with weights seeded from their parameters' names; and any model as a chain."""

from mplab.models.chain import layers
from mplab.models.gpt import GPT, GPTConfig
from mplab.models.layer import Layer, Stage, tied_names
from mplab.models.loss import cross_entropy
from mplab.models.mlp import MLP
from mplab.models.seed import seed_parameters, seeded

__all__ = [
    "GPT",
    "MLP",
    "GPTConfig",
    "Layer",
    "Stage",
    "cross_entropy",
    "layers",
    "seed_parameters",
    "seeded",
    "tied_names",
]
