"""The error that a user can put right."""


class UserError(ValueError):
  """Something is wrong with flags, config or data, and one line says what.

  Found before anything is trained; running again does not help.
  """
