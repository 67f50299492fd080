"""Curves as SVG that takes its colours from the page."""

from collections.abc import Iterator, Mapping, Sequence
import io
import math
import re
from typing import Any, NamedTuple

import matplotlib
from matplotlib import figure

from vjepa_jax.plots.training import CURVES, find_curves

# Colours that stand for those of the page, which differ by day and night.
_INK, _FAINT = '#010101', '#020202'
_SERIES = ('#030303', '#040404', '#050505')
_PALETTE = {_INK: '--muted', _FAINT: '--line'} | {
  colour: f'--series-{i}' for i, colour in enumerate(_SERIES)
}
_STYLE = {
  'font.size': 8,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'svg.fonttype': 'none',
  **dict.fromkeys(('text.color', 'axes.labelcolor'), _INK),
  **dict.fromkeys(('xtick.labelcolor', 'ytick.labelcolor'), _INK),
  **dict.fromkeys(('axes.edgecolor', 'grid.color'), _FAINT),
  **dict.fromkeys(('xtick.color', 'ytick.color'), _FAINT),
}
# Points of a curve whose values can be read off; the curve itself has all.
_READABLE_POINTS = 400
_MAX_CHARTS = 12
# Beyond this ratio of largest to smallest a chart is logarithmic.
_LOG_RATIO = 1000.0
# Part of the picture that the axes fill: left, bottom, width, height.
_AREA = 0.12, 0.12, 0.85, 0.78

Points = list[tuple[float, float]]
Metrics = Sequence[Mapping[str, Any]]
Group = tuple[str, Mapping[str, str]]  # title, labels of metrics


class Chart(NamedTuple):
  """A chart for the page.

  Attributes:
    title: What it shows.
    svg: The picture, to be put into HTML as it is.
    legend: Label and last value of each curve.
    readout: For the script that shows the values under a pointer: limits of
      the steps, where the axes begin and end as shares of the width, and the
      points of each curve.
  """

  title: str
  svg: str
  legend: list[tuple[str, str]]
  readout: dict[str, Any]


def draw_charts(metrics: Metrics) -> list[Chart]:
  """Draws the curves that pretraining is watched by, those that there are."""
  return list(_draw(metrics, CURVES))


def draw_other_charts(metrics: Metrics) -> list[Chart]:
  """Draws every other metric that changes, a chart each."""
  drawn = [name for _, group in CURVES for name in group]
  return list(_draw(metrics, _group_rest(metrics, drawn)))


def draw_all_charts(metrics: Metrics, owner: str) -> list[Chart]:
  """Draws the first metrics that change of any task, a chart each.

  Args:
    metrics: Lines with a 'step'.
    owner: Whose they are: of a page's charts only one can have a name.
  """
  groups = _group_rest(metrics, [])[:_MAX_CHARTS]
  return list(_draw(metrics, groups, owner))


def _group_rest(metrics: Metrics, drawn: Sequence[str]) -> list[Group]:
  """Groups what is not drawn and no copy of it, a metric a chart."""
  others = {
    name
    for line in metrics
    for name, value in line.items()
    if isinstance(value, int | float)
  }
  labels = {
    name: name.replace('_', ' ')
    for name in sorted(others.difference(drawn, ['step']))
  }
  # Those that are drawn come first: what is a copy of them is not found.
  curves = find_curves(metrics, {x: f'drawn {x}' for x in drawn} | labels)
  return [
    (label, {name: label})
    for name, label in labels.items()
    if len({value for _, value in curves.get(label, ())}) > 1
  ]


def _draw(
  metrics: Metrics, groups: Sequence[Group], owner: str = ''
) -> Iterator[Chart]:
  last_step = max((line['step'] for line in metrics), default=0)
  for title, names in groups:
    # Infinities have no place in a chart.
    curves = {
      label: finite
      for label, points in find_curves(metrics, names).items()
      if (finite := [(s, v) for s, v in points if math.isfinite(v)])
    }
    if curves:
      yield _draw_chart(title, curves, max(last_step, 1), f'{owner} {title}')


def _draw_chart(
  title: str, curves: Mapping[str, Points], last_step: float, name: str
) -> Chart:
  """Draws curves by label over steps 0 to `last_step`; `name` is unique."""
  with matplotlib.rc_context(_STYLE | {'svg.hashsalt': name}):
    fig = figure.Figure(figsize=(4.2, 2.5))
    axis = fig.add_axes(_AREA)
    for i, points in enumerate(curves.values()):
      axis.plot(
        *zip(*points, strict=True),
        color=_SERIES[i % len(_SERIES)],
        linewidth=1.4,
        # A curve of few points is seen to be one.
        marker='o' if len(points) < 8 else None,
        markersize=3,
      )
    values = [v for points in curves.values() for _, v in points]
    if min(values) > 0 and max(values) > _LOG_RATIO * min(values):
      axis.set_yscale('log')
    else:
      axis.ticklabel_format(scilimits=(-2, 4))
    axis.set_xlim(-0.02 * last_step, 1.02 * last_step)
    axis.grid(linewidth=0.6)
    buffer = io.StringIO()
    fig.savefig(buffer, format='svg', transparent=True)
  return Chart(
    title,
    _embed(buffer.getvalue(), name),
    [(label, f'{points[-1][1]:.4g}') for label, points in curves.items()],
    {
      'limits': axis.get_xlim(),
      'area': [_AREA[0], _AREA[0] + _AREA[2]],
      'curves': [_thin_out(points) for points in curves.values()],
    },
  )


def _thin_out(points: Points) -> Points:
  """Keeps a few hundred points at even distances, and the last one."""
  stride = math.ceil(len(points) / _READABLE_POINTS)
  kept = points[::stride]
  if kept[-1] != points[-1]:
    kept.append(points[-1])
  return [(step, float(f'{value:.4g}')) for step, value in kept]


def _embed(svg: str, name: str) -> str:
  """Makes an SVG file part of a page that has others, of other names."""
  svg = svg[svg.index('<svg') :]
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
  # The page sets the size; ids are unique in it.
  svg = re.sub(r' (width|height)="[\d.]+pt"', '', svg, count=2)
  prefix = 'chart' + re.sub(r'\W+', '-', f' {name}')
  svg = re.sub(r'(\bid="|url\(#|href="#)', rf'\g<1>{prefix}-', svg)
  for colour, variable in _PALETTE.items():
    svg = svg.replace(colour, f'var({variable})')
  return svg.replace('<svg', '<svg role="img" aria-hidden="true"', 1)
