"""Questions put to the system, one file a question: `python -m experiments` lists them.

A file `NAME.py` is an experiment when it has a docstring whose first line is the question, a frozen dataclass `Config`
with a classmethod `smoke()` (a run of seconds), and `run(config, run) -> rows`. With `main(config)` in place of `run`
it is a command: it leaves no run behind. Nothing else needs to know about it.
"""
