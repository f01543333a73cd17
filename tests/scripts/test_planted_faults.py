"""The script that plants faults: its table is true of the code, and it tells caught from missed."""

import dataclasses
import json

import planted_faults as script
import pytest

FAULTS = script.read_faults()

ADDS = script.Fault("adds", "sums.py", "a + b", "a - b", ("test_sums.py",))


@pytest.fixture
def tree(tmp_path):
    """A repository of one function and its test, which knows positive numbers only."""
    (tmp_path / "sums.py").write_text("def total(a, b):\n    return abs(a + b)\n")
    (tmp_path / "test_sums.py").write_text(
        "from sums import total\n\ndef test_total():\n    assert total(2, 3) == 5\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = nightly\n")
    return tmp_path


def test_faults_fit_the_code():
    """Each has its old text once, and names tests that exist."""
    problems = []
    for fault in FAULTS:
        try:
            script.planted((script.ROOT / fault.file).read_text(), fault)
        except (OSError, ValueError) as error:
            problems.append(str(error))
        for test in fault.tests:
            file, _, name = test.partition("::")
            path = script.ROOT / file
            if not path.is_file() or f"def {name}" not in path.read_text():
                problems.append(f"{fault.name}: no test {test}")
    assert problems == []


def test_each_fault_has_a_name_of_its_own():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_a_fault_that_a_test_sees_is_caught_and_taken_out_again(tree):
    before = (tree / "sums.py").read_text()
    outcome = script.run_fault(tree, ADDS)
    assert (outcome.caught, outcome.by) == (True, "test_sums.py::test_total")
    assert (tree / "sums.py").read_text() == before
    assert script.run_tests(tree, ADDS.tests) == ""


def test_a_fault_that_no_test_sees_is_missed(tree):
    outcome = script.run_fault(tree, dataclasses.replace(ADDS, old="abs(a + b)", new="a + b"))
    assert not outcome.caught
    assert "MISSED  adds" in script.table([outcome])
    assert "0 of 1 planted faults are caught" in script.table([outcome])


def test_a_run_that_was_stopped_goes_on_with_the_faults_that_are_left(tree, tmp_path):
    """The journal of a run that got to the second fault; the third has changed since."""
    faults = [dataclasses.replace(ADDS, name=name) for name in ("first", "second", "third")]
    journal = tmp_path / "journal"
    outcome = script.Outcome("first", "sums.py", True, "test_sums.py::test_total", 0.5)
    for fault in (faults[0], dataclasses.replace(faults[2], new="a * b")):
        script.append_to_journal(journal, fault, dataclasses.replace(outcome, name=fault.name))
    assert script.read_journal(journal, faults) == {"first": outcome}
    assert script.read_journal(tmp_path / "none", faults) == {}


def test_a_stopped_run_is_finished(tree, tmp_path, monkeypatch, capsys):
    """Only the fault that the journal lacks is planted; the table has both."""
    for command in (["init", "-q"], ["add", "."], ["config", "user.email", "@"]):
        script.git(tree, *command)
    script.git(tree, "-c", "user.name=t", "commit", "-qm", "A sum")
    other = dataclasses.replace(ADDS, name="other")
    faults = tmp_path / "faults.json"
    faults.write_text(json.dumps([dataclasses.asdict(fault) for fault in (ADDS, other)]))
    journal, table = tmp_path / "journal", tmp_path / "table"
    kept = script.Outcome(ADDS.name, ADDS.file, True, "kept", 1.0)
    script.append_to_journal(journal, ADDS, kept)
    arguments = ["--root", tree, "--faults", faults, "--journal", journal, "--output", table]
    assert script.main([str(argument) for argument in arguments]) == 0
    lines = table.read_text().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("caught")] == ["adds", "other"]
    assert lines[3].endswith("kept") and lines[4].endswith("test_sums.py::test_total")
    assert script.git(tree, "describe", "--always").strip() in lines[1]
    assert [json.loads(line)["name"] for line in journal.read_text().splitlines()] == [
        "adds",
        "other",
    ]
    assert capsys.readouterr().err.count("caught") == 1


def test_a_text_that_is_not_there_once_is_an_error():
    with pytest.raises(ValueError, match="'a' 2 times, not once"):
        script.planted("a b a", dataclasses.replace(ADDS, old="a"))


def test_a_test_that_does_not_exist_is_an_error(tree):
    with pytest.raises(ValueError, match="test_nothing.py"):
        script.run_tests(tree, ["test_nothing.py"])
