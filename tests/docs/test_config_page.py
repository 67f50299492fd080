"""The page of all fields is what its program makes of configs/base.py."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_made_of_the_recipe():
  path = ROOT / 'docs' / 'make_config.py'
  spec = importlib.util.spec_from_file_location('make_config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  page = module.make_page((ROOT / 'configs' / 'base.py').read_text())
  assert page == (ROOT / 'docs' / 'config.md').read_text(), (
    'run: python docs/make_config.py'
  )
  assert '| `clip.frames` | `16` |' in page
