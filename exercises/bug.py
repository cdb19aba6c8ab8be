"""Exercise 11: get a function with a bug in it.

    python exercises/bug.py 3           # writes exercises/bug_3.py
    pytest --mine bug_3                 # red; mend the file until it is green

One line is wrong. Shapes are right, nothing crashes, and a detector trains with it, only worse.
"""
import pathlib
import sys
import textwrap

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)             # not exercises/, whose files have the names of the package's
from exercises import stubs  # noqa: E402
from exercises.grading import bank, catalogue  # noqa: E402


def text_of(name):
    """The file that is handed out."""
    mutant = bank.BUGS[name]
    module, *path = mutant.function.split(".")
    rows = [f'"""Bug {name[4:]} of exercise 11: one line of this function is not as it was in',
            f"{catalogue.path(module)}. Find it without looking there, mend it, and grade it with",
            "", f"    pytest --mine {name}", '"""', *stubs.imports(module, [path]), "", ""]
    source = mutant.source()
    if path[:-1]:
        rows += [f"class {path[0]}:", f"    # its other parts: {catalogue.path(module)}", ""]
        source = textwrap.indent(source, "    ")
    return "\n".join(rows) + "\n" + source


def main(words, folder=ROOT / "exercises"):
    """Write a file, say so in a sentence, return the exit status."""
    if len(words) != 1 or f"bug_{words[0]}" not in bank.BUGS:
        print(f"Say which: a number from 1 to {len(bank.BUGS)}")
        return 2
    file = folder / f"bug_{words[0]}.py"
    if file.exists():
        print(f"{file} is there already and stays as it is; delete it to begin again")
        return 1
    file.write_text(text_of(file.stem))
    print(f"{file} written; grade it with `pytest --mine {file.stem}`")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
