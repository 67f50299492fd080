"""Makes docs/reliability.md of what `python -m vjepa_jax.bench faults` found.

python -m vjepa_jax.bench faults --json=docs/reliability.json
python docs/make_reliability.py
"""

import json
from pathlib import Path

_HERE = Path(__file__).parent
_PAGE = """# What faults do to a run

`python -m vjepa_jax.bench faults` starts runs of a toy size as a user does, on
the CPU, kills them, damages what they read, and counts how often they end as
they should:

- **Kills**: SIGKILL at a random moment, then the same command again until the
  run is at its end. Good is one whose losses and last checkpoint are those of
  a run that was left alone, to the bit.
- **Damaged clips**: of six kinds (empty, cut, noise, a web page, no header, no
  frames), 5 % of all, in one pass over them; in shards also a record of another
  form and one with zeroed bytes. Good is one that `quarantine.jsonl` names.
- **Damaged checkpoints**: the newest one truncated, without its largest file,
  garbled, or empty. Good is a run that goes on from the one before and ends as
  if nothing had happened.
- **Mistakes**: wrong flags, fields, paths and sizes. Good is one line and exit
  code 2; the worst is the slowest.
- **Shards**: a record of each is read.
- **Memory**: of a run that reads 256 clips ahead, less that of one that reads
  24; the bound is the difference of what both print.
- **Storage**: the server of a run whose videos and workdir are at gs:// is
  killed at a random moment, and there again 10 seconds later. Good is a run
  that ends as one that was left alone, to the bit. This server forgets uploads
  that are under way: a run that was in the middle of one ends with exit code 1,
  and goes on when it is started again, as the launch scripts do.

{table}

Measured on {cores} CPU cores with jax {jax}, at a load of {load}, by one run of
`python -m vjepa_jax.bench faults --json=docs/reliability.json`;
`python docs/make_reliability.py` makes this page of that.
"""


def make_page(text: str) -> str:
  """Makes the page of the JSON that the command writes."""
  figures = json.loads(text)
  machine = figures.pop('machine')
  rows = [['', 'tried', 'good', 'worst'], ['---'] * 4]
  for name, figure in figures.items():
    values = (str(figure[key]) for key in ('tried', 'good', 'worst'))
    rows.append([name, *(value.replace('|', ',') for value in values)])
  table = '\n'.join(f'| {" | ".join(row)} |' for row in rows)
  return _PAGE.format(table=table, **machine)


if __name__ == '__main__':
  content = (_HERE / 'reliability.json').read_text()
  (_HERE / 'reliability.md').write_text(make_page(content))
