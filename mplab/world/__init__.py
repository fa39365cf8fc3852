"""Who runs."""

from mplab.world.probe import Probe as Probe
from mplab.world.probe import probe as probe
from mplab.world.rank import Rank as Rank
from mplab.world.world import World as World
