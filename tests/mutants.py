"""Which small wrong edits of the papers' files do the default tests notice?

    python tests/mutants.py                     # all mutants, about half an hour on two slow cores
    python tests/mutants.py matcher tal_loss    # those of some files

A mutant is one of the papers' files with one line changed for a wrong one, in a copy of the
repository. Its file's own tests run first. If they pass, so do the tests of the files that use it.
Exit status 0 only if every mutant is caught, but for those in SURVIVORS.
"""
import ast
import contextlib
import functools
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import pytest  # noqa: E402
import torch  # noqa: E402

import helpers  # noqa: E402, F401      what is slow to import is imported once, for all copies
import mutants_decoders  # noqa: E402
import mutants_losses  # noqa: E402
import mutants_memory  # noqa: E402
from detr_min.run import registry  # noqa: E402, F401
from exercises.grading import bank  # noqa: E402

with contextlib.suppress(ImportError):
    import hypothesis  # noqa: F401

MUTANTS = [*mutants_memory.MUTANTS, *mutants_decoders.MUTANTS, *mutants_losses.MUTANTS,
           *(m for m in bank.MUTANTS if not m.function.startswith("align_loss."))]
USERS = {       # whose tests run too, if a file's own let a mutant live
    "boxes": "proposals criterion", "attention": "encoder decoder_base",
    "attention_conditional": "encoder_conditional decoder_conditional decoder_decoupled",
    "backbone": "", "encoder": "proposals decoder_base", "proposals": "decoder_base",
    "decoder_base": "decoder_dac", "decoder_dac": "", "encoder_conditional": "",
    "proposals_conditional": "query_gen", "query_gen": "proposals_conditional",
    "decoder_conditional": "decoder_decoupled", "decoder_decoupled": "decoder_conditional",
    "decoder_decoupled_deformable": "", "matcher": "criterion", "tal_loss": "criterion",
    "criterion": "matcher"}
SURVIVORS = {       # (function, mistake): why no test can or should notice
    ("attention.neighbours", "the border goes on below"):
        "A cell below 0 has share 0, so which cell of the map stands for it does not matter.",
    ("proposals.anchors", "padding is good"):
        "The centre of a cell of padding lies beyond 1, and no anchor beyond .99 is good.",
    ("decoder_decoupled_deformable.level_of", "h and w swapped"):
        "Only the product of both sides is used; rounding on a padded image hardly changes it."}
ALSO = ["tests/test_numerics.py", "tests/test_properties.py"]
SECONDS = 120       # a mutant that takes longer is caught: it never ends
AT_ONCE = 2


def file_of(mutant):
    return mutant.function.split(".")[0]


def path_of(mutant):
    return pathlib.Path("detr_min", f"{file_of(mutant)}.py")


@functools.cache
def parsed(path):
    """The lines of a file and its syntax tree."""
    text = (ROOT / path).read_text()
    return text.splitlines(keepends=True), ast.parse(text)


def changed(mutant):
    """The mutant's function in three texts: the file before it, it with its line, and the rest."""
    lines, node = parsed(path_of(mutant))
    first, end = 0, len(lines)
    for name in mutant.function.split(".")[1:]:
        node = next(n for n in node.body if getattr(n, "name", "") == name)
        first, end = node.lineno - 1, node.end_lineno
    ours = "".join(lines[first:end])
    if ours.count(mutant.old) != 1:
        raise ValueError(f"{mutant.function} holds {ours.count(mutant.old)} times: {mutant.old}")
    return "".join(lines[:first]), ours.replace(mutant.old, mutant.new), "".join(lines[end:])


def run_tests(folder, names, keeps_bytecode):
    """Run tests in a copy, in this process; ends it with pytest's exit status."""
    sys.dont_write_bytecode = not keeps_bytecode
    os.chdir(folder)
    for name in [n for n in sys.modules if n.split(".")[0] in ("detr_min", "exercises", "helpers")]:
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if not path.startswith(str(ROOT / "tests"))
                   and path != str(ROOT)]
    with open(folder / "log", "w") as log, contextlib.redirect_stdout(log), \
            contextlib.redirect_stderr(log):
        status = pytest.main([*names, "-x", "-q", "-p", "no:cacheprovider"])
    os._exit(status)


def start(base, mutant, tests):
    """Start a process that runs tests on a copy of `base` with a mutant, or in `base` itself.

    Returns its folder, its id, and when it has to end.
    """
    folder = base
    if mutant:
        folder = pathlib.Path(tempfile.mkdtemp(dir=base.parent)) / "copy"
        shutil.copytree(base, folder)
        (folder / path_of(mutant)).write_text("".join(changed(mutant)))
    process = os.fork()
    if not process:
        try:
            run_tests(folder, tests, keeps_bytecode=mutant is None)
        finally:
            os._exit(99)
    return folder, process, time.monotonic() + (SECONDS if mutant else 10 * SECONDS)


def outcomes(base, jobs):
    """Run (mutant, tests) jobs, AT_ONCE at a time; yields each mutant with its exit status."""
    waiting, running = list(jobs), []
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            running.append((waiting[0][0], *start(base, *waiting.pop(0))))
        for each in list(running):
            mutant, folder, process, limit = each
            done, status = os.waitpid(process, os.WNOHANG)
            if not done and time.monotonic() > limit:
                os.kill(process, signal.SIGKILL)
                done, status = os.waitpid(process, 0)
            if done:
                running.remove(each)
                if mutant:
                    shutil.rmtree(folder.parent)
                yield mutant, os.waitstatus_to_exitcode(status)
        time.sleep(0.05)


def tests_of(names):
    return [f"tests/test_{name}.py" for name in names]


def run(files, folder):
    """Print what becomes of each mutant of these files; returns those that live unexplained."""
    base = folder / "base"
    shutil.copytree(ROOT, base, ignore=shutil.ignore_patterns(
        ".*", "__pycache__", "runs", "benchmarks", "*.png", "*.pt"))
    mutants = [m for m in MUTANTS if not files or file_of(m) in files]
    used = {name for m in mutants for name in [file_of(m), *USERS[file_of(m)].split()]}
    [(_, status)] = outcomes(base, [(None, tests_of(sorted(used)) + ALSO)])
    if status:
        sys.exit(f"the tests fail on the files as they are:\n{(base / 'log').read_text()[-2000:]}")
    living, survivors = [], []
    for mutant, status in outcomes(base, [(m, tests_of([file_of(m)])) for m in mutants]):
        if status:
            print(f"caught    {mutant.function}: {mutant.mistake}", flush=True)
        else:
            living.append(mutant)
    for mutant, status in outcomes(
            base, [(m, tests_of(USERS[file_of(m)].split()) + ALSO) for m in living]):
        why = SURVIVORS.get((mutant.function, mutant.mistake), "")
        print(f"{'caught by others' if status else 'SURVIVED'}  {mutant.function}: "
              f"{mutant.mistake}  {why}", flush=True)
        if not status:
            survivors.append(mutant)
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} mutants caught, "
          f"{len(mutants) - len(living)} by the tests of their own file")
    return [m for m in survivors if (m.function, m.mistake) not in SURVIVORS]


def main(files):
    unknown = set(files) - set(USERS)
    if unknown:
        sys.exit(f"no mutants of {', '.join(sorted(unknown))}; there are some of {' '.join(USERS)}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return 1 if run(files, pathlib.Path(folder)) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
