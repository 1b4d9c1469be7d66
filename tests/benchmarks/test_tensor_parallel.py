"""What several GPUs could give is computed as its page says."""

import json

import pytest

from benchmarks.tensor_parallel import main, parse_arguments, step_ms

FLAGS = ["--layers", "10", "--hidden", "1000", "--step-gb", "20", "--step-ms", "12"]
FLAGS += ["--bandwidth-tb-s", "2", "--reduce-us", "4", "--peer-gb-s", "1"]


def test_a_step_is_its_bytes_and_its_sums():
    options = parse_arguments(FLAGS)
    alone = {"reading": 10.0, "sums": 0.0, "floor": 10.0, "divided": 12.0, "undivided": 12.0}
    assert step_ms(options, 1) == alone
    # 20 sums of 4 us, each with 2,000 bytes at 1 GB/s.
    found = step_ms(options, 2)
    assert found == pytest.approx(
        {"reading": 5.0, "sums": 0.12, "floor": 5.12, "divided": 6.12, "undivided": 7.12}
    )
    # What every card reads is not divided.
    shared = parse_arguments([*FLAGS, "--common-gb", "4"])
    assert step_ms(shared, 2)["reading"] == pytest.approx(6.0)


def test_the_last_line_has_the_table_and_its_assumptions(capsys):
    main(FLAGS)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["assumptions"]["layers"] == 10
    assert found["computed"] is True
    assert found["gpus"]["2"]["floor"] == pytest.approx(5.12)


@pytest.mark.parametrize("flags", [["--link-gb-s", "0"], ["--common-gb", "21"], ["--rows", "-1"]])
def test_impossible_assumptions_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([*FLAGS, *flags])
    assert flags[0] in capsys.readouterr().err
