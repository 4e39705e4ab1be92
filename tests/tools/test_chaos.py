"""Tests of what ``make chaos`` keeps between runs, and of what its page says about them."""

from pathlib import Path

import chaos_table
import pytest
from chaos_table import Outcome, Results, summary, write_page
from faults.tested import ROOT, TESTED, read_report

GOOD = Outcome("kill -9 of rank 0", "JobError: rank 0 died", 3.0, 1, 1.5)
BAD = Outcome("no inodes left", "", 0, 0, 0, "losses differ")
NAMES = [GOOD.fault, BAD.fault]


def test_survived_rows_are_kept_and_failed_ones_counted(tmp_path: Path):
    path = tmp_path / "build" / "chaos.json"
    first = Results(path, resume=False)
    first.add(GOOD)
    first.add(BAD)
    second = Results(path, resume=True)
    assert [second.survived(name) for name in NAMES] == [True, False]
    second.add(Outcome(BAD.fault, "CheckpointError: no inodes left", 3.0, 0, 1.5))
    assert second.survived(BAD.fault)
    text = summary(Results(path, resume=True).of(NAMES), second.code)
    assert "2 faults were injected" in text
    assert "all were survived" in text
    assert text.endswith("with the same code: no inodes left (losses differ).")
    assert not Results(path, resume=False).survived(GOOD.fault)


def test_rows_of_other_code_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "chaos.json"
    Results(path, resume=False).add(GOOD)
    monkeypatch.setattr(chaos_table, "code_version", lambda: "the code of commit 1234567")
    assert not Results(path, resume=True).survived(GOOD.fault)


def test_the_page_says_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its text around the table stays, but for the line with the number of faults."""
    page = tmp_path / "reliability.md"
    page.write_text(
        "# Head\n| faults, in the table below | 99 | 99 | `make chaos` |\n"
        "<!-- table by make chaos -->\nold\n<!-- end of table -->\ntail\n"
    )
    monkeypatch.setattr(chaos_table, "PAGE", page)
    results = Results(tmp_path / "chaos.json", resume=False)
    results.add(GOOD)
    results.add(BAD)
    write_page(results.of(NAMES), "the code of commit 1234567")
    text = page.read_text()
    assert text.startswith("# Head\n| faults, in the table below | 2 | 1 | `make chaos` |\n<!--")
    assert text.endswith("<!-- end of table -->\ntail\n")
    assert "with the code of commit 1234567, and 1 of them were survived" in text
    assert "| kill -9 of rank 0 | JobError: rank 0 died | 1 | 3.0 | 1.5 | yes |" in text
    assert "| no: losses differ |" in text
    assert "old" not in text


PASSED = """<testcase name="a"><properties><property name="saw" value="JobError: rank 1"/>
<property name="steps_again" value="2"/><property name="recover_seconds" value="31.5"/></properties>
</testcase>"""
SKIPPED = '<testcase name="b"><skipped message="needs root"/></testcase>'
FAILED = '<testcase name="c"><failure message="assert 1 == 2">text</failure></testcase>'
HARMLESS = '<testcase name="d"/>'


@pytest.mark.parametrize(
    ("cases", "expected"),
    [
        (PASSED, Outcome("row", "JobError: rank 1", None, 2, 31.5)),
        (HARMLESS + SKIPPED, Outcome("row", "", None, None, None)),
        (SKIPPED, Outcome("row", "", None, None, None, skipped="needs root")),
        (PASSED + FAILED, Outcome("row", "", None, None, None, "assert 1 == 2")),
        ("", Outcome("row", "", None, None, None, "no such test")),
    ],
)
def test_a_test_fills_a_row(tmp_path: Path, cases: str, expected: Outcome):
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert read_report("row", report) == expected


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("launch/nodes.sh: 1 ranks here, on one of 2 machines\nJobError: rank 1 died", "JobError"),
        ("slurm.sbatch: 4 ranks on 2 nodes\nslurm.sbatch: time is nearly up", "slurm.sbatch: time"),
        ("slurm.sbatch: 4 ranks on 2 nodes", "slurm.sbatch: 4 ranks"),
        ("", "nothing"),
    ],
)
def test_the_table_shows_the_line_of_the_fault(message: str, line: str):
    assert Outcome("row", message, None, None, None).first_line.startswith(line)


def test_rows_name_tests_that_exist():
    for row in TESTED:
        file, _, function = row.test.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(), row


def test_skipped_rows_are_not_counted(tmp_path: Path):
    results = Results(tmp_path / "chaos.json", resume=False)
    results.add(GOOD)
    results.add(Outcome("SLURM: preempted", "", None, None, None, skipped="needs slurmd"))
    of = results.of([GOOD.fault, "SLURM: preempted"])
    text = chaos_table.table(of, "this code")
    assert text.startswith("1 faults were injected")
    assert "1 rows were skipped here." in text
    assert "| SLURM: preempted | nothing | - | - | - | skipped: needs slurmd |" in text
