"""detr_min/evaluate.py: detections worked by hand, and COCO's AP where its value is known."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from detr_min import boxes, model
from detr_min.data import coco_json, dataset
from detr_min.run import evaluate

# Images 11, 22, 33 of 100 x 80 pixels, their objects as (category_id, x, y, w, h); ids have gaps.
OBJECTS = {11: [(3, 10, 10, 40, 20), (7, 60, 30, 30, 40)], 22: [(90, 5, 5, 50, 50)],
           33: [(3, 20, 20, 20, 20)]}
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 90, "name": "owl"}]


def make_coco(objects=OBJECTS, crowds=()):
    annotations = [{"id": 1 + 10 * image_id + k, "image_id": image_id, "category_id": c,
                    "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
                   for image_id, found in objects.items() for k, (c, *box) in enumerate(found)]
    annotations += [{"id": 9000 + k, "image_id": image_id, "category_id": c, "bbox": box,
                     "area": box[2] * box[3], "iscrowd": 1}
                    for k, (image_id, c, *box) in enumerate(crowds)]
    return coco_json.index({
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 80} for i in objects],
        "annotations": annotations, "categories": CATEGORIES})


def result(image_id, found):
    """found: [(label, score, x1, y1, x2, y2)] as `detect` and `evaluate` give it."""
    rows = torch.tensor(found, dtype=torch.float32).reshape(-1, 6)
    return {"image_id": image_id, "labels": rows[:, 0].long(), "scores": rows[:, 1],
            "boxes_xyxy": rows[:, 2:]}


def perfect(image_ids=OBJECTS):
    """Every object found where it is; scores differ."""
    ids = [c["id"] for c in CATEGORIES]
    return [result(i, [(ids.index(c), 0.9 - 0.1 * k, x, y, x + w, y + h)
                       for k, (c, x, y, w, h) in enumerate(OBJECTS[i])]) for i in image_ids]


def ap(results, coco=None, image_ids=OBJECTS):
    return evaluate.coco_metrics(coco or make_coco(), list(image_ids), results, CATEGORIES)[0]


class Fixed(nn.Module):
    """A detector that always says the same of image i of a batch."""

    def __init__(self, logits, pred_boxes):
        super().__init__()
        self.logits, self.boxes = nn.Parameter(logits), pred_boxes
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, images, is_pad):
        self.seen = is_pad, self.training, torch.is_inference_mode_enabled()
        answer = boxes.Predictions(self.logits[:len(images)], self.boxes[:len(images)])
        wrong = boxes.Predictions(-answer.logits, 1 - answer.boxes)
        return model.Output([wrong, answer], [], None)


class Centroid(nn.Module):
    """A detector whose box is where the image is not 0, wherever padding lies: its answer for an
    image does not depend on the others in the batch."""

    def forward(self, images, is_pad):
        answers = []
        for image, pad in zip(images, is_pad):
            h, w = (~pad[:, 0]).sum(), (~pad[0]).sum()
            y, x = image[0].nonzero().unbind(-1)
            x1, x2, y1, y2 = x.min(), x.max() + 1, y.min(), y.max() + 1
            answers.append(torch.stack([(x1 + x2) / 2 / w, (y1 + y2) / 2 / h,
                                        (x2 - x1) / w, (y2 - y1) / h]))
        found = torch.stack(answers)[:, None]                                         # (B, 1, 4)
        labels = images[:, 1].amax((1, 2)).long()       # written into the image's second channel
        logits = torch.eye(3)[labels][:, None] * 9 - 4                                # (B, 1, 3)
        return model.Output([boxes.Predictions(logits, found)], [], None)


class Pictures(torch.utils.data.Dataset):
    """Image i of OBJECTS with its first object painted; sizes differ, so batches are padded."""

    def __init__(self, objects=OBJECTS):
        self.coco, self.image_ids, self.categories = make_coco(objects), list(objects), CATEGORIES
        self.objects_of = objects

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, i):
        c, x, y, w, h = self.objects_of[self.image_ids[i]][0]
        label, scale = [c["id"] for c in CATEGORIES].index(c), 1 + i % 2
        image = torch.zeros(3, 80 * scale, 100 * scale)
        image[0, y * scale:(y + h) * scale, x * scale:(x + w) * scale] = 1
        image[1] = label
        box = torch.tensor([[(x + w / 2) / 100, (y + h / 2) / 80, w / 100, h / 80]])
        return image, dataset.Target(torch.tensor([label]), box, self.image_ids[i], (80, 100))


# ---- detect ----

def test_detect_worked_by_hand():
    """Two queries, two classes; the picture is 200 wide and 100 high, whatever the network saw.

    Logits   query 0: 0, 2     query 1: 1, -1     ->  order (0, class 1), (1, class 0), (0, class 0)
    Boxes    query 0: centre (.5, .5), size (.2, .4)  ->  x 80..120, y 30..70
             query 1: centre (.9, .5), size (.4, 1.)  ->  x 140..220, clipped to 200; y 0..100
    """
    detector = Fixed(torch.tensor([[[0., 2.], [1., -1.]]]),
                     torch.tensor([[[.5, .5, .2, .4], [.9, .5, .4, 1.]]]))
    [found] = evaluate.detect(detector, torch.rand(1, 3, 32, 32), [(100, 200)], top_k=3)
    torch.testing.assert_close(found["scores"], torch.tensor([2., 1., 0.]).sigmoid())
    assert found["labels"].tolist() == [1, 0, 0] and found["labels"].dtype == torch.int64
    torch.testing.assert_close(found["boxes_xyxy"], torch.tensor(
        [[80., 30., 120., 70.], [140., 0., 200., 100.], [80., 30., 120., 70.]]))


def test_detect_gives_all_pairs_if_more_are_asked_for():
    detector = Fixed(torch.randn(1, 2, 3), torch.rand(1, 2, 4))
    [found] = evaluate.detect(detector, torch.rand(1, 3, 8, 8), [(8, 8)], top_k=100)
    assert {key: tuple(t.shape) for key, t in found.items()} == {
        "scores": (6,), "labels": (6,), "boxes_xyxy": (6, 4)}


def test_equal_scores_keep_their_order():
    """100 equal logits: the first queries win, in order, on every machine."""
    spots = torch.arange(100)[:, None] / 200
    pred_boxes = torch.cat([spots, spots, spots * 0 + .1, spots * 0 + .1], dim=1)[None]
    [found] = evaluate.detect(Fixed(torch.zeros(1, 100, 1), pred_boxes), torch.rand(1, 3, 8, 8),
                              [(1, 1)], top_k=5)
    expected = boxes.to_xyxy(pred_boxes[0, :5]).clamp(0, 1)
    torch.testing.assert_close(found["boxes_xyxy"], expected)


# centre x, y, width, height; IoU with box 0: .9, .75, 0, 0; of boxes 3 and 4: .5, clipped 1
CLOSE_BOXES = torch.tensor([[[.5, .5, .4, .40], [.5, .5, .4, .36], [.5, .5, .4, .30],
                             [1., .5, .4, .20], [1.2, .5, .8, .20]]])
CLOSE_LOGITS = torch.tensor([[[5., -9.], [4., 1.], [3., -9.], [2., -9.], [0., -9.]]])


@pytest.mark.parametrize("nms, expected", [
    # (class, logit, last side's y) of what is left, best first; without NMS 5 pairs above -9 and 1
    (None, [(0, 5), (0, 4), (0, 3), (0, 2), (1, 1), (0, 0)]),
    (.80, [(0, 5), (0, 3), (0, 2), (1, 1), (0, 0)]),    # (0, 4) overlaps (0, 5) by .9; (1, 1) too,
    (.74, [(0, 5), (0, 2), (1, 1), (0, 0)]),            # but is of another class
    (.45, [(0, 5), (0, 2), (1, 1)])])                   # 3 and 4 overlap by .5, before clipping
def test_nms_worked_by_hand(nms, expected):
    detector, image = Fixed(CLOSE_LOGITS, CLOSE_BOXES), torch.rand(1, 3, 8, 8)
    [found] = evaluate.detect(detector, image, [(50, 100)], len(expected), nms)
    logits = torch.tensor([float(logit) for _, logit in expected])
    torch.testing.assert_close(found["scores"], logits.sigmoid())
    assert found["labels"].tolist() == [label for label, _ in expected]
    rows = [CLOSE_LOGITS[0, :, label].tolist().index(logit) for label, logit in expected]
    scaled = boxes.to_xyxy(CLOSE_BOXES[0, rows]) * torch.tensor([100, 50, 100, 50])
    torch.testing.assert_close(found["boxes_xyxy"], scaled.clamp(max=100))


def test_nms_looks_at_the_best_pairs_only_and_top_k_counts_what_it_leaves(monkeypatch):
    detector, image = Fixed(CLOSE_LOGITS, CLOSE_BOXES), torch.rand(1, 3, 8, 8)
    [found] = evaluate.detect(detector, image, [(50, 100)], top_k=2, nms=.8)
    torch.testing.assert_close(found["scores"], torch.tensor([5., 3.]).sigmoid())
    monkeypatch.setattr(evaluate, "NMS_PAIRS", 3)
    [found] = evaluate.detect(detector, image, [(50, 100)], top_k=9, nms=.8)
    torch.testing.assert_close(found["scores"], torch.tensor([5., 3.]).sigmoid())


def test_detect_runs_in_eval_mode_and_gives_every_mode_back():
    detector = Fixed(torch.randn(1, 2, 3), torch.rand(1, 2, 4)).train()
    detector.frozen.eval()                          # as a frozen norm would be
    evaluate.detect(detector, torch.rand(1, 3, 8, 8), [(8, 8)])
    assert detector.seen[1:] == (False, True)                   # not training, in inference mode
    assert detector.training and not detector.frozen.training


def test_modes_return_after_an_error():
    detector = nn.Linear(2, 2).train()
    with pytest.raises(KeyError), evaluate.answering(detector):
        raise KeyError
    assert detector.training


def test_a_padded_list_gives_what_one_image_at_a_time_gives():
    images = [image for image, _ in Pictures()]
    assert len({image.shape for image in images}) > 1                       # padding is needed
    sizes = [(80, 100), (40, 50), (800, 1000)]
    together = evaluate.detect(Centroid(), images, sizes)
    for image, size, found in zip(images, sizes, together):
        [alone] = evaluate.detect(Centroid(), [image], [size])
        for key in alone:
            torch.testing.assert_close(found[key], alone[key], rtol=0, atol=0)


def test_padding_is_marked_at_the_right_and_bottom():
    detector = Fixed(torch.randn(2, 2, 3), torch.rand(2, 2, 4))
    evaluate.detect(detector, [torch.rand(3, 4, 6), torch.rand(3, 2, 8)], [(4, 6), (2, 8)])
    is_pad = detector.seen[0]
    assert is_pad.shape == (2, 4, 8)
    assert (~is_pad[0]).nonzero().max(0).values.tolist() == [3, 5] and is_pad[0].sum() == 8
    assert (~is_pad[1]).nonzero().max(0).values.tolist() == [1, 7] and is_pad[1].sum() == 16


def test_mistakes_are_named():
    detector = Fixed(torch.randn(1, 2, 3), torch.rand(1, 2, 4))
    with pytest.raises(ValueError, match="1 images but 2 sizes_px"):
        evaluate.detect(detector, torch.rand(1, 3, 8, 8), [(8, 8), (8, 8)])
    with pytest.raises(ValueError, match="normalise"):
        evaluate.detect(detector, torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [(8, 8)])
    with pytest.raises(ValueError, match="no images"):
        evaluate.coco_metrics(make_coco(), [], [], CATEGORIES)


# ---- coco_metrics ----

def test_perfect_detections_give_exactly_1():
    metrics = ap(perfect())
    assert metrics["AP"] == metrics["AP50"] == metrics["AP75"] == metrics["AR100"] == 1.0
    assert metrics["per_class"] == {"cat": 1.0, "dog": 1.0, "owl": 1.0}


def test_ap_worked_by_hand():
    """One class, objects g1 and g2. Surest detection: nothing there; second: g1 exactly.

    Precision at recall .5 is 1/2, beyond it 0. COCO reads it at recalls 0, .01, ... 1: the 51
    readings up to .5 give 1/2, the other 50 give 0, at every IoU: AP = 51/101/2 = .2525.
    """
    coco = make_coco({11: [(3, 10, 10, 40, 20), (3, 60, 30, 30, 40)]})
    metrics = ap([result(11, [(0, 0.9, 0, 60, 9, 79), (0, 0.8, 10, 10, 50, 30)])], coco, [11])
    assert metrics["AP"] == pytest.approx(51 / 101 / 2, abs=1e-12)
    assert metrics["per_class"] == {"cat": metrics["AP"], "dog": None, "owl": None}


def test_no_detection_gives_0_and_not_an_error():
    for results in ([], [result(i, []) for i in OBJECTS]):
        metrics = ap(results)
        assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == 0.0
        assert metrics["APl"] is None               # no object above 96 x 96 pixels: COCO's -1
        assert set(metrics["per_class"].values()) == {0.0}


def test_no_object_at_all_gives_none():
    coco = make_coco({11: []})
    false = [result(11, [(0, .9, 0, 0, 5, 5)])]
    metrics, table = evaluate.coco_metrics(coco, [11], false, CATEGORIES)
    assert set(list(metrics.values())[:-1]) == {None} and table.count("n/a") == 7 + 3


def test_order_of_detections_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    results = []
    for i, found in zip(OBJECTS, perfect()):
        near = found["boxes_xyxy"].repeat(6, 1)
        near = near + 4 * torch.randn(near.shape, generator=generator)
        results.append({"image_id": i, "labels": found["labels"].repeat(6), "boxes_xyxy": near,
                        "scores": torch.rand(len(near), generator=generator)})
    shuffled = []
    for found in reversed(results):
        order = torch.randperm(len(found["labels"]), generator=generator)
        shuffled.append({k: v if k == "image_id" else v[order] for k, v in found.items()})
    assert 0 < ap(results)["AP"] < 1
    assert ap(shuffled) == ap(results)


def test_a_crowd_neither_helps_nor_hurts():
    """Three sure detections inside a crowd region: false without the crowd, no matter with it."""
    inside = [(0, 0.99 - k / 100, 60 + k, 50, 70 + k, 70) for k in range(3)]
    true = [(0, .5, 10, 10, 50, 30), (1, .5, 60, 30, 90, 70)]
    results = [result(11, inside + true), *perfect([22, 33])]
    crowded = make_coco(crowds=[(11, 3, 55, 45, 45, 35)])
    assert ap(results)["AP"] < 1.0
    assert ap(results, crowded)["AP"] == 1.0            # ignored
    assert ap(perfect(), crowded)["AP"] == 1.0          # and not missed when nobody finds it


def test_labels_are_mapped_to_json_ids_with_gaps():
    """The label itself as category_id would be a class that the json does not have."""
    owl = ap([result(22, [(2, .9, 5, 5, 55, 55)])])
    assert owl["per_class"] == {"cat": 0.0, "dog": 0.0, "owl": 1.0}


def test_labels_follow_the_given_categories_and_not_the_ids():
    """A checkpoint that lists owl first, and a class the json lacks, which counts for nothing."""
    categories = [CATEGORIES[2], {"id": None, "name": "emu"}, CATEGORIES[0], CATEGORIES[1]]
    found = [(0, .9, 5, 5, 55, 55), (1, .95, 0, 0, 20, 20)]
    metrics, _ = evaluate.coco_metrics(make_coco(), list(OBJECTS), [result(22, found)], categories)
    assert metrics["per_class"] == {"owl": 1.0, "cat": 0.0, "dog": 0.0}


def test_only_the_given_images_count():
    assert ap(perfect([11, 22]), image_ids=[11, 22])["AP"] == 1.0
    assert ap(perfect([11, 22]))["AP"] < 1.0                     # 33 was looked at: nothing there


def test_only_the_given_classes_count():
    metrics, table = evaluate.coco_metrics(make_coco(), list(OBJECTS), perfect([11, 33]),
                                           CATEGORIES[:2])
    assert metrics["AP"] == 1.0 and "owl" not in table
    assert set(metrics["per_class"]) == {"cat", "dog"}


def test_pycocotools_prints_nothing_and_the_json_stays_as_it_was(capsys):
    coco = make_coco()
    ap(perfect(), coco)
    assert capsys.readouterr().out == ""
    assert len(coco.dataset["annotations"]) == 4 and "score" not in coco.dataset["annotations"][0]


def test_table_can_be_read():
    coco = make_coco(crowds=[(11, 3, 55, 45, 45, 35)])
    table = evaluate.coco_metrics(coco, list(OBJECTS), perfect(), CATEGORIES)[1].splitlines()
    assert table[0] == "3 images, 4 objects"                # a crowd is none
    assert table[1].split() == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"]
    assert table[2].split() == ["1.000"] * 5 + ["n/a", "1.000"]     # objects of 400 to 2500 pixels
    assert [line.split() for line in table[4:]] == [
        ["cat", "1.000", "2"], ["dog", "1.000", "1"], ["owl", "1.000", "1"]]


def test_table_of_many_classes_shows_those_of_most_objects():
    metrics = {**dict.fromkeys(evaluate.STATS, 0.5), "per_class": {f"c{i}": 0.5 for i in range(80)}}
    table = evaluate.table(metrics, {f"c{i}": i for i in range(80)}, 5).splitlines()
    assert "(20 of 80 classes)" in table[3]
    assert [line.split()[0] for line in table[4:]] == [f"c{i}" for i in range(79, 59, -1)]


# ---- evaluate ----

ONE_EACH = {i: [((3, 7, 90)[i % 3], 10 + i, 12, 30, 24)] for i in range(1, 8)}      # 7 images


def test_evaluate_puts_the_parts_together():
    """Centroid finds what is painted in each image, at two scales, padded or not."""
    metrics, table = evaluate.evaluate(Centroid(), Pictures(ONE_EACH), batch_size=3)
    assert metrics["AP"] == 1.0 and table.startswith("7 images, 7 objects")


def test_evaluate_finds_with_what_it_is_given():
    def find(model, images, sizes_px):
        return [{key: t[1:] for key, t in found.items()}            # the best one is thrown away
                for found in evaluate.detect(model, images, sizes_px, top_k=2)]
    assert evaluate.evaluate(Centroid(), Pictures(ONE_EACH), 3, find)[0]["AP"] < 0.5


def test_evaluate_puts_pictures_of_like_shape_into_a_batch():
    """From the tallest to the widest, which leaves the least padding; every picture is tested."""
    seen = []

    class Notes(Pictures):
        def __getitem__(self, i):
            seen.append(i)
            return super().__getitem__(i)
    pictures = Notes(ONE_EACH)
    for i, width in enumerate((50, 20, 50, 30, 20, 90, 10)):        # of 7 images
        pictures.coco.imgs[pictures.image_ids[i]].update(width=width, height=40)
    assert evaluate.evaluate(Centroid(), pictures, 3)[0]["AP"] == 1.0
    assert seen == [6, 1, 4, 3, 0, 2, 5]


def test_the_order_of_a_dataset_does_not_matter():
    """The same AP, per class too, and table. All scores are equal, so only order tells them apart.
    """
    class Rough(Centroid):
        """Boxes that are the worse the further left they lie; some of another class."""

        def forward(self, images, is_pad):
            [found] = super().forward(images, is_pad).o_decoder
            x = found.boxes[..., :1]                                                # (B, 1, 1)
            wide = found.boxes * torch.cat([x ** 0, x ** 0, 1.5 - x, x ** 0], dim=-1)
            logits = torch.where(x * 100 % 10 < 2, found.logits.roll(1, -1), found.logits)
            return model.Output([boxes.Predictions(logits, wide)], [], None)
    pictures = Pictures({i: [((3, 7, 90)[i % 3], 2 * i, 12, 30, 24), (7, 80, 50, 9, 9)]
                         for i in range(1, 25)})
    for i, image in pictures.coco.imgs.items():
        image["width"] = 50 + 7 * i % 40                # so that batches are filled out of order
    metrics, table = evaluate.evaluate(Rough(), pictures, batch_size=5)
    assert 0 < min(metrics["per_class"].values()) < max(metrics["per_class"].values()) < 1
    for seed in range(3):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(seed)).tolist()
        pictures.image_ids = [pictures.image_ids[i] for i in order]
        assert evaluate.evaluate(Rough(), pictures, batch_size=5) == (metrics, table)


def test_evaluate_shows_progress_in_batches_on_a_terminal_alone(monkeypatch):
    bars = []
    monkeypatch.setattr(evaluate, "tqdm", lambda loader, **words: bars.append(
        (len(loader), words["disable"])) or loader)
    evaluate.evaluate(Centroid(), Pictures(ONE_EACH), 3)
    assert bars == [(3, None)]                              # None: off where there is no terminal
    monkeypatch.setattr(evaluate.processes, "rank", lambda: 1)
    evaluate.evaluate(Centroid(), Pictures(ONE_EACH), 3)
    assert bars[1] == (2, True)                             # it has the other images


def test_bf16_is_autocast_of_the_network_alone():
    class Asks(Centroid):
        def forward(self, images, is_pad):
            self.autocast = torch.is_autocast_enabled("cpu")
            return super().forward(images, is_pad)
    for precision, expected in (("fp32", False), ("bf16", True)):
        detector = Asks()
        assert evaluate.evaluate(detector, Pictures(), 3, precision=precision)[0]["AP50"] > 0
        assert detector.autocast == expected


def one_process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    seen = []

    class Counts(Pictures):
        def __getitem__(self, i):
            seen.append(i)
            return super().__getitem__(i)
    counted, real = [], evaluate.coco_metrics

    def count(coco, image_ids, results, categories):
        counted.extend(found["image_id"] for found in results)
        return real(coco, image_ids, results, categories)
    evaluate.coco_metrics = count
    wrapped = nn.Module()                               # as DistributedDataParallel does
    wrapped.module = Centroid()
    metrics, table = evaluate.evaluate(wrapped, Counts(ONE_EACH), batch_size=3)
    torch.save({"seen": seen, "counted": counted, "AP": metrics["AP"], "table": table},
               f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_images_and_agree(tmp_path):
    torch.multiprocessing.spawn(one_process, (str(tmp_path),), 2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["seen"] == [0, 2, 4, 6] and second["seen"] == [1, 3, 5]
    assert sorted(first["counted"]) == list(ONE_EACH) and second["counted"] == []
    assert first["AP"] == second["AP"] == 1.0 and first["table"] == second["table"]


# ---- [DAC Fig. 3] ----

def test_queries_per_object_worked_by_hand():
    """[DAC Fig. 3]  M = .3 p + .7 IoU of [DAC Eq. 4], p = 1/2: at IoU 1 M = .85, at IoU .5 M = .5.

    Image 11 has one object and three queries: exact, exact, half of it. Image 33 has one, found by
    none. Mean over both objects: above .4, (3 + 0)/2; above .6 and .8, (2 + 0)/2; above .9, 0.
    """
    class Two(Pictures):
        def __getitem__(self, i):
            image, target = super().__getitem__(i)
            return image, target._replace(boxes=torch.tensor([[exact, elsewhere][i]]))
    exact, half, elsewhere = [.3, .3, .2, .2], [.3, .3, .2, .1], [.8, .8, .1, .1]
    dataset = Two({11: OBJECTS[11], 33: OBJECTS[33]})
    detector = Fixed(torch.zeros(2, 3, 3), torch.tensor([[exact, exact, half], [exact] * 3]))
    found = evaluate.queries_per_object(detector, dataset, thresholds=(.4, .6, .8, .9))
    assert found == {.4: 1.5, .6: 1.0, .8: 1.0, .9: 0.0}


def test_queries_per_object_without_objects():
    class Empty(Pictures):
        def __getitem__(self, i):
            image, target = super().__getitem__(i)
            return image, target._replace(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long())
    assert evaluate.queries_per_object(Centroid(), Empty()) == {.6: None, .7: None, .8: None}
