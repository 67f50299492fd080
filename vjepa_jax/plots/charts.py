"""Curves as pictures, whose values the page shows under a pointer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import io
import math
from typing import Any, NamedTuple

import matplotlib
from matplotlib import figure

from vjepa_jax.plots.report import embed
from vjepa_jax.plots.training import CURVES, find_curves

# Those of report.html, which inverts pictures in the dark.
_SERIES = ('#1f6fb4', '#d9660a', '#2b8a3e', '#8250df')
_INK, _LINE = '#57606a', '#d5dae0'
_STYLE = {
  'font.size': 8,
  'axes.prop_cycle': matplotlib.cycler(color=_SERIES),
  'axes.spines.top': False,
  'axes.spines.right': False,
  'svg.fonttype': 'none',
  **dict.fromkeys(('xtick.labelcolor', 'ytick.labelcolor'), _INK),
  **dict.fromkeys(('axes.edgecolor', 'grid.color'), _LINE),
  **dict.fromkeys(('xtick.color', 'ytick.color'), _LINE),
}
# Points of a curve whose values can be read off; the curve itself has all.
_READABLE_POINTS = 400
# Beyond this ratio of largest to smallest a chart is logarithmic.
_LOG_RATIO = 1000.0
# Part of the picture that the axes fill: left, bottom, width, height.
_AREA = 0.12, 0.12, 0.85, 0.78

Points = list[tuple[float, float]]
Metrics = Sequence[Mapping[str, Any]]
Group = tuple[str, Mapping[str, str]]  # title, labels of metrics


class Chart(NamedTuple):
  """A chart for the page."""

  title: str
  uri: str  # of the picture, with its content
  legend: list[tuple[str, str]]  # label and last value of each curve
  # For the script that shows the values under a pointer: limits of the steps,
  # where the axes begin and end as shares of the width, points of each curve.
  readout: dict[str, Any]


def draw_charts(
  metrics: Metrics, groups: Iterable[Group] = CURVES
) -> Iterator[Chart]:
  """Draws the curves that there are, by default those of pretraining."""
  last_step = max((line['step'] for line in metrics), default=0)
  for title, names in groups:
    # Infinities have no place in a chart.
    curves = {
      label: finite
      for label, points in find_curves(metrics, names).items()
      if (finite := [(s, v) for s, v in points if math.isfinite(v)])
    }
    if curves:
      yield _draw_chart(title, curves, max(last_step, 1))


def group_rest(metrics: Metrics, drawn: Iterable[Group] = ()) -> list[Group]:
  """Groups metrics that change and are no copy of `drawn` ones, one a chart."""
  drawn = {name: f'drawn {name}' for _, group in drawn for name in group}
  others = {
    name: name.replace('_', ' ')
    for name in sorted(set().union(*metrics) - {'step', *drawn})
    if any(isinstance(line.get(name), int | float) for line in metrics)
  }
  # Those that are drawn come first: what is a copy of them is not found.
  curves = find_curves(metrics, drawn | others)
  return [
    (label, {name: label})
    for name, label in others.items()
    if len({value for _, value in curves.get(label, ())}) > 1
  ]


def _draw_chart(
  title: str, curves: Mapping[str, Points], last_step: float
) -> Chart:
  """Draws curves by label over steps 0 to `last_step`."""
  with matplotlib.rc_context(_STYLE):
    fig = figure.Figure(figsize=(4.2, 2.5))
    axis = fig.add_axes(_AREA)
    for points in curves.values():
      # A curve of few points is seen to be one.
      marker = 'o' if len(points) < 8 else None
      steps, values = zip(*points, strict=True)
      axis.plot(steps, values, linewidth=1.4, marker=marker, markersize=3)
    values = [v for points in curves.values() for _, v in points]
    if min(values) > 0 and max(values) > _LOG_RATIO * min(values):
      axis.set_yscale('log')
    else:
      axis.ticklabel_format(scilimits=(-2, 4))
    axis.set_xlim(-0.02 * last_step, 1.02 * last_step)
    axis.grid(linewidth=0.6)
    buffer = io.BytesIO()
    fig.savefig(buffer, format='svg', transparent=True)
  return Chart(
    title,
    embed(buffer.getvalue(), 'chart.svg', title).uri,
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
  kept = points[:-1:stride] + points[-1:]
  return [(step, float(f'{value:.4g}')) for step, value in kept]
