"""What every communicator must do: each `check_*` runs on all ranks of a world, of any size, and asserts on every rank.

    World(4).run(check_all_reduce)          # ranks as threads
    World.from_env().run(check_all_reduce)  # a rank under torchrun

Expected results are worked out on each rank by itself, from what all ranks are known to give; expected messages are
listed one by one, by hand, and added up. `CHECKS` has all of them; `SENDING` those that a rendezvous may change.
"""

from __future__ import annotations

from collections.abc import Callable

from conformance import coalesced, groups, ledgers, memory, messages, moving, reductions, refused, taught
from mplab.world import Rank

Check = Callable[[Rank], None]


def checks_of(*modules: object) -> tuple[Check, ...]:
    found = {name: value for module in modules for name, value in vars(module).items() if name.startswith("check_")}
    return tuple(found.values())


SENDING = (*checks_of(messages, groups, taught), memory.check_sent_tensors_may_be_changed_at_once)
CHECKS = checks_of(reductions, coalesced, moving, memory, messages, groups, taught, ledgers, refused)
