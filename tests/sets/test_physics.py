"""The physics set: twins, manifests, and what gives nothing away."""

import csv
import itertools
import time

import numpy as np
import pytest

from vjepa_jax.data.sources import ManifestSource
from vjepa_jax.sets import pairs, physics


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('physics')
  return physics.write_physics_set(path, num_train=3, num_sets=1, seed=3)


@pytest.mark.parametrize('name', physics.PROPERTIES)
@pytest.mark.parametrize('screen', [False, True])
def test_every_frame_of_an_impossible_film_is_a_possible_one(name, screen):
  films = physics.render_set(name, screen, np.random.default_rng(1))
  (aa, ab, bb, ba) = films
  first = (aa != ab).any(axis=(1, 2, 3)).argmax()
  assert 8 < first < physics.FRAMES - 8
  np.testing.assert_array_equal(ab[:first], aa[:first])
  np.testing.assert_array_equal(ab[first:], bb[first:])
  np.testing.assert_array_equal(ba[:first], bb[:first])
  np.testing.assert_array_equal(ba[first:], aa[first:])
  assert (aa[:first] != bb[:first]).any() or not screen


@pytest.mark.parametrize('name', physics.PROPERTIES)
def test_behind_a_screen_nothing_is_seen_of_the_switch(name):
  for seed in range(20):
    aa, ab, _, _ = physics.render_set(name, True, np.random.default_rng(seed))
    first = (aa != ab).any(axis=(1, 2, 3)).argmax()
    # Each frame differs little from the one before: nothing jumps in sight.
    for film in (aa, ab):
      jump = np.abs(np.diff(film.astype(int), axis=0)).max(axis=-1) > 40
      assert jump[first - 1].sum() < 40


def test_films_are_decoded_alike_up_to_the_violation(folder):
  found = pairs.read_pairs(folder)
  assert len(found) == 2 * 2 * len(physics.PROPERTIES)
  for pair in found:
    possible, impossible = (
      pairs.read_film(path, physics.SIZE)
      for path in (pair.possible, pair.impossible)
    )
    assert len(possible) == len(impossible) == physics.FRAMES
    differs = (possible != impossible).any(axis=(1, 2, 3))
    assert differs.argmax() == pair.frame


def test_a_film_may_take_long(folder, monkeypatch):
  monkeypatch.setattr(time, 'thread_time', itertools.count(0, 100).__next__)
  film = pairs.read_film(pairs.read_pairs(folder)[0].possible, physics.SIZE)
  assert len(film) == physics.FRAMES


def test_the_set_is_a_function_of_the_seed(folder, tmp_path):
  again = physics.write_physics_set(
    tmp_path / 'again', num_train=3, num_sets=1, seed=3
  )
  names = sorted(p.relative_to(folder) for p in folder.rglob('*.*'))
  assert len(names) == 3 + 4 * 10 + 3
  other = physics.write_physics_set(
    tmp_path / 'other', num_train=3, num_sets=1, seed=4
  )
  for name in names:
    content = (folder / name).read_bytes()
    assert (again / name).read_bytes() == content, name
    if name.suffix == '.mp4':
      assert (other / name).read_bytes() != content, name


def test_a_finished_set_is_left_alone_and_another_is_refused(folder):
  before = (folder / 'train/00000.mp4').stat().st_mtime_ns
  physics.write_physics_set(folder, num_train=3, num_sets=1, seed=3)
  assert (folder / 'train/00000.mp4').stat().st_mtime_ns == before
  # Training films are a manifest that pretraining reads.
  source = ManifestSource(str(folder / 'train.csv'))
  assert [r.name for r in source] == [f'train/0000{i}.mp4' for i in range(3)]
  with pytest.raises(ValueError, match='num_train=3, not 4'):
    physics.write_physics_set(folder, num_train=4, num_sets=1, seed=3)
  with pytest.raises(ValueError, match='must be positive'):
    physics.write_physics_set(folder / 'none', num_sets=0)


def test_the_manifest_of_pairs(folder, tmp_path):
  with (folder / 'test.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert sum(row['possible'] == '1' for row in rows) == len(rows) / 2
  manifest = tmp_path / 'test.csv'
  # Of a set of one's own four columns will do.
  manifest.write_text('file,pair,property,possible\na,0,p,1\nb,0,p,0\n')
  assert pairs.read_pairs(tmp_path) == [
    pairs.Pair(str(tmp_path / 'a'), str(tmp_path / 'b'), 'p', '0', None, None)
  ]
  for text, message in (
    ('file,pair,possible\na,0,1\n', "no column 'property'"),
    ('file,pair,property,possible\na,0,p,1\nb,0,p,1\n', 'pair 0 must have one'),
    ('file,pair,property,possible\n', 'lists no films'),
  ):
    manifest.write_text(text)
    with pytest.raises(ValueError, match=message):
      pairs.read_pairs(tmp_path)
  with pytest.raises(FileNotFoundError, match='physics_set --output'):
    pairs.read_pairs(tmp_path / 'none')
