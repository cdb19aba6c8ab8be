"""A student's function in a process of its own: inputs go there, outputs and gradients come back.

The tests and their verdict stay here, where no line of the hand-in runs. It answers with
tensors and plain values, as in messages.py.
"""
import builtins
import collections
import io
import multiprocessing
import sys

import pytest
import torch

from exercises.grading import catalogue, handin, limits, messages

# With fork torch is loaded already, and nothing is copied; Windows has none, nor this grading.
FORK = multiprocessing.get_context("fork" if sys.platform != "win32" else None)
SECONDS, MEMORY_MB, STARTS = 20, 1024, 3        # for an answer; beyond torch's own; of the process
LONGEST = 2 ** 28                               # bytes of an answer
KEPT_CALLS = 1000                               # whose gradients can still be asked for
ERRORS = {name: kind for name, kind in vars(builtins).items()
          if isinstance(kind, type) and issubclass(kind, Exception)}


# ---- there: the process of the hand-in -----------------------------------------------------------

def serve(connection, path, text, function, memory_mb):
    """Run the student's file, then answer until the connection is closed."""
    limits.confine(connection.fileno(), memory_mb)
    for undo in list(handin.UNDO):
        undo()
    try:
        yours = handin.function_of(path, text, function.split(".")[1:])
        _, undo = handin.swap(original := catalogue.find(function), original)
        ready = {"ready": True}
    except BaseException as error:
        ready = {"refused": str(error)}
    connection.send_bytes(messages.encode(ready, []))
    calls = collections.OrderedDict()
    while True:
        header, tensors = messages.decode(connection.recv_bytes())
        try:
            reply = messages.encode(*(gradients if "of" in header else evaluate)(
                yours, calls, header, tensors))
        except BaseException as error:
            where = handin.line_of(path, error)
            text = str(error)[:2000] + f" ({path.name}, line {where})" * (where != "?")
            reply = messages.encode({"error": type(error).__name__, "text": text}, [])
        connection.send_bytes(reply)


def evaluate(yours, calls, header, tensors):
    *tensors, frame = tensors
    for place, kind in enumerate(header["kinds"]):
        if kind == "parameter":
            tensors[place] = torch.nn.Parameter(tensors[place])
        tensors[place].requires_grad_(kind != "constant")
    args, kwargs = messages.Unpickler(io.BytesIO(frame.numpy().tobytes()), tensors).load()
    before, found = [t._version for t in tensors], []
    with torch.set_grad_enabled(header["grad"]):
        row = messages.take_apart(yours(*args, **kwargs), found)
    edited = [place for place, t in enumerate(tensors) if t._version != before[place]]
    calls[header["call"]] = tensors, found
    if len(calls) > KEPT_CALLS:
        calls.popitem(last=False)
    return {"answer": row, "edited": edited, "outputs": len(found),
            "grads": [t.requires_grad for t in found]}, found + [tensors[i] for i in edited]


def gradients(yours, calls, header, tensors):
    inputs, outputs = calls[header["of"]]
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(torch.autograd.grad([outputs[i] for i in header["given"]], wanted, tensors,
                                     retain_graph=True, allow_unused=True))
    found = [next(found) if t.requires_grad else None for t in inputs]
    return ({"reached": [g is not None for g in found]}, [g for g in found if g is not None])


# ---- here ----------------------------------------------------------------------------------------

class Gone(Exception):
    """The process gave no answer: it ended, it hung, or what it sent is none."""


class Answer(torch.autograd.Function):
    """Connects outputs that came from elsewhere to the inputs: backward asks there."""

    @staticmethod
    def forward(ctx, apart, number, outputs, grads, *inputs):
        ctx.set_materialize_grads(False)
        ctx.apart, ctx.number = apart, number
        ctx.mark_non_differentiable(*[t for t, grad in zip(outputs, grads) if not grad])
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *given):
        return None, None, None, None, *ctx.apart.backward(ctx.number, given)


class Apart:
    """A student's function; call it like the package's.

    Raises:
        pytest.UsageError: a sentence about a file that cannot be run
    """

    def __init__(self, path, function, seconds, memory_mb):
        self.path, self.function, self.text = path, function, handin.text_of(path)
        self.seconds, self.memory_mb = seconds, memory_mb
        self.process, self.starts, self.calls, self.reason = None, 0, 0, ""
        try:
            self.start()
        except Gone as error:
            raise pytest.UsageError(f"{handin.shown(path)} fails on import: {error}") from None

    def start(self):
        self.starts += 1
        self.connection, theirs = FORK.Pipe()
        self.process = FORK.Process(target=serve, daemon=True, args=(
            theirs, self.path, self.text, self.function, self.memory_mb))
        self.process.start()
        theirs.close()
        header, _ = self.receive()
        if header.get("refused"):
            self.stop()
            raise pytest.UsageError(str(header["refused"]))

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None

    def gone(self, reason):
        self.stop()
        self.reason = reason
        return Gone(reason)

    def receive(self):
        try:
            if not self.connection.poll(self.seconds):
                raise self.gone(f"no answer within {self.seconds:g} s: an endless loop?")
            message = self.connection.recv_bytes(LONGEST)
        except (EOFError, ConnectionError):
            self.process.join(self.seconds)
            raise self.gone(f"its process ended, exit status {self.process.exitcode}") from None
        except OSError:
            raise self.gone(f"an answer of more than {LONGEST} bytes") from None
        try:
            return messages.decode(message)
        except Exception as error:
            raise self.gone(f"what it sent is no answer: {type(error).__name__}") from None

    def ask(self, header, tensors):
        """Send a request, return what `read` makes of the reply, or raise the student's error."""
        if self.process is None:
            if self.starts == STARTS:
                raise Gone(self.reason)
            self.start()
        try:
            self.connection.send_bytes(messages.encode(header, tensors))
        except OSError:
            pass                                    # it has ended; receive says how
        reply, found = self.receive()
        if "error" in reply:
            name, text = str(reply["error"]), str(reply.get("text"))
            raise ERRORS[name](text) if name in ERRORS else RuntimeError(f"{name}: {text}")
        return reply, found

    def __call__(self, *args, **kwargs):
        pickler = messages.Pickler(file := io.BytesIO())
        pickler.dump((args, kwargs))
        inputs, self.calls = pickler.tensors, self.calls + 1
        kinds = ["constant" if not t.requires_grad else "parameter" if
                 isinstance(t, torch.nn.Parameter) else "variable" for t in inputs]
        frame = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
        header = {"call": self.calls, "kinds": kinds, "grad": torch.is_grad_enabled()}
        reply, found = self.ask(header, [*inputs, frame])
        try:
            outputs, edited = found[:reply["outputs"]], found[reply["outputs"]:]
            with torch.no_grad():
                for place, new in zip(reply["edited"], edited):
                    inputs[place].copy_(new)
            if any(reply["grads"]):
                outputs = Answer.apply(self, self.calls, outputs, reply["grads"], *inputs)
            return messages.put_together(reply["answer"], outputs)
        except Exception as error:
            raise self.gone(f"what it sent is no answer: {type(error).__name__}") from None

    def backward(self, number, given):
        """Gradients of the inputs of a call, given those of its outputs; None where there is none.
        """
        places = [i for i, gradient in enumerate(given) if gradient is not None]
        reply, found = self.ask({"of": number, "given": places}, [given[i] for i in places])
        found = iter(found)
        return [next(found) if reached else None for reached in reply["reached"]]
