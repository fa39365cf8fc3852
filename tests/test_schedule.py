"""Orders against their tables, formulas and everything that can be tried; bad schedules against their messages."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import partial
from itertools import permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_search import shortest

from mplab.errors import MplabError
from mplab.plan import orders as module
from mplab.plan.schedule import KINDS, ORDERS, Action, Order, Schedule, build, interleaved

SIZES = [(p, m) for p in range(1, 6) for m in range(1, 10)]
RANKS, COUNTS = st.integers(1, 5), st.integers(1, 9)


def a(text: str) -> tuple[Action, ...]:
    """ "0F0 0B0" -> actions."""
    return tuple(Action.parse(word) for word in text.split())


def orders() -> Iterator[tuple[str, Order]]:
    for name, order in ORDERS.items():
        if name != "interleaved":
            yield name, order
    for num_chunks in (1, 2, 3):
        yield f"interleaved, v = {num_chunks}", partial(interleaved, num_chunks=num_chunks)


every_order = pytest.mark.parametrize("order", [pytest.param(order, id=name) for name, order in orders()])


# --- the five orders ------------------------------------------------------------------------------------------------

TABLES = {
    ("naive", 3, 3): """
    rank 0 | F0                   B0=== F1                   B1=== F2                   B2===
    rank 1 |    F0          B0===          F1          B1===          F2          B2===
    rank 2 |       F0 B0===                   F1 B1===                   F2 B2===
    """,
    ("gpipe", 3, 4): """
    rank 0 | F0 F1 F2 F3                   B0=== B1=== B2=== B3===
    rank 1 |    F0 F1 F2 F3          B0=== B1=== B2=== B3===
    rank 2 |       F0 F1 F2 F3 B0=== B1=== B2=== B3===
    """,
    ("1f1b", 3, 4): """
    rank 0 | F0 F1 F2             B0=== F3 B1===    B2===    B3===
    rank 1 |    F0 F1       B0=== F2 B1=== F3 B2===    B3===
    rank 2 |       F0 B0=== F1 B1=== F2 B2=== F3 B3===
    """,
    ("interleaved", 2, 4): """
    rank 0 | 0F0 0F1 2F0 2F1 0F2     2B0==== 0F3 2B1==== 2F2 0B0==== 2F3 0B1====     2B2====     2B3==== 0B2==== 0B3====
    rank 1 |     1F0 1F1 3F0 3B0==== 3F1 3B1==== 1F2 1B0==== 1F3 1B1==== 3F2 3B2==== 3F3 3B3==== 1B2==== 1B3====
    """,
    ("zero_bubble", 3, 4): """
    rank 0 | F0 F1 F2       B0=== F3 B1=== B2=== B3===
    rank 1 |    F0 F1    I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
    rank 2 |       F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3
    """,
}  # fmt: skip


@pytest.mark.parametrize(("name", "num_ranks", "num_microbatches"), TABLES)
def test_a_table_is_what_is_drawn(name: str, num_ranks: int, num_microbatches: int) -> None:
    table = inspect.cleandoc(TABLES[name, num_ranks, num_microbatches])
    assert build(name, num_ranks, num_microbatches).draw() == table


def test_every_table_above_a_generator_is_what_is_drawn() -> None:
    found = re.findall(r"^# (\w+), p = (\d), .*?m = (\d)\n#\n((?:#   rank .*\n)+)", inspect.getsource(module), re.M)
    assert {(name, int(p), int(m)) for name, p, m, _ in found} == set(TABLES)
    for name, p, m, table in found:
        assert build(name, int(p), int(m)).draw() == table.replace("#   ", "").rstrip()


@every_order
def test_every_order_can_run(order: Order) -> None:
    for p, m in SIZES:
        schedule = build(order, p, m)
        assert (schedule.num_ranks, schedule.num_microbatches) == (p, m)
        assert len(schedule.rank_of) == schedule.num_stages
        assert all(schedule.rank_of[stage] == stage % p for stage in range(schedule.num_stages))


@given(RANKS, COUNTS)
def test_naive_is_busy_for_one_part_in_p(p: int, m: int) -> None:
    schedule = build("naive", p, m)
    assert schedule.bubble(Fraction(1), Fraction(2)) == (Fraction(p - 1, p),) * p
    assert schedule.in_flight() == (1,) * p


@given(RANKS, COUNTS, st.fractions(0.1, 10), st.fractions(0.1, 10))
def test_the_bubble_of_gpipe_and_1f1b(p: int, m: int, forward: Fraction, backward: Fraction) -> None:
    for name, in_flight in (("gpipe", [m] * p), ("1f1b", [min(p - rank, m) for rank in range(p)])):
        schedule = build(name, p, m)
        assert schedule.makespan(forward, backward) == (m + p - 1) * (forward + backward)
        assert schedule.bubble(forward, backward) == (Fraction(p - 1, m + p - 1),) * p
        assert schedule.in_flight() == tuple(in_flight)


@given(RANKS, st.integers(1, 4), st.integers(1, 3))
def test_interleaving_divides_the_bubble_where_p_divides_m(p: int, rounds: int, v: int) -> None:
    m = rounds * p
    schedule = build(partial(interleaved, num_chunks=v), p, m)
    assert schedule.makespan() == 3 * (m * v + p - 1)
    assert schedule.bubble(Fraction(1), Fraction(2)) == (Fraction(p - 1, m * v + p - 1),) * p
    assert schedule.in_flight() == tuple(min(m * v, 2 * (p - 1 - rank) + (v - 1) * p + 1) for rank in range(p))


@given(RANKS, COUNTS, st.integers(1, 3))
def test_interleaving_is_never_slower_than_1f1b_with_the_same_layers(p: int, m: int, v: int) -> None:
    # A stage of 1f1b is v stages here.
    assert build(partial(interleaved, num_chunks=v), p, m).makespan() <= v * build("1f1b", p, m).makespan()


@given(RANKS, COUNTS)
def test_zero_bubble(p: int, m: int) -> None:
    schedule = build("zero_bubble", p, m)
    # Either the last rank is never idle once it has begun, or there are too few micro-batches to fill the way back.
    assert schedule.makespan() == max(3 * m + p - 1, 2 * m + 2 * p - 1)
    assert schedule.in_flight() == (min(p, m),) * p
    if m >= p:
        assert schedule.bubble(Fraction(1), Fraction(2)) == (Fraction(p - 1, 3 * m + p - 1),) * p


# --- the shortest there is ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 3), (2, 1), (2, 2), (2, 3), (2, 4), (3, 1), (3, 2), (3, 3), (4, 2)])
def test_nothing_is_shorter_than_gpipe_and_1f1b_while_the_backward_is_whole(size: tuple[int, int]) -> None:
    assert build("gpipe", *size).makespan() == build("1f1b", *size).makespan() == shortest(*size)


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("size", [(2, 2), (2, 3), (3, 2), (3, 3), (4, 2)])
def test_1f1b_and_zero_bubble_hold_no_more_than_their_length_needs(size: tuple[int, int], is_split: bool) -> None:
    schedule = build("zero_bubble" if is_split else "1f1b", *size)
    limits = schedule.in_flight()
    assert shortest(*size, is_split=is_split, limits=limits) == schedule.makespan()
    for rank in range(size[0]):
        less = [limit - (r == rank) for r, limit in enumerate(limits)]
        best = shortest(*size, is_split=is_split, limits=less)
        assert best is None or best > schedule.makespan()


@pytest.mark.parametrize("size", [(1, 2), (2, 1), (2, 2), (2, 3), (2, 4), (3, 1), (3, 2), (3, 3), (4, 2)])
def test_nothing_is_shorter_than_zero_bubble(size: tuple[int, int]) -> None:
    assert build("zero_bubble", *size).makespan() == shortest(*size, is_split=True)


@pytest.mark.parametrize(
    ("p", "m", "v", "longer"),
    # Where p does not divide m it is not the shortest, nor is it always the frugalest.
    [(2, 2, 2, 0), (2, 4, 2, 0), (2, 2, 3, 0), (3, 3, 2, 0), (2, 1, 2, 0), (3, 2, 2, 0), (2, 3, 2, 2), (2, 3, 3, 4)],
)
def test_how_much_longer_than_the_shortest_interleaving_is(p: int, m: int, v: int, longer: int) -> None:
    schedule = build(partial(interleaved, num_chunks=v), p, m)
    assert schedule.makespan() - shortest(p, m, v) == longer
    assert schedule.makespan() - shortest(p, m, v, limits=schedule.in_flight()) == longer


@pytest.mark.parametrize(
    ("m", "kinds", "limits"),
    [(2, "FB", None), (3, "FB", None), (3, "FB", (2, 1)), (2, "FIW", None), (2, "FIW", (2, 1))],
)
def test_the_search_finds_the_shortest_of_all_orders(m: int, kinds: str, limits: tuple[int, int] | None) -> None:
    """Two ranks, and really all orders: every one that can run is built and timed."""
    best = 10**9
    for ranks in product(*(list(all_orders(stage, kinds, m)) for stage in range(2))):
        try:
            schedule = Schedule("one of all", ranks)
        except MplabError:
            continue
        if limits is None or all(x <= y for x, y in zip(schedule.in_flight(), limits, strict=True)):
            best = min(best, schedule.makespan())
    assert best == shortest(2, m, is_split=kinds == "FIW", limits=limits)


def all_orders(stage: int, kinds: str, m: int) -> Iterator[tuple[Action, ...]]:
    """All orders of a stage in which no micro-batch goes backward before it went forward."""
    for js in set(permutations([j for j in range(m) for _ in kinds])):
        yield tuple(Action(stage, kinds[js[:i].count(j)], j) for i, j in enumerate(js))  # type: ignore[arg-type]


# --- any schedule ---------------------------------------------------------------------------------------------------


def before(action: Action, kinds: dict[tuple[int, int], str]) -> list[Action]:
    """What an action needs, written down once more; `kinds` of each stage and micro-batch: "FB" or "FIW"."""
    stage, kind, j = action
    chain = [(s, "F") for s in range(max(kinds)[0] + 1)]
    chain += [(s, "B" if "B" in kinds[s, j] else "I") for s, _ in reversed(chain)]
    if kind == "W":
        return [Action(stage, "I", j)]
    return [Action(s, k, j) for s, k in chain[: chain.index((stage, kind))]]  # type: ignore[arg-type]


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Schedule, dict[Action, list[Action]]]:
    """Any order that can run: stages anywhere, each backward whole or in two, and any next action that is possible."""
    chance = random.Random(draw(st.integers(0, 2**32)))
    num_ranks, num_stages, m = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rank_of = [chance.randrange(num_ranks) for _ in range(num_stages)]
    kinds = {(s, j): chance.choice(["FB", "FIW"]) for s in range(num_stages) for j in range(m)}
    needs = {action: before(action, kinds) for (s, j), ks in kinds.items() for k in ks for action in [Action(s, k, j)]}  # type: ignore[arg-type]
    ranks: list[list[Action]] = [[] for _ in range(num_ranks)]
    done: set[Action] = set()
    while len(done) < len(needs):
        able = sorted(x for x in needs if x not in done and done.issuperset(needs[x]))
        action = chance.choice(able)
        ranks[rank_of[action.stage]].append(action)
        done.add(action)
    return Schedule("random", tuple(map(tuple, ranks))), needs


@given(schedules(), st.randoms(use_true_random=False))
def test_any_order_that_can_run_is_accepted_and_timed(
    drawn: tuple[Schedule, dict[Action, list[Action]]], chance: random.Random
) -> None:
    schedule, needs = drawn
    durations = {action: chance.randrange(10) for action in needs}
    ends: dict[Action, int] = {}
    while len(ends) < len(needs):  # the longest path, round by round
        for actions in schedule.ranks:
            for previous, action in zip([None, *actions], actions, strict=False):
                waits = [*needs[action], *([previous] if previous else [])]
                if all(x in ends for x in waits):
                    ends[action] = max((ends[x] for x in waits), default=0) + durations[action]
    assert schedule.ends(durations.__getitem__) == ends
    schedule.draw()


@given(schedules(), st.randoms(use_true_random=False))
def test_no_order_that_turns_a_need_round_is_accepted(
    drawn: tuple[Schedule, dict[Action, list[Action]]], chance: random.Random
) -> None:
    schedule, needs = drawn
    swaps = [(r, x, y) for r, actions in enumerate(schedule.ranks) for y in actions for x in needs[y] if x in actions]
    rank, x, y = chance.choice(swaps)
    swapped = tuple({x: y, y: x}.get(action, action) for action in schedule.ranks[rank])
    ranks = tuple(swapped if r == rank else actions for r, actions in enumerate(schedule.ranks))
    with pytest.raises(MplabError, match=r"this order can't finish:(\n  rank \d waits at .* for .*)+$"):
        Schedule("swapped", ranks)


@given(schedules())
def test_a_reader_is_who_needs_it_next_door(drawn: tuple[Schedule, dict[Action, list[Action]]]) -> None:
    schedule, _ = drawn
    for action in schedule.actions:
        readers = [x for x in schedule.actions if action in schedule.needs(x) and x.stage != action.stage]
        assert [schedule.reader(action)] == (readers or [None])


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([], "s: a schedule without actions"),
        (["", ""], "s: a schedule without actions"),
        (["0F0"], "stage 0 does 0F0 with micro-batch 0; it needs one F, and one B or one I and one W"),
        (["0F0 0B0 0F1 0B1", "1F0 1B0"], "stage 1 does nothing with micro-batch 1; it needs"),
        (["0F0 0I0"], "stage 0 does 0F0, 0I0 with micro-batch 0"),
        (["0F0 0B0 0I0 0W0"], "stage 0 does 0F0, 0B0, 0I0, 0W0 with micro-batch 0"),
        (["0F0 0F0 0B0"], "0F0 is done 2 times"),
        (["0F0 0B0", "0F0 0B0"], "0F0 is done 2 times"),
        (["0F0", "0B0"], "stage 0 is on ranks [0, 1], but its weights are on one"),
        (["0F0 0B0", "2F0 2B0"], "stages [0, 2], but they are numbered from 0 without a gap"),
        (["0F1 0B1 0F2 0B2"], "micro-batches [1, 2], but they are numbered from 0 without a gap"),
        (["0B0 0F0"], "rank 0 waits at 0B0, its action 0, for 0F0 of itself, where it stands later"),
        (["0F0 0W0 0I0"], "rank 0 waits at 0W0, its action 1, for 0I0 of itself, where it stands later"),
        (
            ["0F0 0B0 0F1 0B1", "1F1 1B1 1F0 1B0"],
            "s: this order can't finish:\n"
            "  rank 0 waits at 0B0, its action 1, for 1B0 of rank 1\n"
            "  rank 1 waits at 1F1, its action 0, for 0F1 of rank 0",
        ),
    ],
)
def test_a_schedule_that_cannot_run_is_refused(ranks: Iterable[str], message: str) -> None:
    with pytest.raises(MplabError, match=re.escape(message)):
        Schedule("s", tuple(a(text) for text in ranks))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(MplabError, match=r"s: 0X0 is no action: its kind is one of F, B, I, W"):
        Schedule("s", ((Action(0, "F", 0), Action(0, "X", 0)),))  # type: ignore[arg-type]


@pytest.mark.parametrize("stranger", ["0F0", (0, "F", 0), None])
def test_what_is_no_action_is_refused(stranger: object) -> None:
    with pytest.raises(MplabError, match=re.escape(f"s: rank 1 does {stranger!r}, which is no action: write Action(")):
        Schedule("s", ((Action(0, "F", 0),), (stranger,)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("order", "num_ranks", "num_microbatches", "message"),
    [
        ("gpipe", 0, 1, "a schedule of 1 micro-batches on 0 ranks: give whole numbers, 1 or more"),
        ("gpipe", 1, 0, "a schedule of 0 micro-batches on 1 ranks: give whole numbers, 1 or more"),
        ("gpipe", 2.0, 1, "a schedule of 1 micro-batches on 2.0 ranks: give whole numbers"),
        ("pipedream", 2, 2, "schedule 'pipedream': there are naive, gpipe, 1f1b, interleaved, zero_bubble; or give a"),
        (["gpipe"], 2, 2, "schedule ['gpipe']: there are naive"),
        (lambda r, p, m: None, 2, 2, "<lambda>: rank 0 gets None, not actions: yield them, or return a list of them"),
        (lambda r, p, m: a(f"{r}F0"), 2, 1, "<lambda>: stage 0 does 0F0 with micro-batch 0"),
    ],
)
def test_what_cannot_be_built(order: Order, num_ranks: int, num_microbatches: int, message: str) -> None:
    with pytest.raises(MplabError, match=re.escape(message)):
        build(order, num_ranks, num_microbatches)


# --- names ----------------------------------------------------------------------------------------------------------


@given(st.builds(Action, st.integers(0, 99), st.sampled_from(KINDS), st.integers(0, 999)))
def test_an_action_is_read_as_it_is_written(action: Action) -> None:
    assert Action.parse(str(action)) == action


@pytest.mark.parametrize("text", ["", "F0", "0F", "0X0", "-1F0", "0F0 ", "0f0", "0FB0"])
def test_what_is_no_action_is_not_read(text: str) -> None:
    with pytest.raises(MplabError, match=re.escape(f'"{text}" is no action: write stage, one of F, B, I, W, micro')):
        Action.parse(text)


def test_names() -> None:
    assert build("1f1b", 2, 2).name == "1f1b"
    assert build(module.one_f_one_b, 2, 2).name == "one_f_one_b"
    assert build(partial(interleaved, num_chunks=3), 2, 2).name == "interleaved"
    split = build("zero_bubble", 2, 2)
    assert [split.span_name(x) for x in a("0F0 1I1 1W0")] == ["forward", "input gradient", "weight gradient"]
    chunks = build("interleaved", 2, 2)
    assert (chunks.stages(0), chunks.stages(1)) == ((0, 2), (1, 3))
    assert [chunks.span_name(x) for x in a("2F0 1B1")] == ["forward of chunk 1", "backward of chunk 0"]
