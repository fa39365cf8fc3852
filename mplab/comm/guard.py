"""What a process rank knows of the others: parcels that came, who waits where, who has failed.

Every process keeps watch for itself. A rank that waits tells all others so, with the number of parcels that it has sent
to and received from each. Parcels of one pair never overtake each other, so when all are known to wait, and every count
of parcels sent equals the count received, nothing is on its way and nobody can ever go on. No server is asked: a dead
one could not answer.

**Reference**: Mattern, "Algorithms for Distributed Termination Detection", 1987 (counting messages).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from torch import Tensor

from mplab.comm.bell import Bell
from mplab.comm.gloo import GlooWire
from mplab.comm.hub import user_line
from mplab.comm.wire import Deliver, Lose, Parcel, Wire
from mplab.errors import CollectiveMismatch, CommError, CommTimeout, Deadlock, PeerFailure

LOOK_EVERY_S = 0.05
# A rank that waits longer than this tells the others.
TELL_AFTER_S = 0.2
# For the last words of the others: what they called, why they failed, where they are.
LISTEN_S = 0.4

# Failures that concern all ranks alike are raised in each as what they are; all others as PeerFailure.
_COMMON: dict[str, type[CommError]] = {kind.__name__: kind for kind in (CollectiveMismatch, Deadlock, CommTimeout)}


class State(NamedTuple):
    """What a rank last said of itself.

    Args:
        status: "runs", "waits", "finished" (the run) or "left" (the world).
        run: which run of the world.
        text: where it is.
        missing: world ranks that it waits for.
        sent: parcels sent to each rank.
        received: parcels received from each rank.
    """

    status: str = "runs"
    run: int = 0
    text: str = "runs"
    missing: Sequence[int] = ()
    sent: Sequence[int] = ()
    received: Sequence[int] = ()


class Failure(NamedTuple):
    """The first failure: which rank, which exception, with what words."""

    rank: int
    kind: str
    text: str


class Guard:
    """One process's mail and watch.

    Args:
        rank: this process's world rank.
        size: ranks in the world.
        timeout_s: the longest that it may wait for others.
        make_wire: called as `Wire` is, makes what carries its parcels.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        timeout_s: float,
        make_wire: Callable[[int, int, Deliver, Lose], Wire] = GlooWire,
    ) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self.failure: Failure | None = None
        self._has_told = False  # the others of that failure
        self.run = 0
        self.numbers: Counter[Any] = Counter()
        self._main = threading.get_ident()
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._news = Bell()
        self._boxes: dict[tuple[int, str], deque[Parcel]] = {}
        # The rank is woken when all of these have come; of what is said besides, at once.
        self._awaited: set[tuple[int, str]] = set()
        self._sent, self._received = [0] * size, [0] * size
        self._states = [State()] * size
        self._heard_s = [time.monotonic()] * size
        self._told = State()
        self._lost: dict[int, str] = {}
        with self._lock:  # what comes at once is read once there is a wire to answer with
            self._wire = make_wire(rank, size, self._deliver, self._lose)
        self.peers = self._wire.peers

    @property
    def is_mine(self) -> bool:
        """False in a fork of the process, which has its connections too, and must not talk over them."""
        return os.getpid() == self._process

    # -- a run ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """A run begins: what was not received in the one before is forgotten."""
        with self._lock:
            self.check_running("the start of a run")
            self.run += 1
            self.numbers.clear()
            self._main = threading.get_ident()
            self._told = State("runs", self.run)
            self._boxes = {at: box for at, box in self._boxes.items() if int(at[1].split()[0]) >= self.run}

    def finish(self, x: Tensor) -> list[Tensor]:
        """This rank's part of the run is over: wait for the others, and swap a tensor with them; in rank order."""
        with self._lock:
            self.check_running("the end of the run")
            self.send(self.peers, "end", None, x)
            self._tell(State("finished", self.run, "has finished", (), tuple(self._sent), tuple(self._received)))
        came = self.collect(self.peers, "end", "the end of the run", range(self.size))
        xs = {r: parcel.x for r, parcel in came.items()} | {self.rank: x}
        return [xs[r] for r in range(self.size)]  # type: ignore[misc]

    def leave(self, timeout_s: float) -> None:
        """No more runs: wait a little until the others are through as well."""
        with self._lock:
            if self.failure is None:
                self._tell(State("left", self.run, "has left the world"))
        try:
            self._wire.close(timeout_s)
        except BaseException:  # Ctrl-C: no more waiting, but no thread may be left
            self._wire.close(0.0)
            raise

    # -- mail ---------------------------------------------------------------------------------------------------------

    def send(
        self,
        peers: Sequence[int],
        key: str,
        words: object,
        x: Tensor | Sequence[Tensor] | None = None,
        borrowed: bool = False,
    ) -> None:
        """Send to some ranks, without waiting; each of them collects it with the same key."""
        with self._lock:
            for peer in peers:
                self._sent[peer] += 1
        self._wire.send(peers, ["data", self.run, key, words], x, borrowed)

    def collect(
        self,
        peers: Sequence[int],
        key: str,
        doing: object,
        group: Sequence[int],
        agrees: Callable[[int, Any], bool] | None = None,
    ) -> dict[int, Parcel]:
        """Wait for a parcel from each of some ranks.

        Args:
            peers: world ranks.
            key: of the parcels.
            doing: what the rank is in, for the table of who waits where.
            group: world ranks of the communicator.
            agrees: called with each rank and its words; once False, the others get a moment, and what came is returned.

        Raises:
            PeerFailure: another rank failed, or its process is gone.
            Deadlock, CommTimeout: it will not come, or not in time.
        """
        came: dict[int, Parcel] = {}
        key = f"{self.run} {key}"
        missing, start_s, end_s = list(peers), time.monotonic(), float("inf")
        try:
            while True:
                with self._lock:
                    self.check_running(doing)
                    for peer in [p for p in missing if (p, key) in self._boxes]:
                        came[peer] = self._take(peer, key)
                        missing.remove(peer)
                        if agrees is not None and not agrees(peer, came[peer].words):
                            end_s = min(end_s, time.monotonic() + LISTEN_S)
                    if not missing or time.monotonic() > end_s:
                        return came
                    self._awaited = {(p, key) for p in missing}
                    late = self._watch(missing, start_s, doing, group) if end_s == float("inf") else None
                if late is not None:
                    self._time_out(late, doing)
                self._wire.expect()
                self._news.wait(LOOK_EVERY_S)
        finally:
            with self._lock:
                if self._told.status == "waits":
                    self._tell(State("runs", self.run))

    def reuse(self, parcels: dict[int, Parcel]) -> None:
        """Give back the memory of parcels that nobody needs any more."""
        for parcel in parcels.values():
            self._wire.reuse(parcel)

    def _take(self, peer: int, key: str) -> Parcel:
        box = self._boxes[peer, key]
        parcel = box.popleft()
        if not box:
            del self._boxes[peer, key]
        return parcel

    def _deliver(self, peer: int, parcel: Parcel) -> bool:
        """A parcel came; called by the thread that receives from this peer."""
        kind, *words = parcel.words
        with self._lock:
            self._heard_s[peer] = time.monotonic()
            if kind == "data":
                run, key, body = words
                at = peer, f"{run} {key}"
                if run >= self.run:  # what an earlier run did not receive, nobody will
                    self._boxes.setdefault(at, deque()).append(parcel._replace(words=body))
                    self._awaited.discard(at)
                self._received[peer] += 1
            elif kind == "state":
                self._states[peer] = state = State(*words)
                if state.status == "left":  # a send to it may have failed before this was read
                    self._lost.pop(peer, None)
                is_asked = state.status == "waits" and self.rank in state.missing and self._told.status == "runs"
                if is_asked and not self._has_told:
                    # Asked under the lock: this rank cannot begin to wait, and say so, before this is sent.
                    self._wire.send([peer], ["state", *State("runs", self.run, f"runs at {self._line()}")])
            elif kind == "failure" and self.failure is None:
                self.failure = Failure(*words)
            if kind != "data" or not self._awaited:
                self._news.ring()
        return kind != "failure" and not (kind == "state" and words[0] == "left")

    def _lose(self, peer: int, reason: str) -> None:
        with self._lock:
            if self._states[peer].status != "left":
                self._lost[peer] = reason
            self._news.ring()

    # -- watch --------------------------------------------------------------------------------------------------------

    def check_running(self, doing: object) -> None:
        """Raise if the world has failed."""
        if self.failure is None:
            return
        rank, kind, text = self.failure
        if kind in _COMMON:
            raise _COMMON[kind](text)
        if kind == PeerFailure.__name__:
            raise PeerFailure(text, rank)
        said = f"{kind}: {text}" if text else kind
        raise PeerFailure(f"rank {self.rank} stopped in {doing}: rank {rank} failed with {said}", rank)

    def fail(self, error: BaseException) -> None:
        """Tell all others why this rank fails, if none has failed before."""
        if not self.is_mine:
            return
        with self._lock:
            if self.failure is None:
                rank = error.rank if isinstance(error, PeerFailure) and error.rank is not None else self.rank
                self.failure = Failure(rank, type(error).__name__, str(error))
            failure, has_told, self._has_told = self.failure, self._has_told, True
        if not has_told:
            self._wire.send(self.peers, ["failure", *failure])
            self._wire.flush(LISTEN_S)

    def _raise(self, error: CommError) -> NoReturn:
        self.fail(error)
        raise error

    def _watch(self, missing: list[int], start_s: float, doing: object, group: Sequence[int]) -> State | None:
        """Look once for a reason why this wait will not end; what this rank waits for, if it is too long. The lock is
        held."""
        waited_s = time.monotonic() - start_s
        if self._lost and waited_s > LISTEN_S:  # by then those who know better have said so
            rank, reason = next(iter(self._lost.items()))
            self._raise(PeerFailure(f"rank {rank}'s process is gone or cannot be reached any more ({reason})", rank))
        has_finished = self._told.status == "finished"
        if has_finished:
            self._tell(self._told._replace(sent=tuple(self._sent), received=tuple(self._received)))
        text = f"waits for rank {', '.join(map(str, missing))} in {doing} of group {list(group)} at {self._line()}"
        state = State("waits", self.run, text, tuple(missing), tuple(self._sent), tuple(self._received))
        gone = [r for r in missing if self._status(r) in (("left",) if has_finished else ("finished", "left"))]
        if gone:
            how = "finished" if self._status(gone[0]) == "finished" else "left the world"
            self._raise(Deadlock(f"rank {self.rank} waits for rank {gone[0]}, which has {how}\n{self._table(state)}"))
        if has_finished:  # the others may take as long as they like
            return None
        if waited_s > TELL_AFTER_S:
            self._tell(state)
            if self._is_stuck(state):
                self._raise(Deadlock(f"no rank can go on\n{self._table(state)}"))
        return state if waited_s > self.timeout_s else None

    def _time_out(self, state: State, doing: object) -> NoReturn:
        """Ask the late ranks where they are, and give up."""
        asked_s = time.monotonic()
        with self._lock:
            self._tell(state, again=True)
            running = [r for r in state.missing if self._status(r) == "runs"]
        while (silent := [r for r in running if self._heard_s[r] < asked_s]) and time.monotonic() < asked_s + LISTEN_S:
            self._news.wait(LOOK_EVERY_S)
        with self._lock:
            self.check_running(doing)
            for r in silent:
                silence = "does not answer: its process is stopped or busy, or the network between is slow or down"
                self._states[r] = State("runs", self.run, silence)
            late = running or [r for r in self.peers if self._status(r) == "runs"] or state.missing
            names = ", ".join(f"rank {r}" for r in late)
            why = f"rank {self.rank} waited {self.timeout_s:g} s in {doing}; late: {names}"
            self._raise(CommTimeout(f"{why}\n{self._table(state)}"))

    def _status(self, rank: int) -> str:
        state = self._states[rank]
        return state.status if state.run == self.run or state.status == "left" else "runs"

    def _is_stuck(self, mine: State) -> bool:
        """True if all ranks wait or have finished, and every parcel that was sent has been received."""
        if any(self._status(r) == "runs" for r in self.peers):
            return False
        states = {r: self._states[r] for r in self.peers if self._status(r) != "left"} | {self.rank: mine}
        return all(a.sent[q] == b.received[p] for p, a in states.items() for q, b in states.items() if p != q)

    def _table(self, mine: State) -> str:
        """One line a rank: where it is, as far as this one knows."""
        texts = []
        for r in range(self.size):
            state = mine if r == self.rank else self._states[r]
            texts.append(f"  rank {r} {state.text if r == self.rank or self._status(r) == state.status else 'runs'}")
        return "\n".join(texts)

    def _tell(self, state: State, again: bool = False) -> None:
        if (state != self._told or again) and not self._has_told:
            self._told = state
            self._wire.send(self.peers, ["state", *state])

    def _line(self) -> str:
        return user_line(sys._current_frames().get(self._main))
