"""The examples of README.md and docs are tests: `make docs` runs them (tests/documents.py)."""

from documents import EXAMPLES

pytest_collect_file = EXAMPLES.pytest()
