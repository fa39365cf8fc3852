"""What happened: events, and the timeline that they make."""

from mplab.trace.event import LANES, Event, Lane
from mplab.trace.recorder import Recorder
from mplab.trace.timeline import RankSummary, Summary, Timeline

__all__ = ["LANES", "Event", "Lane", "RankSummary", "Recorder", "Summary", "Timeline"]
