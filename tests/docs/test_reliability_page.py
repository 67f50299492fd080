"""The page on faults is what its program makes of what was measured."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[2] / 'docs'


def test_the_page_is_made_of_what_was_measured():
  path = DOCS / 'make_reliability.py'
  spec = importlib.util.spec_from_file_location('make_reliability', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  page = module.make_page((DOCS / 'reliability.json').read_text())
  assert page == (DOCS / 'reliability.md').read_text(), (
    'run: python docs/make_reliability.py'
  )
