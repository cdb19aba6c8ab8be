"""studies/: the statistics by hand, what is trained and what not, and numbers that have a json."""
import json
import pathlib
import re
import subprocess
import types

import pytest
import torch

from detr_min import attention, criterion, matcher, tal_loss
from detr_min.data import dataset, transforms
from detr_min.run import config
from studies import __main__ as program
from studies import (catalogue, cell_content, constants, figures, harness, measures,
                     one_stack)

ROOT = pathlib.Path(__file__).parent.parent
STUDIES = list(catalogue.STUDIES.values())
A_STUDY = harness.Study("x", "Does it help?", "--preset shapes",
                        {"plain": "", "idea": "--loss tal"}, seeds=2,
                        columns={"correlation": "correlation"},
                        claims=(harness.Claim("it helps", "+1.0", "idea", "plain"),))


def result(variant, seed, AP):
    return {"study": "x", "variant": variant, "seed": seed, "AP": AP, "AP50": 2 * AP, "AP75": None,
            "correlation": 0.5, "cpu_seconds": 30.0, "steps": 100, "parameters": 1_500_000,
            "curve": [[50, AP / 2], [100, AP]]}


@pytest.fixture
def three_seeds(tmp_path, monkeypatch):
    """Gains of .02, .03 and .07 in json files."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    (tmp_path / "x").mkdir()
    for variant, scores in (("plain", (.30, .31, .32)), ("idea", (.32, .34, .39))):
        for seed, AP in enumerate(scores):
            path = tmp_path / "x" / f"{variant}_{seed}.json"
            path.write_text(json.dumps(result(variant, seed, AP)))
    return tmp_path


def test_paired_difference_by_hand(three_seeds):
    """Mean .04; deviation sqrt((.02^2 + .01^2 + .03^2) / 2) = .026458; t of 2 degrees, 4.30265.

    Half width 4.30265 * .026458 / sqrt(3) = .065724
    """
    found = harness.results(A_STUDY)
    mean, half = harness.paired(found["idea"], found["plain"])
    assert mean == pytest.approx(.04) and half == pytest.approx(.065724, abs=1e-5)


def test_paired_difference_of_one_seed_and_of_none(three_seeds):
    found = harness.results(A_STUDY)
    one = {0: found["idea"][0]}
    assert harness.paired(one, found["plain"]) == (pytest.approx(.02), None)
    assert harness.paired({7: found["idea"][0]}, found["plain"]) == (None, None)


def test_the_table_and_the_plot_hold_what_the_json_files_hold(three_seeds):
    plain, idea, _, _, _, claim = harness.table(A_STUDY).splitlines()[2:]
    assert "| 3 | 0.300 0.310 0.320 | 0.310 | 0.620 | n/a | 0.500 |  | 300 | 1.50 |" in plain
    assert "| 0.320 0.340 0.390 | 0.350 |" in idea and "| +0.040 ± 0.066 |" in idea
    assert claim == ("| it helps | +1.0 | `idea` - `plain`: +0.040 ± 0.066, 3 of 3 seeds | "
                     "direction only |")
    figures.curves(A_STUDY, three_seeds / "x.png")
    assert (three_seeds / "x.png").stat().st_size > 10_000


@pytest.mark.parametrize("gains, verdict", [
    ((.02, .03, .07), "direction only"), ((.02, .03, .04), "reproduced"),
    ((-.02, -.03, -.04), "contradicted"), ((.02, .03, -.01), "not seen"), ((.02,), "not seen"),
    ((), "not seen")])
def test_verdicts(gains, verdict):
    """Half widths 2.4 * sample deviation: .066 for the first, .025 for the second and third."""
    ours = {seed: {"AP": .5 + gain} for seed, gain in enumerate(gains)}
    base = {seed: {"AP": .5} for seed in range(4)}
    assert harness.verdict(ours, base) == verdict
    own = {"reproduced": "gain seen", "contradicted": "loss seen"}.get(verdict, verdict)
    assert harness.verdict(ours, base, is_printed=False) == own


def test_runs_that_are_through_are_not_trained_again(three_seeds, tmp_path, monkeypatch):
    """Of two variants and four seeds two runs are missing; one of them was interrupted."""
    monkeypatch.setattr(harness, "RUNS", tmp_path / "runs")
    (tmp_path / "runs" / "x" / "idea_3").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "idea_3" / "last.pt").touch()
    asked, measured = [], []
    def command(*flags):
        asked.append(flags)
        folder = pathlib.Path(flags[-1])
        folder.mkdir(exist_ok=True)
        (folder / "metrics.json").touch()

    monkeypatch.setattr(harness, "command", command)
    monkeypatch.setattr(harness, "measure", lambda study, variant, seed, folder, extra:
                        measured.append((variant, seed)))
    harness.run(A_STUDY, ["plain", "idea"], 4, ["--steps", "3"], jobs=1)
    assert measured == [("plain", 3), ("idea", 3)]
    folder = str(tmp_path / "runs" / "x")
    assert asked == [("train.py", "--preset", "shapes", "--seed", "3", "--steps", "3", "--out",
                      f"{folder}/plain_3"), ("train.py", "--resume", f"{folder}/idea_3")]


def test_a_watched_run_stops_is_measured_and_goes_on(tmp_path, monkeypatch):
    """Six stops in 100 steps; interrupted after the second, then once more before the last look."""
    asked, steps = [], [16, 33, 50, 66, 83, 100]

    def command(program, *flags):
        assert program == "train.py"
        asked.append((flags[0], flags[-1]))
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "last.pt").touch()
        if flags[-1] == "100":
            (tmp_path / "run" / "metrics.json").touch()

    looks = iter([6.0, 5.0, KeyboardInterrupt, 4.0, 3.0, 2.0, KeyboardInterrupt, 1.0])

    def watch(model, dataset):
        found = next(looks)
        if found is KeyboardInterrupt:
            raise found
        return {"above_0.7": found}

    monkeypatch.setattr(harness, "command", command)
    monkeypatch.setattr(harness.checkpoints, "load_model",
                        lambda path: types.SimpleNamespace(config=None, categories=None))
    monkeypatch.setattr(harness.sets, "open_val", lambda *_: None)
    flags = ["--preset", "shapes", "--steps", "100"]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            harness.train(tmp_path / "run", flags, watch=watch)
    harness.train(tmp_path / "run", flags, watch=watch)
    lines = [json.loads(x) for x in (tmp_path / "run" / "watched.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == steps
    assert [line["above_0.7"] for line in lines] == [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    assert asked[0] == ("--preset", "16") and asked[-1] == ("--resume", "100")
    assert [stop for _, stop in asked] == ["16", "33", "50", "50", "66", "83", "100"]


class Answers(torch.nn.Module):
    """Two boxes: the first picture's two objects, moved; scores .9 and .6. C says both twice."""

    class Decoder(torch.nn.Module):
        def o_decoder(self, queries, memory):
            return queries[:2]

        def c_decoder(self, queries, memory):
            return queries

    def __init__(self):
        super().__init__()
        self.decoder = self.Decoder()

    def forward(self, images, is_pad):
        from detr_min import boxes, model
        rows = self.decoder.o_decoder([(.3, .3, .2, .2, .9), (.7, .7, .2, .1, .6),
                                       (.3, .3, .2, .2, .8), (.7, .7, .2, .2, .2)], None)
        pred_boxes = torch.tensor([row[:4] for row in rows]).expand(len(images), -1, -1)
        logits = torch.tensor([row[4:] for row in rows]).logit().expand(len(images), -1, -1)
        return model.Output([boxes.Predictions(logits, pred_boxes)], [], None)


TARGET = dataset.Target(torch.tensor([0, 0]),
                        torch.tensor([[.3, .3, .2, .2], [.7, .7, .2, .2]]), 1, (32, 32))
IMAGES = [(torch.zeros(3, 32, 32), TARGET)]


def test_correlation_by_hand():
    """Scores .9 and .6 with IoU 1 and .5: two points lie on a rising line."""
    assert measures.score_iou_correlation(Answers(), IMAGES) == {"correlation": pytest.approx(1.0)}


@pytest.mark.parametrize("right_class, AP", [(True, 1.0), (False, 0.0)])
def test_boxes_alone_by_hand(monkeypatch, right_class, AP):
    """Each object is found exactly with a score of .3, half with .9, and once more exactly.

    The exact box counts, once; a query of no object does not. With the class wrong nothing counts.
    """
    data = dataset.open_shapes("val", transforms.resize(64, 64), 3, 64)

    def answers(model, dataset):
        for _, target in dataset:
            half = target.boxes * torch.tensor([1, 1, .5, .5])
            labels = target.labels if right_class else (target.labels + 1) % 4
            logits = torch.nn.functional.one_hot(torch.cat([labels] * 3 + [labels[:1]]), 4) * 9.0
            logits -= torch.tensor([10.0] * len(labels) + [7.0] * (2 * len(labels) + 1))[:, None]
            nothing = torch.tensor([[.02, .02, .01, .01]])
            yield logits, torch.cat([target.boxes, half, target.boxes, nothing]), target

    monkeypatch.setattr(measures, "answers", answers)
    assert measures.boxes_alone(None, data) == {"boxes_AP": AP}


def test_recall_of_the_best_boxes_by_hand():
    """Four queries, two objects. The first and the second fit exactly; scores .9, .6, .8, .2.

    Of the two best boxes one is among the two highest scores, both are among the four.
    """
    class Repeats(Answers.Decoder):
        def o_decoder(self, queries, memory):
            exact = [(.3, .3, .2, .2, .9), (.7, .7, .2, .2, .6)]
            return [*exact, (.3, .3, .2, .1, .8), (.7, .7, .2, .1, .2)]

    model = Answers()
    model.decoder = Repeats()
    blank = (torch.zeros(3, 32, 32), TARGET._replace(labels=TARGET.labels[:0],
                                                     boxes=TARGET.boxes[:0]))
    assert measures.best_boxes_recall(model, [*IMAGES, blank]) == {
        "recall_1": 0.5, "recall_2": 1.0, "recall_5": 1.0}


def test_gathered_by_hand():
    """Match qualities .3 * .9 + .7 * 1 = .97 and .3 * .6 + .7 * .5 = .53."""
    assert measures.gathered(Answers(), IMAGES) == {"above_0.6": .5, "above_0.7": .5,
                                                    "above_0.8": .5}


def test_decoders_by_hand(monkeypatch):
    """The O-Decoder finds each object once; the C-Decoder the first twice, the second once.

    The fourth prediction fits but its score, .2, is below .3.
    """
    monkeypatch.setattr(measures.evaluate, "evaluate", lambda network, dataset, batch, find=None:
                        ({"AP": len(network(torch.zeros(1), None).o_decoder[-1].boxes[0])}, ""))
    found = measures.decoders(Answers(), IMAGES)
    assert found == {"O_AP_nms": 2, "O_finds": 1, "C_AP_nms": 4, "C_AP": 4, "C_finds": 1.5}


@pytest.mark.slow
def test_the_plot_of_gathering_draws_what_was_watched(tmp_path, monkeypatch):
    """Two seeds of one variant: the mean line goes through .5 and 2, the paper's stands below."""
    study = A_STUDY._replace(watched=("plain", "idea"))
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    (tmp_path / "x").mkdir()
    for seed, numbers in enumerate(((0, 1), (1, 3))):
        watched = [{"step": 50 * (i + 1), "above_0.6": n, "above_0.7": n, "above_0.8": n}
                   for i, n in enumerate(numbers)]
        (tmp_path / "x" / f"plain_{seed}.json").write_text(json.dumps(
            {**result("plain", seed, .3), "watched": watched}))
    (tmp_path / "x" / "plain_2.json").write_text(json.dumps(result("plain", 2, .3)))
    figure = figures.gathered(study, tmp_path / "g.png")
    ours, theirs = figure.axes[1], figure.axes[4]
    [line] = ours.lines
    assert line.get_label() == "plain (2 seeds)" and "0.7" in ours.get_title()
    assert line.get_xydata().tolist() == [[50, .5], [100, 2]]
    assert [len(line.get_xdata()) for line in theirs.lines] == [12, 12]


def test_one_stack_trains_the_same_predictions_with_both_kinds_of_labels():
    decoder = one_stack.OneStack(2, 8, 2, 1, 2, 16, 3)
    decoder.o_decoder = lambda queries, memory: (queries, memory)
    assert decoder.c_decoder("queries", "memory") == ("queries", "memory")


def test_content_of_a_cell_query_is_its_cells_feature_without_gradient(generator):
    """Two sets; the best cells, in their order; an image of fewer cells than queries gets zeros."""
    tokens = torch.randn(1, 6, 8, generator=generator, requires_grad=True)
    no_pad = torch.zeros(1, 6, dtype=torch.bool)
    memory = attention.Memory(tokens, no_pad, [(2, 3)], torch.ones(1, 1, 2))
    queries = cell_content.CellQueries(7, 8, 2, num_sets=2)
    found = queries(memory)
    order = found.proposals.logits[0, :, 0].argsort(descending=True)
    assert found.content.shape == (2, 1, 7, 8) and not found.content.requires_grad
    for content in found.content[:, 0]:
        assert torch.equal(content, torch.cat([tokens[0, order], torch.zeros(1, 8)]))


@pytest.fixture
def own_defaults(monkeypatch):
    """Functions whose constants a test may change."""
    for function in (matcher.one_to_many, matcher.match_quality, tal_loss.aligned_target,
                     criterion.task_aligned_loss, config.Recipe.__init__):
        monkeypatch.setattr(function, "__defaults__", function.__defaults__)


def test_a_constant_is_put_into_its_equation(own_defaults):
    """Three boxes of quality .9, .8, .7: two positives with k = 2, one more with a second word."""
    quality = torch.tensor([[.9], [.8], [.7]])
    constants.put("matcher.one_to_many.k=2")
    assert len(matcher.one_to_many(quality)[0]) == 2
    constants.put("matcher.one_to_many.threshold=0.85")
    assert len(matcher.one_to_many(quality)[0]) == 1


@pytest.mark.parametrize("words", [
    *catalogue.CONSTANTS.values(), *catalogue.TARGETS.values(), *catalogue.WEIGHTS.values()])
def test_every_constant_of_a_study_exists_and_is_another_than_ours(own_defaults, words):
    def all_defaults():
        return [matcher.one_to_many.__defaults__, matcher.match_quality.__defaults__,
                tal_loss.aligned_target.__defaults__, criterion.task_aligned_loss.__defaults__,
                config.Recipe.__init__.__defaults__]
    for word in words.split():
        before = all_defaults()
        constants.put(word)
        assert all_defaults() != before
    if "num_points" in words:
        assert config.preset("shapes").recipe.num_points == int(words[-1])


@pytest.mark.parametrize("word", ["matcher.one_to_many.kk=1", "matcher.one_to_many.quality=1",
                                  "matcher.nothing.k=1", "nothing.k=1", "k=1", "k",
                                  "matcher.one_to_many.k=many"])
def test_a_constant_that_there_is_not_is_refused(word):
    with pytest.raises(ValueError, match=f"{word}: it must be like matcher.one_to_many.k=1"):
        constants.put(word)


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_what_a_study_borrows_is_trained_alike_elsewhere(study):
    for variant, name in study.borrows.items():
        other = catalogue.STUDIES[name]
        assert study.common == other.common and study.first == other.first
        assert study.variants[variant] == other.variants[variant]
        assert variant not in other.borrows


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_the_flags_of_every_variant_are_accepted(study):
    for flags in study.variants.values():
        data = "--coco DIR" if study.real else ""
        config.parse("doc", f"{study.common} {flags} {data}".split())
    if study.first:
        config.parse("doc", study.first.split())


def test_the_program_lists_the_studies(three_seeds, monkeypatch, capsys):
    """And what their runs took: six of 30 seconds here, 180 / 3600 of an hour."""
    monkeypatch.setitem(catalogue.STUDIES, "x", A_STUDY)
    program.main([])
    said = capsys.readouterr().out
    assert all(study.name in said for study in STUDIES) and "; 6 runs are here, 0.1 CPU" in said
    with pytest.raises(SystemExit):
        program.main(["sd_detr", "--only", "nothing"])


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What would be trained: [(study, variants, seeds, flags)]; nothing is."""
    runs = []
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "RUNS", tmp_path)
    monkeypatch.setattr(harness, "QUICK", (tmp_path / "quick", ["--steps", "2"]))
    monkeypatch.setattr(harness, "run", lambda study, names, seeds, flags, jobs:
                        runs.append((study.name, names, seeds, flags)))
    return runs


def test_all_quick_trains_every_study_for_a_moment_and_elsewhere(asked, tmp_path, capsys):
    """And anew, for a run of older code would say nothing."""
    (tmp_path / "quick" / "runs").mkdir(parents=True)
    program.main(["--all", "--quick"])
    assert not (tmp_path / "quick").exists()
    assert "bccd is left out: it needs --coco DIR" in capsys.readouterr().out
    assert [name for name, *_ in asked] == [s.name for s in STUDIES if not s.real]
    assert all((seeds, flags) == (1, ["--steps", "2"]) for _, _, seeds, flags in asked)
    assert harness.RESULTS == tmp_path / "quick" / "results"


def test_into_keeps_everything_in_another_folder(asked, tmp_path, capsys):
    program.main(["dac", "--only", "dac", "--into", str(tmp_path / "mine"), "--steps", "5"])
    assert asked == [("dac", ["dac"], 0, ["--steps", "5"])]
    assert (harness.RUNS, harness.RESULTS) == (tmp_path / "mine/runs", tmp_path / "mine/results")
    assert "dac: no run of its own is through yet" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        program.main(["dac", "--steps", "5"])
    assert "--steps 5: with flags of train.py" in capsys.readouterr().err


def test_a_json_holds_no_place_of_this_machine():
    assert harness.said(["--steps", "3", "--coco", "/home/me/bccd"]) == [
        "--steps", "3", "--coco", "bccd"]
    assert harness.said([]) == []


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_a_json_names_the_program_that_ran(study):
    """Without it the flags alone would train another model."""
    for variant, runs in harness.results(study).items():
        if variant in study.programs:
            assert {run["program"] for run in runs.values()} == {study.programs[variant]}


def test_a_json_names_the_code_and_says_if_it_was_edited(tmp_path, monkeypatch):
    """Of a repository of one file: git's name of its folder, then that with `+edits`."""
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    (tmp_path / "detr_min").mkdir()
    (tmp_path / "detr_min" / "boxes.py").write_text("one\n")
    for words in ("init -q", "add .", "-c user.name=x -c user.email=x commit -qm x"):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    name = harness.tree()
    assert re.fullmatch("[0-9a-f]{7,}", name)
    (tmp_path / "detr_min" / "boxes.py").write_text("two\n")
    assert harness.tree() == f"{name}+edits"


def test_a_study_on_real_images_needs_their_folder(asked, capsys):
    with pytest.raises(SystemExit):
        program.main(["bccd"])
    assert "bccd needs --coco DIR, the folder of its images" in capsys.readouterr().err
    program.main(["bccd", "--coco", "here", "--only", "dac"])
    assert asked == [("bccd", ["dac"], 0, ["--coco", "here"])]


# ---- committed numbers ----

@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_a_committed_table_is_that_of_its_json_files(study):
    path = harness.RESULTS / f"{study.name}.md"
    if harness.results(study).keys() - study.borrows.keys():
        assert path.read_text() == harness.table(study) + "\n"
    else:
        assert not path.exists()


def test_rows_of_studies_in_the_readme_and_the_page_come_from_a_committed_table():
    """A row whose first cell names a variant, as `plain`, has the numbers of that table."""
    rows = [row for path in harness.RESULTS.glob("*.md") for row in path.read_text().splitlines()]
    for page in (ROOT / "README.md", ROOT / "studies" / "README.md"):
        for name, cells in re.findall(r"^\| `(\w+)` \|(.*)\|$", page.read_text(), re.M):
            numbers = re.findall(r"[+-]?0\.\d{3}", cells)
            sources = [row for row in rows if row.startswith(f"| {name} |")]
            assert any(all(n in row for n in numbers) for row in sources), (page, name, numbers)


def test_every_verdict_stands_in_the_page_as_it_was_judged():
    """Those that are superseded stand in a table that the page links."""
    page = (ROOT / "studies" / "README.md").read_text()
    for path in harness.RESULTS.glob("*.md"):
        if path.stem.endswith("_lr1"):
            assert f"(results/{path.name})" in page
            continue
        for row in re.findall(r"^\|.*\| (?:reproduced|direction only|not seen|contradicted|"
                              r"gain seen|loss seen) \|$", path.read_text(), re.M):
            assert row in page, f"{path.name}: {row}"


def test_the_page_says_how_long_its_runs_took():
    """Those of the studies that are not superseded."""
    runs = [json.loads(path.read_text()) for name in catalogue.STUDIES if not name.endswith("_lr1")
            for path in (harness.RESULTS / name).glob("*.json")]
    hours = sum(run["cpu_seconds"] for run in runs) / 3600
    page = (ROOT / "studies" / "README.md").read_text()
    assert f"{len(runs)} runs behind this page took {hours:.1f} CPU-hours" in page


def test_every_difference_in_a_sentence_is_one_of_a_committed_table():
    """`.030 ± .012`, with its sign or without it."""
    known = " ".join(path.read_text() for path in harness.RESULTS.glob("*.md"))
    for page in (ROOT / "README.md", ROOT / "studies" / "README.md"):
        found = re.findall(r"(?<![\d])(\.\d{3}) ± (\.\d{3})", page.read_text())
        assert found, page
        for gain, half in found:
            assert re.search(rf"[+-]0{re.escape(gain)} ± 0{re.escape(half)}", known), (page, gain)
