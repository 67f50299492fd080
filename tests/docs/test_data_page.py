"""The page on data: its programs make manifests that a source opens."""

import json
from pathlib import Path
import re
import shutil

import pytest

from vjepa_jax.data import sources

PAGE = Path(__file__).parents[2] / 'docs' / 'data.md'


def _read_programs():
  text = PAGE.read_text()
  sections = re.split(r'^## ', text, flags=re.M)
  programs = {}
  for section in sections:
    for program in re.findall(r'```python\n(.*?)```', section, flags=re.S):
      programs[section.partition('\n')[0]] = program
  return programs


@pytest.fixture
def folder(toy_videos, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return sorted(toy_videos.parent.rglob('*.mp4'))


def _copy(videos, *paths):
  for video, path in zip(videos, paths, strict=False):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(video, path)


def _open(manifest):
  source = sources.open_source(manifest)
  records = [source[i] for i in range(len(source))]
  assert all(Path(record.video).exists() for record in records)
  return {record.name: record.label for record in records}


def test_each_section_has_a_program():
  assert list(_read_programs()) == [
    'What training reads',
    'Your own folders',
    'Kinetics',
    'Something-Something v2',
  ]


def test_a_mixture_is_a_recipe_of_two_sources():
  recipe = {}
  exec(_read_programs()['What training reads'], recipe)
  sources = recipe['get_config']('l16').data.sources
  assert sum(source.weight for source in sources.values()) == 1.0
  assert {source.path for source in sources.values()} == {
    'k400/train.txt',
    'ssv2/train.csv',
  }


def test_folders_of_classes(folder):
  _copy(folder, 'videos/run/a.mp4', 'videos/jump/b.mp4', 'videos/run/c d.mp4')
  exec(_read_programs()['Your own folders'], {})
  expected = {'jump/b.mp4': 0, 'run/a.mp4': 1, 'run/c d.mp4': 1}
  assert _open('videos/train.csv') == expected
  assert Path('videos/classes.txt').read_text() == 'jump\nrun\n'


def test_kinetics(folder):
  # A class has a blank in its name, and one video is gone.
  _copy(folder, 'k400/train/tai chi/x_000001_000011.mp4')
  _copy(folder, 'k400/val/abseiling/z_000100_000110.mp4')
  header = 'label,youtube_id,time_start,time_end,split\n'
  Path('k400/train.csv').write_text(
    header + 'tai chi,x,1,11,train\nabseiling,y,2,12,train\n'
  )
  Path('k400/val.csv').write_text(
    header + 'abseiling,z,100,110,val\ntai chi,w,3,13,val\n'
  )
  exec(_read_programs()['Kinetics'], {})
  assert _open('k400/train.txt') == {'train/tai chi/x_000001_000011.mp4': 1}
  assert _open('k400/val.txt') == {'val/abseiling/z_000100_000110.mp4': 0}


def test_something_something(folder):
  videos = 'ssv2/20bn-something-something-v2'
  _copy(folder, f'{videos}/7.webm', f'{videos}/8.webm')
  Path('ssv2/labels.json').write_text('{"Pushing something": "4"}')
  for split, number in (('train', '7'), ('validation', '8')):
    entry = {'id': number, 'template': 'Pushing [something]'}
    Path(f'ssv2/{split}.json').write_text(json.dumps([entry]))
  exec(_read_programs()['Something-Something v2'], {})
  name = '20bn-something-something-v2/7.webm'
  assert _open('ssv2/train.csv') == {name: 4}
