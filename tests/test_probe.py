"""The machine as `probe()` sees it: the fit of a link, what is measured once, and the table."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mplab import Link, MplabError, Probe, World
from mplab.world import links, machine
from mplab.world.links import LinkFit, fit_link
from mplab.world.probe import Speed, format_rate, main, probe

# `mplab.world.probe` is the function: its module has the same name.
probe_module = importlib.import_module("mplab.world.probe")
SIZES = (1 << 10, 1 << 14, 1 << 18, 1 << 24)


# -- the fit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", [Link(13e-6, 12e9), Link(50e-6, 1e9), Link(1e-3, 1e8), Link(1e-6, 4e11)])
def test_the_fit_recovers_a_link(link: Link) -> None:
    fit = fit_link("made up", SIZES, [link.time_s(1, size) for size in SIZES])
    assert fit.rung == "made up"
    assert fit.latency_s == pytest.approx(link.latency_s, rel=1e-9)
    assert fit.bandwidth_bytes_s == pytest.approx(link.bandwidth_bytes_s, rel=1e-9)
    assert fit.worst_residual < 1e-9
    assert fit.link == Link(fit.latency_s, fit.bandwidth_bytes_s)


@given(
    st.floats(1e-7, 1e-2), st.floats(1e6, 1e12), st.lists(st.integers(1, 1 << 26), min_size=2, max_size=9, unique=True)
)
def test_the_fit_goes_through_every_point_of_a_line(latency_s: float, bandwidth: float, sizes: list[int]) -> None:
    fit = fit_link("made up", sizes, [Link(latency_s, bandwidth).time_s(1, size) for size in sizes])
    assert fit.worst_residual < 1e-7


def test_small_messages_count_as_much_as_large_ones() -> None:
    link = Link(10e-6, 1e9)
    times = [link.time_s(1, size) for size in SIZES]
    fit = fit_link("made up", SIZES, [*times[:-1], times[-1] * 1.3])
    assert fit.latency_s == pytest.approx(link.latency_s, rel=0.1)  # 30 % of the largest is 500 times alpha


def test_alpha_and_beta_are_never_negative() -> None:
    faster_when_larger = fit_link("made up", SIZES, [4e-6, 3e-6, 2e-6, 1e-6])
    assert math.isinf(faster_when_larger.bandwidth_bytes_s)
    assert 1e-6 < faster_when_larger.latency_s < 4e-6
    worse_than_linear = fit_link("made up", SIZES, [1e-7, 1e-5, 1e-3, 1.0])
    assert worse_than_linear.latency_s == 0
    assert 0 < worse_than_linear.bandwidth_bytes_s < math.inf


def test_residuals_are_relative_to_what_was_measured() -> None:
    fit = LinkFit("made up", 1e-6, math.inf, (1, 2), (2e-6, 0.5e-6))
    assert fit.residuals == pytest.approx((0.5, -1.0))
    assert fit.worst_residual == pytest.approx(1.0)
    assert "off by up to 100%" in str(fit)


@pytest.mark.parametrize(
    ("sizes", "times"), [((1,), (1.0,)), ((1, 1), (1.0, 2.0)), ((1, 2), (1.0,)), ((1, 2), (1.0, 0.0)), ((), ())]
)
def test_what_is_no_line_is_refused(sizes: tuple[int, ...], times: tuple[float, ...]) -> None:
    with pytest.raises(MplabError, match="two different sizes"):
        fit_link("made up", sizes, times)


# -- the probe ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that takes no time, and forgets what it measured."""
    for name, value in {"CPU_MATMUL_SIZE": 16, "CPU_COPY_BYTES": 4096, "MEASURE_S": 0.0, "_measured": None}.items():
        monkeypatch.setattr(probe_module, name, value)
    monkeypatch.setattr(links, "num_round_trips", lambda size: 3)
    monkeypatch.setattr(
        probe_module, "measure_gloo", lambda: LinkFit("gloo processes", 1e-4, math.inf, (1, 2), (1e-4, 1e-4))
    )


@pytest.mark.usefixtures("tiny")
def test_the_probe_measures_this_machine() -> None:
    num_threads = torch.get_num_threads()
    measured = probe()
    assert torch.get_num_threads() == num_threads
    assert measured.torch == torch.__version__
    assert measured.num_cores >= 1
    assert measured.memory_bytes > 1 << 20
    assert len(measured.gpus) == len(measured.gpu_speeds) == torch.cuda.device_count()
    for speed in (measured.core, measured.all_cores, *measured.gpu_speeds):
        assert min(speed.matmul_fp32_flops, speed.matmul_bf16_flops, speed.copy_bytes_s) > 0
    threads = measured.link("CPU threads")
    assert threads.sizes_bytes == links.SIZES_BYTES
    assert min(threads.times_s) > 0
    World(2, "cpu", link=threads.link)  # it is a link that a world can have
    with pytest.raises(MplabError, match=r"there are 'CPU threads'.*processes=True"):
        measured.link("gloo processes")


@pytest.mark.usefixtures("tiny")
def test_a_machine_is_measured_once() -> None:
    first = probe()
    assert probe() is first
    with_gloo = probe(processes=True)
    assert with_gloo.links[:-1] == first.links  # only what was missing is measured
    assert with_gloo.core is first.core
    assert probe() is probe(processes=True) is with_gloo
    assert probe(refresh=True) is not with_gloo


@pytest.mark.usefixtures("tiny")
def test_what_it_prints_says_what_was_measured_on_what(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    measured = probe()
    assert printed == f"{measured}\n"
    for part in (
        measured.cpu,
        f"torch {torch.__version__}",
        "1 core",
        "link, CPU threads",
        "link, gloo processes",
        "α",
    ):
        assert part in printed
    assert "matmuls of 16×16" in printed


@pytest.mark.usefixtures("tiny")
def test_json_is_one_object_and_strict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    values = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert values["num_cores"] == probe().num_cores
    gloo = values["links"][-1]
    assert gloo["rung"] == "gloo processes"
    assert gloo["bandwidth_bytes_s"] is None
    assert len(gloo["residuals"]) == len(gloo["times_s"]) == len(gloo["sizes_bytes"])


def example(**changes: object) -> Probe:
    made_up = Probe(
        cpu="A <fast> one",
        num_cores=2,
        memory_bytes=1 << 34,
        gpus=(),
        torch="2.0",
        python="3.11",
        system="Linux",
        load=0.1,
        core=Speed("1 core", 1.7e11, 1.1e12, 1.3e10),
        all_cores=Speed("2 cores at once", 1, 1, 1),
        gpu_speeds=(),
        links=(LinkFit("<any> threads", 1e-5, 1e10, (1, 2), (1e-5, 1e-5)),),
        notes=("a & b",),
    )
    return dataclasses.replace(made_up, **changes)


def test_the_table_in_a_notebook_is_escaped() -> None:
    shown = example()._repr_html_()
    assert "A &lt;fast&gt; one" in shown
    assert "link, &lt;any&gt; threads" in shown
    assert "a &amp; b" in shown
    assert shown.count("<tr>") == len(example().rows())


def test_one_core_has_no_row_for_all_cores() -> None:
    assert "2 cores at once" in str(example())
    assert "at once" not in str(example(num_cores=1))


def test_a_busy_or_a_small_machine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = probe_module._notes(example(load=3.25, num_cores=1))
    assert "2 ranks share 1 core" in " ".join(busy)
    assert "load average was 3.25 on 1 cores" in " ".join(busy)
    assert len(probe_module._notes(example(load=0.0))) == 1


@pytest.mark.parametrize(
    ("value", "text"), [(1.7e11, "170 GX"), (13.04e9, "13.0 GX"), (1.1e12, "1.10 TX"), (12, "12 X"), (2e15, "2.00 PX")]
)
def test_rates_as_people_read_them(value: float, text: str) -> None:
    assert format_rate(value, "X") == text


def test_memory_is_the_container_s(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = machine._memory_bytes()
    for text, expected in (("max", whole), ("4096", 4096), (str(whole * 2), whole)):
        monkeypatch.setattr(Path, "read_text", lambda *_, text=text: f"{text}\n")
        assert machine._memory_bytes() == expected


@pytest.mark.gpu
def test_gpus_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "_measured", None)
    measured = probe()
    assert len(measured.gpu_speeds) == torch.cuda.device_count()
    assert all(gpu.num_sms > 0 for gpu in measured.gpus)
    assert min(measured.link("CUDA streams").times_s) > 0
    assert [speed.device for speed in measured.gpu_speeds] == [f"cuda:{i}" for i in range(len(measured.gpus))]
    print(measured)
