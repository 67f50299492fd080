"""Tests of the sources of videos."""

import io
import json
import pathlib
import pickle
import tarfile
import tracemalloc

import cloudpickle
import numpy as np
from PIL import Image
import pyarrow
from pyarrow import parquet
import pytest
from variants import write_shard

from vjepa_jax.data import records, shards, sources
from vjepa_jax.data.decode import open_video
from vjepa_jax.data.features import holds_features
from vjepa_jax.data.records import Record
from vjepa_jax.data.video import DecodeError


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  root = tmp_path / 'clips'
  for name in ['b.mp4', 'a.MP4', 'deep/er/c d.webm', 'notes.md', '._b.mp4']:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'x')
  return root


def test_folder(folder):
  source = sources.open_source(str(folder))
  assert [r.name for r in source] == ['a.MP4', 'b.mp4', 'deep/er/c d.webm']
  assert source[1] == Record(str(folder / 'b.mp4'), -1, 'b.mp4')
  assert source[-1].video == str(folder / 'deep/er/c d.webm')
  with pytest.raises(IndexError):
    source[3]


def test_glob(folder):
  source = sources.open_source(str(folder / '*.mp4'))
  assert [pathlib.Path(r.video).name for r in source] == ['b.mp4']
  source = sources.open_source(str(folder / '**' / '*'))
  assert len(source) == 3


def test_a_folder_is_listed_once_however_many_links_lead_to_it(
  folder, tmp_path
):
  (tmp_path / 'elsewhere').mkdir()
  (tmp_path / 'elsewhere' / 'e.mp4').touch()
  (tmp_path / 'elsewhere' / 'back').symlink_to(folder)
  for name, target in [
    ('a loop', folder),
    ('again', folder / 'deep' / 'er'),
    ('linked', tmp_path / 'elsewhere'),
  ]:
    (folder / name).symlink_to(target)
  assert [r.name for r in sources.open_source(str(folder))] == [
    'a.MP4',
    'b.mp4',
    'deep/er/c d.webm',
    'linked/e.mp4',
  ]


def test_brackets_in_a_path_are_no_pattern(folder):
  folder = folder.rename(folder.parent / 'set[1]*')
  assert len(sources.open_source(str(folder))) == 3
  (folder / 'list.csv').write_text('b.mp4 1')
  assert sources.open_source(str(folder / 'list.csv'))[0].label == 1
  record = Record(b'v', 1, 'v.mp4')
  write_shard(folder / 'a[0].array_record', [records.pack(record)])
  for path in (folder, folder / 'a[0].array_record'):
    assert list(sources.open_source(str(path))) == [record]


@pytest.mark.parametrize('separator', [' ', '\t', ',', ', ', '::'])
def test_manifest(folder, separator):
  manifest = folder / 'train.csv'
  manifest.write_text(
    f'b.mp4{separator}3\n\n{folder}/a.MP4{separator}0\n'
    f'deep/er/c d.webm{separator}12\ndeep/er/c d.webm\n',
  )
  source = sources.open_source(str(manifest))
  assert [r.label for r in source] == [3, 0, 12, -1]
  assert source[0].video == str(folder / 'b.mp4')
  assert source[1].video == str(folder / 'a.MP4')
  assert source[2].name == source[3].name == 'deep/er/c d.webm'


def test_manifest_says_which_line_is_wrong(folder):
  manifest = folder / 'train.txt'
  manifest.write_text('b.mp4 1\na.MP4 2\nabc\n')
  with pytest.raises(ValueError, match="line 3: 'abc' is neither"):
    sources.open_source(str(manifest))
  manifest.write_text('path,label\nb.mp4,1\n')
  with pytest.raises(ValueError, match='line 1: .*header'):
    sources.open_source(str(manifest))
  manifest.write_text('\n')
  with pytest.raises(ValueError, match='lists no videos'):
    sources.open_source(str(manifest))
  manifest.write_text('elsewhere/b.mp4 1\n')
  with pytest.raises(FileNotFoundError, match='clips/elsewhere/b.mp4 does not'):
    sources.open_source(str(manifest))
  manifest.write_bytes(b'\xff\xfe\x00')
  with pytest.raises(ValueError, match='UTF-8'):
    sources.open_source(str(manifest))


@pytest.mark.parametrize(
  'line,path,label',
  [
    ('"a b.mp4" 3', 'a b.mp4', 3),
    ('a b.mp4  ::  -1', 'a b.mp4', -1),
    ('a,1,2', 'a,1', 2),
    ('a-1.mp4', 'a-1.mp4', -1),
    ('a 1.mp4 :: 2', 'a 1.mp4', 2),
    ('é.mp4\t7', 'é.mp4', 7),
    ('\ufeffa.mp4 7', 'a.mp4', 7),
  ],
)
def test_a_line_of_a_manifest(tmp_path, line, path, label):
  (tmp_path / path).touch()
  (tmp_path / 'list.txt').write_text(f'{line}\r\n', encoding='utf-8')
  (record,) = sources.open_source(str(tmp_path / 'list.txt'))
  assert (record.name, record.label) == (path, label)


@pytest.mark.parametrize('line', ['3', ', 3', 'a1', 'a-1', '"" 3', '"'])
def test_no_line_of_a_manifest(tmp_path, line):
  (tmp_path / 'list.txt').write_text(f'{line}\n')
  with pytest.raises(ValueError, match='list.txt, line 1'):
    sources.open_source(str(tmp_path / 'list.txt'))


@pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
def test_a_manifest_is_a_table(folder, kind):
  path = folder / f'train.{kind}'

  def write(rows):
    if kind == 'jsonl':
      path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    else:
      parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)

  rows = [
    {'path': 'b.mp4', 'caption': 'é', 'label': 3},
    {'path': f'{folder}/deep/er/c d.webm', 'caption': '', 'label': 0},
  ]
  source = sources.open_source(write(rows))
  assert list(source) == [
    Record(str(folder / 'b.mp4'), 3, 'b.mp4'),
    Record(rows[1]['path'], 0, rows[1]['path']),
  ]
  source = sources.open_source(write([{'path': 'b.mp4'}]))
  assert source[0].label == -1
  for rows, message in [
    ([{'file': 'b.mp4', 'label': 1}], 'has no column path, only file, label'),
    ([{'path': 'b.mp4', 'label': '1'}], "row 1: 'b.mp4' and '1' are no path"),
    ([{'path': 'b.mp4'}, {'path': None}], 'row 2: None and -1 are no path'),
  ]:
    with pytest.raises(ValueError, match=message):
      sources.open_source(write(rows))
  path.write_text('path,label\n')
  with pytest.raises(ValueError, match='is damaged: '):
    sources.open_source(str(path))


def test_a_long_manifest_takes_little_memory(tmp_path):
  lines = [f'some/folder/{i:07d}.mp4 {i % 400}\n' for i in range(20_000)]
  path = tmp_path / 'list.csv'
  path.write_text(''.join(lines))
  (tmp_path / 'some' / 'folder').mkdir(parents=True)
  (tmp_path / 'some' / 'folder' / '0000000.mp4').touch()
  tracemalloc.start()
  source = sources.open_source(str(path))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert len(source) == len(lines) and source[-1].label == 399
  # 400 MB for two million.
  assert peak < 200 * len(lines)


def test_empty_shards_are_named(tmp_path):
  write_shard(tmp_path / 'a.array_record', [])
  with pytest.raises(ValueError, match='a.array_record.* are empty'):
    sources.open_source(str(tmp_path / 'a.array_record'))
  record = records.pack(Record(b'v', 1, 'v.mp4'))
  write_shard(tmp_path / 'b.array_record', [record])
  assert len(sources.open_source(str(tmp_path))) == 1


def test_says_what_does_not_exist(tmp_path, folder):
  for path, reason in [
    (tmp_path / 'nowhere', 'nowhere does not exist'),
    (tmp_path / 'nowhere.csv', 'manifest .*nowhere.csv does not exist'),
    (tmp_path / '*.array_record', 'no ArrayRecord shards match'),
    (tmp_path / 'one.array_record', 'one.array_record does not exist'),
    (tmp_path / '*.avi', 'no video files in .*avi, looked for .3g2'),
  ]:
    with pytest.raises(FileNotFoundError, match=reason) as e:
      sources.open_source(str(path))
    assert '\n' not in str(e.value)
  (tmp_path / 'bare').mkdir()
  with pytest.raises(FileNotFoundError, match='looked for .*, .mp4'):
    sources.open_source(str(tmp_path / 'bare'))
  with pytest.raises(ValueError, match='names no split'):
    sources.open_source('tfds:moving_mnist')


def test_records_survive_packing():
  record = Record(b'\x00video\xff', 7, 'földer/ñame 1.mp4')
  assert records.unpack(records.pack(record)) == record
  for data in (b'', b'\x05', b'\x04\x00\x00\x00junk', b'\x02\x00\x00\x00{}v'):
    with pytest.raises(ValueError, match='not a record'):
      records.unpack(data)
  with pytest.raises(TypeError, match='bytes'):
    records.pack(Record('path.mp4', 0, 'path'))


def test_array_records(tmp_path):
  written = [Record(bytes([i]) * 9, i, f'{i}.mp4') for i in range(5)]
  packed = list(map(records.pack, written))
  write_shard(tmp_path / 'v-00000-of-00002.array_record', packed[:3])
  write_shard(tmp_path / 'v-00001-of-00002.array_record', packed[3:])
  (tmp_path / 'v-00002-of-00002.array_record.tmp').touch()
  for path in (tmp_path, tmp_path / 'v-*.array_record*'):
    assert list(sources.open_source(str(path))) == written
  single = sources.open_source(str(tmp_path / 'v-00001-of-00002.array_record'))
  assert list(single) == written[3:]
  (tmp_path / 'broken.array_record').write_bytes(b'broken' * 99)
  with pytest.raises(ValueError, match='cannot open the shards'):
    sources.open_source(str(tmp_path / 'broken.array_record'))


def test_few_shards_are_open_at_a_time(tmp_path):
  for i in range(200):
    record = records.pack(Record(b'v', i, f'{i}.mp4'))
    write_shard(tmp_path / f'v-{i:05d}-of-00200.array_record', [record])

  def count_open():
    return len(list(pathlib.Path('/proc/self/fd').iterdir()))

  before = count_open()
  source = sources.open_source(str(tmp_path))
  assert [r.label for r in source] == list(range(200))
  assert count_open() <= before + 64
  copy = pickle.loads(cloudpickle.dumps(source))
  assert copy[150].label == 150 and copy[-1] == source[199]


def test_a_missing_shard_is_an_error(tmp_path):
  for i in (0, 1, 3):
    record = records.pack(Record(b'v', 0, 'v.mp4'))
    write_shard(tmp_path / f'v-0000{i}-of-00005.array_record', [record])
  for path in (tmp_path, tmp_path / '*.array_record'):
    with pytest.raises(
      ValueError, match='2 of 5 shards are missing, .*/v-00002-of-00005.arr'
    ):
      sources.open_source(str(path))
  assert len(
    sources.open_source(str(tmp_path / 'v-00003-of-00005.array_record'))
  )
  few = sources.open_source(str(tmp_path / 'v-0000[01]-of-*'))
  assert len(few) == 2
  with pytest.raises(ValueError, match='1 of 5 .*/v-00002-of-00005.arr'):
    sources.open_source(str(tmp_path / 'v-0000[0-3]-of-00005.array_record'))
  shards.check_complete(['a-1-of-2', 'a-0-of-2', 'b-0-of-1', 'a-1-of-9/b'])
  with pytest.raises(ValueError, match='1 of 2 .* is b.array_record-1-of-2'):
    shards.check_complete(['b.array_record-0-of-2', 'c-1-of-2', 'c-0-of-2'])


def test_one_record_says_what_shards_hold(tmp_path, monkeypatch):
  record = records.pack(Record(b'v', 0, 'v.mp4'))
  write_shard(tmp_path / 'v.array_record', [record] * 5)
  read = []

  def unpack(data):
    read.append(data)
    return records.unpack(data)

  monkeypatch.setattr(sources, 'unpack', unpack)
  assert not holds_features(str(tmp_path))
  assert len(read) == 1


def test_names_say_whether_it_is_the_same_data(tmp_path, folder):
  """Reordered, renamed, relabelled, or fewer: not the same."""
  manifest = tmp_path / 'clips' / 'list.csv'

  def hash_manifest(text):
    manifest.write_text(text)
    return sources.open_source(str(manifest)).hash_names()

  texts = [
    'b.mp4 1\na.MP4 0',
    'a.MP4 0\nb.mp4 1',
    'b.mp4 1\na.MP4 2',
    'b.mp4 1',
  ]
  assert len(set(map(hash_manifest, texts))) == 4
  assert hash_manifest(texts[0]) == hash_manifest(texts[0] + '\n\n')
  before = sources.open_source(str(folder))
  moved = folder.rename(tmp_path / 'moved')
  after = sources.open_source(str(moved))
  assert before.hash_names() == after.hash_names()
  some, others = (sources.Subset(after, part) for part in ([0, 1], [0, 2]))
  assert some.hash_names() != others.hash_names()
  (moved / 'b.mp4').rename(moved / 'z.mp4')
  renamed = sources.open_source(str(moved))
  assert renamed.hash_names() != after.hash_names()


def test_sources_are_cheap_to_pickle(tmp_path):
  names = [f'videos/of/some/length/{i:07d}.mp4' for i in range(100_000)]
  manifest = tmp_path / 'many.txt'
  (tmp_path / 'videos/of/some/length').mkdir(parents=True)
  (tmp_path / names[0]).touch()
  manifest.write_text('\n'.join(f'{n} {i}' for i, n in enumerate(names)))
  source = sources.open_source(str(manifest))
  data = cloudpickle.dumps(source)
  assert len(data) < 56 * len(names)
  copy = pickle.loads(data)
  assert copy[99_999] == source[99_999]
  assert copy[99_999].label == 99_999
  assert repr(copy) == repr(source)
  record = records.pack(Record(b'v', 1, 'v.mp4'))
  write_shard(tmp_path / 'a.array_record', [record])
  source = sources.open_source(str(tmp_path / 'a.array_record'))
  source[0]
  assert pickle.loads(cloudpickle.dumps(source))[0] == source[0]


def test_tfds(tmp_path):
  tfds = pytest.importorskip('tensorflow_datasets')

  class TinyClips(tfds.core.GeneratorBasedBuilder):
    """Two videos as bytes and two as frames."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      features = tfds.features.FeaturesDict(
        {
          'video': tfds.features.Text(),
          'frames': tfds.features.Tensor(shape=(2, 4, 4, 3), dtype=np.uint8),
          'label': tfds.features.ClassLabel(num_classes=4),
        }
      )
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples()}

    def _generate_examples(self):
      for i in range(2):
        frames = np.full((2, 4, 4, 3), i, np.uint8)
        yield i, {'video': b'\xffmp4', 'frames': frames, 'label': i + 2}

  builder = TinyClips(data_dir=tmp_path, file_format='array_record')
  builder.download_and_prepare()
  source = sources.open_source('tfds:tiny_clips/train', data_dir=tmp_path)
  assert len(source) == 2
  assert source[0].video == b'\xffmp4'
  assert {r.label for r in (source[0], source[1])} == {2, 3}
  assert source[0].name == 'tiny_clips/train[0]'
  assert (
    source.hash_names()
    != sources.TfdsSource('tiny_clips', 'train[:1]', tmp_path).hash_names()
  )
  assert pickle.loads(cloudpickle.dumps(source))[1] == source[1]
  frames = sources.TfdsSource(
    'tiny_clips', 'train', str(tmp_path), video_key='frames', label_key='no'
  )
  assert frames[0].video.shape == (2, 4, 4, 3)
  assert frames[0].label == -1
  with pytest.raises(
    ValueError, match='has frames, label, video: set video_key'
  ):
    sources.TfdsSource('tiny_clips', 'train', str(tmp_path), video_key='clip')
  (shard,) = tmp_path.glob('tiny_clips/*/*.array_record*')
  data = bytearray(shard.read_bytes())
  begin = data.index(b'\xffmp4')
  data[begin : begin + 9] = bytes(9)
  shard.write_bytes(data)
  damaged = sources.open_source('tfds:tiny_clips/train', data_dir=tmp_path)
  with pytest.raises(DecodeError, match='hash mismatch') as error:
    list(damaged)
  assert error.value.name in ('tiny_clips/train[0]', 'tiny_clips/train[1]')


def test_tfds_of_images(tmp_path):
  tfds = pytest.importorskip('tensorflow_datasets')
  _write_image(tmp_path / 'a.png', 9)

  class TinyImages(tfds.core.GeneratorBasedBuilder):
    """One image."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      features = tfds.features.FeaturesDict({'image': tfds.features.Image()})
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
      return {'train': [(0, {'image': str(tmp_path / 'a.png')})]}

    def _generate_examples(self):
      raise NotImplementedError

  builder = TinyImages(data_dir=tmp_path, file_format='array_record')
  builder.download_and_prepare()
  (record,) = sources.open_source('tfds:tiny_images/train', data_dir=tmp_path)
  np.testing.assert_array_equal(record.video, np.full((1, 6, 8, 3), 9))


def _write_image(path, shade):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((6, 8, 3), shade, np.uint8)).save(path)


def test_images_are_labelled_by_their_folders(tmp_path):
  for i, name in enumerate(['n2/a.png', 'n10/b.png', 'n10/x/c.jpeg']):
    _write_image(tmp_path / name, i)
  (tmp_path / 'n2' / 'readme.txt').touch()
  source = sources.open_source(str(tmp_path))
  assert [(r.name, r.label) for r in source] == [
    ('n10/b.png', 0),
    ('n10/x/c.jpeg', 0),
    ('n2/a.png', 1),
  ]
  with open_video(source[0].video) as video:
    frames = video.read([0, 0], (0, 0, 6, 8), (6, 8))
  np.testing.assert_array_equal(frames, np.full((2, 6, 8, 3), 1))
  matched = sources.open_source(str(tmp_path / 'n2' / '*'))
  assert [(r.video, r.label) for r in matched] == [(source[2].video, -1)]
  _write_image(tmp_path / 'd.png', 3)
  assert {r.label for r in sources.open_source(str(tmp_path))} == {-1}
  # Beside videos, images are thumbnails.
  (tmp_path / 'e.mp4').write_bytes(b'v')
  assert [r.name for r in sources.open_source(str(tmp_path))] == ['e.mp4']


def test_tars_are_found_where_there_are_no_videos(tmp_path):
  for number in (1, 0):
    with tarfile.open(tmp_path / f't-{number}.tar', 'w') as tar:
      for name, content in (('k.png', b'image'), ('k.cls', b'4')):
        info = tarfile.TarInfo(f'{number}/{name}')
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
  expected = [Record(b'image', 4, f't-{i}.tar/{i}/k.png') for i in (0, 1)]
  assert list(sources.open_source(str(tmp_path))) == expected
  assert list(sources.open_source(str(tmp_path / 't-1.tar'))) == expected[1:]
  assert list(sources.open_source(str(tmp_path / '*.tar'))) == expected
  (tmp_path / 'e.mp4').write_bytes(b'v')
  assert [r.name for r in sources.open_source(str(tmp_path))] == ['e.mp4']
