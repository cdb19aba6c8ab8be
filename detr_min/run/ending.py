"""How a program ends when something fails: in one sentence, if a person can mend it.

Read after nothing; train.py and eval.py use it.
"""
import contextlib
import sys
import traceback
import warnings

READER = "a process that reads pictures was killed; is the memory full?"
MEMORY = "the memory is full: a smaller batch, smaller pictures or a smaller model needs less"
GONE = "another process of this run has ended"
CAUSES = {              # words of an error -> what they mean
    "DataLoader worker (pid": READER, "EOFError": READER, "ConnectionResetError": READER,
    "ConnectionRefusedError": READER, "Connection closed by peer": GONE,
    "Connection reset by peer": GONE, "allocate memory": MEMORY, "out of memory": MEMORY,
    "MemoryError": MEMORY}


def cause(error):
    """What an error that no code of ours raised means, or ""."""
    text = f"{type(error).__name__}: {error}"
    return next((CAUSES[words] for words in CAUSES if words in text), "")


def is_said(error):
    """Whether a `raise` of this repository made an error, so that its words are for a person.

    Any other ValueError is a mistake in code, whose traceback says more. The data sets' errors are
    raised again by torch where a worker read the pictures.
    """
    if isinstance(error, OSError) or "Traceback" in str(error):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.line.startswith("raise ") and "site-packages" not in last.filename


def what_is_said(error):
    """What an error says; a worker's comes with a traceback, which ends in the sentence."""
    text = str(error).strip()
    return text.splitlines()[-1].split("Error: ", 1)[-1] if "Traceback" in text else text


@contextlib.contextmanager
def in_a_sentence(program):
    """Exit with status 1 and a sentence for what a person can mend, with 130 after Ctrl-C.

    What a terminal cannot show, such as the name of a class in another script, is spelled out. A
    warning is a sentence too, without the line of code that gave it.
    """
    with contextlib.suppress(AttributeError):               # no terminal but a notebook's cell
        sys.stdout.reconfigure(errors="backslashreplace")
    format_before = warnings.formatwarning
    warnings.formatwarning = lambda message, *where: f"{program}: {message}\n"
    try:
        yield
    except (ValueError, OSError) as error:
        if not is_said(error):
            raise
        sys.exit(f"{program}: {what_is_said(error)}")
    except (RuntimeError, MemoryError) as error:
        if not cause(error):
            raise
        sys.exit(f"{program}: {cause(error)}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        warnings.formatwarning = format_before
