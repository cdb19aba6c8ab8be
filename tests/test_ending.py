"""How a program ends: a sentence for what a person can mend, a traceback for what is our fault."""
import io
import sys
import warnings

import pytest
import torch

from detr_min.run import ending


@pytest.mark.parametrize("error, status", [
    (ValueError("said"), "prog: said"), (OSError("said"), "prog: said"),
    (ValueError("Caught ValueError in a worker.\nTraceback ...\nValueError: said"), "prog: said"),
    (KeyboardInterrupt(), 130)])
def test_what_a_person_can_mend_ends_without_a_traceback(error, status):
    with pytest.raises(SystemExit) as stop, ending.in_a_sentence("prog"):
        raise error
    assert stop.value.code == status


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")])
def test_full_memory_is_said(error):
    with pytest.raises(SystemExit, match="^prog: the memory is full: a smaller batch"):
        with ending.in_a_sentence("prog"):
            raise error


def test_a_warning_is_a_sentence_without_its_place(capsys):
    before = warnings.formatwarning
    with ending.in_a_sentence("prog"), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *place: sys.stderr.write(
            warnings.formatwarning(message, *place))                    # pytest's shows nothing
        warnings.warn("boxes look odd")
    assert capsys.readouterr().err == "prog: boxes look odd\n"
    assert warnings.formatwarning is before


@pytest.mark.parametrize("error", [RuntimeError("a defect"), TypeError("a defect")])
def test_a_defect_keeps_its_traceback(error):
    with pytest.raises(type(error), match="a defect"), ending.in_a_sentence("prog"):
        raise error


def test_a_mistake_in_code_keeps_its_traceback_though_it_is_a_value_error():
    """A wrong index, or what torch raises itself, would tell no one where to look."""
    with pytest.raises(ValueError, match="not in list"), ending.in_a_sentence("prog"):
        [].index(0)
    with pytest.raises(ValueError, match="learning rate"), ending.in_a_sentence("prog"):
        torch.optim.SGD([torch.zeros(1)], lr=-1)


def test_any_name_can_be_printed(monkeypatch):
    """A terminal without the letters of a class must not end a run at its last line."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    with ending.in_a_sentence("prog"):
        print("a \u732b", flush=True)
    assert shown.getvalue() == b"a \\u732b\n"
