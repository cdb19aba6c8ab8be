"""How many of its tests a hand-in passes, and why it fails the others. exercises/grade.py calls it.
"""
import contextlib
import io
import re

import pytest
import torch

from exercises.grading import apart, bank, catalogue, handin

ROOT = handin.ROOT
PREFIX = r"^\S*Gone: |^AssertionError: Tensor-likes are not close! "      # says nothing
PYTEST = ["-p", "no:cacheprovider", "-p", "no:unraisableexception", "--maxfail=100000", "--tb=line"]


class Outcome:
    """How many tests a run was asked for, and why those that failed did."""

    def __init__(self):
        self.items, self.works, self.failed = [], [], {}

    def pytest_collection_finish(self, session):
        self.items = [item.nodeid for item in session.items
                      if not item.get_closest_marker("slow")]

    def pytest_sessionfinish(self, session):
        grader = session.config.pluginmanager.get_plugin("grader")
        self.works = grader.works if grader else []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.failed:
            text = " ".join(call.excinfo.exconly().split())
            self.failed[item.name] = re.sub(PREFIX, "", text)[:200]
        return report

    def reasons(self):
        """The tests that failed for one reason, and the reason."""
        tests = {}
        for name, text in self.failed.items():
            tests.setdefault(text, []).append(name)
        return [f"{', '.join(names)}: {text}" for text, names in tests.items()]


def run(words):
    """pytest in this process. -> its Outcome, what it said in stderr"""
    outcome, said = Outcome(), io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        pytest.main([*PYTEST, *words], plugins=[outcome])
    return outcome, " ".join(said.getvalue().split()).removeprefix("ERROR: ")


def tests_of(target):
    function = bank.BUGS[target].function if target in bank.BUGS else target
    return [str(ROOT / "tests" / test) for test in catalogue.GRADED[function].tests]


def numbers_of_tests(targets):
    """{target: how many tests grade it}; the test files are imported on the way."""
    return {target: len(run(["--collect-only", *tests_of(target)])[0].items) for target in targets}


def grade(folder, target, total, memory_mb):
    """-> points, of how many, and why not all of them.

    A test counts only if it has run, has called the student's function and has passed.
    """
    torch.set_num_threads(1)
    apart.MEMORY_MB = memory_mb
    outcome, said = run(["--mine", target, f"--folder={folder}", "--apart"])
    if not outcome.works:
        return 0, total, said or "pytest could not run"
    work, points = outcome.works[0], len(set(outcome.works[0].passed))
    if work.is_stub:
        return points, total, "still the stub"
    missing = total - points - len(outcome.failed)
    reasons = outcome.reasons() + [f"{missing} not run, or without a call of it"] * (missing > 0)
    return points, total, " | ".join(reasons)
