"""How a model is laid out over many ranks: one plan for every strategy of the course, and every mixture of them."""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mplab.errors import MplabError
from mplab.plan.json_object import read_file, read_object
from mplab.plan.schedule import ORDERS


@dataclass(frozen=True)
class Plan:
    """Tensor inside stage inside replica: `dp` replicas, each of `pp` stages, each of whose layers is cut `tp` ways.

    With all that is left out it is plain training on one rank.

    Args:
        dp: replicas of the model; each takes its shard of the batch.
        pp: ranks that the model's layers are divided among, in stages.
        tp: ranks that each layer is cut over.
        cuts: the first layer of every stage but the first; None: such that the largest stage has as few parameters as
            can be.
        schedule: of the stages: "naive", "gpipe", "1f1b", "interleaved" (two stages a rank) or "zero_bubble".
        num_microbatches: parts in which a replica computes its shard before the one update.
        zero: what replicas share out instead of keeping it each: 0 nothing, 1 the optimizer's state, 2 gradients too,
            3 weights too.
        sequence_parallel: between cut layers each tensor-parallel rank works on 1/tp of the sequence.
        recompute: keep only the input of a stage, and compute its activations again for the backward.

    Raises:
        MplabError: settings out of their range, or that exclude each other: all of them at once.

    Reference:
        Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", SC 2021,
        section 3.
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1
    cuts: tuple[int, ...] | None = None
    schedule: str = "1f1b"
    num_microbatches: int = 1
    zero: int = 0
    sequence_parallel: bool = False
    recompute: bool = False

    def __post_init__(self) -> None:
        refuse(self._faults(), "this plan can't be")

    @property
    def num_ranks(self) -> int:
        """dp x pp x tp."""
        return math.prod((self.dp, self.pp, self.tp))

    @property
    def num_stages(self) -> int:
        """Stages of one replica."""
        return self.pp * (2 if self.schedule == "interleaved" and self.pp > 1 else 1)

    def too_few(self, num_samples: int) -> str:
        """What is wrong with a batch that does not have a sample for every micro-batch; "" if it has."""
        needed = self.dp * self.num_microbatches
        if num_samples >= needed:
            return ""
        are_many = self.num_microbatches > 1
        return (
            f"a batch of {num_samples!r} samples for {self.dp} replicas with {self.num_microbatches} "
            f"micro-batch{'es' * are_many} each: every micro-batch needs one sample or more; take {needed} samples or "
            f"more, or fewer {'micro-batches' if are_many else 'replicas'}"
        )

    def _faults(self) -> Iterator[str]:
        for name in ("dp", "pp", "tp", "num_microbatches"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                yield f"{name}={value!r}: must be a whole number, 1 or more"
        if not isinstance(self.schedule, str) or self.schedule not in ORDERS:
            yield f"schedule={self.schedule!r}: there are {', '.join(ORDERS)}"
        if not isinstance(self.zero, int) or isinstance(self.zero, bool) or self.zero not in (0, 1, 2, 3):
            yield f"zero={self.zero!r}: must be 0 (nothing sharded), 1, 2 or 3"
        elif self.zero > 1 and isinstance(self.pp, int) and self.pp > 1:
            yield (
                f"zero={self.zero} with pp={self.pp}: a pipeline's micro-batches would each gather or reduce what is "
                "sharded, in the middle of its schedule; take zero=1, or pp=1"
            )
        elif self.zero > 1 and self.recompute:
            yield f"zero={self.zero} with recompute=True: the backward would need gathered weights twice; take zero=1"
        for name in ("sequence_parallel", "recompute"):
            if not isinstance(getattr(self, name), bool):
                yield f"{name}={getattr(self, name)!r}: must be True or False"
        if self.cuts is not None and not (
            isinstance(self.cuts, tuple)
            and all(isinstance(cut, int) and not isinstance(cut, bool) for cut in self.cuts)
        ):
            yield f"cuts={self.cuts!r}: must be whole numbers, the first layer of every stage but the first, or None"
        elif self.cuts and self.pp == 1:
            yield f"cuts={self.cuts} with pp=1: one rank has all layers; leave the cuts out, or take pp of 2 or more"

    # -- as text -------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        said = [f"{self.dp} x {self.pp} x {self.tp} ranks (dp x pp x tp)"]
        if self.pp > 1:
            said.append(f"{self.schedule}, cut {'by parameters' if self.cuts is None else f'at {list(self.cuts)}'}")
        if self.num_microbatches > 1:
            said.append(f"{self.num_microbatches} micro-batches")
        if self.zero:
            said.append(f"ZeRO {self.zero}")
        said += [name.replace("_", " ") for name in ("sequence_parallel", "recompute") if getattr(self, name)]
        return ", ".join(said)

    def to_json(self) -> str:
        """What differs from the defaults, and the degrees; `from_json` makes the same plan of it."""
        values = dataclasses.asdict(self)
        kept = {
            field.name: values[field.name]
            for field in dataclasses.fields(self)
            if field.name in ("dp", "pp", "tp") or values[field.name] != field.default
        }
        return json.dumps(kept)

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """The plan that `to_json` wrote, or that a person did.

        Raises:
            MplabError: no JSON object, names that a plan has not, or values that it can't have.
        """
        values = read_object("a plan", text, [field.name for field in dataclasses.fields(cls)])
        if isinstance(values.get("cuts"), list):
            values["cuts"] = tuple(values["cuts"])
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write it to a file, as JSON."""
        Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read it from a file.

        Raises:
            MplabError: no such file, or no plan in it.
        """
        return cls.from_json(read_file(path, "a plan", "Plan"))


def refuse(faults: Iterator[str], what: str) -> None:
    """Raise all faults at once, if there are any.

    Raises:
        MplabError: a line for each.
    """
    found = list(dict.fromkeys(faults))
    if found:
        raise MplabError(f"{what}:\n" + "\n".join(textwrap.indent(fault, "  ") for fault in found))
