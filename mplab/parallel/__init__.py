"""The strategies: every one of them trains as `Serial` does."""

from mplab.parallel.pipeline import PipelineParallel
from mplab.parallel.serial import Serial

__all__ = ["PipelineParallel", "Serial"]
