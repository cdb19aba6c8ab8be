"""The exercises and their graders: right answers pass, wrong ones fail, nothing passes by chance.

Right answers are the package's own functions and those in tests/answers; wrong ones are the mutants
of exercises/grading/bank.py. Grading runs pytest within pytest, without the training at its end,
which is under -m slow.
"""
import ast
import contextlib
import inspect
import io
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest
import torch

from detr_min import boxes, criterion, matcher, tal_loss
from detr_min.run import config, registry
from exercises import bug, kill, marks, stubs
from exercises.grading import bank, catalogue, handin, mine, training

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "exercises"
README = (FOLDER / "README.md").read_text()
FUNCTIONS = list(catalogue.EXERCISES)
MODULES = list(dict.fromkeys(name.split(".")[0] for name in FUNCTIONS))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


class Tally:
    """Outcomes of the tests of one run."""

    def __init__(self):
        self.passed, self.failed, self.skipped = [], [], []

    def pytest_runtest_logreport(self, report):
        if report.outcome != "passed" or report.when == "call":
            getattr(self, report.outcome).append(report.nodeid)


def grade(target, folder, *more):
    """pytest --mine target, in this process: its exit status, a Tally, and what it printed."""
    tally, text = Tally(), io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        status = pytest.main([*more, "--mine", target, f"--folder={folder}", "-p",
                              "no:cacheprovider", "-p", "no:unraisableexception", "--capture=no"],
                             plugins=[tally])
    return status, tally, text.getvalue()


UNTRAINED = "--deselect=exercises/grading/training.py"
ONLY_TRAINED = "-ka_tiny_detector_learns"


def hand_in(folder, function, source):
    """A student's file with one function in it."""
    module, *path = function.split(".")
    rows = stubs.imports(module, [path])
    if path[:-1]:
        rows, source = [*rows, f"class {path[0]}:"], textwrap.indent(source, "    ")
    (folder / f"{module}.py").write_text("\n".join(rows) + "\n" + source)
    return folder


# --- the stubs ------------------------------------------------------------------------------------

@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_stub_has_the_signature_and_docstring_of_the_source(function):
    """Whatever a student wrote in its body."""
    module, *path = function.split(".")
    mine_ = stubs.node_of(ast.parse((FOLDER / f"{module}.py").read_text()), path)
    assert mine_ is not None, f"exercises/{module}.py lacks {function}: python exercises/stubs.py"
    source = stubs.node_of(ast.parse(stubs.source_of(module)), path)
    again = "the source has changed: python exercises/stubs.py, if this is still the stub"
    assert ast.unparse(mine_.args) == ast.unparse(source.args), again
    assert ast.get_docstring(mine_) == ast.get_docstring(source), again
    handin.load(file := FOLDER / f"{module}.py", file.read_text())     # what it imports is there


def test_stubs_are_written_once_and_never_over_what_a_student_wrote(tmp_path, capsys):
    stubs.main(tmp_path)
    fresh = {module: (tmp_path / f"{module}.py").read_text() for module in MODULES}
    for text in fresh.values():
        compile(text, "stub", "exec")
        assert f" --folder={tmp_path}\n" in text           # the command grades this file
        assert max(map(len, text.split('"""', 2)[2].splitlines())) <= 100
    own = fresh["matcher"].replace('raise NotImplementedError(\n        "exercise 4',
                                   'return 42\n    print("exercise 4')
    assert own != fresh["matcher"]
    (tmp_path / "matcher.py").write_text(own)
    (tmp_path / "tal_loss.py").write_text("def tal_loss(logits, targets): return 'mine'\n")
    (tmp_path / "decoder_decoupled.py").write_text(
        "class DecoderLayer:\n    def disperse(self):\n        return 1\n\n\nafter = 2\n")
    (tmp_path / "boxes.py").write_text("def giou(:\n")
    for module in ("align_loss", "query_gen"):      # no one wrote in these: they follow the source
        old = fresh[module].replace("Args:", "Arguments:").replace("import torch ", "import gone ")
        assert old != fresh[module]
        (tmp_path / f"{module}.py").write_text(old)
    stubs.main(tmp_path)
    for module in ("align_loss", "query_gen"):
        assert (tmp_path / f"{module}.py").read_text() == fresh[module]
    said = capsys.readouterr().out.splitlines()[len(MODULES):]
    assert (tmp_path / "matcher.py").read_text() == own
    assert (tmp_path / "boxes.py").read_text() == "def giou(:\n"
    completed = (tmp_path / "tal_loss.py").read_text()
    assert completed.startswith("def tal_loss(logits, targets): return 'mine'\n")
    assert completed.count("def aligned_target(") == 1
    joined = (tmp_path / "decoder_decoupled.py").read_text()
    layer = stubs.node_of(ast.parse(joined), ["DecoderLayer"])
    assert [node.name for node in layer.body] == ["disperse", "gather"] and "after = 2" in joined
    assert any(re.search(r"boxes.py left alone: Python cannot read line 1", line) for line in said)
    assert any(re.search(r"matcher.py left alone: nothing is missing", line) for line in said)
    assert any(re.search(r"tal_loss.py completed, what was there is unchanged", s) for s in said)


@pytest.mark.parametrize("module", [pytest.param(name, marks=[pytest.mark.slow] * (number > 1))
                                    for number, name in enumerate(MODULES)])
def test_a_stub_fails_with_a_sentence(tmp_path, module):
    """The first red: one failure, which names the exercise and what to do."""
    stubs.main(tmp_path)
    function = next(name for name in FUNCTIONS if name.startswith(module))
    status, tally, text = grade(function, tmp_path)
    assert status == pytest.ExitCode.TESTS_FAILED and len(tally.failed) == 1 and not tally.passed
    todo = catalogue.EXERCISES[function].todo
    assert re.search(rf"NotImplementedError: exercise \d+, {function}: {re.escape(todo)}", text)
    assert "It is still the stub" in text


# --- graders are graded ---------------------------------------------------------------------------

def test_right_answers_pass_together():
    others = [word for function in FUNCTIONS[1:] for word in ("--mine", function)]
    status, tally, text = grade(FUNCTIONS[0], ROOT / "tests/answers", UNTRAINED, *others)
    assert status == 0 and not tally.failed + tally.skipped, text
    assert text.count("Green.") == len(FUNCTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("answer", ["the package's", "tests/answers"])
def test_right_answers_pass(tmp_path, function, answer):
    folder = ROOT / answer
    if answer == "the package's":
        folder = hand_in(tmp_path, function, catalogue.source(function))
    status, tally, text = grade(function, folder, UNTRAINED)
    assert status == 0 and tally.passed and not tally.failed + tally.skipped, text


@pytest.mark.parametrize("function", FUNCTIONS)
def test_there_are_three_wrong_answers_and_another_right_one(function):
    module, *path = function.split(".")
    assert sum(mutant.function == function for mutant in bank.MUTANTS) >= 3
    other = stubs.node_of(ast.parse((ROOT / "tests/answers" / f"{module}.py").read_text()), path)
    source = stubs.node_of(ast.parse(stubs.source_of(module)), path)
    assert other is not None and ast.dump(other) != ast.dump(source)


ALSO_WRONG = [      # wrong in ways that no test of exercise 12 has to notice
    bank.Mutant("tal_loss.tal_loss", "the loss of a confident mistake is cut off",
                "F.binary_cross_entropy_with_logits(logits,",
                "F.binary_cross_entropy(logits.sigmoid(),"),
    bank.Mutant("matcher.one_to_many", "the argument is changed in place",
                "quality >= threshold", "quality.sub_(threshold) >= 0"),
    bank.Mutant("matcher.match_quality", "0 and 1 are taken for logits",
                "probs.min() < 0 or probs.max() > 1", "probs.min() <= 0 or probs.max() >= 1"),
    bank.Mutant("matcher.one_to_one", "a cost that requires gradient breaks it",
                "cost.detach().cpu().numpy()", "cost.numpy()"),
    bank.Mutant("matcher.one_to_one", "the argument is changed in place",
                "cost.detach()", "cost.detach().mul_(2)"),
    bank.Mutant("attention.deformable_attention", "shapes that do not add up end in a RuntimeError",
                "raise ValueError(", "raise RuntimeError("),
]
ASKED = [mutant for mutant in bank.MUTANTS + ALSO_WRONG if mutant.function in FUNCTIONS]
SLOW_BUT_ONE = [pytest.param(mutant, marks=[pytest.mark.slow] * (mutant is not ASKED[0]))
                for mutant in ASKED]


@pytest.mark.parametrize("mutant", SLOW_BUT_ONE, ids=lambda m: f"{m.function}: {m.mistake}")
def test_wrong_answers_fail(tmp_path, mutant):
    folder = hand_in(tmp_path, mutant.function, mutant.source())
    status, tally, text = grade(mutant.function, folder, UNTRAINED, "-x")
    assert status == pytest.ExitCode.TESTS_FAILED and tally.failed, text


def c_decoder_that_detaches_where_it_looks(self, queries, memory):
    x, base, found = queries.content[0], queries.ref_boxes, []
    ref_boxes = base
    for depth, layer in enumerate(self.layers):
        x = layer.gather(x, queries.pos[0], ref_boxes.detach(), memory)
        delta = self.box_heads[depth](x)
        found.append(boxes.Predictions(self.class_heads[depth](x), boxes.refine(base, delta)))
        ref_boxes = base = boxes.refine(ref_boxes.detach(), delta)
    return found


ALSO_RIGHT = {      # function: its source
    "decoder_dac.DACDecoder.c_decoder": inspect.getsource(
        c_decoder_that_detaches_where_it_looks).replace("_that_detaches_where_it_looks", ""),
    "attention.deformable_attention": re.sub(
        r"raise ValueError\(.*?\)\n", 'raise ValueError(f"want {value.shape[1]} cells")\n',
        catalogue.source("attention.deformable_attention"), flags=re.DOTALL),
}


@pytest.mark.parametrize("function", ALSO_RIGHT)
def test_other_right_answers_pass(tmp_path, function):
    """Other words in an error, a `detach` in another place."""
    folder = hand_in(tmp_path, function, ALSO_RIGHT[function])
    status, tally, text = grade(function, folder, UNTRAINED)
    assert status == 0 and tally.passed and not tally.failed + tally.skipped, text


def test_a_failure_shows_the_numbers_of_its_case_and_no_more(tmp_path):
    """The case worked by hand fails first; a matrix is printed, a layer's whole gradient is not."""
    best_class = bank.one("matcher.match_quality", "the best class instead of the object's")
    text = grade(best_class.function, hand_in(tmp_path, best_class.function, best_class.source()),
                 UNTRAINED)[2]
    assert re.search(r"Begin with tests/test_matcher.py::test_quality\w*_by_hand", text), text
    k = bank.one("matcher.one_to_many", "one too many")
    text = grade(k.function, hand_in(tmp_path, k.function, k.source()), UNTRAINED,
                 "-kby_definition and 5-7", "--maxfail=9")[2]
    assert re.search(r"seed \d+, quality \[\[", text), text
    still = bank.one("decoder_dac.DACDecoder.c_decoder", "self-attention is still there")
    text = grade(still.function, hand_in(tmp_path, still.function, still.source()), UNTRAINED)[2]
    assert "test_c_decoder_sends_no_gradient_into_self_attention" in text
    assert len(text.splitlines()) < 100 and max(map(len, text.splitlines())) < 1000, text


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (number > 0))
                                  for number, name in enumerate(bank.BUGS)])
def test_a_bug_is_red_as_handed_out_and_green_when_mended(tmp_path, name, capsys):
    """[exercise 11]  And nothing is written over it."""
    assert bug.main([name[4:], str(tmp_path)]) == 0
    file, mutant = tmp_path / f"{name}.py", bank.BUGS[name]
    status, tally, text = grade(name, tmp_path, UNTRAINED, "-x")
    assert status == pytest.ExitCode.TESTS_FAILED and tally.failed, text
    handed_out = file.read_text()
    assert f"pytest --mine {name} --folder={tmp_path}\n" in handed_out
    assert max(map(len, handed_out.split('"""', 2)[2].splitlines())) <= 110
    assert bug.main([name[4:], str(tmp_path)]) == 1 and file.read_text() == handed_out
    indent = "    " * (mutant.function.count(".") - 1)
    wrong, right = (textwrap.indent(text, indent) for text in (
        mutant.source(), catalogue.source(mutant.function)))
    assert handed_out.endswith(wrong)
    file.write_text(handed_out.replace(wrong, right))
    status, tally, text = grade(name, tmp_path, UNTRAINED)
    assert status == 0 and tally.passed and not tally.skipped, text


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (number > 1))
                                  for number, name in enumerate(bank.BUGS)])
def test_a_bug_cannot_be_seen_by_shapes(name, monkeypatch):
    """[exercise 11]  A detector trains with it: two steps, no error, finite numbers."""
    mutant = bank.BUGS[name]
    monkeypatch.setattr(training, "STEPS", 2)
    calls, undo = handin.swap(catalogue.find(mutant.function), mutant.make())
    try:
        with training.detour(mutant.function):
            training.train(catalogue.GRADED[mutant.function].variant)
    finally:
        undo()
    assert calls


# --- training through the student's function ------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("answer", ["the package's", "tests/answers"])
def test_a_detector_learns_through_right_answers(tmp_path, function, answer):
    folder = ROOT / answer
    if answer == "the package's":
        folder = hand_in(tmp_path, function, catalogue.source(function))
    status, tally, text = grade(function, folder, ONLY_TRAINED)
    assert status == 0 and len(tally.passed) == 1, text


LEARNING_TELLS = [
    bank.one("boxes.refine", "no sigmoid"),
    bank.one("matcher.match_cost", "a quality added to a cost"),
    bank.one("matcher.one_to_one", "the dearest"),
    bank.one("matcher.match_quality", "cxcywh read as corners"),
    bank.one("matcher.one_to_many", "a quality read as a cost"),
    bank.Mutant("attention.neighbours", "nothing is read", "share * (", "0 * share * ("),
    bank.Mutant("attention.deformable_attention", "nothing is read", "* weights", "* 0 * weights"),
    bank.Mutant("tal_loss.tal_loss", "away from the target", "return (", "return -("),
    bank.Mutant("tal_loss.aligned_target", "upside down", "ious.detach()", "(1 - ious.detach())"),
    bank.Mutant("align_loss.ranked_target", "all are negatives", "quality * w", "0 * quality * w"),
]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", LEARNING_TELLS, ids=lambda m: f"{m.function}: {m.mistake}")
def test_where_learning_can_tell_it_does(tmp_path, mutant):
    """The training alone fails."""
    folder = hand_in(tmp_path, mutant.function, mutant.source())
    status, tally, text = grade(mutant.function, folder, ONLY_TRAINED)
    assert status == pytest.ExitCode.TESTS_FAILED and tally.failed, text


# --- what is swapped ------------------------------------------------------------------------------

def test_a_swap_reaches_every_reference_and_is_undone():
    """Names imported elsewhere, tables, default arguments: whoever holds the function."""
    captured, table = criterion.focal_loss, registry.LOSSES["focal"]
    default = inspect.signature(criterion.detection_loss).parameters["layer_loss"].default
    before = captured.__code__
    calls, undo = handin.swap(criterion.focal_loss, lambda layer, pairs: f"mine, of {layer}")
    assert captured("a", "b") == table("a", pairs="b") == default(pairs="b", layer="a")
    assert criterion.focal_loss("a", "b") == "mine, of a" and len(calls) == 4
    undo()
    assert captured.__code__ is before and not any(
        name.startswith("_mine") for name in vars(criterion))


LOOP = "def aligned_target(*given):\n    while True: pass\n"


def test_an_endless_loop_ends_in_a_sentence(tmp_path, monkeypatch, capsys):
    """In a function, in its file, and in a student's own tests, which kill a mutant that way."""
    (tmp_path / "tal_loss.py").write_text(LOOP)
    status, tally, text = grade("tal_loss.aligned_target", tmp_path, UNTRAINED, "--seconds=.2")
    assert status == pytest.ExitCode.TESTS_FAILED and not tally.passed
    assert len(tally.failed) == 1, "the other tests would only make the student wait"
    assert "test_target_by_hand did not end within 0.2 s: an endless loop, or a slow one?" in text
    assert "tal_loss.py:2: in aligned_target" in text
    (tmp_path / "tal_loss.py").write_text("while True: pass\n")
    status, _, text = grade("tal_loss.aligned_target", tmp_path, "--seconds=.2")
    assert status == pytest.ExitCode.USAGE_ERROR and "tal_loss.py, line 1 fails on import" in text
    assert "did not end within 0.2 s" in text
    monkeypatch.setattr(kill, "SECONDS", .2)
    for loop in ("while True: pass\n", "def test_it():\n    while True: pass\n"):
        status, said = graded(tmp_path, loop, capsys)
        assert status == 1 and "Not graded" in said and "did not end within 0.2 s" in said


def test_functions_of_one_run_keep_their_own_counts(tmp_path):
    """A right one, a wrong one and a stub, which none of the others' tests is about."""
    (tmp_path / "tal_loss.py").write_text((ROOT / "tests/answers/tal_loss.py").read_text())
    wrong = bank.one("matcher.match_quality", "weights swapped")
    hand_in(tmp_path, wrong.function, wrong.source())
    stubs.main(tmp_path)
    _, tally, text = grade("tal_loss.aligned_target", tmp_path, UNTRAINED, "--mine",
                           wrong.function, "--mine", "matcher.one_to_many")
    counts = {name: (int(passed), int(failed)) for name, passed, failed in re.findall(
        r"exercise \d+, ([\w.]+) of .*: (\d+) passed, (\d+) failed, calls: \d+", text)}
    assert counts["tal_loss.aligned_target"] == (4, 0) and counts["matcher.one_to_many"] == (0, 1)
    assert counts[wrong.function][1] == len(tally.failed) - 1 > 0
    assert counts[wrong.function][0] == len(tally.passed) - 4
    assert text.count("Green. Now compare with detr_min/tal_loss.py.") == 1 == text.count("Green.")
    assert "It is still the stub" in text and "Begin with tests/test_matcher.py::test_qual" in text


def test_an_answer_that_calls_the_packages_function_is_told_so(tmp_path):
    (tmp_path / "tal_loss.py").write_text(
        "from detr_min import tal_loss as theirs\n"
        "def aligned_target(*given):\n    return theirs.aligned_target(*given)\n")
    status, _, text = grade("tal_loss.aligned_target", tmp_path, UNTRAINED, "-x")
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "your aligned_target calls the package's, which yours replaces now" in text


def test_a_whole_test_file_can_be_given(tmp_path):
    folder = hand_in(tmp_path, "tal_loss.aligned_target",
                     bank.one("tal_loss.aligned_target", "exponents swapped").source())
    status, tally, text = grade("tal_loss.aligned_target", folder, "--maxfail=99",
                                "tests/test_tal_loss.py")
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "tests/test_tal_loss.py::test_loss_by_hand" in tally.passed          # the package's
    assert "tests/test_tal_loss.py::test_target_by_hand" in tally.failed        # the student's
    assert "Begin with tests/test_tal_loss.py::test_target_by_hand" in text
    assert "not trained: mend the tests above first" in text
    assert "found    tensor([0.1250, 0.5000" in text and "expected tensor([0.5000, 0.1250" in text


# --- nothing passes by chance ---------------------------------------------------------------------

ANSWER = "def aligned_target(s, u, alpha=.25, beta=.75):\n    return (s ** alpha * u ** beta)"


@pytest.mark.parametrize("line, skipped", [
    ("pytest.skip('no reason')", True), ("pytest.xfail('no reason')", True), ("pass", False)])
def test_a_skip_is_no_pass(tmp_path, monkeypatch, line, skipped):
    """Nor is a run in which the function was never called."""
    monkeypatch.delitem(sys.modules, "test_given", raising=False)
    (tmp_path / "tal_loss.py").write_text(ANSWER)
    call = "tal_loss.aligned_target(torch.ones(1), torch.ones(1))" if skipped else "pass"
    file = tmp_path / "test_given.py"
    file.write_text("import pytest, torch\nfrom detr_min import tal_loss\n"
                    f"def test_one():\n    {call}\ndef test_two():\n    {line}\n")
    status, tally, text = grade("tal_loss.aligned_target", tmp_path, f"--rootdir={ROOT}", UNTRAINED,
                                "tests/test_tal_loss.py::test_loss_by_hand", str(file))
    assert status == pytest.ExitCode.TESTS_FAILED and not tally.failed
    says = "a skip is no pass" if skipped else "no test called tal_loss.aligned_target"
    assert f"NOT PASSED: {'1 skipped, and ' * skipped}{says}" in text


def refusal(target, folder):
    with pytest.raises(pytest.UsageError) as error:
        mine.Work(target, folder)
    return str(error.value)


def test_a_folder_inside_a_hand_in_is_named(tmp_path):
    (tmp_path / "ada" / "mine").mkdir(parents=True)
    (tmp_path / "ada" / "mine" / "matcher.py").touch()
    with pytest.raises(pytest.UsageError, match="ada/mine holds up into .*/ada"):
        handin.text_of(tmp_path / "ada" / "matcher.py")


def test_a_mark_at_the_beginning_of_a_file_is_no_fault(tmp_path):
    """The byte order mark of Windows' editors, and a name beyond ASCII."""
    (tmp_path / "a.py").write_text("# Álvaro\nx = 1\n", encoding="utf-8-sig")
    assert handin.load(tmp_path / "a.py", handin.text_of(tmp_path / "a.py")).x == 1


def test_mistakes_of_the_command_line_end_in_a_sentence(tmp_path):
    says = refusal("matcher.match_qualty", tmp_path)
    assert "matcher.match_qualty is not an exercise. Did you mean matcher.match_quality?" in says
    assert all(name in says for name in [*FUNCTIONS, *bank.BUGS])
    (tmp_path / "boxes.py").write_text("x = 1\n")
    says = refusal("matcher.match_quality", tmp_path)
    assert "matcher.py is missing" in says and "boxes" in says and "exercises/stubs.py" in says
    assert "exercises/bug.py 2" in refusal("bug_2", tmp_path)
    (tmp_path / "matcher.py").write_text("import torch\ndef match_quality(:\n    pass\n")
    assert re.search(r"Python cannot read .*matcher.py, line 2: .*`def match_quality\(:`",
                     refusal("matcher.match_quality", tmp_path))
    (tmp_path / "matcher.py").write_text("import torch\n\nx = 1 / 0\n")
    assert re.search(r"matcher.py, line 3 fails on import: ZeroDivisionError: division by zero",
                     refusal("matcher.match_quality", tmp_path))
    (tmp_path / "matcher.py").write_text("import torch\ndef match_qualty(): pass\n")
    assert re.search(r"matcher.py has no match_quality; it has match_qualty. `python exercises/",
                     refusal("matcher.match_quality", tmp_path))
    (tmp_path / "decoder_dac.py").write_text("class DACDecoder:\n    pass\n")
    (tmp_path / "tal_loss.py").write_text("import sys\nsys.exit(0)\n")
    assert "tal_loss.py, line 2 fails on import: SystemExit: 0" in refusal("tal_loss.tal_loss",
                                                                           tmp_path)
    (tmp_path / "tal_loss.py").write_bytes(b"x = '\xff'")
    assert "is no text in UTF-8" in refusal("tal_loss.tal_loss", tmp_path)
    assert "there is no folder" in refusal("boxes.giou", tmp_path / "mein")
    (tmp_path / "query_gen.ipynb").touch()
    assert "notebook beside it" in refusal("query_gen.points_to_query", tmp_path)
    (tmp_path / "mine.zip").touch()
    assert "mine.zip is to be unpacked" in refusal("align_loss.ranked_target", tmp_path)
    assert "has no DACDecoder.c_decoder" in refusal("decoder_dac.DACDecoder.c_decoder", tmp_path)
    status, _, text = grade("nonsense", tmp_path)
    assert status == pytest.ExitCode.USAGE_ERROR and "nonsense is not an exercise" in text


# --- tests that are graded by mutants [exercise 12] -----------------------------------------------

GOOD = """
import torch
from detr_min import matcher

def pairs(*given):
    return list(zip(*(t.tolist() for t in matcher.one_to_many(*given))))

def test_it():
    quality = torch.tensor([[.9, .5], [.4, .0], [.8, .0], [.3, .7]])
    assert pairs(quality, .4, 2) == [(0, 0), (2, 0), (3, 1)]
    assert pairs(quality[1:2], .4, 2) == [(0, 0)]
"""


def graded(tmp_path, text, capsys):
    file = tmp_path / "given_tests.py"
    file.write_text(text)
    status = kill.grade("matcher.one_to_many", file)
    return status, capsys.readouterr().out


def test_good_tests_kill_every_mutant(tmp_path, capsys):
    status, said = graded(tmp_path, GOOD, capsys)
    assert status == 0 and "5 of 5 mutants of matcher.one_to_many killed" in said, said
    assert "SURVIVED" not in said


def test_weak_tests_let_mutants_live(tmp_path, capsys):
    status, said = graded(tmp_path, GOOD.replace("assert pairs(quality[1:2], .4, 2) == [(0, 0)]",
                                                 "").replace(".4, 2)", ".3, 2)"), capsys)
    assert status == 1 and "SURVIVED  exactly the threshold does not count\n" in said
    assert "killed    one too many" in said
    status, said = graded(tmp_path, "def test_nothing():\n    assert 1 + 1 == 2\n", capsys)
    assert status == 1 and "0 of 5 mutants" in said and "never called the function" in said


@pytest.mark.slow
@pytest.mark.parametrize("text, why", [
    ("", "the file holds no test"),
    ("def test_it(:\n", "the file cannot be run"),
    ("import nowhere\n", "the file cannot be run"),
    ("def test_it():\n    assert False\n", "they fail on the function as it is"),
    ("import sys\ndef test_it():\n    sys.exit(0)\n", "they fail on the function as it is"),
    (GOOD + "\nimport pytest\ndef test_b():\n    pytest.skip('later')\n", "no pass: 1 of its"),
    (GOOD + "\nimport pytest\n@pytest.mark.xfail\ndef test_b():\n    assert 0\n", "no pass: 1 of"),
    (GOOD + "\nimport pytest\ndef test_b():\n    pytest.exit('done', 0)\n", "only 1 of the 2"),
    ("import os\nif os.environ.setdefault('KILL_RUNS', '') == 'xxx': raise SystemError\n" + GOOD +
     "\ndef test_b():\n    os.environ['KILL_RUNS'] += 'x'\n    assert len(os.environ['KILL_RUNS']) "
     "< 3\n", "so chance decides")])
def test_tests_that_prove_nothing_are_refused(tmp_path, capsys, monkeypatch, text, why):
    monkeypatch.delenv("KILL_RUNS", raising=False)
    status, said = graded(tmp_path, text, capsys)
    assert status == 1 and "Not graded" in said and why in said, said


def test_the_stub_of_exercise_12_is_refused_with_its_own_sentence(tmp_path, capsys):
    status, said = graded(tmp_path, stubs.MY_TESTS, capsys)
    assert status == 1 and "NotImplementedError: exercise 12: write tests that pass" in said
    assert kill.main([]) == kill.main(["matcher.nonsense"]) == 2
    assert "matcher.nonsense has no mutants. There are mutants of:" in capsys.readouterr().out


# --- the table and the README ---------------------------------------------------------------------

ROWS = re.findall(r"^\| (\d+) \| `([\w.]+)` \| (\d+) \| (.+?) \| (\d+) \|$", README, re.M)
SECTIONS = {int(number): text for number, text in
            re.findall(r"^## (\d+) (.+?)(?=^## |\Z)", README, re.M | re.S)}
PROBLEMS = (FOLDER / "problem_set.md").read_text()


def test_the_table_of_the_readme_is_the_table_of_the_exercises():
    """Number, function, lines of the package's own answer, and of those none above 15."""
    assert [(int(number), function) for number, function, *_ in ROWS] == [
        (exercise.number, function) for function, exercise in catalogue.EXERCISES.items()]
    for _, function, minutes, _, lines in ROWS:
        assert catalogue.lines(function) == int(lines) <= 15, function
        assert 5 <= int(minutes) <= 240


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1])
def test_a_row_names_the_equation_that_the_source_names(row):
    _, function, _, section, _ = row
    module = stubs.source_of(function.split(".")[0]).split('"""')[1]
    text = catalogue.source(function) + module
    for paper, number in re.findall(r"\b(DAC|SD|DETR) Eq\. (\d)", section):
        tags = re.findall(rf"{paper} Eq\. (\d)(?:-(\d))?", text)
        assert any(int(a) <= int(number) <= int(b or a) for a, b in tags), (section, tags)


def test_each_exercise_has_its_paper_its_goal_its_grading_and_one_hint():
    assert sorted(SECTIONS) == list(range(1, 14))
    for number, text in SECTIONS.items():
        assert re.match(r".+ \(.+\)\n", text), f"no paper section in the heading of {number}"
        assert text.count("Graded: ") == 1 == text.count("Hint: "), number
        assert len(re.findall(r"^Goal \((?:easy|medium|hard)\): \w.+\.$", text, re.M)) == 1, number
    for function, exercise in catalogue.EXERCISES.items():
        assert f"`pytest --mine {function}`" in SECTIONS[exercise.number], function


def test_numbers_files_and_flags_of_the_readme_are_true():
    assert f"There are {len(bank.BUGS)}, among them:" in SECTIONS[11]
    assert f"| 11 | `bug_1` to `bug_{len(bank.BUGS)}` |" in README
    many = sum(mutant.function == "matcher.one_to_many" for mutant in bank.MUTANTS)
    assert f"each of {many} versions" in " ".join(SECTIONS[12].split())
    for name in re.findall(r"(?:python |`)(exercises/[\w/]+\.py)", README):
        assert (ROOT / name).exists() or "bug_1" in name, name
    for flag, value in re.findall(r"--(\w+) (\w+)", SECTIONS[13]):
        assert config.parse("", [f"--{flag}", value])[1] == {flag}
    assert f"{PRESET.steps:,} steps on shapes" in SECTIONS[13]
    assert (FOLDER / "my_tests.py").exists()


PRESET = config.preset("shapes")


# --- the problem set ------------------------------------------------------------------------------

def test_the_points_of_the_problem_set_add_up():
    """Two weeks of 50 points; the bonus is extra."""
    weeks = re.findall(r"^## Week \d.*?\((\d+) points\)(.+?)(?=^## |\Z)", PROBLEMS, re.M | re.S)
    numbers = re.findall(r"^\*\*Problem (\d+) \(", PROBLEMS, re.M)
    assert numbers == [str(k) for k in range(1, len(numbers) + 1)] and len(weeks) == 2
    for total, text in weeks:
        points = re.findall(r"^\*\*Problem \d+ \((\d+) points", text, re.M)
        assert sum(map(int, points)) == int(total) == 50


def test_tests_become_points_of_the_problem_set(tmp_path):
    """giou is half of 6 points: 3 of 4 tests give 2.25, 1 of 4 nothing.

    A mended bug is 2 points, one that is nearly mended none. With two files a function of week 1
    that was handed in with week 2 is late.
    """
    late, empty = tmp_path / "late.csv", tmp_path / "empty.csv"
    empty.write_text("student,exercise,passed,tests,seconds,reason\n")
    late.write_text(empty.read_text() + """ada,boxes.giou,3,4,1,
ada,boxes.refine,1,4,1,
ada,decoder_decoupled.DecoderLayer.gather,1,2,1,
bob,bug_1,4,4,1,
bob,bug_6,3,4,1,
""")
    names = ["student", "Problem 2 (of 6)", "Problem 3 (of 10)", "Problem 5 (of 12)",
             "Problem 6 (of 8)", "Bonus (of 10)", "Problem 7 (of 8)", "Problem 8 (of 8)",
             "Problem 10 (of 8)", "Problem 11 (of 4)", "sum (of 64 and the bonus)"]
    header, ada, bob = marks.table([late], PROBLEMS)
    assert header == names
    assert ada == ["ada", "2.25", *["0.00"] * 4, "2.00", *["0.00"] * 3, "4.25"]
    assert bob == ["bob", *["0.00"] * 8, "2.00", "2.00"]
    assert marks.table([empty, late], PROBLEMS)[1] == [
        "ada", *["0.00"] * 5, "2.00", *["0.00"] * 3, "2.00"]
    functions = {name.split(".")[-1] for name in catalogue.EXERCISES} | {"bug_1", "bug_6"}
    assert {name for *_, shares in marks.problems(PROBLEMS) for name in shares} <= functions


def test_marks_of_no_file_end_in_a_sentence(tmp_path):
    (tmp_path / "other.csv").write_text("name,mark\nada,1.0\n")
    for words, says in ([], "Say which csv"), (["no.csv"], "no.csv is missing"), (
            ["other.csv"], "no column 'student' in one of other.csv"):
        run = subprocess.run([sys.executable, str(FOLDER / "marks.py"), *words], cwd=tmp_path,
                             capture_output=True, text=True)
        assert run.returncode == 1 and says in run.stderr and "Traceback" not in run.stderr


def test_functions_and_links_of_the_problem_set_exist():
    """Every function of exercises 1 to 9 is asked for once."""
    named = [name for names in re.findall(r"\((`\w+`(?:, `\w+`)*)\)\.", PROBLEMS)
             for name in names.replace("`", "").split(", ")]
    upto_9 = [name.split(".")[-1] for name, exercise in catalogue.EXERCISES.items()
              if exercise.number < 10]
    assert sorted(named) == sorted([*upto_9, "bug_1", "bug_6"])
    for file in FOLDER.glob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)", file.read_text()):
            assert (FOLDER / link).exists(), f"{file.name}: {link}"


def test_the_problems_on_paper_have_the_answers_that_they_hint_at():
    """Problem 4: one pair more for k = 3. Problem 9: t = 1/2, weight (7/16)^2; no weight at s = u.
    """
    quality = torch.tensor([[float(x) for x in row] for row in re.findall(
        r"^\| \d \| (\.\d+) \| (\.\d+) \|$", PROBLEMS, re.M)])
    assert pairs(quality, 2) == [(0, 0), (2, 1), (3, 0)]
    assert pairs(quality, 3) == [(0, 0), (1, 0), (2, 1), (3, 0)]
    query_idx, gt_idx = matcher.one_to_one(-quality)
    assert list(zip(query_idx.tolist(), gt_idx.tolist())) == [(0, 0), (2, 1)]
    s = torch.tensor([1 / 16, 1 / 16], dtype=torch.float64)
    t = tal_loss.aligned_target(s, torch.tensor([1, 1 / 16], dtype=torch.float64))
    torch.testing.assert_close(t, torch.tensor([1 / 2, 1 / 16], dtype=torch.float64))
    torch.testing.assert_close((t - s) ** 2, torch.tensor([49 / 256, 0], dtype=torch.float64))


def pairs(quality, k):
    return list(zip(*(t.tolist() for t in matcher.one_to_many(quality, 0.4, k))))


def test_a_mutant_replaces_one_place_and_still_runs():
    for mutant in [*bank.MUTANTS, *LEARNING_TELLS]:
        assert callable(mutant.make()) and mutant.source() != catalogue.source(mutant.function)


@pytest.mark.parametrize("function", catalogue.GRADED)
def test_the_tests_of_an_exercise_exist(function):
    for test in catalogue.GRADED[function].tests:
        file, name = test.split("[")[0].split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), test
    assert len(catalogue.GRADED[function].tests) >= 3
    assert "by_hand" in catalogue.GRADED[function].tests[0], "the case worked by hand comes first"
