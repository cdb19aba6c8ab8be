"""The list of mutants cannot rot, and the program that runs them tells the caught from the rest."""
import ast
import collections
import subprocess
import sys
import textwrap

import pytest

import mutants


@pytest.mark.parametrize("file", mutants.USERS)
def test_a_mutant_changes_one_line_of_a_file_that_can_still_be_read(file):
    """`changed` fails if the old text is not found exactly once."""
    found = [m for m in mutants.MUTANTS if mutants.file_of(m) == file]
    assert found
    for mutant in found:
        ast.parse(textwrap.dedent(mutants.changed(mutant)[1]))
        assert mutant.old != mutant.new and "\n" not in mutant.old.strip() + mutant.new.strip()


def test_every_mutant_has_a_name_of_its_own_and_a_file_whose_users_are_known():
    names = collections.Counter((m.function, m.mistake) for m in mutants.MUTANTS)
    assert set(names.values()) == {1}
    assert {mutants.file_of(m) for m in mutants.MUTANTS} == set(mutants.USERS)
    assert set(mutants.SURVIVORS) <= set(names)
    assert all(why.endswith(".") for why in mutants.SURVIVORS.values())
    assert len(names) > 400


@pytest.mark.slow
def test_the_program_tells_the_caught_from_the_rest():
    done = subprocess.run([sys.executable, "tests/mutants.py", "tal_loss"], cwd=mutants.ROOT,
                          capture_output=True, text=True)
    count = sum(mutants.file_of(m) == "tal_loss" for m in mutants.MUTANTS)
    assert done.returncode == 0 and f"{count} of {count} mutants caught" in done.stdout
