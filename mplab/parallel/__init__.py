"""The strategies: every one of them trains as `Serial` does. What their steps should take, and took."""

from mplab.parallel.data import DataParallel
from mplab.parallel.hybrid import HybridParallel
from mplab.parallel.measure_plans import measure_plans
from mplab.parallel.naive_data import naive_data_parallel, parameter_server, scatter_gather
from mplab.parallel.parallelize import Parallelized, parallelize
from mplab.parallel.pipeline import PipelineParallel
from mplab.parallel.predict import Predictor
from mplab.parallel.profile import profile_layers
from mplab.parallel.serial import Serial
from mplab.parallel.sharded import ShardedDataParallel
from mplab.parallel.tensor import TensorParallel
from mplab.parallel.tensor_layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from mplab.parallel.tensor_model import tensor_parallel
from mplab.parallel.tensor_plan import tensor_plan
from mplab.parallel.vocab import vocab_parallel_cross_entropy

__all__ = [
    "ColumnParallelLinear",
    "DataParallel",
    "HybridParallel",
    "Parallelized",
    "PipelineParallel",
    "Predictor",
    "RowParallelLinear",
    "Serial",
    "ShardedDataParallel",
    "TensorParallel",
    "VocabParallelEmbedding",
    "measure_plans",
    "naive_data_parallel",
    "parallelize",
    "parameter_server",
    "profile_layers",
    "scatter_gather",
    "tensor_parallel",
    "tensor_plan",
    "vocab_parallel_cross_entropy",
]
