"""Kill a run, fill its disk: it goes on bit for bit, or a sentence says what is lost.

A server process imports everything once; each run of train.py is a fork of it, on the smallest
network that there is.
"""
import json
import multiprocessing
import os
import pathlib
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from detr_min import backbone
from detr_min.data import shapes
from detr_min.run import checkpoints, config, registry, sets

resource = pytest.importorskip("resource")          # Windows has none, and no signals to groups
pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parent.parent
TINY = dict(d_model=32, num_heads=4, num_levels=3, num_points=2, d_ffn=32, num_queries=20,
            encoder_layers=1, decoder_layers=1, size=64, max_size=64, images=4, batch=2)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "test_faults"])


def train(words, said, file_bytes):
    """train.py as a program: in a session of its own, its output in a file, smaller than usual."""
    os.setsid()
    os.chdir(said.parent)
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    multiprocessing.set_start_method("fork", force=True)        # of its workers: they start at once
    if file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    run_small(words)


def run_small(words):
    """train.py in this process, on the smallest network."""
    torch.set_num_threads(1)
    sets.NUM_VAL_SHAPES = 2
    registry.BACKBONES["deformable"]["convnet"] = lambda r: backbone.ConvNet(8)
    for name in ("shapes", "coco"):
        config.PRESETS[name].update(TINY)
    sys.argv = ["train.py", "--device", "cpu", *map(str, words)]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


class Program:
    """A run of train.py that has begun."""

    def __init__(self, folder, *words, file_bytes=0):
        self.said_at = folder / "said.txt"
        self.process = FORKS.Process(target=train, args=(words, self.said_at, file_bytes))
        self.process.start()

    def wait(self, seconds=120):
        """Its exit status; None if it still runs after so many seconds."""
        self.process.join(seconds)
        return self.process.exitcode

    def said(self):
        return self.said_at.read_text(errors="replace")

    def until(self, is_so):
        """Wait until something is so, which must come before the program ends."""
        start = time.monotonic()
        while not is_so():
            assert self.process.is_alive() and time.monotonic() - start < 100, self.said()
            time.sleep(0.002)

    def send(self, number, to_all):
        """A signal to the process, or to all processes that it began."""
        try:
            (os.killpg if to_all else os.kill)(self.process.pid, number)
        except ProcessLookupError:                          # it has just ended
            pass

    def workers(self):
        """The processes that read its pictures."""
        listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout
        pairs = [map(int, line.split()) for line in listing.splitlines()]
        return [pid for pid, parent in pairs if parent == self.process.pid]


def run_of(folder):
    """The last checkpoint without its clock, and the log without its times."""
    content = checkpoints.read(folder)
    progress = {key: value for key, value in content["progress"].items() if "seconds" not in key}
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    log = [{key: line[key] for key in line.keys() - {"ms", "cpu_s"}} for line in lines]
    return content["model"], content["optimizer"]["state"], progress, log


def assert_equal(one, other):
    """Bit for bit: weights, moments, progress, and each line of the log once."""
    for found, wanted in zip(run_of(one), run_of(other), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def going_on(folder, out, *words):
    """Go on with a run, or begin it anew where it never saved anything. -> Program"""
    if (out / "last.pt").exists():
        words = "--resume", out
    else:
        shutil.rmtree(out, ignore_errors=True)
    return Program(folder, *words)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An undisturbed run on a folder with workers, and the flags it had."""
    folder = tmp_path_factory.mktemp("straight")
    shapes.write_folder(folder / "data", 4, 2, size_px=64)
    words = ["--coco", folder / "data", "--steps", 40, "--out"]
    program = Program(folder, *words, folder / "run")
    assert program.wait() == 0, program.said()
    return folder / "run", words


def begun(tmp_path, words, steps=3):
    """A run that has logged so many steps. -> Program, its folder"""
    out = tmp_path / "run"
    program = Program(tmp_path, *words, out)
    program.until(lambda: (out / "last.pt").exists()
                  and (out / "log.jsonl").read_text().count("loss") >= steps)
    return program, out


def test_50_times_kill_9(tmp_path):
    """At random moments of reading, training, testing and saving; the same runs come out."""
    shapes.write_folder(tmp_path / "data", 4, 2, size_px=64)
    words = ["--coco", tmp_path / "data", "--steps", 12, "--out"]
    chance, kills, saved, runs = random.Random(0), 0, 0, 0
    for name in ("straight", "again"):                  # the first one waits for the imports
        start = time.monotonic()
        program = Program(tmp_path, *words, tmp_path / name)
        assert program.wait() == 0, program.said()
        seconds = time.monotonic() - start
    assert_equal(tmp_path / "again", tmp_path / "straight")
    while kills < 50:
        out, status, runs = tmp_path / f"run{runs}", None, runs + 1
        while status is None:
            saved += (out / "last.pt").exists()
            program = going_on(tmp_path, out, *words, out)
            status = program.wait(chance.uniform(0, seconds) if kills < 50 else 120)
            if status is None:
                program.process.kill()
                program.wait()
                kills += 1
        assert status == 0, program.said()
        assert_equal(out, tmp_path / "straight")
        assert not [*out.glob("*.unfinished")]
    print(f"{kills} kills in {runs} runs, {saved} of them resumed")


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("to_all", [False, True], ids=["process", "group"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_a_second_one_stops_at_once(number, to_all, times, straight, tmp_path):
    reference, words = straight
    program, out = begun(tmp_path, words)
    for _ in range(times):
        program.send(number, to_all)
        time.sleep(0.01)
    assert program.wait() == 130, program.said()
    said = program.said()
    assert "Traceback" not in said and "stopping once this step is saved" in said
    if times == 1:
        step = int(re.search(r"stopped after step (\d+) of 40; nothing is lost", said).group(1))
        assert checkpoints.read(out)["progress"]["step"] == step < 40
    program = going_on(tmp_path, out)
    assert program.wait() == 0, program.said()
    assert_weights_equal(out, reference)


def assert_weights_equal(one, other):
    """Bit for bit; the log has one line more, of the step at which the run was stopped."""
    for found, wanted in zip(run_of(one)[:2], run_of(other)[:2], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_worker_that_is_killed(straight, tmp_path):
    """As by a system out of memory."""
    reference, words = straight
    if os.cpu_count() < 2:
        pytest.skip("one core: pictures are read without workers")
    program, out = begun(tmp_path, words)
    workers = program.workers()
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    assert program.wait() == 1, program.said()
    said = program.said().splitlines()[-1]
    assert re.fullmatch(
        r"train.py: a process that reads pictures was killed; is the memory full\?; "
        rf"step \d+ is the last one saved in {out}: go on with --resume {out}", said)
    assert "Traceback" not in program.said()
    program = going_on(tmp_path, out)
    assert program.wait() == 0, program.said()
    assert_equal(out, reference)


@pytest.mark.parametrize("file_bytes, name", [(300_000, "last.pt"), (3_000, "log.jsonl")])
def test_a_full_disk(file_bytes, name, tmp_path):
    """A file that may not grow any more, which is an OSError as a full disk's: old files stay."""
    words, out = ["--steps", 20, "--out"], tmp_path / "run"
    for more in ([tmp_path / "straight"], [out, "--pause", 10]):
        program = Program(tmp_path, *words, *more)
        assert program.wait() == 0, program.said()
    before = (out / "last.pt").read_bytes()
    program = Program(tmp_path, "--resume", out, file_bytes=file_bytes)
    assert program.wait() == 1, program.said()
    said = program.said().splitlines()[-1]
    assert "Traceback" not in program.said()
    assert f"{name} could not be written" in said and "is the disk full?" in said
    assert "step 10 is the last one saved" in said
    assert (out / "last.pt").read_bytes() == before and not [*out.glob("*.unfinished")]
    program = going_on(tmp_path, out)
    assert program.wait() == 0, program.said()
    assert_equal(out, tmp_path / "straight")


def test_a_folder_that_cannot_be_written(tmp_path):
    """A file is where a folder should be; and, but for root, a folder that is read-only."""
    (tmp_path / "file").write_text("mine")
    places = [tmp_path / "file" / "run"]
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        places.append(tmp_path / "closed" / "run")
    for out in places:
        program = Program(tmp_path, "--steps", 2, "--out", out)
        assert program.wait() == 1
        [line] = [line for line in program.said().splitlines() if line.startswith("train.py: ")]
        assert str(out.parent) in line and "Traceback" not in program.said()
    assert (tmp_path / "file").read_text() == "mine"


def torchrun(folder, nodes, *words):
    """run_small on two processes, both on one node or one on each. -> [Popen] of the nodes"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = [f"--nnodes={nodes}", f"--nproc_per_node={2 // nodes}", "--master_addr=localhost",
             f"--master_port={port}"]
    return [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *place, f"--node_rank={node}", __file__,
         *map(str, words)], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        for node in range(nodes)]


def children(pid):
    """The processes that a process began, the eldest first."""
    listing = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    return sorted(int(word) for word in listing.split())


@pytest.fixture(scope="module")
def straight_on_two(tmp_path_factory):
    """The undisturbed run on two processes."""
    folder = tmp_path_factory.mktemp("two")
    [node] = torchrun(folder, 1, "--steps", 60, "--out", folder / "run")
    _, error = node.communicate(timeout=600)
    assert node.returncode == 0, error
    return folder / "run"


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_is_killed(rank, nodes, straight_on_two, tmp_path):
    """The other one says what is lost and ends; then the run goes on from its last save."""
    out = tmp_path / "run"
    launchers = torchrun(tmp_path, nodes, "--steps", 60, "--out", out)
    start = time.monotonic()
    while not (out / "last.pt").exists():
        assert launchers[0].poll() is None and time.monotonic() - start < 300
        time.sleep(0.01)
    ranks = [pid for launcher in launchers for pid in children(launcher.pid)]
    assert len(ranks) == 2
    os.kill(ranks[rank], signal.SIGKILL)
    errors = [launcher.communicate(timeout=300)[1] for launcher in launchers]
    assert all(launcher.returncode for launcher in launchers)
    said = re.findall(r"train.py: another process of this run has ended; step (\d+) is the last "
                      rf"one saved in {out}: go on with --resume {out}", "".join(errors))
    assert len(said) == 1, errors
    for pid in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert checkpoints.read(out)["progress"]["step"] == int(said[0]) < 60
    for launcher in torchrun(tmp_path, nodes, "--resume", out):
        _, error = launcher.communicate(timeout=600)
        assert launcher.returncode == 0, error
    assert_equal(out, straight_on_two)


if __name__ == "__main__":              # by torchrun
    run_small(sys.argv[1:])
