"""The strategies: every one of them trains as `Serial` does. What their steps should take, and took."""

from mplab.parallel.pipeline import PipelineParallel
from mplab.parallel.predict import Predictor
from mplab.parallel.profile import profile_layers
from mplab.parallel.serial import Serial

__all__ = ["PipelineParallel", "Predictor", "Serial", "profile_layers"]
