"""Grade the hand-ins of a class.

    python exercises/grade.py submissions/ --csv points.csv
    python exercises/grade.py submissions/ --csv points.csv --mine boxes.giou --mine bug_3

submissions/ holds a folder for each student, named as the student is to be called in the csv. The
files lie in it as in exercises/: submissions/ada/matcher.py. Without --mine, all functions of
exercises 1 to 10 are graded, by how many of their tests pass; there is no training.

The csv gets a row for each student and exercise as soon as it is graded. Existing rows are kept and
not graded again: after Ctrl-C or a crash, give the same command. Use --again NAME for a student who
hands in again. Needs Linux. To see all of a failure:

    pytest --mine matcher.match_quality --folder=submissions/ada --apart
"""
import argparse
import csv
import io
import multiprocessing.connection
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)             # not exercises/, whose files have the names of the package's
if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""     # a process that has used a GPU cannot fork
from exercises.grading import apart, bank, catalogue, points  # noqa: E402

FIELDS = "student", "exercise", "passed", "tests", "seconds", "reason"
FORK = apart.FORK


class Job:
    """One hand-in being graded: a process, whose only word is its last."""

    def __init__(self, student, folder, target, total, options):
        self.student, self.target, self.total, self.options = student, target, total, options
        self.begin = time.monotonic()
        self.connection, theirs = FORK.Pipe(duplex=False)

        def work():
            theirs.send(points.grade(folder, target, total, options.memory))
        self.process = FORK.Process(target=work)
        self.process.start()
        theirs.close()

    def row(self):
        """The row of the csv, once it is there; None before."""
        seconds = time.monotonic() - self.begin
        is_late = seconds > self.options.seconds
        if not self.connection.poll() and self.process.is_alive() and not is_late:
            return None
        passed, tests, reason = 0, self.total, f"not graded within {self.options.seconds:g} s"
        try:
            if self.connection.poll():
                passed, tests, reason = self.connection.recv()
        except EOFError:
            self.process.join(1)
            reason = f"the process that graded it was ended, status {self.process.exitcode}"
        self.process.kill()
        self.process.join()
        self.connection.close()
        return dict(zip(FIELDS, (self.student, self.target, passed, tests, round(seconds, 1),
                                 reason)))


def parse(words):
    about, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=about, epilog=rest, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=pathlib.Path, help="it holds a folder for each student")
    add("--csv", type=pathlib.Path, required=True, metavar="FILE", help="where the rows go")
    add("--mine", action="append", default=[], metavar="MODULE.FUNCTION", help="what to grade")
    add("--again", action="append", default=[], metavar="NAME", help="a student to grade anew")
    add("--jobs", type=int, default=os.cpu_count(), metavar="N", help="hand-ins at the same time")
    add("--seconds", type=float, default=180, metavar="S", help="for one function of one student")
    add("--memory", type=int, default=apart.MEMORY_MB, metavar="MB", help="of it, besides torch's")
    options = parser.parse_args(words)
    known = [*catalogue.EXERCISES, *bank.BUGS]
    for target in options.mine:
        if target not in known:
            parser.error(f"--mine {target} is not an exercise. There are: {', '.join(known)}")
    if options.jobs < 1 or options.seconds <= 0 or options.memory <= 0:
        parser.error("--jobs, --seconds and --memory are above 0")
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder; it should hold a folder for each student")
    if not sys.platform.startswith("linux"):
        parser.error("the limits of time and memory need Linux: use a virtual machine or WSL")
    options.mine = options.mine or list(catalogue.EXERCISES)
    return options


def rows_of(file, is_kept):
    """The rows of a csv, which is made if it is not there; a last row that was cut off is removed,
    and so are those that are not kept."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    whole = text[:text.rfind("\n") + 1] or ",".join(FIELDS) + "\n"
    reader = csv.DictReader(io.StringIO(whole))
    if tuple(reader.fieldnames) != FIELDS:
        raise SystemExit(f"{file} has the columns {', '.join(reader.fieldnames)} and not "
                         f"{', '.join(FIELDS)}: is it another file?")
    rows = list(reader)
    kept = [row for row in rows if is_kept(row)]
    if whole != text or kept != rows:
        beside = file.with_name(file.name + ".new")
        with beside.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
        beside.replace(file)
    return kept


def main(words):
    options = parse(words)
    options.csv = options.csv.resolve()
    students = sorted(f for f in options.folder.iterdir() if f.is_dir() and f.name[0] not in "._")
    if not students:
        print(f"{options.folder} holds no folder; it should hold one for each student")
        return 2
    unknown = set(options.again) - {folder.name for folder in students}
    if unknown:
        print(f"--again {unknown.pop()}: {options.folder} holds no such folder")
        return 2
    rows = rows_of(options.csv, lambda row: row["student"] not in options.again
                   or row["exercise"] not in options.mine)
    done = {(row["student"], row["exercise"]) for row in rows}
    todo = [(folder.name, folder.resolve(), target) for folder in students
            for target in options.mine if (folder.name, target) not in done]
    print(f"students: {len(students)}; functions to grade: {len(todo)}; rows that {options.csv} "
          f"has already: {len(rows)}")
    os.chdir(ROOT)                          # where pytest finds its settings
    totals, jobs = points.numbers_of_tests(dict.fromkeys(target for *_, target in todo)), []
    with options.csv.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        try:
            while todo or jobs:
                while todo and len(jobs) < options.jobs:
                    student, folder, target = todo.pop(0)
                    jobs.append(Job(student, folder, target, totals[target], options))
                multiprocessing.connection.wait([job.connection for job in jobs], timeout=0.5)
                for job in list(jobs):
                    if row := job.row():
                        jobs.remove(job)
                        writer.writerow(row)
                        stream.flush()
                        rows.append(row)
                        print("{student}  {exercise}  {passed}/{tests}  "
                              "{reason:.100}".format(**row))
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here")
            return 130
        finally:
            for job in jobs:
                job.process.kill()
    for folder in students:
        own = [row for row in rows if row["student"] == folder.name]
        print(f"{folder.name}: {sum(int(r['passed']) for r in own)} of "
              f"{sum(int(r['tests']) for r in own)} tests passed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
