"""`pytest --mine matcher.match_quality`: a student's function takes the place of the package's.

The tests that check the package then grade the student. tests/conftest.py hands over to `Grader`.
"""
import difflib
import pathlib
import traceback
import types

import pytest

from exercises.grading import bank, catalogue

ROOT = pathlib.Path(__file__).parents[2]
TRAINING = ROOT / "exercises" / "grading" / "training.py"


def add_options(parser):
    """--mine and --folder."""
    group = parser.getgroup("exercises")
    group.addoption("--mine", action="append", default=[], metavar="MODULE.FUNCTION",
                    help="grade exercises/MODULE.py's FUNCTION in place of the package's, "
                         "or a mended bug: --mine bug_1")
    group.addoption("--folder", default=str(ROOT / "exercises"), metavar="FOLDER",
                    help="where the files to grade are, if not in exercises/ (written with =)")


def swap(original, function):
    """Let a function of the package run another one, wherever it is imported or kept in a table.

    Its code is exchanged for a call of `function`, so whoever holds the function calls the other.

    Returns:
        calls, a list that grows by an entry with each call; and a function that undoes it
    """
    calls, inside = [], []

    def call(*args, **kwargs):
        __tracebackhide__ = True
        if inside:
            raise RuntimeError(f"your {original.__qualname__} calls the package's, which yours "
                               "replaces now: write out what it does")
        calls.append(original.__qualname__)
        inside.append(True)
        try:
            return function(*args, **kwargs)
        finally:
            inside.clear()

    kept = original.__code__, original.__defaults__, original.__kwdefaults__
    key, shell = f"_mine_{id(call)}", {}
    exec(f"def {original.__name__}(*args, **kwargs):\n    __tracebackhide__ = True\n"
         f"    return {key}(*args, **kwargs)", shell)
    original.__globals__[key] = call
    original.__code__ = shell[original.__name__].__code__
    original.__defaults__ = original.__kwdefaults__ = None

    def undo():
        original.__code__, original.__defaults__, original.__kwdefaults__ = kept
        del original.__globals__[key]
    return calls, undo


def shown(path):
    """A path as a person in the repository's root would type it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def load(path):
    """A student's file as a module.

    Raises:
        pytest.UsageError: a sentence about a missing file, or one that Python cannot run
    """
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.py"))) or "no .py file"
        how = (f"python exercises/bug.py {path.stem[4:]}" if path.stem.startswith("bug_") else
               "python exercises/stubs.py")
        raise pytest.UsageError(f"{shown(path)} is missing; {shown(path.parent)} holds {there}. "
                                f"`{how}` writes it.")
    module = types.ModuleType(f"exercises_{path.stem}")
    module.__file__ = str(path)
    try:
        exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    except SyntaxError as error:
        raise pytest.UsageError(f"Python cannot read {shown(path)}, line {error.lineno}: "
                                f"{error.msg}: `{(error.text or '').strip()}`") from None
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__)
                 if f.filename == str(path)]
        raise pytest.UsageError(f"{shown(path)}, line {lines[-1] if lines else '?'} fails on "
                                f"import: {type(error).__name__}: {error}") from None
    return module


def numbers(excinfo):
    """What a failed assert_close compared, beside how far apart it is; "" for any other failure."""
    for entry in excinfo.traceback:
        if entry.frame.code.name == "assert_close":
            sides = (str(entry.frame.f_locals[name]) for name in ("actual", "expected"))
            return "\n".join(f"{name} {text[:1000]}{' ...' * (len(text) > 1000)}"
                             for name, text in zip(("found   ", "expected"), sides))
    return ""


class Work:
    """One function of a student's, and the tests that grade it."""

    def __init__(self, target, folder):
        known = [*catalogue.EXERCISES, *bank.BUGS]
        if target not in known:
            near = difflib.get_close_matches(target, known, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise pytest.UsageError(f"--mine {target} is no exercise.{hint} There are: "
                                    + ", ".join(known))
        self.target = target
        self.function = bank.BUGS[target].function if target in bank.BUGS else target
        self.exercise = catalogue.GRADED[self.function]
        name = target if target in bank.BUGS else target.split(".")[0]
        self.path = pathlib.Path(folder).resolve() / f"{name}.py"
        found, path = load(self.path), self.function.split(".")[1:]
        for depth, part in enumerate(path):
            if not hasattr(found, part):
                names = [n for n, thing in vars(found).items() if not n.startswith("_")
                         and isinstance(thing, (type, types.FunctionType))]
                raise pytest.UsageError(
                    f"{shown(self.path)} has no {'.'.join(path[:depth + 1])}; it has "
                    f"{', '.join(names) or 'nothing'}. `python exercises/stubs.py` adds what is "
                    "missing.")
            found = getattr(found, part)
        self.calls, self.undo = swap(catalogue.find(self.function), found)


class Grader:
    """The part of a test run that --mine adds."""

    def __init__(self, config):
        self.works, self.session, self.is_stub = [], None, False
        self.failed, self.skipped, self.passed = [], [], []
        try:
            for target in config.option.mine:
                self.works.append(Work(target, config.option.folder))
        except pytest.UsageError:
            self.pytest_unconfigure()
            raise
        if config.args_source is not config.ArgsSource.ARGS:
            config.args[:] = []
            for work in self.works:
                config.args += [str(ROOT / "tests" / test) for test in work.exercise.tests]
        config.args.append(f"{TRAINING}::test_a_tiny_detector_learns_through_it")
        if config.option.tbstyle == "auto":
            config.option.tbstyle = "short"
        config.option.maxfail = config.option.maxfail or 3      # more would bury the first

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

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.failed and numbers(call.excinfo):
            report.sections.append(("the numbers that were compared", numbers(call.excinfo)))
        return report

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)
            if "NotImplementedError: exercise" in report.longreprtext:
                self.session.shouldfail = "the function is still the stub"
                self.is_stub = True
        elif report.skipped:
            self.skipped.append(report.nodeid)
        elif report.when == "call":
            self.passed.append(report.nodeid)

    def complaints(self):
        """Why a run without a failure is still no pass."""
        if self.skipped:
            yield f"{len(self.skipped)} skipped, and a skip is no pass: {self.skipped[0]}"
        for work in self.works:
            if not work.calls and not self.failed:
                yield f"no test called {work.target}, so nothing was graded"

    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus == 0 and list(self.complaints()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        write = terminalreporter.write_line
        terminalreporter.section("exercises")
        for work in self.works:
            number = 11 if work.target in bank.BUGS else work.exercise.number
            write(f"exercise {number}, {work.target} of {shown(work.path)}: "
                  f"called {len(work.calls)} times")
        for complaint in self.complaints():
            write(f"NOT PASSED: {complaint}")
        if self.is_stub:
            write("It is still the stub: write its body, then run this again.")
        elif self.failed:
            by_hand = ": its comments do the arithmetic" * ("by_hand" in self.failed[0])
            write(f"Begin with {self.failed[0]}{by_hand}.")
        elif self.passed and not list(self.complaints()):
            for work in self.works:
                code = catalogue.find(work.function).__globals__["__file__"]
                write(f"Green. Now compare with {shown(pathlib.Path(code))}.")

    def pytest_unconfigure(self):
        for work in reversed(self.works):
            work.undo()
