"""Flags, words, errors, exit codes and the log, as all commands have them."""

import importlib
import logging
from pathlib import Path
import sys

from commands import run_command
import pytest

from vjepa_jax.errors import UserError
from vjepa_jax.tools import command, recipes

TOOLS = Path(command.__file__).parent


def define_flags(define):
  define.integer('number', 'A number.', 3, least=1)
  define.string('needed', 'Without a default.', required=True)


def main(options, workdir):
  return options.number


def _parse(*arguments):
  return command.parse(main, define_flags, list(arguments))


def test_flags_and_words_reach_the_command():
  options, words = _parse('one', '--needed=a', '--number=7')
  assert (options.number, options.needed, words) == (7, 'a', ['one'])
  assert _parse('one', '--needed=b')[0].number == 3  # nothing has stayed


@pytest.mark.parametrize(
  'arguments,message',
  [
    (['one'], '--needed'),
    (['--needed=a'], 'give one workdir, got none'),
    (['--needed=a', 'one', 'two'], 'give one workdir, got one, two'),
    (['--needed=a', 'one', '--number=0'], '--number=0'),
    (['--needed=a', 'one', '--nosuch=1'], "flag 'nosuch'"),
  ],
)
def test_what_is_wrong_with_a_command_line_is_named(arguments, message):
  with pytest.raises(UserError, match=message):
    _parse(*arguments)


def _fail(error, file='data/somewhere.py'):
  code = compile('def fail(error): raise error', file, 'exec')
  scope = {}
  exec(code, scope)
  return lambda: scope['fail'](error)


@pytest.mark.parametrize(
  'function,code,line',
  [
    (lambda: None, 0, ''),
    (lambda: 3, 3, ''),
    (_fail(UserError('no\n  data')), 2, 'error: no data\n'),
    (_fail(ValueError('nan')), 1, 'error: ValueError: nan\n'),
    (_fail(FileNotFoundError('no data')), 2, 'error: no data\n'),
    (
      _fail(FileNotFoundError('gone'), 'training/loop.py'),
      1,
      'error: FileNotFoundError: gone',
    ),
    (_fail(UserError('nan'), 'training/loop.py'), 2, 'error: nan'),
    (_fail(RuntimeError('gone')), 1, 'error: RuntimeError: gone\n'),
    (_fail(KeyboardInterrupt()), 1, 'error: KeyboardInterrupt'),
  ],
)
def test_errors_are_one_line_and_a_code(function, code, line, capsys, caplog):
  assert command.guard(function) == code
  error = capsys.readouterr().err
  assert error.startswith(line) and len(error.splitlines()) <= 1
  # A traceback is for who reads the log.
  assert ('Traceback' in caplog.text) == (code == 1)


@pytest.mark.parametrize(
  'name,arguments,message',
  [
    ('convert', '--from={0} --to={0}/new', 'is neither a workdir'),
    ('health', '{0}', 'holds no metrics.jsonl'),
    (
      'plan',
      '--config=configs/vjepa1.py --topology=v9:1',
      "'v9:1' is not KIND",
    ),
    ('predict', '{0} --video=a.mp4', 'is neither a workdir'),
    ('prepare', '--input=/nowhere --output={0}', '/nowhere does not exist'),
    ('report', '{0}', 'is not the directory of a run'),
  ],
)
def test_mistakes_are_one_line(name, arguments, message, tmp_path, capsys):
  module = importlib.import_module(f'vjepa_jax.tools.{name}')
  words = arguments.format(tmp_path).split()
  assert command.guard(lambda: run_command(module, *words)) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ') and message in line


def test_of_other_packages_warnings_are_logged(caplog):
  def keep(path, level):
    record = logging.LogRecord('', level, str(path), 1, '', (), None)
    return command._is_worth_telling(record)

  assert keep(TOOLS / 'train.py', logging.INFO)
  assert keep('/vjepa_jax/.venv/orbax/save.py', logging.WARNING)
  assert not keep('/vjepa_jax/.venv/orbax/save.py', logging.INFO)


def test_every_command_can_be_imported_beside_the_others(capsys, monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['vjepa', '--help'])
  with pytest.raises(SystemExit) as end:
    command.start()
  assert end.value.code == 0
  lines = capsys.readouterr().out.splitlines()
  names = [line.split()[1] for line in lines]
  assert {'train', 'prepare', 'report', 'plan'} <= set(names)
  for name in names:
    module = importlib.import_module(f'vjepa_jax.tools.{name}')
    with pytest.raises(SystemExit) as end:
      command.parse(module.main, module.define_flags, ['--help'])
    assert end.value.code == 0
    assert module.__doc__ in capsys.readouterr().out


def test_recipes_are_listed_with_the_options_that_they_have():
  text = recipes.format_recipes()
  for path in recipes.list_recipes():
    recipe = importlib.import_module(f'configs.{path.stem}')
    _, _, after = text.partition(f'configs/{path.name}')
    line = after.splitlines()[1] if '=' in after.splitlines()[1] else ''
    for part in filter(None, line.strip().split(', ')):
      name, _, values = part.partition('=')
      if values == 'PATH':
        continue
      assert recipe.get_config(f'{name}={values.split("|")[0]}') is not None
      with pytest.raises(ValueError) as error:
        recipe.get_config(f'{name}=none')
      assert sorted(values.split('|')) == sorted(
        word.strip("'")
        for word in str(error.value)[:-1].split('[')[1].split(', ')
      )


@pytest.mark.parametrize('folder', ['checkout', 'elsewhere'])
def test_recipes_are_found_without_a_checkout(folder, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = Path('configs/small.py')
  if folder == 'checkout':
    path.parent.mkdir()
    path.write_text('')
    assert recipes._find_recipe(str(path)) == str(path)
  else:
    shipped = Path(recipes._find_recipe(str(path)))
    assert shipped.is_absolute() and 'get_config' in shipped.read_text()
  with pytest.raises(UserError, match='no such file; .* configs/vjepa1.py'):
    recipes._find_recipe('configs/vjepa11.py')
