"""The notebook of the reading path: whole, in order, and every cell runs."""
import importlib.util
import json
import pathlib
import re

import pytest

from detr_min import decoder_dac
from exercises.grading import catalogue

ROOT = pathlib.Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("notebook", ROOT / "docs" / "notebook.py")
spec.loader.exec_module(notebook := importlib.util.module_from_spec(spec))


@pytest.fixture
def made():
    return json.loads(json.dumps(notebook.notebook()))


def text_of(cell):
    return "".join(cell["source"])


def test_each_step_has_its_question_and_its_worked_examples(made):
    """Eleven steps; step 5 has the C-Decoder's case by hand, but not its body, an exercise's."""
    steps, inside = {}, None
    for cell in made["cells"]:
        if text_of(cell).startswith("## "):
            inside = steps.setdefault(int(text_of(cell)[3:].split(".")[0]), [])
        elif inside is not None:
            inside.append(text_of(cell))
    assert list(steps) == list(range(1, 12))
    assert "Exercises: 6 the C-Decoder" in steps[5][0]
    assert "show(" in steps[5][1] and "decoder_dac.DACDecoder.o_decoder" in steps[5][1]
    shown = "".join(text for texts in steps.values() for text in texts if "show(" in text)
    assert not [name for name in catalogue.EXERCISES if re.search(rf"{name}[,)]", shown)]
    assert any("expected in zip(decoder.c_decoder(queries, memory)" in text for text in steps[5])
    for step, name in {1: "test_worked_by_hand", 4: "test_gather_worked_by_hand",
                       6: "test_quality_worked_by_hand", 7: "test_plain_decoder_worked_by_hand",
                       8: "test_split_decoder_worked_by_hand", 9: "test_points_worked_by_hand",
                       10: "test_target_by_hand"}.items():
        assert any(f"::{name}`" in text for text in steps[step]), name
    assert "**Without self-attention, what do" in "".join(map(text_of, made["cells"]))


def test_the_format_is_jupyters(made):
    assert (made["nbformat"], made["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in made["cells"]]
    assert len(ids) == len(set(ids)) > 60
    for cell in made["cells"]:
        assert set(cell) - {"id", "metadata", "cell_type", "source"} == (
            {"outputs", "execution_count"} if cell["cell_type"] == "code" else set())


def test_nbformat_finds_no_mistake(made):
    pytest.importorskip("nbformat", reason="pip install nbformat").validate(made)


@pytest.mark.slow
def test_every_cell_runs(made, monkeypatch, capsys):
    """One after the other in one namespace, as Jupyter runs them, from the folder docs."""
    monkeypatch.chdir(ROOT / "docs")
    names = {"__name__": "__main__"}
    for cell in made["cells"]:
        if cell["cell_type"] == "code":
            exec(compile(text_of(cell), cell["id"], "exec"), names)
    assert names["decoder_dac"] is decoder_dac and "[DAC Eq. 2]" in capsys.readouterr().out
