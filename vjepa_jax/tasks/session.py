"""What every task does between its state and its results: the run itself."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath
import jax
from jax.sharding import Mesh
from ml_collections import config_dict

from vjepa_jax.data import pipeline
from vjepa_jax.parallel import sharding
from vjepa_jax.tasks.program import check_steps
from vjepa_jax.training import loop
from vjepa_jax.training.checkpoint import Checkpoints
from vjepa_jax.training.feed import Feed, Quarantine
from vjepa_jax.training.state import TrainState
from vjepa_jax.training.step import TrainStep
from vjepa_jax.training.telemetry import Telemetry


def make_batches(
  config: config_dict.ConfigDict,
  loader: Any,
  position: int,
  *,
  weights: Sequence[float] = (1.0,),
  batch_size: int | None = None,
  whole: bool = False,
) -> Iterator[Any]:
  """Makes this host's share of the batches from a position on.

  Args:
    config: Its `data` says how many workers and threads there are.
    loader: See `pipeline.make_batches`.
    position: Samples consumed before, over all hosts.
    weights: Of the loader's sources.
    batch_size: Clips of a batch; `config.data.batch_size` if none.
    whole: Give every host the whole batches instead of its share.
  """
  process_index, process_count = jax.process_index(), jax.process_count()
  if whole:
    process_index, process_count = 0, 1
  return pipeline.make_batches(
    loader,
    weights=list(weights),
    batch_size=batch_size or config.data.batch_size,
    position=position,
    process_index=process_index,
    process_count=process_count,
    num_workers=config.data.num_workers,
    num_threads=config.data.num_threads,
  )


def run(
  config: config_dict.ConfigDict,
  workdir: epath.Path,
  state: TrainState,
  train_step: TrainStep,
  batches: Iterator[Any],
  *,
  mesh: Mesh,
  checkpoints: Checkpoints,
  position: int,
  samples_per_batch: int,
  clips_per_step: int,
  total_steps: int,
  profile_steps: tuple[int, int] | None = None,
  diagnose: Callable[..., Any] | None = None,
  diagnose_every: int = 0,
  evaluate: Callable[[TrainState], dict[str, float]] | None = None,
  evaluate_every: int = 0,
) -> TrainState | None:
  """Trains to the end; closes what it opened, and the checkpoints, always.

  Args:
    config: Says how often to log, and how many lost steps are too many.
    workdir: Directory of the run.
    state: Where it starts; donated.
    train_step: Jitted.
    batches: Of `make_batches`.
    mesh: The devices.
    checkpoints: Where states go.
    position: Samples consumed before.
    samples_per_batch: Videos of a batch, over all hosts.
    clips_per_step: Clips of a batch, over all hosts.
    total_steps: Where it ends.
    profile_steps: First and last step to trace.
    diagnose, evaluate: See `loop.train`.
    diagnose_every, evaluate_every: Steps from one to the next; 0 for never.

  Returns:
    The last state; None if the platform took the machine back.

  Raises:
    ValueError: The run is past its end, or its trace would be.
  """
  start_step = int(state.step)
  check_steps(workdir, start_step, total_steps, profile_steps)
  feed = Feed(
    batches,
    sharding.shard_batch(mesh),
    Quarantine(workdir),
    position=position,
    samples_per_batch=samples_per_batch,
  )
  telemetry = Telemetry(
    workdir,
    start_step=start_step,
    total_steps=total_steps,
    clips_per_step=clips_per_step,
  )
  try:
    with jax.set_mesh(mesh):
      return loop.train(
        state,
        train_step,
        feed,
        loop.Cadence(
          total_steps=total_steps,
          log_every=config.log_every_steps,
          diagnose_every=diagnose_every,
          evaluate_every=evaluate_every,
          max_skipped=config.max_skipped,
          profile=profile_steps,
        ),
        start_step=start_step,
        checkpoints=checkpoints,
        telemetry=telemetry,
        diagnose=diagnose,
        evaluate=evaluate,
      )
  finally:
    feed.close()
    telemetry.close()
    checkpoints.close()
