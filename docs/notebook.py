"""Write the reading path as a Jupyter notebook: questions, code and the cases worked by hand.

    python docs/notebook.py             # docs/reading_path.ipynb

Nothing in it is written twice. Questions come from docs/reading_path.md; the code of an equation is
shown from the package when a cell runs; examples are the bodies of the tests whose names end in
`by_hand`. Write it anew after changing any of them.
"""
import ast
import json
import pathlib
import re
import sys
import textwrap

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from exercises.grading import catalogue  # noqa: E402
SETUP = '''import inspect
import pathlib
import sys

ROOT = next(p for p in [pathlib.Path.cwd(), *pathlib.Path.cwd().parents]
            if (p / "detr_min").is_dir())
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def show(*things):
    """Print the source of functions."""
    for thing in things:
        print(inspect.getsource(thing))'''


def steps():
    """The rows of the reading path: number, paper, files, question before, what one knows after."""
    text = (ROOT / "docs" / "reading_path.md").read_text(encoding="utf-8")
    text = text[text.index("## In order"):text.index("## Exercises")]
    for row in re.findall(r"^\| (\d+ \|.*) \|$", text, re.M):
        number, paper, files, _, question, after = map(str.strip, row.split(" | "))
        yield int(number), paper, re.findall(r"`(\w+)\.py`", files), question, after


def exercises():
    """{step: its exercises}, from the page's second table."""
    text = (ROOT / "docs" / "reading_path.md").read_text(encoding="utf-8")
    table = text[text.index("| step | exercise"):]
    return {int(step): cell for step, cell in
            re.findall(r"^\| (\d+) \| (\d+ .+?) \|", table, re.M)}


def functions(tree, path=()):
    """The functions of a parsed file and of its classes: (dotted name, node)."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from functions(node, (*path, node.name))
        elif isinstance(node, ast.FunctionDef):
            yield ".".join([*path, node.name]), node


def equations(module):
    """The functions of one of the papers' files whose docstring cites what they compute.

    Those that an exercise asks for are left out.
    """
    tree = ast.parse((ROOT / "detr_min" / f"{module}.py").read_text(encoding="utf-8"))
    return [f"{module}.{name}" for name, node in functions(tree)
            if f"{module}.{name}" not in catalogue.EXERCISES
            and re.search(r"\[[\w ]+(Eq|App|Alg|Sec)\. ", ast.get_docstring(node) or "")]


def examples(module):
    """The tests of a file that are worked by hand and take no argument: (about, code) each."""
    file = ROOT / "tests" / f"test_{module}.py"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    for name, node in functions(ast.parse(text)):
        if re.fullmatch(r"test_.*by_hand", name) and not node.args.args:
            rows = text.splitlines()[node.lineno:node.end_lineno]
            about = ast.get_docstring(node)
            if about:
                rows = rows[node.body[0].end_lineno - node.lineno:]
            yield (f"`tests/{file.name}::{name}` {about or ''}".strip(),
                   f"from test_{module} import *\n\n" + textwrap.dedent("\n".join(rows)))


def cells():
    """(kind, text) of all cells."""
    yield "markdown", ("# The reading path\n\nAnswer each question on paper, then run the cells "
                       "below it. Written by `docs/notebook.py` from `docs/reading_path.md`, the "
                       "package and its tests.")
    yield "code", SETUP
    tasks = exercises()
    for number, paper, modules, question, after in steps():
        yield "markdown", (f"## {number}. {paper}\n\nFiles: "
                           + ", ".join(f"`{module}.py`" for module in modules)
                           + f"\n\n**{question}**" * (question != "–"))
        if number in tasks:
            yield "markdown", (f"Exercises: {tasks[number]}; see `exercises/README.md`. The code "
                               "of these functions is not shown here.")
        for module in modules:
            names = equations(module) if (ROOT / "detr_min" / f"{module}.py").exists() else []
            if names:
                yield "code", f"from detr_min import {module}\n\nshow({', '.join(names)})"
            for about, code in examples(module):
                yield "markdown", about
                yield "code", code
        yield "markdown", f"You can now explain: {after}."


def notebook():
    """The notebook, in the format that Jupyter calls nbformat 4."""
    made = []
    for number, (kind, text) in enumerate(cells()):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {},
                "source": text.splitlines(keepends=True)}
        made.append({**cell, "execution_count": None, "outputs": []} if kind == "code" else cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"nbformat": 4, "nbformat_minor": 5, "cells": made,
            "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}}}


if __name__ == "__main__":
    out = pathlib.Path(sys.argv[1]) if sys.argv[1:] else ROOT / "docs" / "reading_path.ipynb"
    out.write_text(json.dumps(notebook(), indent=1) + "\n", encoding="utf-8")
    print(f"{out} written; open it with `jupyter lab {out}`")
