"""Tests of the sources of videos."""

import pathlib
import pickle

from array_record.python import array_record_module
import cloudpickle
import numpy as np
import pytest

from vjepa_jax.data import records, sources
from vjepa_jax.data.records import Record


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  root = tmp_path / 'clips'
  for name in ['b.mp4', 'a.MP4', 'deep/er/c d.webm', 'notes.md', '._b.mp4']:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'x')
  return root


def _write_shard(path: pathlib.Path, content: list[Record]) -> None:
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for record in content:
    writer.write(records.pack(record))
  writer.close()


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
  _write_shard(tmp_path / 'v-00000-of-00002.array_record', written[:3])
  _write_shard(tmp_path / 'v-00001-of-00002.array_record', written[3:])
  (tmp_path / 'v-00002-of-00002.array_record.tmp').touch()
  for path in (tmp_path, tmp_path / 'v-*.array_record*'):
    assert list(sources.open_source(str(path))) == written
  single = sources.open_source(str(tmp_path / 'v-00001-of-00002.array_record'))
  assert list(single) == written[3:]
  (tmp_path / 'broken.array_record').write_bytes(b'broken' * 99)
  with pytest.raises(ValueError, match='cannot open the shards'):
    sources.open_source(str(tmp_path / 'broken.array_record'))


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
  _write_shard(tmp_path / 'a.array_record', [Record(b'v', 1, 'v.mp4')])
  shards = sources.open_source(str(tmp_path / 'a.array_record'))
  shards[0]
  assert pickle.loads(cloudpickle.dumps(shards))[0] == shards[0]


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
  assert pickle.loads(cloudpickle.dumps(source))[1] == source[1]
  frames = sources.TfdsSource(
    'tiny_clips', 'train', str(tmp_path), video_key='frames', label_key='no'
  )
  assert frames[0].video.shape == (2, 4, 4, 3)
  assert frames[0].label == -1
  with pytest.raises(
    ValueError, match='has frames, label, video|set video_key'
  ):
    sources.TfdsSource('tiny_clips', 'train', str(tmp_path), video_key='clip')
