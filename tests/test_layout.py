"""A plan: what it is by default, what it refuses (all at once), and that nothing is lost on its way to a file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mplab
from mplab.errors import MplabError
from mplab.plan.layout import Plan, refuse
from mplab.plan.schedule import ORDERS

WHOLE = "must be a whole number, 1 or more"
NAMES = "dp, pp, tp, cuts, schedule, num_microbatches, zero, sequence_parallel, recompute"


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any that can be."""
    count = st.integers(1, 1024)
    pp, recompute = draw(st.integers(1, 8)), draw(st.booleans())
    return Plan(
        draw(count),
        pp,
        draw(count),
        cuts=draw(st.none() | st.lists(st.integers(-5, 500), max_size=9).map(tuple)) if pp > 1 else None,
        schedule=draw(st.sampled_from(list(ORDERS))),
        num_microbatches=draw(count),
        zero=draw(st.integers(0, 1 if pp > 1 or recompute else 3)),
        sequence_parallel=draw(st.booleans()),
        recompute=recompute,
    )


# --- what it is ------------------------------------------------------------------------------------------------------


def test_what_is_left_out_makes_it_plain_training() -> None:
    assert Plan() == Plan(1, 1, 1, None, "1f1b", 1, 0, False, False)
    assert Plan().num_ranks == Plan().num_stages == 1
    assert mplab.Plan is Plan


def test_it_is_frozen_and_can_be_a_key() -> None:
    plan = Plan(2, 2, cuts=(3,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.dp = 4  # type: ignore[misc]
    assert {plan: 1}[Plan(2, 2, cuts=(3,))] == 1
    assert plan != Plan(2, 2)


def test_the_degrees_come_in_the_order_of_the_mesh() -> None:
    plan = Plan(2, 3, 5)
    assert (plan.dp, plan.pp, plan.tp, plan.num_ranks) == (2, 3, 5, 30)


@pytest.mark.parametrize("schedule", ORDERS)
def test_interleaving_gives_each_of_several_ranks_two_stages(schedule: str) -> None:
    assert Plan(pp=3, tp=2, schedule=schedule).num_stages == (6 if schedule == "interleaved" else 3)
    assert Plan(dp=4, schedule=schedule).num_stages == 1


# --- what it refuses -------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"{name} of {value!r}": ({name: value}, f"{name}={value!r}: {WHOLE}")
        for name in ("dp", "pp", "tp", "num_microbatches")
        for value in (0, -1, 1.5, 2.0, "2", True, None)
    },
    "an unknown schedule": (
        {"schedule": "2f2b"},
        "schedule='2f2b': there are naive, gpipe, 1f1b, interleaved, zero_bubble",
    ),
    "a schedule that is no text": ({"schedule": ["1f1b"]}, "schedule=['1f1b']: there are naive, gpipe"),
    "no schedule": ({"schedule": None}, "schedule=None: there are naive, gpipe"),
    **{
        f"zero of {value!r}": ({"zero": value}, f"zero={value!r}: must be 0 (nothing sharded), 1, 2 or 3")
        for value in (-1, 4, 1.0, True, False, "1", None, [1])
    },
    "gradients sharded in a pipeline": ({"zero": 2, "pp": 2}, "zero=2 with pp=2: a pipeline's micro-batches would"),
    "weights sharded in a pipeline": ({"zero": 3, "pp": 4}, "zero=3 with pp=4: a pipeline's micro-batches would"),
    "gradients sharded, and recomputed": ({"zero": 2, "recompute": True}, "zero=2 with recompute=True: the backward"),
    "weights sharded, and recomputed": ({"zero": 3, "recompute": True}, "zero=3 with recompute=True: the backward"),
    **{
        f"{name} of {value!r}": ({name: value}, f"{name}={value!r}: must be True or False")
        for name in ("sequence_parallel", "recompute")
        for value in (1, 0, None, "yes")
    },
    **{
        f"cuts {value!r}": ({"pp": 2, "cuts": value}, f"cuts={value!r}: must be whole numbers, the first layer of")
        for value in ([1], 1, "1", (1.5,), ("1",), (True,), (None,), {"a": 1})
    },
    "cuts where nothing is cut": ({"cuts": (2,)}, "cuts=(2,) with pp=1: one rank has all layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_with_its_rule(name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(MplabError) as caught:
        Plan(**options)
    first, *faults = str(caught.value).split("\n")
    assert first == "this plan can't be:"
    assert [fault.startswith(f"  {message}") for fault in faults] == [True]
    read = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    if not isinstance(options.get("cuts"), list):  # which JSON has in place of a tuple
        with pytest.raises(MplabError, match="this plan can't be"):
            Plan.from_json(json.dumps(read))


def test_the_remedies_are_in_the_message() -> None:
    with pytest.raises(MplabError, match=r"take zero=1, or pp=1$"):
        Plan(zero=3, pp=2)
    with pytest.raises(MplabError, match=r"take zero=1$"):
        Plan(zero=3, recompute=True)


def test_all_faults_come_at_once() -> None:
    with pytest.raises(MplabError) as caught:
        Plan(0, 1.5, "2", [1], "2f2b", -1, 7, 1, None)  # type: ignore[arg-type]
    first, *faults = str(caught.value).split("\n")
    assert first == "this plan can't be:"
    assert [fault.split("=")[0].strip() for fault in faults] == [
        *("dp", "pp", "tp", "num_microbatches", "schedule", "zero", "sequence_parallel", "recompute", "cuts")
    ]
    with pytest.raises(MplabError) as caught:
        Plan(dp=0, pp=2, zero=3, recompute=True, schedule="x")
    assert len(str(caught.value).split("\n")) == 1 + 3
    with pytest.raises(MplabError) as caught:
        Plan(pp="2", zero=3)  # type: ignore[arg-type]
    assert str(caught.value) == f"this plan can't be:\n  pp='2': {WHOLE}"


@pytest.mark.parametrize("zero", [0, 1])
def test_what_may_go_together(zero: int) -> None:
    Plan(2, 2, 2, zero=zero, recompute=True, sequence_parallel=True, schedule="zero_bubble", cuts=(1,))
    Plan(2, 1, 2, zero=zero + 2, sequence_parallel=True, num_microbatches=3)
    Plan(pp=2, cuts=())  # whether cuts fit a model is for the model to say


def test_refuse_raises_nothing_where_there_is_nothing() -> None:
    refuse(iter([]), "all is well")
    with pytest.raises(MplabError) as caught:
        refuse(iter(["a", "b"]), "two things")
    assert str(caught.value) == "two things:\n  a\n  b"


# --- as text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (Plan(), "1 x 1 x 1 ranks (dp x pp x tp)"),
        (Plan(2, 1, 4, zero=3), "2 x 1 x 4 ranks (dp x pp x tp), ZeRO 3"),
        (Plan(pp=2), "1 x 2 x 1 ranks (dp x pp x tp), 1f1b, cut by parameters"),
        (Plan(pp=2, cuts=()), "1 x 2 x 1 ranks (dp x pp x tp), 1f1b, cut at []"),
        (
            Plan(2, 3, 2, (2, 4), "gpipe", 8, 1, True, True),
            "2 x 3 x 2 ranks (dp x pp x tp), gpipe, cut at [2, 4], 8 micro-batches, ZeRO 1, sequence parallel, "
            "recompute",
        ),
        (Plan(recompute=True, schedule="gpipe"), "1 x 1 x 1 ranks (dp x pp x tp), recompute"),
    ],
)
def test_it_prints_in_one_line_what_matters(plan: Plan, text: str) -> None:
    assert str(plan) == text


def test_json_has_the_degrees_and_what_differs_from_the_defaults() -> None:
    assert json.loads(Plan().to_json()) == {"dp": 1, "pp": 1, "tp": 1}
    plan = Plan(2, 2, cuts=(3,), zero=1)
    assert json.loads(plan.to_json()) == {"dp": 2, "pp": 2, "tp": 1, "cuts": [3], "zero": 1}
    assert "\n" not in plan.to_json()


@given(plans())
def test_json_and_back_is_the_same_plan(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert str(again) == str(plan)
    assert Plan.from_json(json.dumps(dataclasses.asdict(plan))) == plan  # all of it, as a person may write it


def test_a_person_may_leave_out_what_is_default() -> None:
    assert Plan.from_json("{}") == Plan()
    assert Plan.from_json(' {"tp": 2,\n "pp": 2, "cuts": [1]} ') == Plan(pp=2, tp=2, cuts=(1,))
    assert Plan.from_json('{"cuts": null}') == Plan()


NO_PLANS = {
    "": "a plan is a JSON object, and this is not JSON (Expecting value",
    "{'dp': 2}": "this is not JSON (Expecting property name",
    "dp=2": "this is not JSON",
    "[2, 1, 1]": f"a plan is no list: give a JSON object with some of {NAMES}",
    "2": "a plan is no int",
    "null": "a plan is no NoneType",
    '"dp"': "a plan is no str",
    '{"dp": 2, "ranks": 4, "DP": 1}': f"a plan has not ['DP', 'ranks']: give a JSON object with some of {NAMES}",
    '{"_faults": 1}': "a plan has not ['_faults']",
}


@pytest.mark.parametrize("text", NO_PLANS)
def test_what_is_no_plan_is_told(text: str) -> None:
    with pytest.raises(MplabError) as caught:
        Plan.from_json(text)
    assert NO_PLANS[text] in str(caught.value)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_keeps_it(tmp_path: Path) -> None:
    plan = Plan(2, 2, 2, (1,), "zero_bubble", 4, 1, True, True)
    for path in (tmp_path / "plan.json", str(tmp_path / "as text.json")):
        plan.save(path)
        assert Plan.load(path) == plan
        assert Path(path).read_text() == plan.to_json() + "\n"


def test_a_path_without_a_plan_is_told(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json", str(tmp_path / "none.json")):
        with pytest.raises(MplabError) as caught:
            Plan.load(path)
        assert str(caught.value) == f"{path} is no file: give the path of a plan, as Plan.save writes it"
    for name, raw in (("empty", b""), ("picture", b"\x89PNG\r\n\xff\xfe\x00"), ("text", b'{"dp": "\xff"}')):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(MplabError, match="a plan is a JSON object, and this is not JSON"):
            Plan.load(tmp_path / name)
    (tmp_path / "faults").write_text('{"dp": 0, "tp": 0}')
    with pytest.raises(MplabError, match=r"dp=0: must be .*\n  tp=0: must be"):
        Plan.load(tmp_path / "faults")
