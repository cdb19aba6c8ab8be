"""The reading order is the import order, and only config.py knows of command lines."""
import ast
import pathlib
import re
import subprocess
import sys

import pytest

import detr_min

FOLDER = pathlib.Path(detr_min.__file__).parent
LISTING = re.search(r"only from files above it:\n\n((?:    .+\n)+)", detr_min.__doc__).group(1)
ORDER = LISTING.split()                                         # boxes, attention, position, ...
FILES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def imports_of(name):
    """Everything a file imports, as dotted names from the top: "detr_min.boxes", "torch.nn", ..."""
    found = []
    for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            parts = (["detr_min"] if node.level else []) + ([node.module] if node.module else [])
            found += [".".join([*parts, alias.name]) for alias in node.names]
    return found


def own_imports_of(name):
    """Of these, the files of this package."""
    return [full.split(".")[1] for full in imports_of(name) if full.startswith("detr_min.")]


def test_the_listing_names_every_file_once():
    assert sorted(ORDER) == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_files_above_it(name):
    below = [other for other in own_imports_of(name) if ORDER.index(other) >= ORDER.index(name)]
    assert not below, f"{name}.py imports {below}, which come after it in detr_min/__init__.py"


@pytest.mark.parametrize("name", FILES)
def test_files_import_modules_not_names(name):
    """So that a call says where to look, and an exercise can swap a function."""
    for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.module is None, f"{name}.py line {node.lineno}: from . import {node.module}"


def test_the_two_decoders_never_import_one_another():
    assert "decoder_decoupled" not in own_imports_of("decoder_dac")
    assert "decoder_dac" not in own_imports_of("decoder_decoupled")


@pytest.mark.parametrize("name", ["matcher", "tal_loss", "align_loss"])
def test_matcher_and_class_losses_know_no_network(name):
    assert set(own_imports_of(name)) <= {"boxes", "tal_loss"}
    assert not {"torch.nn", "torch.nn.Module"} & set(imports_of(name))


@pytest.mark.parametrize("name", FILES)
def test_command_lines_belong_to_config_and_environment_variables_to_nobody(name):
    if name != "checkpoints":       # it lets the Namespace of published files through, no parser
        assert ("argparse" in imports_of(name)) == (name == "config")
    for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "environb", "getenv"), f"line {node.lineno}"
    assert not {"os.environ", "os.getenv"} & set(imports_of(name))


def test_import_is_quick():
    """`import detr_min` takes less than 3 s: it loads no network library before a file is used."""
    command = [sys.executable, "-c", "import detr_min"]
    subprocess.run(command, cwd=FOLDER.parent, check=True, timeout=3)
