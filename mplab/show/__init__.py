"""Figures and widgets of the labs."""

from mplab.show.buckets import BucketExplorer as BucketExplorer
from mplab.show.figures import all_reduce_times as all_reduce_times
from mplab.show.figures import format_bytes as format_bytes
from mplab.show.figures import link_fits as link_fits
from mplab.show.hops import Hops as Hops
from mplab.show.split import SplitExplorer as SplitExplorer
from mplab.show.tensor import TensorExplorer as TensorExplorer
from mplab.show.tensor_figure import tensor_times_figure as tensor_times_figure
from mplab.show.tensor_step import measure_block_speeds as measure_block_speeds
from mplab.show.timing import Timing as Timing
from mplab.show.timing import time_all_reduce as time_all_reduce
from mplab.show.widgets import CollectiveExplorer as CollectiveExplorer
from mplab.show.zero import zero_memory_figure as zero_memory_figure
from mplab.show.zero import zero_memory_table as zero_memory_table
