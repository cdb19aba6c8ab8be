"""Messages between the grader and the process of a hand-in: a header in JSON, bytes of tensors.

What comes from a hand-in is never unpickled: it can only become tensors and plain values.
"""
import json
import math
import pickle
import types

import torch

from detr_min import boxes

DTYPES = {str(dtype)[6:]: dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool)}
NAMED = {"Predictions": boxes.Predictions}


def encode(header, tensors):
    rows = [(str(t.dtype)[6:], list(t.shape)) for t in tensors]
    text = json.dumps({**header, "tensors": rows}).encode()
    parts = [t.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)
             .numpy().tobytes() for t in tensors]
    return b"".join([len(text).to_bytes(8, "big"), text, *parts])


def decode(message):
    """-> header, tensors; any error if it is not a message"""
    start = 8 + int.from_bytes(message[:8], "big")
    header, tensors = json.loads(message[8:start]), []
    for name, shape in header.pop("tensors"):
        end = start + math.prod(shape) * DTYPES[name].itemsize
        part = bytearray(message[start:end])
        tensors.append(torch.frombuffer(part, dtype=DTYPES[name]).reshape(shape) if part else
                       torch.empty(shape, dtype=DTYPES[name]))
        start = end
    return header, tensors


def take_apart(thing, tensors):
    """An answer as [kind, content] for JSON; its tensors are appended to a list."""
    if isinstance(thing, torch.Tensor):
        tensors.append(thing)
        return ["tensor", len(tensors) - 1]
    if isinstance(thing, (tuple, list, types.GeneratorType)):
        kind = type(thing).__name__ if type(thing).__name__ in NAMED else (
            "tuple" if isinstance(thing, tuple) else "list")
        return [kind, [take_apart(part, tensors) for part in thing]]
    if isinstance(thing, dict):
        return ["dict", [[str(key), take_apart(part, tensors)] for key, part in thing.items()]]
    if thing is None or isinstance(thing, (bool, int, float, str)):
        return ["value", thing]
    raise TypeError(f"returned a {type(thing).__name__}, where tensors are wanted")


def put_together(row, tensors):
    kind, content = row
    if kind == "tensor":
        return tensors[content]
    if kind == "value":
        return content
    if kind == "dict":
        return {key: put_together(part, tensors) for key, part in content}
    parts = [put_together(part, tensors) for part in content]
    return NAMED[kind](*parts) if kind in NAMED else tuple(parts) if kind == "tuple" else parts


class Pickler(pickle.Pickler):
    """Arguments without their tensors, which are listed: modules keep their structure."""

    def __init__(self, file):
        super().__init__(file)
        self.tensors, self.places = [], {}

    def persistent_id(self, thing):
        if not isinstance(thing, torch.Tensor):
            return None
        if id(thing) not in self.places:
            self.places[id(thing)] = len(self.tensors)
            self.tensors.append(thing)
        return self.places[id(thing)]


class Unpickler(pickle.Unpickler):
    """Arguments, with their tensors put back. For what the grader sends."""

    def __init__(self, file, tensors):
        super().__init__(file)
        self.persistent_load = tensors.__getitem__
