"""Machines and a model by their sizes alone, and the same model built: what the planner's tests plan for."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from mplab.models import GPT, GPTConfig
from mplab.plan.cost import Link
from mplab.plan.machines import MACHINES, Machine
from mplab.plan.transformer import Transformer

FAST, SLOW = Link(1e-6, 1e10), Link(1e-5, 1e9)
ONE = Machine("one", 1, 1e9, 1e9, 1e9, FAST)
FOUR = Machine("four", 4, 1e9, 1e9, 1e9, FAST)
HOSTS = Machine("hosts", 16, 1e9, 1e9, 1e9, FAST, SLOW, 4)
SMALL = Transformer(16, 8, 4, 4, 16)
CLUSTER = MACHINES["64 x 8 H100"]
LAUNCHES = {"launch_s": 1e-4, "call_s": 2e-4, "update_launch_s": 3e-5}


def gpt(tied: bool = True) -> tuple[GPT, Transformer]:
    config = GPTConfig(16, 8, 4, 4, 16, tied)
    return GPT(config), Transformer(**asdict(config))


def numbers(num_samples: int) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(16, (2, num_samples, 8), generator=torch.Generator().manual_seed(0))
    return drawn[0], drawn[1]
