"""What all tasks share: a run, from its devices to its last step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import json
from typing import Any

from absl import logging
from etils import epath
from flax.traverse_util import flatten_dict
import jax
from ml_collections import ConfigDict

from vjepa_jax.data import pipeline, sources, storage
from vjepa_jax.data.clip import ClipOptions, adapt_options
from vjepa_jax.data.readers import open_journal
from vjepa_jax.data.streams import Stream
from vjepa_jax.errors import UserError
from vjepa_jax.parallel import hosts, sharding
from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.tasks.initial import take_over
from vjepa_jax.tasks.program import Program, check_batch, get_steps
from vjepa_jax.tasks.smoke import shrink
from vjepa_jax.training import loop
from vjepa_jax.training.checkpoint import Checkpoints, restore
from vjepa_jax.training.feed import Feed, Quarantine
from vjepa_jax.training.goodput import Goodput
from vjepa_jax.training.state import TrainState
from vjepa_jax.training.step import TrainStep
from vjepa_jax.training.telemetry import Telemetry


def prepare(config: ConfigDict, workdir: epath.PathLike) -> ConfigDict:
  """Copies a config, so that a task may complete it; shrinks it for `smoke`."""
  if config.get('smoke'):
    return shrink(config, epath.Path(workdir))
  return ConfigDict(config.to_dict())


def open_sources(data: ConfigDict) -> tuple[sources.Source, ...]:
  """Opens the sources of `config.data` or `config.image`."""
  own = ('weight', 'fps', 'frame_step', 'frames')
  return tuple(
    sources.open_source(**{k: v for k, v in source.items() if k not in own})
    for source in data.sources.values()
  )


def adapt_to_sources(
  data: ConfigDict, options: ClipOptions
) -> tuple[ClipOptions, ...]:
  """Says how each of the sources of `data` is cut."""
  every = data.sources.values()
  return tuple(adapt_options(options, source) for source in every)


class Session:
  """A run: `open` gives its state, `train` takes that to the end."""

  def __init__(
    self,
    config: ConfigDict,
    workdir: epath.PathLike,
    loader: Any,
    profile_steps: tuple[int, int] | None = None,
    image_loader: pipeline.SampleLoader | None = None,
  ):
    """Makes the mesh and counts the steps; writes nothing.

    Args:
      config: The config of the task, complete.
      workdir: Directory of the run.
      loader: See `pipeline.make_batches`.
      profile_steps: First and last step to trace.
      image_loader: Of `config.image`, where batches have images.

    Raises:
      UserError: The config does not fit together, or not the devices.
    """
    self._goodput = Goodput()
    self.workdir = epath.Path(workdir)
    self.mesh = mesh_lib.make_mesh(config.fsdp)
    num_videos = sum(len(source) for source in loader.sources)
    self.steps_per_epoch = num_videos / config.data.batch_size
    self.total_steps = get_steps(config, 'total', self.steps_per_epoch)
    self.resumed = False  # whether `open` found a checkpoint of this run
    self._config = config
    self.loader = loader  # may be replaced by one that reads the same
    # Where a probe sees several segments together, batches count videos.
    self._clips_per_step = config.data.batch_size * config.get('segments', 1)
    self._image_loader = image_loader
    self._images_per_step = config.image.batch_size if image_loader else 0
    self._profile_steps = profile_steps
    names = list(config.data.get('sources', ())) or ['train']
    self._data = _describe_data(names, loader, 'videos')
    if image_loader:
      names = [f'image.{name}' for name in config.image.sources]
      self._data |= _describe_data(names, image_loader, 'images')
    if jax.process_count() > 1:
      hosts.check_agreement({'data': self._data})
    check_batch(config, self.mesh, self._clips_per_step)
    self._check_steps(0)

  def open(
    self, program: Program, model: dict[str, Any] | None = None
  ) -> TrainState:
    """Takes the state from this run, from `config.init_from`, or makes it.

    Nothing in it is frozen yet. Each checkpoint says `model`, JSON.

    Raises:
      UserError: The run was started on another backbone, or is of another
        model.
    """
    config, shardings = self._config, program.shardings
    self._model, self._progress = model, {'samples': 0}
    with self._goodput.spend('restore'):
      restored = restore(self.workdir, program.abstract, shardings)
    self.resumed = restored is not None
    if self.resumed:
      state, self._progress = restored
      self._check_backbone(self._progress['model'], program)
      _check_data(
        self._progress['data'],
        self._data,
        int(state.step),
        config.data.changed,
      )
      self._goodput.resume(self._progress.get('seconds', {}))
      return state
    average = config.get('init_average', False)
    if average and not config.init_from:
      raise UserError(
        'config.init_average takes the average of config.init_from, which is '
        'empty: give the workdir of the stage before'
      )
    if config.get('init_from'):
      return take_over(config.init_from, program, config.seed, average)
    init = jax.jit(program.init, out_shardings=shardings.replace(frozen=None))
    return init(jax.random.key(config.seed))

  def train(
    self,
    state: TrainState,
    train_step: TrainStep,
    *,
    diagnose: Callable[..., Any] | None = None,
    diagnose_every: int = 0,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    evaluate_every: int = 0,
  ) -> TrainState | None:
    """Trains to the end; closes what was opened, always.

    Args:
      state: What `open` returned, with what is frozen; donated.
      train_step: Jitted.
      diagnose, evaluate: See `loop.train`.
      diagnose_every, evaluate_every: Steps from one to the next; 0 for never.

    Returns:
      The last state; None if the platform took the machine back.

    Raises:
      UserError: The run is past its end, or its trace would be.
    """
    config, start_step = self._config, int(state.step)
    with contextlib.ExitStack() as stack:
      self._check_steps(start_step)
      # Reading starts when all else is ready; mistakes in it are found first.
      make_feed = self._prepare_feed()
      checkpoints = Checkpoints(
        self.workdir, model=self._model, data=self._data, **config.checkpoint
      )
      stack.callback(checkpoints.close)
      write_config(self.workdir, config, start_step)
      images = f' and {self._images_per_step} images' * bool(self._image_loader)
      logging.info(
        'steps %d to %d of %d clips%s, %.1f epochs',
        start_step,
        self.total_steps,
        self._clips_per_step,
        images,
        self.total_steps / self.steps_per_epoch,
      )
      feed = make_feed()
      stack.callback(feed.close)
      telemetry = Telemetry(
        self.workdir,
        start_step=start_step,
        total_steps=self.total_steps,
        clips_per_step=self._clips_per_step,
        images_per_step=self._images_per_step,
        goodput=self._goodput,
      )
      stack.callback(telemetry.close)
      stack.enter_context(jax.set_mesh(self.mesh))
      return loop.train(
        state,
        train_step,
        feed,
        loop.Cadence(
          total_steps=self.total_steps,
          log_every=config.log_every_steps,
          diagnose_every=diagnose_every,
          evaluate_every=evaluate_every,
          max_skipped=config.max_skipped,
          profile=self._profile_steps,
        ),
        start_step=start_step,
        progress=self._progress,
        checkpoints=checkpoints,
        telemetry=telemetry,
        diagnose=diagnose,
        evaluate=evaluate,
      )

  def _prepare_feed(self) -> Callable[[], Feed]:
    """Prepares what starts to read, at the place that the run has come to."""
    progress = {'samples': self._progress['samples']}
    samples = {'samples': self._clips_per_step // self.loader.num_clips}
    if self._image_loader or 'images' in self._progress:
      progress['images'] = self._progress.get('images', 0)
      samples['images'] = self._images_per_step
    batches = self.make_batches(*progress.values())
    return lambda: Feed(
      batches,
      sharding.shard_batch(self.mesh),
      Quarantine(self.workdir),
      progress=progress,
      samples_per_batch=samples,
    )

  def make_batches(
    self, position: int, image_position: int = 0, *, whole: bool = False
  ) -> Iterator[Any]:
    """Makes this host's part of the batches, or whole ones, from a position."""
    data, image = self._config.data, self._config.get('image')
    beside = []
    if self._image_loader:
      weights = [s.weight for s in image.sources.values()]
      size = self._images_per_step
      beside = [Stream(self._image_loader, weights, size, image_position)]
    weights = [s.weight for s in data.get('sources', {}).values()]
    journal = open_journal(str(self.workdir), jax.process_index())
    return pipeline.make_batches(
      dataclasses.replace(self.loader, journal=journal),
      weights=weights or [1.0],
      batch_size=self._clips_per_step,
      position=position,
      process_index=0 if whole else jax.process_index(),
      process_count=1 if whole else jax.process_count(),
      num_workers=data.num_workers,
      num_threads=data.num_threads,
      read_ahead=data.read_ahead,
      beside=beside,
    )

  def _check_backbone(self, before: dict[str, Any], program: Program) -> None:
    """Raises UserError if a run goes on from another backbone than its own."""
    model = self._model or {}
    mark, name = model.get('fingerprint'), model.get('backbone')
    # What is trained is read once; where it is from, it may have gone on.
    read_once = (
      program.abstract.frozen is None and before.get('backbone') == name
    )
    if before.get('fingerprint', mark) != mark and not read_once:
      raise UserError(
        f'{self.workdir} was started on {before["backbone"]}, and '
        f'{name} is another backbone or another checkpoint of it: use another '
        '--workdir'
      )

  def _check_steps(self, start_step: int) -> None:
    """Raises UserError if a run is past its end, or its trace would be."""
    total_steps, profile = self.total_steps, self._profile_steps
    if start_step > total_steps:
      raise UserError(
        f'{self.workdir} is at step {start_step}, past the {total_steps} of '
        'this config: raise config.total_steps or use another --workdir'
      )
    if profile and not profile[0] < profile[1] <= total_steps:
      raise UserError(
        f'profile_steps {profile[0]}:{profile[1]} must lie within the '
        f'{total_steps} steps of the run'
      )


def write_config(
  workdir: epath.Path, config: ConfigDict, start_step: int = 0
) -> None:
  """Writes `config.json`, by one host; says what differs from the last one."""
  if jax.process_index():
    return
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / 'config.json'
  text = json.dumps(config.to_dict(), indent=2, default=str)
  if start_step and path.exists():
    try:
      before = flatten_dict(json.loads(path.read_text()), sep='.')
    except ValueError as error:
      logging.warning('%s is damaged and written anew: %s', path, error)
      before = {}
    after = flatten_dict(json.loads(text), sep='.')
    for name in sorted(before | after):
      old, new = before.get(name, 'absent'), after.get(name, 'absent')
      if old != new:
        logging.info(
          'config.%s is %s from step %d on, was %s', name, new, start_step, old
        )
  storage.replace(path, text + '\n')


def report(workdir: epath.Path, results: dict[str, Any], text: str) -> None:
  """Writes `results.json`, and prints what is said of it; by one host.

  Pictures are drawn after it: results outlive what fails there.
  """
  if jax.process_index():
    return
  path = workdir / 'results.json'
  storage.replace(path, json.dumps(results, indent=2) + '\n')
  print(f'{text}\nresults: {path}')


def _describe_data(
  names: Sequence[str], loader: Any, kind: str
) -> dict[str, str]:
  """Says of each source of a loader how many there are, and which."""
  return {
    name: f'{len(source)} {kind}, names {source.hash_names()[:12]}'
    for name, source in zip(names, loader.sources, strict=True)
  }


def _check_data(
  before: Mapping[str, str] | None,
  data: Mapping[str, str],
  step: int,
  accepted: bool,
) -> None:
  """Compares the data with that of a checkpoint, if it says.

  Raises:
    UserError: It is another, and that is not accepted.
  """
  before = before or data
  changes = [
    f'{name} was {before.get(name)} and is {data.get(name)}'
    for name in sorted({*before, *data})
    if before.get(name) != data.get(name)
  ]
  if not changes:
    return
  message = f'the data is not that of step {step}: {"; ".join(changes)}'
  if not accepted:
    raise UserError(
      f'{message}. If that is meant, --config.data.changed=True accepts it'
    )
  logging.warning('%s', message)
