"""Exercise 11: get a function with a bug in it.

    python exercises/bug.py 1           # writes exercises/bug_1.py
    pytest --mine bug_1                 # red; fix the file until it is green
    python exercises/bug.py 1 FOLDER    # elsewhere; graded with --folder=FOLDER

One line is wrong. Shapes are right, nothing crashes, and a detector trains with it, mostly worse.
Bugs 2 to 5 and 7 hold our solutions of exercises 5, 6, 7 and 9: do those first.
"""
import pathlib
import sys
import textwrap

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)             # not exercises/, whose files have the names of the package's
from exercises import stubs  # noqa: E402
from exercises.grading import bank, catalogue  # noqa: E402


def text_of(name, where=""):
    """The file that is handed out; `where` follows the command that grades it."""
    mutant = bank.BUGS[name]
    module, *path = mutant.function.split(".")
    rows = [f'"""Bug {name[4:]} of exercise 11: one line of this function is not as it was in',
            f"{catalogue.path(module)}. Find it without looking there, fix it, and grade it with",
            "", f"    pytest --mine {name}{where}", '"""', *stubs.imports(module, [path]), "", ""]
    source = mutant.source()
    if path[:-1]:
        rows += [f"class {path[0]}:", f"    # its other parts: {catalogue.path(module)}", ""]
        source = textwrap.indent(source, "    ")
    return "\n".join(rows) + "\n" + source


def main(words):
    """Write a file, say so in a sentence, return the exit status."""
    number, *place = words or [""]
    if len(place) > 1 or f"bug_{number}" not in bank.BUGS:
        print(f"Say which: a number from 1 to {len(bank.BUGS)}, and behind it a folder if you like")
        return 2
    folder, where = stubs.HERE, ""
    if place:
        folder, where = pathlib.Path(place[0]), f" --folder={place[0]}"
        folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"bug_{number}.py"
    if file.exists():
        print(f"{file} is there already and stays as it is; delete it to begin again")
        return 1
    file.write_text(text_of(file.stem, where), encoding="utf-8")
    print(f"{file} written; grade it with `pytest --mine {file.stem}{where}`")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
