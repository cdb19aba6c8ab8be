"""Exercise 12: grade tests by the mistakes they notice.

    python exercises/kill.py                              # which functions there are
    python exercises/kill.py matcher.one_to_many          # grade exercises/my_tests.py
    python exercises/kill.py matcher.one_to_many FILE     # grade another file

The tests first have to pass on the function as it is. Then they run once for each mutant, which is
the function with one line replaced by a plausible wrong one, and have to fail. Exit status 0 only
when every mutant is killed. A test that takes more than a minute has failed. This is a self-check:
exercises/lecturers.md says what it does not prevent.
"""
import contextlib
import io
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)             # not exercises/, whose files have the names of the package's
import pytest  # noqa: E402
import torch  # noqa: E402

from exercises.grading import bank, catalogue, handin, limits  # noqa: E402


SECONDS = 60                # for a test, and for the import of their file


class Outcome:
    """What one run of a test file came to."""

    def __init__(self):
        self.passed = self.failed = self.skipped = self.errors = self.asked = 0
        self.reason = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector):
        with limits.time_limit(SECONDS, f"the import of {collector.name}"):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        with limits.time_limit(SECONDS, item.name):
            return (yield)

    def pytest_collection_finish(self, session):
        self.asked = len(session.items)

    def pytest_collectreport(self, report):
        self.errors += report.failed
        self.skipped += report.skipped
        self.note(report)

    def pytest_runtest_logreport(self, report):
        self.failed += report.failed
        self.skipped += report.skipped
        self.passed += report.passed and report.when == "call"
        self.note(report)

    def note(self, report):
        """Remember the first failure's last lines."""
        if report.failed and not self.reason:
            self.reason = report.longreprtext.strip()[-800:]


def run(file):
    """The tests of a file, imported afresh."""
    outcome = Outcome()
    sys.modules.pop(file.stem, None)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        outcome.status = pytest.main(
            [str(file), "--noconftest", "--import-mode=importlib", f"--rootdir={file.parent}",
             "--tb=short", "-p", "no:cacheprovider", "-p", "no:unraisableexception"],
            plugins=[outcome])
    return outcome


def complaint(outcome):
    """Why tests cannot grade anything, in a sentence; "" if they can."""
    if outcome.errors:
        return f"the file cannot be run:\n{outcome.reason}"
    if outcome.failed:
        return ("they fail on the function as it is, so they prove nothing about mutants:\n"
                + outcome.reason)
    if outcome.skipped:
        return f"skipped or expected to fail, which is no pass: {outcome.skipped} of its tests"
    if not outcome.passed:
        return "the file holds no test: a function whose name begins with test_"
    if outcome.passed != outcome.asked or outcome.status != 0:
        return f"only {outcome.passed} of the {outcome.asked} tests were run to their end"
    return ""


def grade(function, file):
    """Print what is killed and what survives. Returns the exit status."""
    first = complaint(run(file))
    if first:
        print(f"Not graded, {file.name}: {first}")
        return 1
    mutants, killed = [m for m in bank.MUTANTS if m.function == function], 0
    for mutant in mutants:
        calls, undo = handin.swap(catalogue.find(function), mutant.make())
        try:
            outcome = run(file)
        finally:
            undo()
        is_killed = outcome.failed > 0
        killed += is_killed
        why = "" if is_killed or calls else "   (your tests never called the function)"
        print(f"{'killed  ' if is_killed else 'SURVIVED'}  {mutant.mistake}{why}")
    if complaint(run(file)):
        print("Not graded: run again on the function as it is, the tests fail, so chance decides")
        return 1
    print(f"{killed} of {len(mutants)} mutants of {function} killed")
    return 0 if killed == len(mutants) else 1


def main(words):
    functions = list(dict.fromkeys(mutant.function for mutant in bank.MUTANTS))
    if not 1 <= len(words) <= 2 or words[0] not in functions:
        print(f"{words[0]} has no mutants. " if words else "", end="")
        print(f"There are mutants of: {', '.join(functions)}")
        return 2
    file = pathlib.Path(words[1]).resolve() if words[1:] else ROOT / "exercises" / "my_tests.py"
    if not file.is_file():
        print(f"{file} is missing: write your tests there")
        return 2
    torch.set_num_threads(1)
    return grade(words[0], file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
