"""The datasets: batches that follow from the seed and the step alone, and what a bad file gets."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from limits import global_random_states

from mplab.datasets import Dataset, Digits, Text, digits, text
from mplab.datasets.dataset import epoch_order
from mplab.errors import MplabError

SENTENCE = "The naïve café: 12 €, “déjà vu”.\r\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.txt"
    path.write_bytes((SENTENCE * 40).encode())
    return path


@pytest.fixture(params=["text", "digits"])
def make(request: pytest.FixtureRequest) -> Callable[..., Dataset]:
    """Makes a dataset of batches of five, given a seed or not."""
    return partial(text, batch_size=5, sequence=8) if request.param == "text" else partial(digits, batch_size=5)


# Every dataset


def test_a_batch_follows_from_the_seed_and_the_step_alone(make: Callable[..., Dataset]) -> None:
    data, again, other = make(), make(seed=0), make(seed=1)
    for step in (7, 0, 7, data.num_batches + 3):
        expected = again.batch(step)
        epoch_order.cache_clear()
        torch.manual_seed(step)
        for mine, same in zip(data.batch(step), expected, strict=True):
            assert torch.equal(mine, same)
    assert not torch.equal(data.batch(0)[0], other.batch(0)[0])
    assert not torch.equal(data.batch(0)[0], data.batch(1)[0])
    assert not torch.equal(data.batch(0)[0], data.batch(data.num_batches)[0])  # the next epoch has another order


def test_the_global_random_state_is_left_alone(make: Callable[..., Dataset]) -> None:
    before = global_random_states()
    make(seed=3).batch(11)
    assert global_random_states() == before


def test_batches_go_on_where_they_are_told_to(make: Callable[..., Dataset]) -> None:
    data = make()
    steps = [inputs for inputs, _ in data.batches(3, start=2)]
    assert len(steps) == 3
    for step, inputs in enumerate(steps, start=2):
        assert torch.equal(inputs, data.batch(step)[0])


class Numbers(Dataset):
    """Sample i is the number i."""

    def samples(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return indices, indices


@given(
    num_training=st.integers(1, 40),
    num_validation=st.integers(0, 20),
    batch_size=st.integers(1, 40),
    epoch=st.integers(0, 3),
)
def test_an_epoch_has_every_sample_at_most_once_and_validation_exactly_once(
    num_training: int, num_validation: int, batch_size: int, epoch: int
) -> None:
    batch_size = min(batch_size, num_training)
    data = Numbers(num_training, num_validation, batch_size, seed=0)
    batches = [inputs for inputs, _ in data.batches(data.num_batches, start=epoch * data.num_batches)]
    assert all(len(batch) == batch_size for batch in batches)
    seen = torch.cat(batches).tolist()
    assert len(set(seen)) == len(seen) > num_training - batch_size
    assert set(seen) <= set(range(num_training))
    held_out = [number for inputs, _ in data.validation() for number in inputs.tolist()]
    assert held_out == list(range(num_training, num_training + num_validation))


@pytest.mark.parametrize("batch_size", [0, 11])
def test_a_batch_size_that_the_samples_do_not_give_is_refused(batch_size: int) -> None:
    with pytest.raises(MplabError, match=f"batch_size {batch_size}: must be from 1 to the 10 training samples"):
        Numbers(10, 2, batch_size, seed=0)


def test_a_negative_seed_or_step_is_refused() -> None:
    with pytest.raises(MplabError, match="seed -1: must be 0 or more"):
        Numbers(10, 2, 1, seed=-1)
    with pytest.raises(MplabError, match="step -1: must be 0 or more"):
        Numbers(10, 2, 1, seed=0).batch(-1)


# Text


def test_the_reference_is_that_of_this_python_in_a_stable_order() -> None:
    data = text(sequence=100)
    assert data.vocab_size == 256
    assert data.name == "the Python language reference"
    first = sorted(topics)[0]
    inputs, _ = data.samples(torch.tensor([0]))
    assert data.decode(inputs) == topics[first].encode()[:100].decode()
    assert data.num_tokens == len("\n".join(topics.values()).encode()) > 300_000


def test_targets_are_the_inputs_one_token_on_and_each_is_predicted_once(file: Path) -> None:
    data = text(file, batch_size=3, sequence=7)
    raw = file.read_bytes()
    inputs, targets = data.samples(torch.arange(data.num_training + data.num_validation))
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert inputs.shape == ((len(raw) - 1) // 7, 7)
    assert bytes(inputs.flatten().tolist()) == raw[: inputs.numel()]
    assert bytes(targets.flatten().tolist()) == raw[1 : 1 + targets.numel()]
    assert data.num_validation == len(inputs) // 10


def test_a_batch_has_the_shape_asked_for(file: Path) -> None:
    inputs, targets = text(file, batch_size=3, sequence=7).batch(0)
    assert inputs.shape == targets.shape == (3, 7)


@given(st.text())
def test_bytes_come_back_from_their_tokens(words: str) -> None:
    words = words.encode(errors="ignore").decode()
    data = REFERENCE
    tokens = data.encode(words)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == list(words.encode())
    assert data.decode(tokens) == words


REFERENCE = text()


def test_a_cut_character_still_decodes() -> None:
    assert REFERENCE.decode(REFERENCE.encode("é")[:1]) == "\ufffd"


def test_characters_are_the_vocabulary_of_the_file(file: Path) -> None:
    data = text(file, level="character", batch_size=2, sequence=len(SENTENCE))
    assert data.vocabulary == "".join(sorted(set(SENTENCE)))
    assert data.vocab_size == len(set(SENTENCE))
    assert data.num_tokens == 40 * len(SENTENCE)
    assert data.decode(data.samples(torch.tensor([3]))[0]) == SENTENCE
    assert data.decode(data.encode("vu €")) == "vu €"
    assert data.encode("").shape == (0,)
    assert data.batch(0)[0].max() < data.vocab_size


def test_a_character_that_the_file_does_not_have_is_refused(file: Path) -> None:
    data = text(file, level="character", batch_size=2, sequence=8)
    with pytest.raises(MplabError, match=re.escape(f"'Z' is not among the {data.vocab_size} characters of {file}")):
        data.encode("vu Z")


def test_a_path_may_be_a_string_and_begin_at_home(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(file.parent))
    monkeypatch.setenv("USERPROFILE", str(file.parent))
    assert text(f"~/{file.name}", batch_size=2, sequence=8).num_tokens == len(file.read_bytes())


@given(batch_size=st.integers(1, 60), sequence=st.integers(1, 9), length=st.integers(0, 3))
def test_a_short_text_is_refused_with_exactly_the_length_that_it_needs(
    batch_size: int, sequence: int, length: int
) -> None:
    unit, letter = ("bytes", b"a") if length % 2 else ("characters", "a")
    with pytest.raises(MplabError, match=f"own.txt is .*at least .* {unit}: take") as caught:
        Text(letter * min(length, batch_size), "own.txt", batch_size, sequence)
    needed = int(re.search(r"at least (\d+)", str(caught.value))[1])
    data = Text(letter * needed, "own.txt", batch_size, sequence)
    assert data.num_validation >= 1
    with pytest.raises(MplabError, match=f"too short: it has {needed - 1} {unit}; .* at least {needed} "):
        Text(letter * (needed - 1), "own.txt", batch_size, sequence)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(MplabError, match=r"empty\.txt is empty; .*need at least 1089 bytes"):
        text(tmp_path / "empty.txt")


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MplabError, match=r"none\.txt cannot be read \(No such file"):
        text(tmp_path / "none.txt")
    with pytest.raises(MplabError, match="cannot be read"):
        text(tmp_path)


def test_a_file_that_is_not_utf8_is_refused_at_character_level_only(file: Path) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[:100] + b"\xff" + raw[100:])
    with pytest.raises(MplabError, match=r"own\.txt is not UTF-8: byte 100 is 0xff; .*level='byte'"):
        text(file, level="character")
    assert text(file, batch_size=2).num_tokens == len(raw) + 1


def test_an_unknown_level_is_refused(file: Path) -> None:
    with pytest.raises(MplabError, match="level 'word': must be 'byte' or 'character'"):
        text(file, level="word")  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [{"batch_size": 0}, {"sequence": 0}])
def test_a_batch_or_window_of_nothing_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(MplabError, match="both must be 1 or more"):
        text(**sizes)


def test_a_python_without_its_reference_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(MplabError, match=r"comes without pydoc_data\.topics.*a file of your own"):
        text()


# Digits


def test_digits_are_normalised_pictures_with_their_labels() -> None:
    from sklearn.datasets import load_digits

    data, source = digits(), load_digits()
    inputs, targets = data.batch(0)
    assert inputs.shape == (64, 64)
    assert inputs.dtype == torch.float32
    assert targets.shape == (64,)
    assert targets.dtype == torch.int64
    assert data.pictures.min() == -1
    assert data.pictures.max() == 1
    picture, label = data.samples(torch.tensor([1000]))
    assert np.array_equal((picture[0].numpy() + 1) * 8, source.data[1000])
    assert label.item() == source.target[1000]
    assert set(data.labels.tolist()) == set(range(data.num_classes))


def test_a_fifth_of_the_digits_is_held_out() -> None:
    data = digits()
    assert (data.num_training, data.num_validation) == (1438, 359)
    held_out = torch.cat([inputs for inputs, _ in data.validation()])
    assert torch.equal(held_out, data.pictures[1438:])
    assert isinstance(data, Digits)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MplabError, match=r"scikit-learn, which is not installed: pip install"):
        digits()
