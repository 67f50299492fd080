"""The report: what it says, that it stands alone, and how it looks."""

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
import tempfile

from commands import make_workdir, run_command
from etils import epath
import jax
import numpy as np
from PIL import Image
import pytest

from configs import small, vjepa21
from vjepa_jax.interop.layout import Weights
from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.plots import charts
from vjepa_jax.plots.report import format_value, tabulate
from vjepa_jax.tasks.program import build_program
from vjepa_jax.tasks.session import write_config
from vjepa_jax.tasks.smoke import shrink
from vjepa_jax.tools import convert, report
from vjepa_jax.training import health
from vjepa_jax.training.telemetry import read_metrics

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')


class Page:
  """A report: the text of its sections by id, and what is in them."""

  def __init__(self, text):
    self.html = text
    section = r'<section id="([\w-]+)".*?>(.*?)</section>'
    self.parts = dict(re.findall(section, text, re.DOTALL))
    self.sections = {
      name: ' '.join(html.unescape(re.sub(r'<[^>]*>', ' ', part)).split())
      for name, part in self.parts.items()
    }

  def decode(self, section):
    pictures = []
    for content in re.findall(
      r'src="data:image/(?:png|gif);base64,([^"]*)"', self.parts[section]
    ):
      with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        pictures.append(np.asarray(image.convert('RGB')))
    return pictures


def _check_stands_alone(page):
  ids = re.findall(r'\bid="([^"]*)"', page.html)
  assert len(set(ids)) == len(ids)
  found = re.findall(
    r'(?:href|src|srcset|poster|action)="([^"]*)"'
    r'|url\(([^)]*)\)|@import\s*([^;]*)',
    page.html,
  )
  for resource in map(''.join, found):
    if resource.startswith('#'):
      assert resource[1:] in ids
    else:
      assert resource.startswith('data:'), resource[:80]


@pytest.mark.parametrize(
  'name,verdict,state',
  [
    ('small', 'This run is healthy.', 'learning'),
    ('collapsed', 'This run is failing.', 'collapse'),
    ('diverged', 'This run is failing.', 'divergence'),
    ('low_rate', 'This run needs a look.', 'stall'),
    ('starved', 'This run needs a look.', 'starved'),
    ('published', 'This run needs a look.', 'rank loss'),
  ],
)
def test_the_verdict_stands_at_the_top(tmp_path, name, verdict, state):
  page = Page(
    report.make_report(epath.Path(make_workdir(tmp_path / name, name)))
  )
  first, words = next(iter(page.sections.items()))
  assert first == 'health'
  assert words.startswith(f'Is this run healthy? {verdict} {state}')
  finding = health.find(read_metrics(tmp_path / name))[0]
  assert finding.evidence[1:] in words and finding.remedy in words
  assert 'effective rank' in page.sections['curves']
  assert list(page.sections) == ['health', 'run', 'curves']
  _check_stands_alone(page)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run of the small recipe at toy size, with what tools wrote about it."""
  workdir = epath.Path(tmp_path_factory.mktemp('report') / 'run')
  config = shrink(small.get_config(), make_workdir(workdir, 'small'))
  config.task = 'pretrain'
  config.mask_names = ('random',)
  program = build_program(config, mesh_lib.make_mesh(), 4, 1)
  state = jax.jit(program.init)(jax.random.key(0))
  weights = Weights(program.objective.encoder, state.target)
  convert.write_workdir(workdir, weights)
  config.attention = 'pallas'  # of a TPU, where reports are not made
  write_config(workdir, config)

  probe = workdir / 'probe' / 'seed_0'
  probe.mkdir(parents=True)
  results = {
    'top1': {'pretrained': 0.625, 'random_init': 0.5, 'pixels': 0.25},
    'top5': {'pretrained': 0.9, 'random_init': 0.8, 'pixels': 0.7},
    'backbone': '<script>alert(1)</script>',
    'about': 'A sentence too long to stand in a cell of a narrow table, so.',
    'per_class': [0.5] * 100,
  }
  (probe / 'results.json').write_text(json.dumps(results))
  for name, size in (('confusion_matrix.png', (60, 50)), ('clip.gif', (9, 8))):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(probe / name)
  shutil.copy(workdir / 'metrics.jsonl', probe)
  # Files that are being written.
  (workdir / 'surprise').mkdir()
  (workdir / 'surprise' / 'results.json').write_text('{"accuracy": ')
  os.symlink('nothing', workdir / 'surprise' / 'gone.png')
  (workdir / 'rollout').mkdir()
  (workdir / 'rollout' / 'results.json').write_bytes(b'\xff')
  whole = (probe / 'confusion_matrix.png').read_bytes()
  (workdir / 'surprise' / 'twins.png').write_bytes(whole[:100])
  failures = [
    {'name': f'<b>{i}</b>.mp4', 'reason': f'truncated: {i}.5 of 9 s'}
    for i in range(30)
  ] + [{'name': 'gone.mp4', 'reason': 'file does not exist'}]
  text = '\n'.join(map(json.dumps, failures))
  (workdir / 'quarantine.jsonl').write_text(text + '\n{"name": "ha')
  (workdir / 'quarantine-1.jsonl').write_text(json.dumps(failures[-1]) + '\n')
  return workdir, config, state


@pytest.fixture(scope='module')
def page(run):
  return Page(report.make_report(run[0]))


def test_the_page_stands_alone_and_escapes(page):
  _check_stands_alone(page)
  assert '<script>alert' not in page.html and '<b>0</b>' not in page.html
  assert '<script>alert(1)</script>' in page.sections['section-1']


def test_the_run_is_described(page, run):
  _, config, state = run
  millions = sum(x.size for x in jax.tree.leaves(state.params['encoder'])) / 1e6
  text = page.sections['run']
  assert f'{millions:.3g} M parameters' in text
  assert '4 × 6 × 6 = 144 tokens' in text
  assert str(config.data.sources.toy.path) in text
  assert 'Step 200 of 4, 1600 clips' in text
  departures = page.sections['config']
  assert 'encoder.size nano (large)' in departures
  assert 'clip.num_clips' not in departures.partition('All settings')[0]


def test_masks_and_features_are_drawn(page):
  masks, features = page.decode('masks'), page.decode('features')
  assert len(masks) == 2 * 2 and len(features) == 2 * 3
  assert len({picture.shape for picture in masks + features}) == 1
  for clip, painted in (masks[:2], masks[2:]):
    orange = painted.astype(int) - clip
    assert (orange[..., 0] > 50).mean() > 0.1
  # An encoder that was not trained has the features that it had before.
  np.testing.assert_array_equal(features[1], features[2])
  assert features[1].std() > 10


def test_images_are_described_and_drawn(tmp_path):
  config = shrink(vjepa21.get_config('l16'), tmp_path)
  text = report._describe_model(config)
  assert 'pixels make 4 × 6 × 6 = 144 tokens. Mask short' in text
  assert 'Images of 64 × 64 pixels make 1 × 8 × 8 = 64 tokens. Mask im' in text
  assert report._describe_data(config).count('toy (') == 2
  levels = {'loss_level_0': 0.5, 'loss_level_1': 0.4, 'image/loss_level_1': 0.3}
  metrics = [{'step': 3, 'seconds_per_step': 2.0, 'goodput': 1.0} | levels]
  progress = report._describe_progress(config, metrics)
  assert '24 clips, 48 images, in 0:00:06' in progress
  assert '(4 clips/s, 8 images/s)' in progress
  titles = [chart.title for chart in charts.draw_charts(metrics)]
  assert titles[1:] == ['loss by level, videos', 'loss by level, images']
  samples = report._load_clips(config, 'image')
  (strips, _) = report._draw_masks(config, samples, 'image')
  assert [strip.caption for strip in strips] == ['image', 'mask image']


def test_folders_of_tools_become_sections(page):
  text = page.sections['section-1']
  assert text.startswith('Probe / seed 0 A sentence too')
  assert 'pretrained random init pixels top1 0.625 0.500 0.250' in text
  assert 'per class' not in text
  assert '--share: 62.5%' in page.html
  assert 'content std' in text and 'skipped' not in text
  assert [p.shape[:2] for p in page.decode('section-1')] == [(9, 8), (60, 50)]
  assert len([i for i in page.sections if i.startswith('section')]) == 1


def test_the_quarantine_is_counted_by_reason(page):
  text = page.sections['quarantine']
  assert '32 videos could not be read' in text
  assert 'truncated: … of … s 30 file does not exist 2' in text
  assert 'The first 20' in text and text.count('.mp4') == 20


def test_nested_results_become_tables():
  tables = list(
    tabulate(
      {
        'steps': 1_000_000,
        'best': None,
        'test': {
          'a': {'top1': 1.0},
          'b': {'top1': 0.5, 'lr': 1e-4},
        },
        'grid': [{'wd': 0.1, 'ok': True}] * 50,
        'shape': [2, 3],
        'confusion': [[1, 2], [3, 4]],
      }
    )
  )
  rows = [
    [(name, list(map(format_value, cells))) for name, cells in table.rows]
    for table in tables
  ]
  assert rows[0] == [
    ('steps', ['1 000 000']),
    ('best', ['–']),
    ('shape', ['2, 3']),
  ]
  assert tables[1].title == 'test' and tables[1].columns == ['top1', 'lr']
  assert rows[1] == [('a', ['1', '–']), ('b', ['0.5', '0.0001'])]
  assert rows[2][0] == ('1', ['0.1', 'yes']) and tables[2].left_out == 10


def test_the_command_writes_into_the_run(tmp_path, capsys):
  workdir = make_workdir(tmp_path / 'run', 'low_rate')
  run_command(report, str(workdir))
  assert str(workdir / 'report.html') in capsys.readouterr().out
  assert '<!DOCTYPE html>' in (workdir / 'report.html').read_text()


# Asks a page, in a frame as narrow as a phone, what a reader would notice.
_ASK = """<!DOCTYPE html><title>?</title><iframe width=375 height=800></iframe>
<script>
const frame = document.querySelector('iframe');
frame.onload = () => {
  const page = frame.contentDocument;
  const chart = page.querySelector('.chart');
  const legend = () => chart.querySelector('.legend').innerText;
  const plot = chart.querySelector('.plot');
  plot.scrollIntoView();
  const box = plot.getBoundingClientRect();
  const before = legend();
  plot.dispatchEvent(new PointerEvent('pointermove', {
    clientX: box.left + box.width / 2, clientY: box.top + box.height / 2}));
  const answer = {
    width: page.documentElement.scrollWidth,
    broken: [...page.images].filter((i) => !i.naturalWidth).length,
    images: page.images.length,
    before, hovered: legend(),
    drawn: plot.querySelector('img').getBoundingClientRect().width,
  };
  document.body.textContent = JSON.stringify(answer);
};
frame.srcdoc = PAGE;
</script>"""


def _start_chromium(*arguments):
  with tempfile.TemporaryDirectory() as profile:
    return subprocess.run(
      [
        CHROMIUM,
        '--headless',
        '--no-sandbox',
        '--disable-gpu',
        '--disable-background-networking',
        '--no-first-run',
        f'--user-data-dir={profile}',
        *arguments,
      ],
      capture_output=True,
      text=True,
      check=True,
      timeout=120,
    ).stdout


@pytest.mark.skipif(CHROMIUM is None, reason='needs chromium on the PATH')
def test_a_browser_shows_the_page_on_a_phone_and_in_the_dark(page, tmp_path):
  # In a script a tag that ends one would end it.
  text = json.dumps(page.html).replace('</', '<\\/').replace('<!', '<\\!')
  asking = tmp_path / 'ask.html'
  asking.write_text(_ASK.replace('PAGE', text))
  dom = _start_chromium('--dump-dom', '--timeout=20000', f'file://{asking}')
  answer = json.loads(re.search(r'\{.*\}', dom)[0])
  assert answer['width'] <= 375, 'the page scrolls sideways'
  assert answer['images'] > 10 and not answer['broken']
  assert 'at step' in answer['hovered']
  assert answer['hovered'] != answer['before']
  assert answer['drawn'] > 300

  (tmp_path / 'page.html').write_text(page.html)
  brightness = []
  for scheme in (1, 0):
    picture = tmp_path / f'{scheme}.png'
    _start_chromium(
      f'--screenshot={picture}',
      '--window-size=1200,800',
      f'--blink-settings=preferredColorScheme={scheme}',
      f'file://{tmp_path}/page.html',
    )
    with Image.open(picture) as image:
      brightness.append(np.asarray(image.convert('L')))
  assert np.median(brightness[0]) > 200 > 60 > np.median(brightness[1])
  assert min(picture.std() for picture in brightness) > 10
