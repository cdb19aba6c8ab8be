"""What a study measures of a trained model, beside AP. Each is a function of (model, dataset)."""
import collections
import copy
import functools
import statistics

import torch

from detr_min import boxes, matcher
from detr_min.run import evaluate

SURE, NEAR = 0.3, 0.5           # a prediction is a find of an object from this score and IoU on


def answers(model, dataset):
    """Yield logits (N, C), boxes (N, 4) of the last O-Decoder layer and the target, by picture."""
    for batch in torch.utils.data.DataLoader(dataset, batch_size=20, collate_fn=list):
        images, targets = zip(*batch)
        yield from zip(*evaluate.predict(model, images), targets)


def score_iou_correlation(model, dataset):
    """Pearson's correlation of class score and IoU over the matched predictions of a data set.

    Predictions of the last layer are matched one-to-one [DETR Eq. 1]; the score is the object's
    class's. Returns {"correlation": a number, or None if it is not defined}.
    """
    scores, ious = [], []
    for logits, pred_boxes, target in answers(model, dataset):
        query_idx, gt_idx = matcher.one_to_one(matcher.match_cost(
            logits, pred_boxes, target.labels, target.boxes))
        scores += logits[query_idx, target.labels[gt_idx]].sigmoid().tolist()
        ious += boxes.paired_iou(pred_boxes[query_idx], target.boxes[gt_idx]).tolist()
    return {"correlation": statistics.correlation(scores, ious) if len(set(scores)) > 1 else None}


def boxes_alone(model, dataset):
    """AP if scores were perfect: what the boxes and classes of the queries are worth.

    Of each object only the best box of its class counts, with its IoU as the score; a query has the
    class of its highest score. So neither a bad ranking nor a duplicate costs anything.
    Returns {"boxes_AP": a number}
    """
    results = []
    for logits, pred_boxes, target in answers(model, dataset):
        labels = logits.argmax(1)                                                       # (N,)
        ious = boxes.iou(pred_boxes, target.boxes) * (labels[:, None] == target.labels)  # (N, M)
        best = ious.argmax(0)                                                           # (M,)
        h, w = target.size_px
        results.append({"image_id": target.image_id, "labels": labels[best],
                        "scores": ious.amax(0),
                        "boxes_xyxy": boxes.to_xyxy(pred_boxes[best]) * torch.tensor([w, h, w, h])})
    metrics, _ = evaluate.coco_metrics(dataset.coco, dataset.image_ids, results,
                                       dataset.categories)
    return {"boxes_AP": metrics["AP"]}


def best_boxes_recall(model, dataset):
    """Whether the best boxes have high scores: recall of the best regressed samples [Align-DETR].

    Best regressed is, for each of an image's M objects, the query of the highest IoU with it. The
    recall is the share of these among the M, 2 M and 5 M queries of the highest score of any class,
    over all images. Returns {"recall_1": a number, "recall_2", "recall_5"}
    """
    counts = collections.Counter()
    for logits, pred_boxes, target in answers(model, dataset):
        if M := len(target.labels):
            best = set(boxes.iou(pred_boxes, target.boxes).argmax(0).tolist())
            order = logits.amax(1).argsort(descending=True, stable=True).tolist()
            counts["all"] += len(best)
            for factor in (1, 2, 5):
                counts[factor] += len(best.intersection(order[:factor * M]))
    return {f"recall_{factor}": counts[factor] / counts["all"] for factor in (1, 2, 5)}


def gathered(model, dataset):
    """[DAC Fig. 3]  queries per object of a match quality above .6, .7 and .8."""
    found = evaluate.queries_per_object(model, dataset)
    return {f"above_{threshold}": number for threshold, number in found.items()}


def finds_per_object(model, dataset):
    """How many predictions find an object: of its class, with a score of .3 and an IoU of .5.

    The mean over the objects that are found at all; 1 means no duplicates. None if none is found.
    """
    counts = []
    for logits, pred_boxes, target in answers(model, dataset):
        sure = logits[:, target.labels].sigmoid() >= SURE                               # (N, M)
        near = boxes.iou(pred_boxes, target.boxes) >= NEAR                              # (N, M)
        counts += (sure & near).sum(0).tolist()
    found = [count for count in counts if count]
    return statistics.mean(found) if found else None


def decoders(model, dataset):
    """O-Decoder and C-Decoder as detectors: AP, AP after NMS at .7, finds per object.

    The C-Decoder is run in place of the O-Decoder. A model without one has numbers for O only.
    """
    with_nms = functools.partial(evaluate.detect, nms=0.7)
    numbers, networks = {}, {"O": model}
    if hasattr(model.decoder, "c_decoder"):
        networks["C"] = copy.copy(model)
        networks["C"]._modules = {**model._modules, "decoder": copy.copy(model.decoder)}
        networks["C"].decoder.o_decoder = model.decoder.c_decoder
    for name, network in networks.items():
        numbers[f"{name}_AP_nms"] = evaluate.evaluate(network, dataset, 20, with_nms)[0]["AP"]
        numbers[f"{name}_finds"] = finds_per_object(network, dataset)
        if name == "C":
            numbers["C_AP"] = evaluate.evaluate(network, dataset, 20)[0]["AP"]
    return numbers
