"""The strategies: every one of them trains as `Serial` does. What their steps should take, and took."""

from mplab.parallel.data import DataParallel
from mplab.parallel.naive_data import naive_data_parallel, parameter_server, scatter_gather
from mplab.parallel.pipeline import PipelineParallel
from mplab.parallel.predict import Predictor
from mplab.parallel.profile import profile_layers
from mplab.parallel.serial import Serial
from mplab.parallel.sharded import ShardedDataParallel

__all__ = [
    "DataParallel",
    "PipelineParallel",
    "Predictor",
    "Serial",
    "ShardedDataParallel",
    "naive_data_parallel",
    "parameter_server",
    "profile_layers",
    "scatter_gather",
]
