"""Who runs."""

from mplab.world.rank import Rank as Rank
from mplab.world.world import World as World
