"""Grading a class: whatever a hand-in does in its process, only right answers are points.

Right answers are in tests/answers. A cheat that does something in the call then answers rightly, so
that it would get the points if it were let.
"""
import csv
import pathlib
import sys

import pytest
import torch
from torch.testing import assert_close

from exercises import grade
from exercises.grading import apart, bank, catalogue, messages, points

ROOT = pathlib.Path(__file__).parents[1]
ANSWERS = ROOT / "tests" / "answers"
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or torch.cuda.is_available(),
    reason="needs Linux; a process that has used a GPU cannot fork")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def graded(folder, target, total=99):
    return points.grade(folder, target, total, memory_mb=512)


# --- answers, gradients and errors come back as if the function ran here --------------------------

EXAMPLE = """
import torch
def aligned_target(x, y):
    if x is None:
        raise ValueError("no x")
    y.add_(1)
    return {"a": (x ** 2, [y.long(), None]), "b": x.detach()}
"""


@pytest.fixture
def example(tmp_path):
    file = tmp_path / "tal_loss.py"
    file.write_text(EXAMPLE)
    there = apart.Apart(file, "tal_loss.aligned_target", 20, 512)
    yield there
    there.stop()


def test_a_function_apart_is_the_function(example):
    """Values, structure, changed arguments, errors; the gradient of x ** 2 is 2 x, both times."""
    x, y = torch.tensor([3., 4.], requires_grad=True), torch.tensor(0.5)
    found = example(x, y=y)
    squares, (ones, nothing) = found["a"]
    assert_close(squares, torch.tensor([9., 16.]))
    assert_close(ones, torch.tensor(1))
    assert nothing is None and y == 1.5, "y was changed there and has to change here"
    assert squares.requires_grad and not found["b"].requires_grad
    for _ in range(2):
        [gradient] = torch.autograd.grad(squares.sum(), [x], retain_graph=True)
        assert_close(gradient, torch.tensor([6., 8.]))
    with torch.no_grad():
        assert not example(x, y)["a"][0].requires_grad
    with pytest.raises(ValueError, match=r"no x \(tal_loss.py, line 5\)"):
        example(None, y)


@pytest.mark.parametrize("tensor", [
    torch.tensor([[1, 2], [3, 4]])[:, 1], torch.zeros(0, 3), torch.tensor(True),
    torch.ones(2, 1).double().expand(2, 3), torch.tensor([1.5], dtype=torch.bfloat16)],
    ids=["strided", "empty", "bool", "expanded", "bfloat16"])
def test_a_message_keeps_its_tensors(tensor):
    header, [found] = messages.decode(messages.encode({"a": 1}, [tensor]))
    assert header == {"a": 1}
    assert_close(found, tensor, atol=0, rtol=0)


QUICK = ["matcher.match_quality", "decoder_dac.DACDecoder.c_decoder", "attention.neighbours"]
LONG = [name for name in catalogue.EXERCISES if name not in QUICK]


@pytest.mark.parametrize("target", QUICK + [pytest.param(name, marks=pytest.mark.slow)
                                            for name in LONG])
def test_right_answers_get_all_points(target):
    """Each test that grades an exercise calls its function, so each can be a point."""
    total = points.numbers_of_tests([target])[target]
    assert total >= 4 and graded(ANSWERS, target, total) == (total, total, "")


def test_a_wrong_answer_gets_the_points_of_the_tests_that_it_passes(tmp_path):
    mutant = bank.one("matcher.match_quality", "negative logits go through")
    (tmp_path / "matcher.py").write_text("from detr_min import boxes\n" + mutant.source())
    passed, total, reason = graded(tmp_path, mutant.function, 6)
    assert (passed, total) == (5, 6)
    assert reason == "test_quality_refuses_logits: Failed: DID NOT RAISE ValueError"


# --- nothing else passes --------------------------------------------------------------------------

RIGHT = (ANSWERS / "matcher.py").read_text()
IN_THE_CALL = RIGHT.replace("iou_weight=0.7):", "iou_weight=0.7):\n    before()")
LOOP = """def before():
    while True:
        try:
            while True: pass
        except BaseException: pass
"""
CHEATS = {
    "ends at import": ("import os\nos._exit(0)\n" + RIGHT, "its process ended, exit status 0"),
    "ends in the call": ("import os\ndef before(): os._exit(0)\n" + IN_THE_CALL,
                         "its process ended, exit status 0"),
    "sys.exit": ("import sys\nsys.exit(0)\n" + RIGHT, "fails on import: SystemExit: 0"),
    "sys.exit in the call": ("import sys\ndef before(): sys.exit(0)\n" + IN_THE_CALL,
                             "SystemExit: 0"),
    "replaces assert_close": ("import torch\ntorch.testing.assert_close = lambda *a, **k: None\n"
                              "def match_quality(*a, **k): return torch.zeros(1, 1)\n",
                              "AssertionError"),
    "patches pytest and the grader": (
        "import pytest, torch\nfrom exercises.grading import apart, messages, points\n"
        "pytest.main = points.run = points.grade = lambda *a, **k: (6, 6, '')\n"
        "apart.Apart.receive = messages.encode = lambda *a, **k: b''\n"
        "def match_quality(*a, **k): return torch.zeros(1, 1)\n", "no answer"),
    "is equal to everything": (
        "import torch\nclass Same(torch.Tensor):\n    def __eq__(self, other): return True\n"
        "def match_quality(*a, **k): return torch.zeros(1, 1).as_subclass(Same)\n",
        "AssertionError"),
    "sends what runs when it is unpickled": (
        "import os\ndef before():\n    for fd in range(3, 50):\n        try: os.write(fd, "
        "(24).to_bytes(4, 'big') + b\"cos\\nsystem\\n(S'exit 0'\\ntR.\")\n"
        "        except OSError: pass\n" + IN_THE_CALL, "what it sent is no answer"),
    "loops at import": ("while True: pass\n", "no answer within 1 s: an endless loop?"),
    "loops in the call": (LOOP + IN_THE_CALL, "no answer within 1 s: an endless loop?"),
    "takes 4 GB": ("def before(): bytearray(2 ** 32)\n" + IN_THE_CALL, "MemoryError"),
    "starts processes": ("import os\ndef before():\n    if not os.fork(): os._exit(0)\n"
                         + IN_THE_CALL, "BlockingIOError"),
    "calls ours": ("from detr_min import matcher\n"
                   "def match_quality(*a, **k): return matcher.match_quality(*a, **k)\n",
                   "your match_quality calls the package's"),
}


def test_what_cheats_do_after_cheating_is_right(tmp_path):
    (tmp_path / "matcher.py").write_text("def before(): pass\n" + IN_THE_CALL)
    assert graded(tmp_path, "matcher.match_quality", 6) == (6, 6, "")


@pytest.mark.parametrize("cheat", [
    pytest.param(cheat, marks=[pytest.mark.slow] * (cheat != "calls ours")) for cheat in CHEATS])
def test_a_cheat_gets_no_point(tmp_path, monkeypatch, cheat):
    source, says = CHEATS[cheat]
    monkeypatch.setattr(apart, "SECONDS", 1 if "loops" in cheat else 20)
    (tmp_path / "matcher.py").write_text(source)
    passed, _, reason = graded(tmp_path, "matcher.match_quality", 6)
    assert passed == 0 and says in reason, reason


# --- a class --------------------------------------------------------------------------------------

def rows(file):
    with file.open(newline="") as stream:
        return {row["student"]: row for row in csv.DictReader(stream)}


@pytest.fixture
def submissions(tmp_path):
    """ada is right, ben's kills the process that grades it, cy has written nothing."""
    folder = tmp_path / "submissions"
    for name, text in [("ada", RIGHT), ("ben", "import os, signal\n"
                                               "def match_quality(*a, **k):\n"
                                               "    os.kill(os.getppid(), signal.SIGKILL)\n")]:
        (folder / name).mkdir(parents=True)
        (folder / name / "matcher.py").write_text(text)
    (folder / "cy").mkdir()
    (folder / ".git").mkdir()
    return folder


def test_a_class_is_graded_and_goes_on_where_it_stopped(submissions, tmp_path, capsys):
    file, mine = tmp_path / "points.csv", "matcher.match_quality"
    words = [str(submissions), "--csv", str(file), "--mine", mine, "--jobs", "2"]
    assert grade.main(words) == 0
    found = rows(file)
    assert {name: (row["passed"], row["tests"]) for name, row in found.items()} == {
        "ada": ("6", "6"), "ben": ("0", "6"), "cy": ("0", "6")}
    assert "matcher.py is missing" in found["cy"]["reason"] and not found["ada"]["reason"]
    assert "ada: 6 of 6 tests passed" in capsys.readouterr().out
    text = file.read_text()
    assert grade.main(words) == 0 and file.read_text() == text      # nothing is left to do
    assert "students: 3; functions to grade: 0; rows" in capsys.readouterr().out
    header, *lines = text.splitlines(keepends=True)             # in the order they were ready
    ada, ben, cy = sorted(lines, key=lambda line: line.split(",")[0])
    cut = header + ada.replace(",6,6,", ",1,6,") + ben + cy[:len(cy) // 2]     # stopped in a row
    file.write_text(cut)
    assert grade.main(words) == 0
    assert "functions to grade: 1; rows" in capsys.readouterr().out
    assert rows(file)["ada"]["passed"] == "1", "a row that is there stays"
    assert rows(file)["cy"]["passed"] == "0" and file.read_text().startswith(cut[:cut.rfind("\n")])
    (submissions / "cy" / "mine").mkdir()                       # cy hands in late, one level deeper
    (submissions / "cy" / "mine" / "matcher.py").write_text(RIGHT)
    assert grade.main([*words, "--again", "cy"]) == 0
    assert {name: row["passed"] for name, row in rows(file).items()} == {
        "ada": "1", "ben": "0", "cy": "6"}
    assert grade.main([*words, "--again", "dora"]) == 2
    assert "--again dora: " in capsys.readouterr().out


def test_mistakes_end_in_a_sentence(submissions, tmp_path, capsys):
    file = tmp_path / "points.csv"
    for words, says in [
            ([str(tmp_path / "nowhere"), "--csv", str(file)], "is not a folder"),
            ([str(submissions), "--csv", str(file), "--mine", "matcher.x"], "matcher.x is not a"),
            ([str(submissions), "--csv", str(file), "--jobs", "0"], "are above 0")]:
        with pytest.raises(SystemExit) as error:
            grade.main(words)
        assert error.value.code == 2 and says in capsys.readouterr().err
    assert grade.main([str(submissions / "cy"), "--csv", str(file)]) == 2
    assert "holds no folder" in capsys.readouterr().out
    file.write_text("name,mark\nada,1.0\n")
    with pytest.raises(SystemExit, match="has the columns name, mark and not student"):
        grade.main([str(submissions), "--csv", str(file)])
    assert file.read_text() == "name,mark\nada,1.0\n"
