"""The reading order is the import order: the papers' files need no other folder, nothing needs run.

Each folder lists its files in the docstring of its __init__.py; that listing is the rule.
"""
import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import detr_min

ROOT = pathlib.Path(detr_min.__file__).parent
FOLDERS = "", "data", "release", "run"                          # "" is the papers'
MAY_IMPORT = {"": {""}, "data": {"", "data"}, "release": {"", "data", "release"},
              "run": {"", "data", "release", "run"}}


def tree_of(folder, name):
    return ast.parse((ROOT / folder / f"{name}.py").read_text())


def listed(folder):
    """The files that a folder's docstring lists, in its order; remarks in brackets are none."""
    text = ast.get_docstring(tree_of(folder, "__init__"), clean=False)
    listing = re.search(r"\n\n((?:    .+\n?)+)", text).group(1)          # the first indented block
    return re.sub(r"\(.*?\)", "", listing).split()


ORDER = {folder: listed(folder) for folder in FOLDERS}
FILES = [(folder, path.stem) for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))
         if path.stem != "__init__"]
each_file = pytest.mark.parametrize("folder, name", FILES)


def own_imports(folder, name):
    """The package's files that a file imports: [(folder, name)]; and what is no module, by line."""
    found, names = [], []
    for node in ast.walk(tree_of(folder, name)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("detr_min") for alias in node.names), node.lineno
        if isinstance(node, ast.ImportFrom) and node.level:
            is_up = node.level == (2 if folder else 1)          # from the top folder
            base = [folder] * (not is_up) + (node.module or "").split(".") * bool(node.module)
            for alias in node.names:
                *path, last = [part for part in base if part] + [alias.name]
                place = "/".join(path), last
                (found if place in FILES else names).append(place)
    return found, names


def outside_imports(folder, name):
    """What a file imports from elsewhere, as dotted names: "torch.nn", "os.environ", ..."""
    found = set()
    for node in ast.walk(tree_of(folder, name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_listing_names_every_file_once(folder):
    assert sorted(ORDER[folder]) == [name for where, name in FILES if where == folder]


@each_file
def test_a_file_imports_only_files_above_it(folder, name):
    """The papers' only papers; data and release papers and their own; run all of these."""
    for where, other in own_imports(folder, name)[0]:
        assert where in MAY_IMPORT[folder], f"{where}/{other}"
        if where == folder:
            assert ORDER[folder].index(other) < ORDER[folder].index(name), f"{other} comes after it"


@each_file
def test_files_import_modules_not_names(folder, name):
    """So that a call says where to look, and an exercise can swap a function."""
    assert not own_imports(folder, name)[1]


def test_only_load_imports_run_and_not_before_it_is_called():
    tree = tree_of("", "__init__")
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    [load] = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert [ast.unparse(node) for node in imports] == ["from .run import predictor"]
    assert load.name == "load" and imports[0] in load.body


def test_the_decoders_of_the_two_papers_never_import_one_another():
    dac, decoupled = ["decoder_dac"], [n for n in ORDER[""] if n.startswith("decoder_decoupled")]
    assert decoupled
    for names, others in ((dac, decoupled), (decoupled, dac)):
        for name in names:
            assert not {("", other) for other in others} & set(own_imports("", name)[0]), name


@pytest.mark.parametrize("name", ["matcher", "tal_loss"])
def test_matcher_and_tal_loss_know_no_network(name):
    assert set(own_imports("", name)[0]) <= {("", "boxes")}
    assert not {"torch.nn", "torch.nn.Module"} & outside_imports("", name)


@each_file
def test_command_lines_belong_to_config_and_environment_variables_to_nobody(folder, name):
    """contents.py lets the Namespace of published files through and makes no parser."""
    imports = outside_imports(folder, name)
    allowed = ("run", "config"), ("run", "contents")
    assert "argparse" not in imports or (folder, name) in allowed
    assert not {"os.environ", "os.environb", "os.getenv"} & imports
    for node in ast.walk(tree_of(folder, name)):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "environb", "getenv"), f"line {node.lineno}"
            assert node.attr != "ArgumentParser" or name == "config", f"line {node.lineno}"


def test_import_is_quick():
    """`import detr_min` takes less than a second: it loads no torch before a file is used."""
    code = ("import sys, time; start = time.perf_counter(); import detr_min; "
            "print(time.perf_counter() - start, 'torch' in sys.modules)")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, check=True, text=True,
                         capture_output=True)
    seconds, has_torch = run.stdout.split()
    assert float(seconds) < 1 and has_torch == "False"


def test_an_installed_copy_has_every_folder_and_the_page():
    text = (ROOT.parent / "pyproject.toml").read_text()
    packages = re.search(r"packages = (\[.*?\])", text)[1]
    assert ast.literal_eval(packages) == [f"detr_min.{name}".rstrip(".") for name in FOLDERS]
    others = {f"{path.parent.name}/{path.name}" for path in ROOT.rglob("*.*")
              if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others == {"run/explorer.html"} and '{"detr_min.run" = ["explorer.html"]}' in text


@pytest.mark.slow
def test_a_program_elsewhere_can_import_an_installed_copy(tmp_path):
    """Installed from a copy, as building leaves folders behind; without its dependencies."""
    copy, site = tmp_path / "clone", tmp_path / "site"
    shutil.copytree(ROOT, copy / "detr_min")
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT.parent / name, copy)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps",
                    "--no-build-isolation", "--target", site, copy], check=True)
    code = "import detr_min; from detr_min.run import explore; print(detr_min.__file__)"
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, check=True,
                          stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(site)})
    assert told.stdout.strip() == str(site / "detr_min" / "__init__.py")
    assert (site / "detr_min" / "run" / "explorer.html").is_file()
