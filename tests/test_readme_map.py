"""The README's map is true: every row's function exists, carries the tag, and its test exists."""
import importlib
import inspect
import pathlib
import re

import pytest
import test_imports

from detr_min.run import config

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
    files = {path.name for folder in (ROOT, ROOT / "detr_min", ROOT / "tests")
             for path in folder.glob("*.py")}
    assert set(re.findall(r"`(\w+\.py)`", README)) <= files
    known = {field.name for field in config.FLAGS} | {"help"}
    for program in (ROOT / "eval.py", ROOT / "studies" / "__main__.py"):
        known |= set(re.findall(r'add_argument\("--(\w+)"', program.read_text()))
    assert set(re.findall(r"--(\w+)", README)) <= known


def test_the_reading_order_names_every_paper_file_in_import_order():
    order = test_imports.listed("")
    table = README[README.index("## Reading order"):README.index("## What else it does")]
    named = [name for name in re.findall(r"`(\w+)\.py`", table) if name in order]
    skipped = {"decoder_decoupled_deformable"}                      # the port, in neither paper
    assert set(named) == set(order) - skipped
    assert len(named) == len(set(named))


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 150
