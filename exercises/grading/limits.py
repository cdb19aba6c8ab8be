"""Limits of time and memory: an endless loop ends in a sentence, a hungry one takes no machine."""
import contextlib
import ctypes
import os
import pathlib
import signal
import sys

import pytest

CPU_SECONDS, FILE_BYTES = 600, 2 ** 20      # of a process of a hand-in; each should end long before
NOBODY = 65534
LATE = "an endless loop, or a slow one?"


@contextlib.contextmanager
def time_limit(seconds, what):
    """Fail whatever runs inside after so many seconds; `what` begins the sentence about it.

    The alarm rings again each second, in case an `except:` swallows it. Windows has no alarm.
    """
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(signum, frame):
        __tracebackhide__ = True
        pytest.fail(f"{what} did not end within {seconds:g} s: {LATE}")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def become_nobody():
    """Give up root's rights but the one to read, as Python may lie where only root can read it."""
    libc = ctypes.CDLL(None)
    if sys.platform == "linux":
        libc.prctl(8, 1)                                        # PR_SET_KEEPCAPS, over the setuid
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    if sys.platform == "linux":
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)           # version 3, this process
        for right in (1 << 2, 0):                               # CAP_DAC_READ_SEARCH, else none
            if libc.capset(header, (ctypes.c_uint32 * 6)(right, right)) == 0:
                break


def confine(keep, memory_mb):
    """Take from this process what the evaluation of a function does not need.

    No open file but the descriptor `keep`, no new process or thread, little more memory than now,
    no long file. Where the grader is root, the process becomes nobody and can change no file of
    the machine's users. It dies with its parent.
    """
    import resource                     # which Windows does not have
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    os.closerange(3, keep)
    os.closerange(keep + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    if os.getuid() == 0:
        become_nobody()
    bounds = {resource.RLIMIT_NPROC: 0, resource.RLIMIT_CORE: 0,
              resource.RLIMIT_CPU: CPU_SECONDS, resource.RLIMIT_FSIZE: FILE_BYTES}
    if sys.platform == "linux":
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        bounds[resource.RLIMIT_AS] = pages * resource.getpagesize() + memory_mb * 2 ** 20
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)                      # PR_SET_PDEATHSIG
    for bound, value in bounds.items():
        resource.setrlimit(bound, (value, value))
