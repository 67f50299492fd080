"""What is damage of a checkpoint, and what is not."""

from collections.abc import Iterator
import contextlib
import gc
import re
import sys
import warnings

from etils import epath

from vjepa_jax.data import storage
from vjepa_jax.errors import UserError

# What a damaged checkpoint makes of its files. Other errors of the system, as
# that too many files are open or a handle is stale, are of the machine.
_MISSING = FileNotFoundError, IsADirectoryError, NotADirectoryError
# What storage says that fails for the moment, or lets nobody in: no damage.
_TRANSIENT = re.compile(
  'UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|'
  'PERMISSION_DENIED|UNAUTHENTICATED|Permission denied|Out of memory'
)


class CheckpointError(UserError):
  """A checkpoint that cannot be used; the message says why and what to do."""


class DamagedError(CheckpointError):
  """A checkpoint that cannot be read, and never will be."""


@contextlib.contextmanager
def explain_damage(directory: epath.Path, step: int) -> Iterator[None]:
  """Raises DamagedError, a line, for what Orbax says of what it cannot read."""
  try:
    yield
  # Orbax has no error of its own for damage: KeyError, ValueError, any.
  except Exception as error:
    causes = [error]
    while causes[-1].__cause__ or causes[-1].__context__:
      causes.append(causes[-1].__cause__ or causes[-1].__context__)
    if any(map(_is_of_the_machine, causes)):
      raise
    cause = ' '.join(str(causes[-1]).split())
    raise DamagedError(
      f'{directory}/{step} is damaged '
      f'({type(causes[-1]).__name__}: {cause[:200]})'
    ) from None


def _is_of_the_machine(error: BaseException) -> bool:
  """Says whether an error tells nothing of what was to be read."""
  # TensorStore has no types: it says what the system said as a ValueError.
  system = isinstance(error, OSError) and not isinstance(error, _MISSING)
  return (
    (system and error.errno is not None)
    or isinstance(error, MemoryError)
    or storage.is_outage(error)
    or _TRANSIENT.search(str(error)) is not None
  )


@contextlib.contextmanager
def hide_orphans() -> Iterator[None]:
  """Hides what Python says of readers that go on when one of them failed."""
  hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', RuntimeWarning)
      yield
      gc.collect()
  finally:
    sys.unraisablehook = hook
