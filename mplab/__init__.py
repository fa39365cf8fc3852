"""mplab: how large language models are trained and served on more than one device, as code to read, run and measure."""

from mplab.comm.mesh import Mesh as Mesh
from mplab.errors import CollectiveMismatch as CollectiveMismatch
from mplab.errors import CommTimeout as CommTimeout
from mplab.errors import Deadlock as Deadlock
from mplab.errors import MplabError as MplabError
from mplab.errors import PeerFailure as PeerFailure
from mplab.plan.cost import Link as Link
from mplab.plan.layout import Plan as Plan
from mplab.trace.event import Event as Event
from mplab.trace.timeline import Timeline as Timeline
from mplab.world.probe import Probe as Probe
from mplab.world.probe import probe as probe
from mplab.world.rank import Rank as Rank
from mplab.world.world import World as World

__version__ = "0.1.0"
