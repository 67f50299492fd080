"""The page on planning is what its program makes of what a run found."""

import importlib.util
import json
from pathlib import Path

DOCS = Path(__file__).parents[2] / 'docs'


def test_the_page_is_made_of_what_was_found():
  path = DOCS / 'make_planning.py'
  spec = importlib.util.spec_from_file_location('make_planning', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  results = json.loads((DOCS / 'planning/results.json').read_text())
  assert module.make_page(results) == (DOCS / 'planning.md').read_text(), (
    'run: python docs/make_planning.py'
  )
