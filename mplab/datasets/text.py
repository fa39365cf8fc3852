"""Text for language models: the Python language reference that is part of every Python, or any file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mplab.datasets.dataset import Batch, Dataset
from mplab.errors import MplabError

REFERENCE = "the Python language reference"


class Text(Dataset):
    """A text as windows of `sequence` tokens; the targets are the inputs one token on. Made by `text()`.

    Sample i has the inputs i T ... i T + T - 1 and the targets i T + 1 ... i T + T (T is `sequence`), so that an epoch
    predicts every token once. The last tenth of the windows, at least one, is held out.

    Attributes:
        name: where the text comes from.
        vocabulary: the characters in the order of their tokens; None at byte level.
        vocab_size: number of different tokens; 256 at byte level.
        num_tokens: length of the whole text.
        sequence: tokens in a window (T).
    """

    def __init__(self, content: bytes | str, name: str, batch_size: int, sequence: int, seed: int = 0) -> None:
        if sequence < 1 or batch_size < 1:
            raise MplabError(f"batch_size {batch_size}, sequence {sequence}: both must be 1 or more")
        self.name, self.sequence, self.num_tokens = name, sequence, len(content)
        num_windows = (len(content) - 1) // sequence
        num_validation = max(1, num_windows // 10)
        if num_windows - num_validation < batch_size:
            needed = max(batch_size + 1, 10 * (batch_size - 1) // 9 + 1) * sequence + 1
            what = "is empty" if not content else f"is too short: it has {len(content)} {unit(content)}"
            raise MplabError(
                f"{name} {what}; a batch of {batch_size} windows of {sequence}, and a tenth held out, "
                f"need at least {needed} {unit(content)}: take a longer file, or a smaller batch_size or sequence"
            )
        super().__init__(num_windows - num_validation, num_validation, batch_size, seed)
        self.vocabulary: str | None = None
        if isinstance(content, bytes):
            self._tokens = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            self.vocab_size = 256
        else:
            points, tokens = np.unique(np.frombuffer(content.encode("utf-32-le"), dtype=np.uint32), return_inverse=True)
            self._tokens = torch.from_numpy(tokens.astype(np.int32))
            self.vocabulary = "".join(map(chr, points.tolist()))
            self.vocab_size = len(self.vocabulary)

    def samples(self, indices: Tensor) -> Batch:
        """Inputs and targets, each (len(indices), sequence) int64."""
        windows = self._tokens[indices[:, None] * self.sequence + torch.arange(self.sequence + 1)].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def encode(self, text: str) -> Tensor:
        """The tokens of a text, int64, one dim; refuses a character that the vocabulary doesn't have."""
        if self.vocabulary is None:
            return torch.tensor(list(text.encode()), dtype=torch.int64)
        if unknown := sorted(set(text) - set(self.vocabulary)):
            raise MplabError(
                f"{unknown[0]!r} is not among the {self.vocab_size} characters of {self.name}: "
                "leave it out, or use level='byte'"
            )
        token_of = {character: token for token, character in enumerate(self.vocabulary)}
        return torch.tensor([token_of[character] for character in text], dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens of any shape, row by row; at byte level, cut characters show as U+FFFD."""
        values = tokens.flatten().tolist()
        if self.vocabulary is None:
            return bytes(values).decode(errors="replace")
        return "".join(self.vocabulary[value] for value in values)


def text(
    path: str | Path | None = None,
    *,
    level: Literal["byte", "character"] = "byte",
    batch_size: int = 16,
    sequence: int = 64,
    seed: int = 0,
) -> Text:
    """Batches of text for a language model.

    Args:
        path: a file of your own; None is the Python language reference (`pydoc_data.topics`, 0.46 MB of English, which
            differs a little from one Python version to the next).
        level: what a token is: a "byte" (any file, vocabulary 256) or a "character" (UTF-8 files, vocabulary as found).
        batch_size: windows in a batch.
        sequence: tokens in a window.
        seed: of the order of the windows.

    Returns:
        The dataset; `.batch(step)` gives inputs and targets, each (batch_size, sequence) int64.

    Raises:
        MplabError: a file that is missing, empty, too short or (at character level) not UTF-8; it says which, and what
            is needed.
    """
    if level not in ("byte", "character"):
        raise MplabError(f"level {level!r}: must be 'byte' or 'character'")
    name = REFERENCE if path is None else str(path)
    raw = reference() if path is None else read(Path(path))
    content: bytes | str = raw
    if level == "character":
        try:
            content = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise MplabError(
                f"{name} is not UTF-8: byte {error.start} is {raw[error.start]:#04x}; "
                "save it as UTF-8, or use level='byte'"
            ) from None
    return Text(content, name, batch_size, sequence, seed)


def reference() -> bytes:
    """The Python language reference in UTF-8, its topics in the order of their names."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise MplabError(
            "this Python comes without pydoc_data.topics, its language reference: "
            "install the full standard library, or give a file of your own"
        ) from None
    return "\n".join(topics[name] for name in sorted(topics)).encode()


def read(path: Path) -> bytes:
    """The bytes of a user's file."""
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise MplabError(f"{path} cannot be read ({error.strerror}): give the path of a text file") from None


def unit(content: bytes | str) -> str:
    """What a token of it is called."""
    return "bytes" if isinstance(content, bytes) else "characters"
