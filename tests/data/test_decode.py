"""Tests of random access to frames, against sequential decoding."""

import os
import pathlib

import av
import cv2
import numpy as np
from PIL import ExifTags, Image
import pytest
from variants import VARIANTS, make_frames, write_video

from vjepa_jax.data import container, decode, storage
from vjepa_jax.data.container import Container
from vjepa_jax.data.video import ARRAY_FPS

_ROTATIONS = [90, 180, 270]


def _decode_sequentially(path: pathlib.Path) -> list[av.VideoFrame]:
  with av.open(path) as container:
    container.streams.video[0].codec_context.thread_count = 1
    return list(container.decode(video=0))


def _whole(video: decode.Video) -> tuple[decode.Box, tuple[int, int]]:
  size = video.height, video.width
  return (0, 0, *size), size


@pytest.mark.parametrize('name', VARIANTS)
def test_reads_exactly_the_frames_of_a_sequential_decode(videos, name):
  path = videos(name)
  frames = _decode_sequentially(path)
  rng = np.random.default_rng(0)
  with decode.open_video(str(path)) as video:
    box, size = _whole(video)
    # The same conversion, so that a hash tells which frame was decoded.
    truth = [video._convert(f, box, size).tobytes() for f in frames]
    assert len(set(truth)) == len(truth)
    assert video.num_frames == len(truth)
    for _ in range(6):
      step = int(rng.integers(1, 4))
      start = rng.integers(0, video.num_frames - 4 * step)
      indices = np.minimum(start + step * np.arange(8), video.num_frames - 1)
      clip = video.read(indices, box, size)
      assert [f.tobytes() for f in clip] == [truth[i] for i in indices]


@pytest.mark.parametrize('name', ['short_gop.mp4', 'hevc.mp4', 'odd.webm'])
def test_bytes_and_path_give_the_same(videos, name):
  path = videos(name)
  content = path.read_bytes()
  args = [3, 9, 30], (5, 7, 40, 51), (32, 48)
  with decode.open_video(str(path)) as a, decode.open_video(content) as b:
    np.testing.assert_array_equal(a.times, b.times)
    np.testing.assert_array_equal(a.read(*args), b.read(*args))


@pytest.mark.parametrize(
    'name', ['short_gop.mp4', 'odd.webm', 'mjpeg.mov', 'bt709.mp4',
             'full_range.mp4'],
)  # fmt: skip
@pytest.mark.parametrize(
  ('box', 'bound'),
  [((0, 0, 75, 101), 2), ((12, 14, 50, 62), 2), ((11, 13, 51, 63), 2.5)],
)
def test_planes_are_close_to_conversion_of_whole_frames(
  videos, name, box, bound
):
  frames = _decode_sequentially(videos(name))
  top, left, height, width = box
  with decode.open_video(str(videos(name))) as video:
    clip = video.read([4, 5], box, (64, 64))
  for image, frame in zip(clip, frames[4:6], strict=True):
    rgb = frame.to_ndarray(format='rgb24')
    crop = rgb[top : top + height, left : left + width]
    expected = cv2.resize(crop, (64, 64))
    difference = image.astype(float) - expected
    assert np.abs(difference).mean() < bound
    # libswscale truncates where the exact conversion rounds: up to 1 darker.
    assert -0.3 < difference.mean() < 1.3


def test_times_follow_a_variable_rate(videos):
  with decode.open_video(str(videos('varied.mp4'))) as video:
    written = np.asarray(VARIANTS['varied.mp4']['times']) / 1000
    np.testing.assert_allclose(video.times, written - written[0], atol=1e-3)
    assert video.fps == pytest.approx(59 / video.times[-1])
  with decode.open_video(str(videos('long_gop.mp4'))) as video:
    np.testing.assert_allclose(video.times, np.arange(60) / 30, atol=1e-4)
    assert video.fps == pytest.approx(30, rel=1e-3)
    assert (video.height, video.width) == (96, 128)


@pytest.mark.parametrize('degrees', _ROTATIONS)
@pytest.mark.parametrize('box', [None, (10, 21, 51, 33)])
def test_turns_frames_upright(tmp_path, degrees, box):
  path = write_video(
    tmp_path / 'turned.mp4', num_frames=8, rotation=degrees, size=(74, 102)
  )
  frame = _decode_sequentially(path)[3]
  assert frame.rotation % 360 == degrees
  upright = np.rot90(frame.to_ndarray(format='rgb24'), degrees // 90)
  with decode.open_video(str(path)) as video:
    assert (video.height, video.width) == upright.shape[:2]
    box = box or _whole(video)[0]
    top, left, height, width = box
    image = video.read([3], box, (60, 40))[0]
    (played,) = video.play([video.times[3]])
  expected = upright[top : top + height, left : left + width]
  expected = cv2.resize(expected, (40, 60)).astype(float)
  assert np.abs(image - expected).mean() < 2.5
  assert np.abs(played - upright.astype(float)).mean() < 2.5


@pytest.mark.parametrize(
  'name', ['short_gop.mp4', 'odd.webm', 'ten_bit.mp4', 'mpeg2.ts', 'turned.mp4']
)
def test_views_of_a_clip_are_decoded_once(videos, monkeypatch, name):
  sent = _count_packets(monkeypatch)
  boxes = [(0, 0, 60, 60), (7, 11, 33, 45), (15, 2, 60, 60)]
  indices = [3, 3, 17, 40]
  path = str(videos(name))
  with decode.open_video(path) as video:
    del sent[:]
    views = video.read_boxes(indices, boxes, (32, 24))
    num_sent = len(sent)
  assert views.shape == (3, 4, 32, 24, 3)
  for view, box in zip(views, boxes, strict=True):
    with decode.open_video(path) as video:
      del sent[:]
      np.testing.assert_array_equal(video.read(indices, box, (32, 24)), view)
      assert len(sent) == num_sent


def test_repeats_frames(videos):
  with decode.open_video(str(videos('short_gop.mp4'))) as video:
    box, size = _whole(video)
    clip = video.read([7, 7, 9, 59, 59], box, size)
    np.testing.assert_array_equal(clip[0], clip[1])
    np.testing.assert_array_equal(clip[3], clip[4])
    assert (clip[1] != clip[2]).any()


def test_reads_again_after_the_end(videos):
  with decode.open_video(str(videos('long_gop.mp4'))) as video:
    box, size = _whole(video)
    first = video.read([0, 59], box, size)
    np.testing.assert_array_equal(video.read([0, 59], box, size), first)


def test_array_of_frames():
  frames = make_frames(10, 40, 50)
  with decode.open_video(frames) as video:
    assert (video.num_frames, video.height, video.width) == (10, 40, 50)
    clip = video.read([2, 2, 9], (4, 6, 20, 30), (20, 30))
    np.testing.assert_array_equal(clip, frames[[2, 2, 9], 4:24, 6:36])
    played = list(video.play([0, 2 / ARRAY_FPS]))
    np.testing.assert_array_equal(played, frames[[0, 2]])
  with pytest.raises(decode.DecodeError, match='uint8'):
    decode.open_video(frames.astype(np.float32))
  with pytest.raises(decode.DecodeError, match='no frames'):
    decode.open_video(frames[:0])


@pytest.mark.parametrize(
  'name', ['short_gop.mp4', 'mpeg2.mpg', 'mpeg4_b.avi', 'varied.mp4']
)
def test_plays_what_is_on_screen(videos, name):
  frames = _decode_sequentially(videos(name))
  with decode.open_video(str(videos(name))) as video:
    box, size = _whole(video)
    times = np.linspace(0, video.times[-1] + 0.1, 23)
    numbers = np.searchsorted(video.times, times + 1e-3, 'right') - 1
    played = list(video.play(times))
    assert len(played) == len(times)
    for image, number in zip(played, numbers, strict=True):
      expected = video._convert(frames[number], box, size)
      np.testing.assert_array_equal(image, expected)


def test_rejects_requests_that_no_video_could_answer(videos):
  with decode.open_video(str(videos('short_gop.mp4'))) as video:
    box, size = _whole(video)
    with pytest.raises(ValueError, match='must not decrease'):
      video.read([3, 2], box, size)
    with pytest.raises(ValueError, match='leave a video of 60 frames'):
      video.read([3, 60], box, size)
    with pytest.raises(ValueError, match='leaves a frame of 96x128'):
      video.read([3], (0, 1, 96, 128), size)
    with pytest.raises(ValueError, match='non-empty'):
      video.read([], box, size)
  with pytest.raises(TypeError, match='path, bytes'):
    decode.open_video(3)


def _write_audio(path: pathlib.Path) -> None:
  with av.open(path, 'w') as container:
    stream = container.add_stream('aac', rate=16000, layout='mono')
    for i in range(8):
      samples = np.zeros((1, 1024), np.float32)
      frame = av.AudioFrame.from_ndarray(samples, 'fltp', layout='mono')
      frame.sample_rate, frame.pts = 16000, 1024 * i
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def test_says_what_is_wrong_with_a_file(tmp_path, videos):
  text = tmp_path / 'text.mp4'
  text.write_text('not a video at all\n' * 200)
  noise = tmp_path / 'noise.mkv'
  noise.write_bytes(np.random.default_rng(0).bytes(20_000))
  story = tmp_path / 'story.txt'
  story.write_text('once upon a time\n' * 200)
  empty = tmp_path / 'empty.mp4'
  empty.touch()
  _write_audio(tmp_path / 'audio.mp4')
  headless = tmp_path / 'headless.mp4'
  headless.write_bytes(videos('short_gop.mp4').read_bytes()[:-3000])
  for path, reason in [
    (tmp_path / 'missing.mp4', 'file does not exist'),
    (empty, 'empty file'),
    (tmp_path, 'a folder'),
    (text, 'not a video'),
    (noise, 'not a video'),
    (story, 'not a video'),
    (tmp_path / 'audio.mp4', 'no video stream'),
    (headless, 'header is damaged or cut off'),
  ]:
    with pytest.raises(decode.DecodeError, match=reason) as e:
      decode.open_video(str(path))
    assert '\n' not in str(e.value)
  with pytest.raises(decode.DecodeError, match='empty file'):
    decode.open_video(b'')
  with pytest.raises(decode.DecodeError, match='not a video'):
    decode.open_video(b'garbage' * 999)
  with pytest.raises(decode.DecodeError, match='cannot read'):
    decode.open_video('unknown://bucket/video.mp4')


def test_opens_no_sockets_and_no_pipes(tmp_path):
  session = (
    b'v=0\no=- 0 0 IN IP4 127.0.0.1\ns=-\nc=IN IP4 127.0.0.1\nt=0 0\n'
    b'm=video 45678 RTP/AVP 96\na=rtpmap:96 H264/90000\n'
  )
  for content in (session, b"ffconcat version 1.0\nfile 'a.mp4'\n"):
    with pytest.raises(decode.DecodeError, match='a list of other files'):
      decode.open_video(content)
  (tmp_path / 'list.mp4').write_bytes(session)
  with pytest.raises(decode.DecodeError, match='a list of other files'):
    decode.open_video(str(tmp_path / 'list.mp4'))
  os.mkfifo(tmp_path / 'pipe.mp4')
  with pytest.raises(decode.DecodeError, match='not a regular file'):
    decode.open_video(str(tmp_path / 'pipe.mp4'))


def test_refuses_a_header_of_more_frames_than_bytes(videos):
  content = bytearray(videos('long_gop.mp4').read_bytes())
  count = content.index(b'stsz') + 12
  # All frames of one size, which takes no table: libav would make 48 GB of it.
  content[count - 4 : count] = (1).to_bytes(4)
  content[count : count + 4] = (2_000_000_000).to_bytes(4)
  with pytest.raises(decode.DecodeError, match='lists 2000000000 frames'):
    decode.open_video(bytes(content))


def test_limits_of_a_video(videos, monkeypatch):
  path = str(videos('long_gop.mp4'))
  with pytest.raises(decode.DecodeError, match='GiB, more than 1e-06'):
    decode.open_video(path, decode.Limits(gib=1e-6))
  with pytest.raises(decode.DecodeError, match='GiB, more than 1e-06'):
    decode.open_video(videos('hevc.mp4').read_bytes(), decode.Limits(gib=1e-6))
  storage.replace('memory://limits/v.mp4', videos('hevc.mp4').read_bytes())
  monkeypatch.delattr(storage, 'read')  # It is not even read.
  with pytest.raises(decode.DecodeError, match='GiB, more than 1e-06'):
    decode.open_video('memory://limits/v.mp4', decode.Limits(gib=1e-6))
  # Computing counts, waiting does not; each read has the whole time.
  clock = [0.0]
  monkeypatch.setattr(container.time, 'thread_time', lambda: clock[0])
  send = Container.send
  monkeypatch.setattr(
    Container,
    'send',
    lambda *a: clock.__setitem__(0, clock[0] + 1) or send(*a),
  )
  with decode.open_video(path, decode.Limits(seconds=12)) as video:
    box, size = _whole(video)
    for _ in range(9):
      assert len(video.read([0, 2], box, size)) == 2
    with pytest.raises(decode.DecodeError, match='more than 12 s of computing'):
      video.read([0, 59], box, size)
    assert len(list(video.play(video.times))) == 60
  monkeypatch.setattr(container, '_MAX_PIXELS', 1000)
  with pytest.raises(decode.DecodeError, match='128x96 pixels are too large'):
    decode.open_video(path)


@pytest.mark.parametrize('form', ['png', 'jpeg', 'webp'])
def test_an_image_is_a_video_of_one_frame(tmp_path, form, monkeypatch):
  pixels = make_frames(1, 48, 64)[0]
  path = tmp_path / f'image.{form}'
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise
  Image.fromarray(pixels).save(path, quality=95, exif=exif)
  expected = np.rot90(pixels, -1).astype(float)
  for source in (str(path), path.read_bytes()):
    with decode.open_video(source) as video:
      assert (video.num_frames, video.height, video.width) == (1, 64, 48)
      frames = video.read([0, 0, 0], *_whole(video))
    assert np.abs(frames - expected).mean() < (8 if form != 'png' else 1e-9)
  with pytest.raises(decode.DecodeError, match='cannot read the image'):
    decode.open_video(path.read_bytes()[: path.stat().st_size // 2])
  # Pillow raises what is no ValueError of a size, and of a broken tag.
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
  with pytest.raises(decode.DecodeError, match='cannot read the image'):
    decode.open_video(path)


@pytest.mark.parametrize('name', ['faststart.mp4', 'h264.mkv', 'odd.webm'])
@pytest.mark.parametrize('kept', [0.3, 0.6])
def test_notices_truncation(tmp_path, name, kept):
  path = tmp_path / name
  write_video(path, **VARIANTS[name] | {'num_frames': 120})
  content = path.read_bytes()
  with decode.open_video(content) as video:
    assert video.num_frames == 120
  with pytest.raises(decode.DecodeError, match='truncated: the header'):
    decode.open_video(content[: int(len(content) * kept)])


def test_blank_payload_does_not_decode(videos):
  content = bytearray(videos('faststart.mp4').read_bytes())
  payload = content.index(b'mdat') + 4
  content[payload:] = bytes(len(content) - payload)
  with decode.open_video(bytes(content)) as video:
    with pytest.raises(decode.DecodeError, match=r'0\.000 s does not decode'):
      video.read([0, 5], *_whole(video))
    with pytest.raises(decode.DecodeError, match='no frame decodes'):
      list(video.play([0]))


def test_missing_frames_are_not_replaced_by_others(videos):
  content = bytearray(videos('faststart.mp4').read_bytes())
  middle = (content.index(b'mdat') + len(content)) // 2
  content[middle:] = bytes(len(content) - middle)
  with decode.open_video(bytes(content)) as video:
    box, size = _whole(video)
    assert len(video.read([0, 1, 2], box, size)) == 3
    with pytest.raises(decode.DecodeError, match='does not decode'):
      video.read([50, 59], box, size)
    with pytest.raises(decode.DecodeError, match='no frame decodes from'):
      list(video.play(video.times))


@pytest.mark.parametrize(
    'name', ['short_gop.mp4', 'h264.mkv', 'hevc.mp4', 'odd.webm', 'mpeg4.avi',
             'mpeg2.ts', 'av1.mp4', 'h264.ts', 'picture.gif', 'mpeg2.mpg',
             'mpeg4_b.avi', 'packed.avi', 'h264.avi'],
)  # fmt: skip
def test_random_damage_gives_frames_or_a_reason(videos, name):
  original = videos(name).read_bytes()
  for seed in range(12):
    rng = np.random.default_rng(seed)
    content = bytearray(original)
    for position in rng.integers(0, len(content), 4 ** (seed % 6)):
      content[position] = rng.integers(256)
    try:
      with decode.open_video(bytes(content)) as video:
        last = video.num_frames - 1
        indices = np.minimum([2, 8, 8, 15], last)
        clip = video.read(indices, (0, 0, video.height, video.width), (16, 16))
        assert clip.shape == (4, 16, 16, 3)
        for _ in video.play(np.arange(0, 1, 0.2)):
          pass
    except decode.DecodeError as e:
      assert '\n' not in str(e)


@pytest.mark.parametrize(
    'name', ['short_gop.mp4', 'open_gop.mp4', 'h264.mkv', 'h264.ts',
             'hevc.mp4', 'odd.webm', 'mpeg4.avi', 'mpeg4_b.avi', 'packed.avi',
             'mpeg2.ts', 'mpeg2.mpg', 'h264.avi'],
)  # fmt: skip
@pytest.mark.parametrize('step', [1, 3, 13, 29])
def test_gaps_between_wanted_frames_change_nothing(videos, name, step):
  frames = _decode_sequentially(videos(name))
  with decode.open_video(str(videos(name))) as video:
    box, size = _whole(video)
    for start in range(0, 30, 4):
      indices = np.arange(start, video.num_frames, step)[:16]
      clip = video.read(indices, box, size)
      for image, i in zip(clip, indices, strict=True):
        expected = video._convert(frames[i], box, size)
        np.testing.assert_array_equal(image, expected)


def _count_packets(monkeypatch):
  """Returns the list of what is sent to decoders from here on."""
  sent, send = [], Container.send

  def count(self, packet):
    sent.append(packet)
    return send(self, packet)

  monkeypatch.setattr(Container, 'send', count)
  return sent


def test_decodes_no_more_than_a_clip_needs(videos, monkeypatch):
  sent = _count_packets(monkeypatch)
  with decode.open_video(str(videos('short_gop.mp4'))) as video:
    assert not sent
    # Frame 0 of each of three groups of 12: a packet each, and the drains.
    video.read([0, 12, 36], (0, 0, 16, 16), (16, 16))
  assert [p is not None for p in sent] == [True, False] * 3


@pytest.mark.parametrize(
  ('name', 'codec', 'most'),
  [
    ('long.ts', 'mpeg2video', 40),
    ('long_h264.ts', 'libx264', 40),
    ('long.mpg', 'mpeg2video', 40),
    ('long.avi', 'mpeg4', 40),
    ('packed.avi', 'mpeg4', 50),
    ('long_h264.avi', 'libx264', 40),
  ],
)
def test_a_late_clip_of_any_container_needs_few_packets(
  tmp_path, monkeypatch, name, codec, most
):
  path = write_video(
    tmp_path / name,
    codec=codec,
    num_frames=300,
    size=(32, 48),
    options={'g': '12', 'bf': '2'},
    packed=name == 'packed.avi',
  )
  frames = _decode_sequentially(path)
  sent = _count_packets(monkeypatch)
  with decode.open_video(str(path)) as video:
    assert not sent
    box, size = _whole(video)
    for start in (100, 257):
      del sent[:]
      indices = start + np.arange(16)
      clip = video.read(indices, box, size)
      assert len(sent) < most
      for image, i in zip(clip, indices, strict=True):
        expected = video._convert(frames[i], box, size)
        np.testing.assert_array_equal(image, expected)
