"""The check of the cheapest plan: what a step costs in device-seconds, among what fits the memory."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from types import FrameType
from typing import Any, NamedTuple

from mplab.errors import MplabError
from mplab.homework.limited import ENDS, OWN, ROUNDING, Attempt, TooManySteps, attempt, borrowed, error, is_written
from mplab.homework.report import Complaint, Report, check_all
from mplab.plan.cost import Link
from mplab.plan.layout import Plan
from mplab.plan.machines import Machine
from mplab.plan.search import Prediction, candidates, predict, search
from mplab.plan.transformer import Transformer
from mplab.trace.units import format_s

PlanSolution = Callable[[Transformer, Machine, int, Sequence[int]], Plan]
MAX_STEPS = 200_000  # a loop over all plans takes a tenth of it
NOTHING = "MplabError where nothing fits"


class _Setting(NamedTuple):
    """What a solution is called with."""

    model: Transformer
    machine: Machine
    batch: int
    counts: tuple[int, ...]

    def __str__(self) -> str:
        model, machine = self.model, self.machine
        return (
            f"{model.num_layers} block{'s' * (model.num_layers > 1)} of width {model.width}, {machine.name}, each "
            f"{machine.memory_bytes / 1e6:.3g} MB, batch={self.batch}, counts={self.counts}"
        )


@cache
def _predictions(setting: _Setting) -> dict[Plan, Prediction]:
    """Of all plans."""
    found = {}
    for num_ranks in setting.counts:
        machine = setting.machine.with_ranks(num_ranks)
        for plan in candidates(setting.model, machine, setting.batch):
            found[plan] = predict(plan, setting.model, setting.batch, machine)
    return found


def cost_s(prediction: Prediction) -> float:
    """Device-seconds of a step."""
    return prediction.plan.num_ranks * prediction.step_s


def _machine(name: str, memory_bytes: float, launch_s: float = 0.0, per_host: int = 8) -> Machine:
    fast, slow = Link(1e-5, 1e10), Link(1e-4, 1e9)
    return Machine(name, 8, 1e11, memory_bytes, 1e11, fast, slow, per_host, launch_s=launch_s)


def _random_settings() -> list[_Setting]:
    numbers = random.Random(5)
    found: list[_Setting] = []
    while len(found) < 4:
        model = Transformer(48, 16, numbers.randint(1, 3), numbers.choice([2, 4]), numbers.choice([32, 64]))
        machine = _machine("8 devices", numbers.uniform(4e5, 2e6), numbers.choice([0.0, 1e-5, 1e-4]))
        setting = _Setting(model, machine, numbers.choice([2, 4]), tuple(numbers.sample([1, 2, 3, 4], 2)))
        if any(prediction.fits for prediction in _predictions(setting).values()):
            found.append(setting)
    return found


SMALL, LARGER, LOW = Transformer(64, 32, 2, 2, 32), Transformer(64, 32, 2, 2, 64), Transformer(64, 32, 1, 2, 64)
# A line of the report: settings, and the hint where they fail.
SETTINGS: dict[str, tuple[Callable[[], Sequence[_Setting]], str]] = {
    "where all plans fit": (
        lambda: [
            _Setting(SMALL, _machine("8 devices", 9e8), 2, (4, 1, 2)),
            _Setting(LARGER, _machine("8 devices", 9e8), 2, (4, 2)),
        ],
        "twice the ranks are cheaper only where they more than halve the step: compare ranks x step_s over all counts",
    ),
    "where the fastest does not fit": (
        lambda: [
            _Setting(SMALL, _machine("8 devices", 6e5), 4, (2,)),
            _Setting(LARGER, _machine("8 devices", 1.35e6), 2, (4, 2)),
        ],
        "look at fits plan by plan: where the fastest of some ranks does not fit, another of as many may",
    ),
    "where more ranks are cheaper": (
        lambda: [_Setting(LARGER, _machine("8 devices with slow launches", 2.2e6, launch_s=1e-3), 4, (1, 2))],
        "few ranks have little memory left for activations, and so need many micro-batches, each with its launches",
    ),
    "where some counts have no plan": (
        lambda: [_Setting(SMALL, _machine("8 devices", 6e5), 2, (7, 2, 5))],
        "candidates gives nothing for them: go on with the others",
    ),
    "on several hosts": (
        lambda: [_Setting(LOW, _machine("4 hosts of 2 devices", 9e8, per_host=2), 4, (4,))],
        "machine.with_ranks(n) keeps the hosts, their links and the memory of a device",
    ),
    "anywhere": (_random_settings, "print ranks x step_s of every plan that fits, and sort"),
}
WITHOUT = (
    _Setting(SMALL, _machine("8 devices", 1e5), 2, (1, 2)),
    _Setting(SMALL, _machine("8 devices", 9e8), 2, (7, 5)),
)


def check_cheapest_plan(solution: PlanSolution) -> Report:
    """Check `solution(model, machine, batch, counts)`: the plan whose step costs the fewest device-seconds.

    It is called on small models and described machines: where all plans fit, where the fastest does not, where more
    ranks are cheaper than fewer, where some counts have no plan, and where nothing fits.

    Args:
        solution: called with a `Transformer`, a `Machine`, the number of samples of a step, and numbers of ranks, of
            which no more than the machine's devices are asked; returns a `Plan` of one of these numbers that fits the
            memory, or raises MplabError where there is none. Of several plans that cost the same, any passes.

    Returns:
        A report; nothing that the solution does is raised.

    **Reference**: as for `mplab.plan.search.search`.
    """
    tried: dict[str, list[_Try]] = {}
    for name, (make, hint) in {**SETTINGS, NOTHING: (lambda: WITHOUT, "")}.items():
        tried[name] = []
        for setting in make():
            if not any(isinstance(one.attempt.error, TooManySteps) for some in tried.values() for one in some):
                tried[name].append(_run(solution, setting, hint))
    without = tried.pop(NOTHING)
    able = [one for some in tried.values() for one in some]
    attempts = [one.attempt for one in [*able, *without]]
    if not is_written(attempts):
        return Report("cheapest_plan", (), is_written=False)
    done = [one for one in able if one.attempt.error is None]
    ends = check_all(ENDS, [*able, *without], _error)
    valid = check_all("a plan of one of the counts", done, _no_plan)
    fits = check_all("the plan fits the memory", done if valid.outcome == "passed" else [], _too_large)
    lines = [ends, check_all(OWN, attempts, borrowed), valid, fits]
    for name, some in tried.items():
        good = [one for one in some if one in done] if fits.outcome == "passed" else []
        lines.append(check_all(f"the plan is the cheapest {name}", good, _dearer))
    lines.append(check_all("no plan is predicted twice", done, _twice))
    lines.append(check_all(NOTHING, without if ends.outcome == "passed" else [], _something))
    return Report("cheapest_plan", tuple(lines))


@dataclass(frozen=True)
class _Try:
    """One call; `predicted` are the plans that it gave to `predict`, `hint` is for a wrong choice."""

    setting: _Setting
    hint: str
    attempt: Attempt
    predicted: list[Any] = field(default_factory=list)

    def __str__(self) -> str:
        return str(self.setting)

    @property
    def prediction(self) -> Prediction:
        """Of its plan."""
        plan, setting = self.attempt.result, self.setting
        return predict(plan, setting.model, setting.batch, setting.machine.with_ranks(plan.num_ranks))


def _run(solution: PlanSolution, setting: _Setting, hint: str) -> _Try:
    predicted: list[Any] = []
    call = partial(_noting, predicted, lambda: solution(*setting))
    return _Try(setting, hint, attempt(str(setting), call, MAX_STEPS, {search.__code__: "search"}), predicted)


def _noting(predicted: list[Any], call: Callable[[], object]) -> object:
    """What it returns, while the plans that are predicted are written down."""

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is predict.__code__:
            predicted.append(frame.f_locals["plan"])

    before = sys.getprofile()
    try:
        sys.setprofile(note)
        return call()
    finally:
        sys.setprofile(before)


# --- what can be wrong ------------------------------------------------------------------------------------------------


def _error(one: _Try) -> Complaint | None:
    if one.setting in WITHOUT and not isinstance(one.attempt.error, TooManySteps):
        return None  # an error is what is asked for, and which one is looked at last
    complaint = error("look for a loop that doesn't end; each plan has to be predicted once")(one.attempt)
    if complaint is not None and isinstance(one.attempt.error, MplabError | ValueError | IndexError):
        return complaint._replace(hint=one.hint)  # nothing was left to choose from
    return complaint


def _no_plan(one: _Try) -> Complaint | None:
    plan, counts = one.attempt.result, one.setting.counts
    expected = f"a Plan of {' or '.join(map(str, counts))} ranks"
    if not isinstance(plan, Plan):
        hint = "return the plan: prediction.plan" if isinstance(plan, Prediction) else "return one of candidates' plans"
        return Complaint(expected, f"an object of type {type(plan).__name__}", hint)
    if plan.num_ranks not in counts:
        return Complaint(expected, f"{plan.num_ranks} ranks: {plan}", "candidates(model, machine.with_ranks(n), batch)")
    try:
        _ = one.prediction
    except MplabError as problem:
        return Complaint(expected, str(problem), "return one of candidates' plans")
    return None


def _too_large(one: _Try) -> Complaint | None:
    prediction, limit = one.prediction, one.setting.machine.memory_bytes
    if prediction.fits:
        return None
    seen = f"{prediction.memory_bytes / 1e6:.3g} MB: {prediction.plan}"
    hint = "its prediction says so: look at fits before you compare costs"
    return Complaint(f"at most {limit / 1e6:.3g} MB on a rank", seen, hint)


def _dearer(one: _Try) -> Complaint | None:
    fitting = [prediction for prediction in _predictions(one.setting).values() if prediction.fits]
    best, prediction = min(fitting, key=cost_s), one.prediction
    if cost_s(prediction) <= cost_s(best) * (1 + ROUNDING):
        return None
    return Complaint(_priced(best), _priced(prediction), one.hint)


def _priced(prediction: Prediction) -> str:
    num_ranks, step_s = prediction.plan.num_ranks, prediction.step_s
    return f"{num_ranks} x {format_s(step_s)} = {format_s(cost_s(prediction))}: {prediction.plan}"


def _twice(one: _Try) -> Complaint | None:
    counts = Counter(map(str, one.predicted))
    if len(one.predicted) == len(counts):
        return None
    (plan, most), *_ = counts.most_common(1)
    hint = "keep the prediction: its plan, step_s and fits are all in it"
    seen = f"{len(one.predicted)} calls of predict, {most} of them for {plan}"
    return Complaint(f"at most {len(_predictions(one.setting))} calls, one a plan", seen, hint)


def _something(one: _Try) -> Complaint | None:
    if isinstance(one.attempt.error, MplabError):
        return None
    hint = "where no plan is left, raise MplabError with what the user can do about it"
    if one.attempt.error is None:
        seen = f"an object of type {type(one.attempt.result).__name__}"
    else:
        seen = f"{type(one.attempt.error).__name__}: {one.attempt.error}"
    return Complaint("MplabError", seen, hint)
