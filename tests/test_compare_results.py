"""`seemore-fast benchmark compare`: what counts as slower, and files that cannot be compared."""

import copy
import json
import re
from pathlib import Path

import pytest

from seemore_fast.cli import main

INFO = {"seemore_fast": "0.1.0", "torch": "2.13", "python": "3.11", "cpu": {"threads": 2, "instruction_set": "avx2"}}


def line(ms, spread=0.02):
    quartiles = [ms * (1 - spread), ms * (1 + spread)]
    return {"ms": ms, "ms_min": 0.9 * ms, "ms_max": 1.5 * ms, "ms_quartiles": quartiles}


@pytest.fixture
def compare(tmp_path, capsys):
    """Function from two tables of cases to (exit status, output, errors)."""

    def run(before, after, *options, **facts):
        files = []
        for name, cases, more in (("before", before, {}), ("after", after, facts)):
            files.append(tmp_path / f"{name}.json")
            files[-1].write_text(json.dumps({"device": "cpu", "backend_info": INFO, "cases": cases} | more))
        try:
            status = main(["benchmark", "compare", *map(str, files), *options])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


BEFORE = {"forward": {"seemore-fast cpu": line(10), "torch eager": line(50), "openvino": {"absent": "not installed"}}}


def changed(**lines):
    after = copy.deepcopy(BEFORE)
    after["forward"] |= {name.replace("_", " ").replace("seemore ", "seemore-"): value for name, value in lines.items()}
    return after


def test_the_same_is_fine(compare):
    status, said, _ = compare(BEFORE, BEFORE)
    assert status == 0 and said.strip() == "2 same"


def test_ours_slower_beyond_noise_and_threshold(compare):
    status, said, _ = compare(BEFORE, changed(seemore_fast_cpu=line(12)))
    assert status == 1
    assert said.splitlines()[2].split() == ["seemore-fast", "cpu", "10.000", "ms", "12.000", "ms", "1.20x", "slower"]


def test_below_the_threshold_or_within_the_noise_it_is_the_same(compare):
    assert compare(BEFORE, changed(seemore_fast_cpu=line(10.9)))[0] == 0
    assert compare(BEFORE, changed(seemore_fast_cpu=line(10.9)), "--threshold", "0.05")[0] == 1
    assert compare(BEFORE, changed(seemore_fast_cpu=line(12, spread=0.2)))[0] == 0


def test_faster_is_told_and_others_may_slow_down(compare):
    status, said, _ = compare(BEFORE, changed(seemore_fast_cpu=line(5), torch_eager=line(90)))
    assert status == 0
    assert "0.50x  faster" in said and "1.80x  slower" in said and "1 slower, 1 faster" in said


def test_gone_and_new(compare):
    after = changed(seemore_fast_cpu={"wrong": "result 0 errs"}, openvino=line(20))
    status, said, _ = compare(BEFORE, after, "--all")
    assert status == 1 and said.splitlines()[-1] == "1 same, 1 gone, 1 new"


def test_a_run_that_was_stopped_is_told(compare):
    _, said, _ = compare(BEFORE, BEFORE, cases_left_out=3)
    assert re.search(r"^not complete: .*after.json lacks 3 cases, its run was stopped$", said, re.M)


def test_old_files_have_no_quartiles(compare):
    before = copy.deepcopy(BEFORE)
    del before["forward"]["seemore-fast cpu"]["ms_quartiles"]
    assert compare(before, changed(seemore_fast_cpu=line(14)))[0] == 0  # its slowest run took 15
    assert compare(before, changed(seemore_fast_cpu=line(16)))[0] == 1


def test_older_files_still_have_no_spread(compare):
    before = copy.deepcopy(BEFORE)
    before["forward"]["seemore-fast cpu"] = {"ms": 10}
    assert compare(before, BEFORE)[0] == 0
    assert compare(before, changed(seemore_fast_cpu=line(14)))[0] == 1


def test_a_package_without_kernels_is_another_build(compare):
    status, said, _ = compare(BEFORE, BEFORE, backend_info={**INFO, "build": "there is no _C here"})
    assert status == 0 and "not the same: compiler: None before, there is no _C here after" in said


def test_another_machine_is_named(compare):
    other = {**INFO, "torch": "2.12"}
    status, said, _ = compare(BEFORE, BEFORE, device="cpu 2", backend_info=other)
    assert status == 0
    told = ["device: cpu before, cpu 2 after", "torch: 2.13 before, 2.12 after"]
    assert said.splitlines()[:2] == [f"not the same: {line}" for line in told]


def test_other_benchmarks_are_refused(compare):
    status, _, errors = compare(BEFORE, {"backward": BEFORE["forward"]})
    assert status == 2 and "no case in common" in errors


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "is no file that `seemore-fast benchmark` wrote"),
        ('{"benchmarks": []}', "pytest-benchmark compare"),
        (None, "cannot be read: No such file"),
    ],
)
def test_files_of_another_kind_are_refused(text, said, tmp_path, capsys):
    bad = tmp_path / "bad.json"
    if text is not None:
        bad.write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "compare", str(bad), str(bad)])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_files_in_the_repository_can_be_compared(capsys):
    written = sorted((Path(__file__).parent.parent / "benchmarks" / "results").glob("*/*.json"))
    assert written
    for path in written:
        assert main(["benchmark", "compare", str(path), str(path)]) == 0
