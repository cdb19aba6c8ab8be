"""A student's file: read, run, and one of its functions put in the place of the package's."""
import pathlib
import traceback
import types

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LONGEST = 2 ** 20           # bytes of a hand-in's file
UNDO = []                   # how to undo each swap that is in force


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
        UNDO.remove(undo)
    UNDO.append(undo)
    return calls, undo


def shown(path):
    """A path as a person in the repository's root would type it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def inside(folder):
    """Where a hand-in's files are: `mine` is often handed in as a folder in a folder."""
    while folder.is_dir() and not list(folder.glob("*.py")):
        within = [f for f in folder.iterdir() if f.is_dir() and f.name[0] not in "._"]
        if len(within) != 1:
            break
        folder = within[0]
    return folder


def text_of(path):
    """What a student's file holds.

    Raises:
        pytest.UsageError: a sentence about a file that is missing, too long or no text
    """
    if not path.is_file():
        if inner := next(path.parent.glob(f"*/{path.name}"), None):
            raise pytest.UsageError(f"{shown(path)} is missing, but {shown(inner)} is there: move "
                                    f"what {shown(inner.parent)} holds up into "
                                    f"{shown(path.parent)}.")
        if not path.parent.is_dir():
            raise pytest.UsageError(f"there is no folder {shown(path.parent)}")
        if path.with_suffix(".ipynb").exists():
            raise pytest.UsageError(f"{shown(path)} is missing; the notebook beside it cannot be "
                                    f"graded: its functions belong into {path.name}")
        if archive := next(path.parent.glob("*.zip"), None):
            raise pytest.UsageError(f"{shown(path)} is missing; {shown(archive)} is to be unpacked")
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.py"))) or "no .py file"
        how = (f"python exercises/bug.py {path.stem[4:]}" if path.stem.startswith("bug_") else
               "python exercises/stubs.py")
        raise pytest.UsageError(f"{shown(path)} is missing; {shown(path.parent)} holds {there}. "
                                f"`{how}` writes it.")
    if path.stat().st_size > LONGEST:
        raise pytest.UsageError(f"{shown(path)} has {path.stat().st_size} bytes; is it a program?")
    try:
        return path.read_text(encoding="utf-8-sig")             # Notepad writes a mark before it
    except UnicodeDecodeError as error:
        raise pytest.UsageError(f"{shown(path)} is no text in UTF-8: {error.reason} at byte "
                                f"{error.start}") from None


def load(path, text):
    """Run a student's file as a module.

    Raises:
        pytest.UsageError: a sentence about a file that Python cannot run
    """
    module = types.ModuleType(f"exercises_{path.stem}")
    module.__file__ = str(path)
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    except SyntaxError as error:
        raise pytest.UsageError(f"Python cannot read {shown(path)}, line {error.lineno}: "
                                f"{error.msg}: `{(error.text or '').strip()}`") from None
    except (Exception, SystemExit, pytest.fail.Exception) as error:
        raise pytest.UsageError(f"{shown(path)}, line {line_of(path, error)} fails on import: "
                                f"{type(error).__name__}: {error}") from None
    return module


def line_of(path, error):
    """The last line of a file that an error went through, or "?"."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return lines[-1] if lines else "?"


def function_of(path, text, names):
    """A student's function: names are ["DACDecoder", "c_decoder"] or ["match_quality"].

    Raises:
        pytest.UsageError: a sentence about a file that Python cannot run or that lacks it
    """
    found = load(path, text)
    for depth, name in enumerate(names):
        if not hasattr(found, name):
            there = [n for n, thing in vars(found).items() if not n.startswith("_")
                     and isinstance(thing, (type, types.FunctionType))]
            raise pytest.UsageError(
                f"{shown(path)} has no {'.'.join(names[:depth + 1])}; it has "
                f"{', '.join(there) or 'nothing'}. `python exercises/stubs.py` adds what is "
                "missing.")
        found = getattr(found, name)
    return found
