"""From a model's answer to detections, COCO's AP and [DAC Fig. 3]'s statistic.

AP is pycocotools' own, against the json's own object, in pixels of the original pictures; crowds
count as COCO counts them. Read after `sets.py`; next: `draw.py`.
"""
import collections
import contextlib
import io
import itertools

import torch
import torch.distributed as dist
import torchvision.ops as ops
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from .. import boxes, matcher
from ..data import batches, coco_json
from . import processes

STATS = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5, "AR100": 8}   # COCOeval's
NMS_PAIRS = 10000       # NMS looks at no more (query, class) pairs than this, as released
THRESHOLD = 0.4         # the smallest score that is drawn, or that a Predictor returns
TABLE_CLASSES = 20              # the table has no more lines of classes than this


@contextlib.contextmanager
def answering(model):
    """Eval mode and no gradients inside; after it every module's own mode returns."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def predict(model, images):
    """The last O-Decoder layer's Predictions for images as in `detect`; float32, on the CPU."""
    if not all(image.is_floating_point() for image in images):
        raise ValueError("images hold whole numbers: normalise them first (transforms.normalise)")
    images, is_pad, _ = batches.collate([(image, None) for image in images])
    device = next(model.parameters(), images).device
    with answering(model):
        logits, pred_boxes = model(images.to(device), is_pad.to(device)).o_decoder[-1]
    if not (logits.isfinite().all() and pred_boxes.isfinite().all()):   # COCO counts NaN as a hit
        raise ValueError("the model's answers are not finite: did a learning rate too high spoil "
                         "its weights?")
    return boxes.Predictions(logits.float().cpu(), pred_boxes.float().cpu())


def headline(metrics):
    """`AP 0.712  AP50 0.893`, or n/a where there is no object to find."""
    return "  ".join(f"{name} {'n/a' if metrics[name] is None else format(metrics[name], '.3f')}"
                     for name in ("AP", "AP50"))


def detect(model, images, sizes_px, top_k=100, nms=None):
    """Detect objects: the k (query, class) pairs of highest score in each picture, best first.

    score = sigmoid(logit). AP wants many, so there is no threshold; one-to-one training leaves few
    duplicates, so NMS is off. Equal logits keep their order. Under autocast if the caller is.

    Args:
        images    (B, 3, h, w), or a list of (3, h, w), padded here; normalised as ImageNet's
        sizes_px  [(h, w), ...] of the B original pictures
        top_k     k = min(top_k, N*C), or fewer with nms
        nms       of two boxes of one class that overlap by more than this IoU, drop the worse
    Returns:
        a list of B dicts, on the CPU: scores (k,) in [0, 1]; labels (k,) int64 in [0, C);
        boxes_xyxy (k, 4) in pixels of the original picture, clipped to it
    Raises:
        ValueError: not one size an image; images of whole numbers, which were not normalised
    """
    if len(images) != len(sizes_px):
        raise ValueError(f"{len(images)} images but {len(sizes_px)} sizes_px: one (h, w) an image")
    found = []
    for logits, pred_boxes, (h, w) in zip(*predict(model, images), sizes_px):
        best, pair = logits.flatten().sort(descending=True, stable=True)                # (N*C,)
        boxes_xyxy = boxes.to_xyxy(pred_boxes)                                          # (N, 4)
        if nms is not None:
            query, label = pair[:NMS_PAIRS] // logits.shape[1], pair[:NMS_PAIRS] % logits.shape[1]
            kept = ops.batched_nms(boxes_xyxy[query], best[:NMS_PAIRS], label, nms)     # best first
            best, pair = best[kept], pair[kept]
        best, pair = best[:top_k], pair[:top_k]                                         # (k,)
        boxes_px = ops.clip_boxes_to_image(
            boxes_xyxy[pair // logits.shape[1]] * torch.tensor([w, h, w, h]), (h, w))
        found.append({"scores": best.sigmoid(), "labels": pair % logits.shape[1],
                      "boxes_xyxy": boxes_px})
    return found


def coco_metrics(coco, image_ids, results, categories):
    """COCO's average precision of some images, and a table of it to print. Higher is better.

    Args:
        coco        pycocotools' object of the whole json, crowds included
        image_ids   the images that were looked at; only these count
        results     dicts of `detect`, each with an image_id
        categories  [{"id": json id, "name"}, ...], position = label; id None: the json lacks it
    Returns:
        {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "per_class": {name: AP}}, in [0, 1] or
        None where there is no object to find (COCO's -1); and the table, one str
    """
    if not image_ids:
        raise ValueError("no images to evaluate")
    json_ids = [category["id"] for category in categories]
    annotations = []
    for result in results:
        x1y1, x2y2 = result["boxes_xyxy"].double().split(2, dim=-1)                     # (k, 2)
        rows = torch.cat([x1y1, x2y2 - x1y1], dim=-1).tolist()
        annotations += [{"image_id": result["image_id"], "category_id": json_ids[label],
                         "bbox": xywh, "score": score} for xywh, label, score in
                        zip(rows, result["labels"].tolist(), result["scores"].tolist())
                        if json_ids[label] is not None]
    found = coco_json.index({**coco.dataset, "annotations": annotations})
    with contextlib.redirect_stdout(io.StringIO()):                 # pycocotools prints as it goes
        scorer = COCOeval(coco, found, "bbox")
        scorer.params.imgIds = list(image_ids)
        scorer.params.catIds = [i for i in json_ids if i is not None]
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    metrics = {name: none_if_empty(scorer.stats[i]) for name, i in STATS.items()}
    precision = scorer.eval["precision"][:, :, :, 0, -1]       # (10 IoUs, 101 recalls, classes)
    objects = collections.Counter(a["category_id"] for image_id in set(image_ids)
                                  for a in coco.imgToAnns.get(image_id, []) if not a["iscrowd"])
    metrics["per_class"], counts = {}, {}
    for k, json_id in enumerate(scorer.params.catIds):
        name = categories[json_ids.index(json_id)]["name"]
        metrics["per_class"][name] = none_if_empty(precision[:, :, k].mean())
        counts[name] = objects[json_id]
    return metrics, table(metrics, counts, len(set(image_ids)))


def none_if_empty(value):
    """Turn COCO's -1, which means no objects, into None; round away its 1 / (1 + 2e-16)."""
    return None if value < 0 else round(float(value), 12)


def table(metrics, counts, num_images):
    """The metrics as text: COCO's numbers, then AP by class, the classes of most objects first."""
    def text(value):
        return "     n/a" if value is None else f"{value:8.3f}"
    shown = sorted(counts, key=lambda name: -counts[name])[:TABLE_CLASSES]
    width = max(len(name) for name in [*shown, "class"])
    more = f"   ({len(shown)} of {len(counts)} classes)" if len(counts) > len(shown) else ""
    return "\n".join([
        f"{num_images} images, {sum(counts.values())} objects",
        "".join(f"{name:>8}" for name in STATS), "".join(text(metrics[name]) for name in STATS),
        f"  {'class':{width}}      AP  objects{more}",
        *(f"  {c:{width}}{text(metrics['per_class'][c])} {counts[c]:8}" for c in shown)])


def evaluate(model, dataset, batch_size, find=detect, precision="fp32"):
    """AP of a model on a dataset.Detections that leaves nothing to chance.

    Pictures of like shape share a batch, so there is little padding. Under torchrun each process
    takes its share, and all get what `coco_metrics` returns. `find` is `detect`, or a
    functools.partial of it with another top_k or with nms. Precision is fp32 or bf16. On a
    terminal a bar shows how far it is.
    """
    model = getattr(model, "module", model)     # DDP itself would wait for equal shares
    device = next(model.parameters(), torch.empty(0)).device
    rank, world = processes.rank(), processes.world()
    shapes = [image["width"] / image["height"] for image in map(dataset.coco.imgs.get,
                                                                dataset.image_ids)]
    by_shape = sorted(range(len(dataset)), key=shapes.__getitem__)
    share = torch.utils.data.Subset(dataset, by_shape[rank::world])
    loader = torch.utils.data.DataLoader(share, batch_size, collate_fn=list)
    results = []
    for batch in tqdm(loader, unit="batch", leave=False, disable=None if rank == 0 else True):
        images, targets = zip(*batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            found = find(model, images, [target.size_px for target in targets])
        results += [{"image_id": t.image_id, **f} for t, f in zip(targets, found)]
    if world == 1:
        return coco_metrics(dataset.coco, dataset.image_ids, results, dataset.categories)
    shares, answer = [None] * world, [None]
    dist.all_gather_object(shares, results)
    if rank == 0:
        results = list(itertools.chain(*shares))
        answer = [coco_metrics(dataset.coco, dataset.image_ids, results, dataset.categories)]
    dist.broadcast_object_list(answer)
    return answer[0]


def queries_per_object(model, dataset, thresholds=(0.6, 0.7, 0.8), batch_size=8):
    """How many queries gather around an object: more with DAC-DETR than without, says [DAC Fig. 3].

    n(t) = mean over objects j of  |{queries i : M[i, j] > t}|       M of [DAC Eq. 4], match_quality

    The figure's axes are known: thresholds .6, .7, .8; "nums", the queries of an affinity above t;
    epochs. That affinity is M, that it is the last O-Decoder layer's, and a mean over all objects
    of a data set (crowds left out), is our definition: the paper's text does not settle it.
    Returns {t: n(t)}, n in [0, N], or None if there is no object.
    """
    counts, num_objects = torch.zeros(len(thresholds)), 0
    for batch in torch.utils.data.DataLoader(dataset, batch_size, collate_fn=list):
        images, targets = zip(*batch)
        for logits, pred_boxes, target in zip(*predict(model, images), targets):
            q = matcher.match_quality(logits.sigmoid(), pred_boxes, target.labels, target.boxes)
            counts += torch.stack([(q > t).sum() for t in thresholds])                  # q (N, M)
            num_objects += len(target.labels)
    return {t: float(n) / num_objects if num_objects else None for t, n in zip(thresholds, counts)}
