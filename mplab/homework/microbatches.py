"""The check of the best number of micro-batches: more are not always better."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

from mplab.homework.limited import ENDS, ROUNDING, Attempt, TooManySteps, attempt, error, is_written
from mplab.homework.report import Complaint, Report, check_all
from mplab.plan.cost import Link
from mplab.plan.layer_cost import LayerCost
from mplab.plan.schedule import build
from mplab.plan.search import divisors
from mplab.plan.simulate import simulate

MicrobatchSolution = Callable[[int, int, float, float, Link, int], int]
MAX_STEPS = 200_000


class _Setting(NamedTuple):
    """What a solution is called with."""

    num_ranks: int
    batch_size: int
    forward_s: float
    launch_s: float
    link: Link
    num_bytes: int

    def __str__(self) -> str:
        return (
            f"num_ranks={self.num_ranks}, batch_size={self.batch_size}, forward_s_per_sample={self.forward_s:.3g}, "
            f"launch_s={self.launch_s:.3g}, link={self.link!r}, bytes_per_sample={self.num_bytes}"
        )


@cache
def _step_s(setting: _Setting, num_microbatches: int) -> float:
    """Seconds of the simulated GPipe step."""
    num_samples = setting.batch_size // num_microbatches
    forward_s = num_samples * setting.forward_s
    stage = LayerCost("stage", forward_s, 2 * forward_s, output_bytes=num_samples * setting.num_bytes)
    schedule = build("gpipe", setting.num_ranks, num_microbatches)
    return simulate(schedule, [stage] * setting.num_ranks, setting.link, launch_s=setting.launch_s).makespan_s


def _random_settings() -> list[_Setting]:
    numbers = random.Random(4)

    def between(low: float, high: float) -> float:
        return math.exp(numbers.uniform(math.log(low), math.log(high)))

    return [
        _Setting(
            numbers.randint(2, 5),
            numbers.choice([12, 18, 20, 30, 36]),
            between(1e-5, 1e-3),
            between(1e-5, 3e-3),
            Link(between(1e-5, 1e-2), between(1e7, 1e10)),
            numbers.randint(1_000, 100_000),
        )
        for _ in range(12)
    ]


FREE = Link(0.0, math.inf)
# A line of the report: settings, and the hint where they fail. In each of them but the last no two m are equally fast.
SETTINGS: dict[str, tuple[Sequence[_Setting], str]] = {
    "where messages and launches are free": (
        [_Setting(4, 12, 1e-3, 0.0, FREE, 0), _Setting(2, 35, 1e-3, 0.0, FREE, 0)],
        "the bubble is (p - 1)/(m + p - 1) of the step; any divisor of the batch is allowed, not only 1, 2, 4, ...",
    ),
    "where launches cost": (
        [
            _Setting(4, 48, 1e-4, 3e-4, FREE, 0),
            _Setting(4, 30, 2e-5, 5e-3, FREE, 0),
            _Setting(3, 24, 1e-3, 1e-4, FREE, 0),
        ],
        "each forward and each backward has a launch: m of both on every rank; a backward takes two forwards",
    ),
    "on a slow link": (
        [
            _Setting(3, 60, 1e-3, 2e-4, Link(1e-5, 1e8), 100_000),
            _Setting(4, 48, 1e-4, 2e-4, Link(1e-5, 1e8), 50_000),
        ],
        "a message of B bytes takes latency + B/bandwidth, while its sender computes the next micro-batch: per "
        "micro-batch, the slower of the two counts",
    ),
    "on a link of high latency": (
        [
            _Setting(2, 24, 1e-4, 0.0, Link(5e-3, 1e10), 1_000),
            _Setting(4, 36, 1e-3, 0.0, Link(5e-3, 1e10), 1_000),
            _Setting(4, 32, 1e-4, 0.0, Link(5e-3, 1e10), 10_000),
        ],
        "every message has the latency, and a rank receives one at a time: m of them take m latencies",
    ),
    "on one rank": (
        [_Setting(1, 16, 1e-3, 1e-4, Link(1e-3, 1e6), 1_000_000), _Setting(1, 9, 1e-3, 0.0, FREE, 0)],
        "one rank has no bubble and sends no message: nothing speaks for more than one micro-batch",
    ),
    "anywhere": (_random_settings(), "print the time of a step for every divisor of the batch, yours and simulate's"),
}


def check_fastest_num_microbatches(solution: MicrobatchSolution) -> Report:
    """Check `solution(num_ranks, batch_size, forward_s_per_sample, launch_s, link, bytes_per_sample)`.

    It returns the number of micro-batches m, a divisor of the batch size, whose GPipe step is the shortest: by a
    formula, or by `simulate` with each m. A stage's forward takes forward_s_per_sample seconds for each sample of the
    micro-batch, its backward twice that, each of them launch_s more; a stage hands on bytes_per_sample bytes for each
    sample. Where several m are equally fast, any of them passes.

    Args:
        solution: called with six arguments in this order: int, int, float, float, `Link`, int.

    Returns:
        A report; nothing that the solution does is raised.
    """
    tried: dict[str, list[_Try]] = {name: [] for name in SETTINGS}
    for name, (settings, _) in SETTINGS.items():
        for setting in settings:
            if not any(isinstance(one.attempt.error, TooManySteps) for some in tried.values() for one in some):
                tried[name].append(_run(solution, setting))
    everything = [one for some in tried.values() for one in some]
    attempts = [one.attempt for one in everything]
    if not is_written(attempts):
        return Report("fastest_num_microbatches", (), is_written=False)
    done = [one for one in everything if one.attempt.error is None]
    valid = check_all("m divides the batch", done, _no_divisor)
    lines = [check_all(ENDS, attempts, error("look for a loop that doesn't end; a batch has few divisors")), valid]
    for name, (_, hint) in SETTINGS.items():
        able = [one for one in tried[name] if one in done] if valid.outcome == "passed" else []
        lines.append(check_all(f"m is the fastest {name}", able, partial(_slower, hint)))
    return Report("fastest_num_microbatches", tuple(lines))


@dataclass(frozen=True)
class _Try:
    setting: _Setting
    attempt: Attempt

    def __str__(self) -> str:
        return str(self.setting)

    @property
    def num_microbatches(self) -> Any:
        return self.attempt.result


def _run(solution: MicrobatchSolution, setting: _Setting) -> _Try:
    return _Try(setting, attempt(str(setting), lambda: solution(*setting), MAX_STEPS))


def _no_divisor(one: _Try) -> Complaint | None:
    m, numbers = one.num_microbatches, divisors(one.setting.batch_size)
    if isinstance(m, int) and not isinstance(m, bool) and m in numbers:
        return None
    hint = "micro-batches are equally large: return a whole number that divides the batch"
    return Complaint(f"one of {', '.join(map(str, numbers))}", repr(m), hint)


def _slower(hint: str, one: _Try) -> Complaint | None:
    times = {m: _step_s(one.setting, m) for m in divisors(one.setting.batch_size)}
    best, m = min(times, key=times.__getitem__), one.num_microbatches
    if times[m] <= times[best] * (1 + ROUNDING):
        return None
    return Complaint(f"{best}, with a step of {1e3 * times[best]:.4g} ms", f"{m}, with {1e3 * times[m]:.4g} ms", hint)
