"""The table of hardware counters, from what Nsight Compute writes; the counters themselves need a GPU and the tool."""

import csv
import io

import pytest
import torch

from benchmarks.dcat_profile import DURATION, SHARES, STALLS, main, table


def written(*kernels: str, unit: str = "ns") -> list[str]:
    """A log of so many kernels: 2,500 units each, shares of 0, 1, ... %, waits of 0, 10, ... cycles."""
    metrics = [DURATION, *SHARES.values(), *STALLS.values()]
    values = ["2,500", *(f"{i}.4" for i in range(len(SHARES))), *(f"{10 * i}" for i in range(len(STALLS)))]
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerow(["ID", "Kernel Name", *metrics])
    writer.writerow(["", "", unit, *["%"] * len(SHARES), *["inst"] * len(STALLS)])
    for number, kernel in enumerate(kernels):
        writer.writerow([number, f"_{kernel}_kernel", *values])
    return ["==PROF== Connected", *text.getvalue().splitlines()]


def test_kernels_stand_at_the_step_whose_forward_pass_came_last() -> None:
    lines = table(written("forward", "fold", "forward", "prepare"), ["a, forward", "b, both"])
    assert lines[0] == "| step | kernel | us | tensor % | XU % | issue % | memory % | L2 % | waits |"
    assert lines[1].count("|") == lines[0].count("|") == lines[2].count("|")
    assert lines[2] == "| a, forward | forward | 2.5 | 0 | 1 | 2 | 3 | 4 | wait 50.0, short_scoreboard 40.0 |"
    assert [line.split(" | ")[:2] for line in lines[3:]] == [
        ["| a, forward", "fold"], ["| b, both", "forward"], ["| b, both", "prepare"]
    ]  # fmt: skip
    assert " 2500.0 " in table(written("forward", unit="us"), ["a"])[2]


@pytest.mark.parametrize("kernels", [["fold", "forward"], ["forward", "forward"], []])
def test_steps_and_kernels_that_do_not_match_are_refused(kernels: list[str]) -> None:
    with pytest.raises(ValueError, match="wanted a forward pass for each of"):
        table(written(*kernels), ["a"] if kernels else ["a", "b"])


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--rows", "S1234"])
    assert "no row is named S1234; there are S512_C128" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main([])
        assert "wanted a CUDA GPU, found none" in capsys.readouterr().err
