"""The papers' tables in miniature. `python -m studies` lists what there is and how to run it."""
