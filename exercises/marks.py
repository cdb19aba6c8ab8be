"""Turn grade.py's counts of tests into points of the problem set.

    python exercises/marks.py week_1.csv week_2.csv > marks.csv

Functions of week 1 count from the first file, those of week 2 from the second; with one file all
count from it. Each has an equal share of its problem's points and earns the fraction of its tests
that pass, or nothing below half. A bug is 2 points once all pass. Points for written answers are
added by hand.
"""
import csv
import pathlib
import re
import sys

PROBLEM_SET = pathlib.Path(__file__).with_name("problem_set.md")
BUG = 2                                 # points; the rest of that problem is for the sentences
LEAST = 0.5                             # of a function's tests


def problems(text):
    """[(week, name, {function: points})] of the problems that ask for code."""
    found = []
    for week, part in re.findall(r"^## Week (\d)(.+?)(?=^## |\Z)", text, re.M | re.S):
        for name, points, names in re.findall(
                r"^\*\*(\w[\w ]*) \((\d+) points\)\.\*\* .*\((`\w+`(?:, `\w+`)*)\)", part, re.M):
            names = re.findall(r"\w+", names)
            found.append((int(week), name, {n: BUG if n.startswith("bug_") else
                                            int(points) / len(names) for n in names}))
    return found


def earned(row, points):
    """The points of a function, from its row of the csv."""
    share = int(row["passed"]) / int(row["tests"])
    least = 1 if row["exercise"].startswith("bug_") else LEAST
    return points * share * (share >= least)


def table(files, text):
    """Rows of the marks, the header first."""
    weeks = problems(text)
    most = {name: sum(shares.values()) for _, name, shares in weeks}
    rows = [["student", *(f"{name} (of {of:g})" for name, of in most.items()),
             f"sum (of {sum(most.values()) - most['Bonus']:g} and the bonus)"]]
    graded = []
    for file in files:
        with open(file, newline="", encoding="utf-8") as stream:
            graded.append({(row["student"], row["exercise"].split(".")[-1]): row
                           for row in csv.DictReader(stream)})
    for student in sorted({student for rows in graded for student, _ in rows}):
        marks = []
        for week, _, shares in weeks:
            of_week = graded[min(week, len(graded)) - 1]
            marks.append(sum(earned(of_week[student, name], points)
                             for name, points in shares.items() if (student, name) in of_week))
        rows.append([student, *(f"{mark:.2f}" for mark in marks), f"{sum(marks):.2f}"])
    return rows


if __name__ == "__main__":
    if not 1 <= len(sys.argv[1:]) <= 2:
        sys.exit("Say which csv of exercises/grade.py: one, or one for each week")
    try:
        marks = table(sys.argv[1:], PROBLEM_SET.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        sys.exit(f"{error.filename} is missing; exercises/grade.py --csv {error.filename} makes it")
    except KeyError as error:
        sys.exit(f"no column {error} in one of {', '.join(sys.argv[1:])}: is it grade.py's csv?")
    csv.writer(sys.stdout, lineterminator="\n").writerows(marks)
