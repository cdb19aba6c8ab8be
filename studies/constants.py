"""train.py, with other constants in the papers' equations.

    python -m studies.constants matcher.one_to_many.k=1 --preset shapes

Name a constant as module.function.argument; the argument must have a number as its default. Give
several, separated by spaces, before the flags of train.py. They are not saved: give them again with
--resume. They reach only what the model calls: dac_release has a one-to-many rule of its own.
"""
import inspect
import pkgutil
import sys

import train
from detr_min.run import ending


def put(word):
    """Give an argument of a function another default.

    Args:
        word  `matcher.one_to_many.k=1`
    Raises:
        ValueError: there is no such argument, or it has no default, or the value is not a number
    """
    place, _, value = word.partition("=")
    path, _, argument = place.rpartition(".")
    try:
        function = pkgutil.resolve_name(f"detr_min.{path}")
        names, defaults = list(inspect.signature(function).parameters), function.__defaults__
        number = names.index(argument) - len(names) + len(defaults)
        kind = type(defaults[number]) if number >= 0 else None
        new = kind(value)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{word}: it must be like matcher.one_to_many.k=1, an argument that has a "
                         f"default and its new value ({error})") from error
    function.__defaults__ = *defaults[:number], new, *defaults[number + 1:]


if __name__ == "__main__":
    words = []
    with ending.in_a_sentence("studies.constants"):
        while sys.argv[1:] and not sys.argv[1].startswith("-"):
            words.append(sys.argv.pop(1))
            put(words[-1])
        try:
            train.main()
        finally:
            if words:
                print(f"with {' '.join(words)}, which is not saved: to go on, give it again before "
                      "--resume, to python -m studies.constants")
