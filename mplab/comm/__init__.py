"""How ranks talk."""

from mplab.comm.calls import Call as Call
from mplab.comm.communicator import Communicator as Communicator
from mplab.comm.communicator import Handle as Handle
from mplab.comm.ledger import Ledger as Ledger
from mplab.comm.ledger import Message as Message
from mplab.comm.mesh import Mesh as Mesh
from mplab.comm.mesh import MeshCommunicator as MeshCommunicator
