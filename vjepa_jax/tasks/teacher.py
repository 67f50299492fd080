"""The frozen teacher: an encoder of another run, whose features are predicted.

See `choose_targets` of `training/objectives`. Released weights become a teacher
by `python -m vjepa_jax.tools.convert --format=jax`.
"""

import json
from typing import Any

from absl import logging
from etils import epath
import jax
from ml_collections import ConfigDict

from vjepa_jax.errors import UserError
from vjepa_jax.interop.load import read_encoder
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.parallel import hosts
from vjepa_jax.training import checkpoint


def name_teacher(config: ConfigDict) -> str:
  """Names the field of the teacher's workdir, for what is said of it."""
  return f'config.objective.{config.objective.kind}.teacher'


def read_teacher(
  path: str, tubelet: tuple[int, int, int], field: str
) -> Encoder:
  """Rebuilds the teacher, without parameters, from what its run says of it.

  Args:
    path: Workdir of the run.
    tubelet: Of the student.
    field: See `name_teacher`.

  Raises:
    UserError: There is no such run, or it cuts clips into other tubelets than
      the student's.
  """
  try:
    teacher = read_encoder(path)
  except ValueError as error:
    raise UserError(f'{field}: {error}') from error
  # Both see the same clip: the same grid is the same tubelets.
  if tuple(teacher.tubelet) != tuple(tubelet):
    raise UserError(
      f'{field}: {path} has tubelets of {tuple(teacher.tubelet)}, '
      f'config.encoder.tubelet is {tuple(tubelet)}: tokens of one have no '
      'counterpart in the other'
    )
  return teacher


def load_teacher(
  path: str,
  field: str,
  workdir: epath.Path,
  abstract: Any,
  shardings: Any,
  *,
  resumed: bool,
) -> Any:
  """Loads the parameters of the teacher, for all of a run the same.

  The start writes to `teacher.json` which checkpoint it took, and a run that
  resumes takes that one, though its teacher may have gone on.

  Args:
    path: Workdir of the teacher's run, whose EMA encoder is taken.
    field: See `name_teacher`.
    workdir: Directory of this run.
    abstract: Shapes of the parameters.
    shardings: Where they shall go.
    resumed: This run goes on from a checkpoint of its own.

  Raises:
    UserError: The run had another teacher, or its checkpoint is gone.
  """
  record = workdir / 'teacher.json'
  if resumed and record.exists():
    used = json.loads(record.read_text())
    if used['path'] != path:
      raise UserError(
        f'{field}: {workdir} has the teacher {used["path"]}, not {path}: use '
        'another --workdir'
      )
  else:
    # Of one host for all: the teacher may be in training still.
    step = hosts.gather(str(checkpoint.read_model(path)[0]))[0]
    used = {'path': path, 'step': int(step)}
  try:
    params = checkpoint.load_item(path, abstract, shardings, step=used['step'])
  except ValueError as error:
    raise UserError(f'{field}: {error}') from error
  logging.info('teacher: step %d of %s', used['step'], path)
  if jax.process_index() == 0 and not resumed:
    workdir.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(used) + '\n')
  return params
