"""Write the files to fill in: signatures and docstrings of the package, bodies left to you.

    python exercises/stubs.py               # add what is missing in exercises/*.py
    python exercises/stubs.py FOLDER        # the same somewhere else, for a fresh start

What is there is never changed: a function that you wrote stays as it is.
"""
import ast
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
HERE = ROOT / "exercises"
sys.path[0] = str(ROOT)             # not exercises/, whose files have the names of the package's
from exercises.grading import catalogue  # noqa: E402
MY_TESTS = '''"""To fill in: exercise 12 of exercises/README.md. Graded by

    python exercises/kill.py matcher.one_to_many

or by another of the functions that `python exercises/kill.py` lists.
"""
import torch  # noqa: F401
from detr_min import matcher  # noqa: F401


def test_one_to_many():
    raise NotImplementedError("exercise 12: write tests that pass on matcher.one_to_many and fail "
                              "on every wrong version of it")
'''


def source_of(module):
    return (ROOT / catalogue.path(module)).read_text(encoding="utf-8")


def node_of(tree, path):
    """The function (or class) that a dotted path names in a parsed file, or None."""
    for name in path:
        tree = next((node for node in tree.body if getattr(node, "name", None) == name), None)
        if tree is None:
            return None
    return tree


def functions_of(module):
    """The exercises of one file of the package, as paths: [["DecoderLayer", "gather"], ...]"""
    return [name.split(".")[1:] for name in catalogue.EXERCISES if name.split(".")[0] == module]


def import_rows(node):
    """An import statement as one row, or as several if that is too long."""
    row, half = f"{ast.unparse(node)}  # noqa: F401", len(node.names) // 2
    if len(row) <= 100 or not half or isinstance(node, ast.Import):
        return [row]
    parts = [ast.ImportFrom(node.module, names, 0)
             for names in (node.names[:half], node.names[half:])]
    return [row for part in parts for row in import_rows(part)]


def imports(module, paths):
    """What a file needs that holds some of a module's functions: rows of import statements."""
    rows, tree, own = [], ast.parse(source_of(module)), set()
    dotted = catalogue.module(module)
    package, _, name = dotted.rpartition(".")
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:     # "from .." -> "from detr_min"
            outer = ".".join([*dotted.split(".")[:-node.level], *filter(None, [node.module])])
            node = ast.ImportFrom(outer, node.names, 0)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            rows += import_rows(node)
        own |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)
                and isinstance(n.ctx, ast.Store) and isinstance(node, ast.Assign)}
        own |= {getattr(node, "name", None)}
    used = {n.id for path in paths for n in ast.walk(node_of(tree, path))
            if isinstance(n, ast.Name)} & own
    here = {path[0] for path in paths}
    if used - here:
        rows.append(f"from {dotted} import {', '.join(sorted(used - here))}  # noqa: F401")
    if used & here:         # the package's, so that one exercise does not wait for another
        rows.append(f"from {package} import {name}  # noqa: F401")
    return rows


def header(module, folder=""):
    """Docstring and imports of a file to fill in; `folder` is its place, if not exercises/."""
    names = [".".join([module, *path]) for path in functions_of(module)]
    numbers = ", ".join(dict.fromkeys(str(catalogue.EXERCISES[name].number) for name in names))
    many = "s" * ("," in numbers)
    rows = [f'"""To fill in: exercise{many} {numbers} of exercises/README.md. Graded by', ""]
    where = f" --folder={folder}" * bool(folder)
    rows += [f"    pytest --mine {name}{where}" for name in names] + ['"""']
    return "\n".join(rows + imports(module, functions_of(module))) + "\n"


def stub(module, path):
    """A function's signature and docstring, word for word, and an error that says what to do."""
    node, name = node_of(ast.parse(source_of(module)), path), ".".join([module, *path])
    rows = source_of(module).splitlines()[node.lineno - 1:node.body[0].end_lineno]
    indent, exercise = " " * node.body[0].col_offset, catalogue.EXERCISES[name]
    rows.append(f"{indent}raise NotImplementedError(")
    rows.append(f'{indent}    "exercise {exercise.number}, {name}: "')
    rows.append(f'{indent}    "{exercise.todo}")')
    return "\n".join(rows) + "\n"


def is_stub(node):
    """Whether nobody wrote in a function yet: it only raises the error above."""
    last = ast.unparse(node.body[-1]).replace('"', "'")         # it quotes as it likes
    return len(node.body) == 2 and last.startswith("raise NotImplementedError('exercise ")


def is_untouched(text):
    """Whether a file holds imports and stubs and nothing else, no comment of a student's either."""
    nodes = []
    for node in ast.parse(text).body:
        nodes += node.body if isinstance(node, ast.ClassDef) else [node]
    comments = re.findall(r"^ *# (?!its other parts)", text, re.M)
    return not comments and all(
        isinstance(node, (ast.Import, ast.ImportFrom))
        or isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        or isinstance(node, ast.FunctionDef) and is_stub(node) for node in nodes)


def complete(module, text, folder=""):
    """A student's file with what is missing at the end of the file or of its class.

    A stub in which nothing was written follows its source, and so do the imports of a file that
    holds only such stubs.
    """
    if not text or is_untouched(text):
        text = header(module, folder)
    for path in functions_of(module):
        tree = ast.parse(text)
        node, rows = node_of(tree, path), text.splitlines()
        owner = node_of(tree, path[:-1]) if path[:-1] else None
        if node is not None and not is_stub(node):
            continue
        if node is not None:
            rows[node.lineno - 1:node.end_lineno] = stub(module, path).splitlines()
        elif owner is not None:
            rows[owner.end_lineno:owner.end_lineno] = ["", *stub(module, path).splitlines()]
        else:
            rows += ["", ""]
            for name in path[:-1]:
                rows += [f"class {name}:", f"    # its other parts: {catalogue.path(module)}", ""]
            rows += stub(module, path).splitlines()
        text = "\n".join(rows) + "\n"
    return text


def main(folder):
    """Write or complete each file; say in a sentence what was done."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "my_tests.py").exists():
        (folder / "my_tests.py").write_text(MY_TESTS, encoding="utf-8")
    for module in dict.fromkeys(name.split(".")[0] for name in catalogue.EXERCISES):
        file = folder / f"{module}.py"
        before = file.read_text(encoding="utf-8-sig") if file.exists() else ""
        try:
            after = complete(module, before, "" if folder == HERE else folder)
        except SyntaxError as error:
            print(f"{file} left alone: Python cannot read line {error.lineno}, {error.msg}")
            continue
        if after == before:
            print(f"{file} left alone: nothing is missing in it")
        else:
            file.write_text(after, encoding="utf-8")
            print(f"{file} {'completed, what was there is unchanged' if before else 'written'}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
