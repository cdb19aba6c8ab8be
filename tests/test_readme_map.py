"""The README's map is true: every row's function exists, carries the tag, and its test exists."""
import importlib
import inspect
import pathlib
import re

import pytest

import detr_min

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ROWS = re.findall(r"^\| \[(DAC|SD) Eq\. (\d)\] \|(.*?)\|(.*?)\|(.*?)\|$", README, re.M)


def test_every_equation_of_both_papers_has_a_row():
    """DAC-DETR numbers its equations 1 to 4, SD-DETR 1 to 7."""
    equations = {(paper, int(number)) for paper, number, *_ in ROWS}
    assert equations == {("DAC", k) for k in range(1, 5)} | {("SD", k) for k in range(1, 8)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}{row[1]}")
def test_a_row_names_code_with_the_tag_and_a_test(row):
    paper, number, _, code, test = row
    assert code.strip() and test.strip()
    for name in re.findall(r"`([\w.]+)`", code):
        module, *path = name.split(".")
        found = importlib.import_module(f"detr_min.{module}")
        for part in path:
            found = getattr(found, part)
        tags = re.findall(rf"\[{paper} Eq\. (\d)(?:-(\d))?", inspect.getsource(found))
        assert any(int(a) <= int(number) <= int(b or a) for a, b in tags), f"{name} lacks the tag"
    for file, name in re.findall(r"`(test_\w+)\.py::(\w+)`", test):
        assert f"def {name}(" in (ROOT / "tests" / f"{file}.py").read_text()


def test_files_and_flags_that_the_readme_names_exist():
    for name in re.findall(r"`(\w+\.py)`", README):
        assert (ROOT / name).exists() or (ROOT / "detr_min" / name).exists() or (
            ROOT / "tests" / name).exists(), name
    flags = set(re.findall(r"--(\w+)", README))
    known = (ROOT / "detr_min" / "config.py").read_text() + (ROOT / "eval.py").read_text()
    known += (ROOT / "exercises" / "grading" / "mine.py").read_text()
    for flag in flags - {"nproc_per_node", "help"}:
        assert re.search(rf"\b{flag}\b", known), f"--{flag}"


def test_names_of_the_package_that_the_readme_mentions_exist():
    """`module.name`, `module.Class.method`, also as a call; `module.py` and .json are files."""
    modules, seen = {path.stem for path in (ROOT / "detr_min").glob("*.py")}, 0
    for module, names in re.findall(r"`(?:detr_min\.)?(\w+)\.(\w+(?:\.\w+)*)[`(]", README):
        if module not in modules or names in ("py", "json"):
            continue
        found, seen = importlib.import_module(f"detr_min.{module}"), seen + 1
        for name in names.split("."):
            assert hasattr(found, name), f"README names {module}.{names}, which does not exist"
            found = getattr(found, name)
    assert seen > 15


def test_the_reading_order_names_only_files_in_import_order():
    order = re.search(r"files above it:\n\n((?:    .+\n)+)", detr_min.__doc__).group(1).split()
    table = README[README.index("## Reading order"):README.index("## The map")]
    named = [n for n in re.findall(r"`(\w+)\.py`", table) if n in order]
    assert named == sorted(named, key=order.index)
