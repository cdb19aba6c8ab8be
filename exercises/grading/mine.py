"""`pytest --mine matcher.match_quality`: a student's function takes the place of the package's.

The tests that check the package then grade the student. tests/conftest.py hands over to `Grader`.
"""
import difflib
import pathlib

import pytest

from exercises.grading import bank, catalogue, handin, limits

ROOT = handin.ROOT
TRAINING = ROOT / "exercises" / "grading" / "training.py"
TRAINS = "test_a_tiny_detector_learns_through_it"
SECONDS = 60                    # for a test; the training may take five times as long


def add_options(parser):
    """--mine, --folder, --apart and --seconds."""
    group = parser.getgroup("exercises")
    group.addoption("--mine", action="append", default=[], metavar="MODULE.FUNCTION",
                    help="grade exercises/MODULE.py's FUNCTION in place of the package's, "
                         "or a mended bug: --mine bug_1")
    group.addoption("--folder", default=str(ROOT / "exercises"), metavar="FOLDER",
                    help="where the files to grade are, if not in exercises/ (written with =)")
    group.addoption("--apart", action="store_true",
                    help="with --mine: run the file in a process of its own, as exercises/grade.py "
                         "does; no training")
    group.addoption("--seconds", type=float, default=SECONDS, metavar="S",
                    help="with --mine: a test fails after so long")


def numbers(excinfo):
    """What a failed assert_close compared, beside how far apart it is; "" for any other failure."""
    for entry in excinfo.traceback:
        if entry.frame.code.name == "assert_close":
            sides = (str(entry.frame.f_locals[name]) for name in ("actual", "expected"))
            return "\n".join(f"{name} {text[:1000]}{' ...' * (len(text) > 1000)}"
                             for name, text in zip(("found   ", "expected"), sides))
    return ""


class Work:
    """One function of a student's, the tests that grade it, and what they came to."""

    def __init__(self, target, folder, is_apart=False, seconds=SECONDS):
        known = [*catalogue.EXERCISES, *bank.BUGS]
        if target not in known:
            near = difflib.get_close_matches(target, known, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise pytest.UsageError(f"--mine {target} is not an exercise.{hint} There are: "
                                    + ", ".join(known))
        self.target = target
        self.function = bank.BUGS[target].function if target in bank.BUGS else target
        self.exercise = catalogue.GRADED[self.function]
        self.number = 11 if target in bank.BUGS else self.exercise.number
        name = target if target in bank.BUGS else target.split(".")[0]
        self.path = handin.inside(pathlib.Path(folder).resolve()) / f"{name}.py"
        self.passed, self.failed, self.calls = [], [], []
        self.is_stub = self.is_late = False
        self.undo = self.stop = lambda: None
        if is_apart:
            from exercises.grading import apart     # needs Linux or a Mac
            self.yours = apart.Apart(self.path, self.function, min(seconds, apart.SECONDS),
                                     apart.MEMORY_MB)
            self.stop = self.yours.stop
        else:
            with limits.time_limit(seconds, f"the import of {handin.shown(self.path)}"):
                self.yours = handin.function_of(self.path, handin.text_of(self.path),
                                                self.function.split(".")[1:])

    def begin(self):
        """Put the function in the place of the package's."""
        self.calls, self.undo = handin.swap(catalogue.find(self.function), self.yours)

    def owns(self, test):
        """Whether a test, by its nodeid, is one of those that grade this function."""
        name = test.rpartition("tests/")[2]
        return (f"{TRAINS}[{self.target}]" in test
                or any(name == mine or name.startswith(f"{mine}[") for mine in self.exercise.tests))


class Grader:
    """The part of a test run that --mine adds."""

    def __init__(self, config):
        option = config.option
        self.works, self.skipped, self.session = [], [], None
        self.seconds, self.before = option.seconds, {}
        self.is_elsewhere = pathlib.Path(option.folder).resolve() != ROOT / "exercises"
        self.most = option.maxfail or 3             # failures of a function; more bury the first
        try:
            for target in dict.fromkeys(option.mine):
                self.works.append(Work(target, option.folder, option.apart, option.seconds))
        except pytest.UsageError:
            self.pytest_unconfigure()
            raise
        for work in self.works:
            work.begin()
        if config.args_source is not config.ArgsSource.ARGS:
            config.args[:] = dict.fromkeys(str(ROOT / "tests" / test) for work in self.works
                                           for test in work.exercise.tests)
        if not option.apart:
            config.args.append(f"{TRAINING}::{TRAINS}")
        if option.tbstyle == "auto":
            option.tbstyle = "short"

    def pytest_collection_modifyitems(self, config, items):
        """Long tests are left out, visibly; elsewhere they are skipped, which is no pass here."""
        if not config.option.markexpr:
            slow = [item for item in items if item.get_closest_marker("slow")]
            items[:] = [item for item in items if item not in slow]
            config.hook.pytest_deselected(items=slow)

    def pytest_collectreport(self, report):
        if report.skipped:
            self.skipped.append(report.nodeid)

    def pytest_sessionstart(self, session):
        self.session = session

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item, nextitem):
        """A test of functions that are stubs or have failed enough is passed over."""
        owners = [work for work in self.works if work.owns(item.nodeid)]
        if owners and all(work.is_stub or work.is_late or len(work.failed) >= self.most
                          for work in owners):
            item.session._setupstate.teardown_exact(nextitem)
            return True
        self.before = {work.target: len(work.calls) for work in self.works}
        return None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        seconds = self.seconds * (5 if TRAINS in item.nodeid else 1)
        with limits.time_limit(seconds, item.name):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.failed and numbers(call.excinfo):
            report.sections.append(("the numbers that were compared", numbers(call.excinfo)))
        return report

    def owners(self, report):
        """The functions that a report is about: those that were called, or whose stub was."""
        for work in self.works:
            stub = f"NotImplementedError: exercise {work.number}, {work.target}:"
            if stub in report.longreprtext:
                return [work]
        listed = [work for work in self.works if work.owns(report.nodeid)]
        called = [work for work in self.works if len(work.calls) > self.before[work.target]]
        if TRAINS in report.nodeid or report.failed and not called:
            return listed
        return called

    def pytest_runtest_logreport(self, report):
        if report.skipped:
            self.skipped.append(report.nodeid)
        for work in self.owners(report):
            if report.failed:
                work.failed.append(report.nodeid)
                work.is_stub |= "NotImplementedError: exercise" in report.longreprtext
                work.is_late |= limits.LATE in report.longreprtext
            elif report.passed and report.when == "call":
                work.passed.append(report.nodeid)

    def complaints(self):
        """Why a run without a failure is still no pass."""
        if self.skipped:
            yield f"{len(self.skipped)} skipped, and a skip is no pass: {self.skipped[0]}"
        for work in self.works:
            if not work.calls and not any(work.failed for work in self.works):
                yield f"no test called {work.target}, so nothing was graded"

    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus == 0 and list(self.complaints()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        write, complaints = terminalreporter.write_line, list(self.complaints())
        terminalreporter.section("exercises")
        for work in self.works:
            write(f"exercise {work.number}, {work.target} of {handin.shown(work.path)}: "
                  f"{len(work.passed)} passed, {len(work.failed)} failed, "
                  f"calls: {len(work.calls)}")
            if work.is_stub:
                elsewhere = "" if self.is_elsewhere else (
                    " If your work is in another folder, add --folder=FOLDER.")
                write(f"It is still the stub: write its body, then run this again.{elsewhere}")
            elif work.failed:
                by_hand = ": its comments do the arithmetic" * ("by_hand" in work.failed[0])
                write(f"Begin with {work.failed[0]}{by_hand}.")
            elif work.passed and not complaints:
                code = catalogue.find(work.function).__globals__["__file__"]
                write(f"Green. Now compare with {handin.shown(pathlib.Path(code))}.")
        for complaint in complaints:
            write(f"NOT PASSED: {complaint}")

    def pytest_unconfigure(self):
        for work in reversed(self.works):
            work.undo()
            work.stop()
