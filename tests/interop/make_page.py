"""Prints the table of parity.json and writes the page docs/parity.md."""

import json
from pathlib import Path
import sys

_HEAD = """\
# The same numbers as the published systems

Made by `bash launch/parity.sh` from what the tests in `tests/interop` measured;
float32 on a CPU, tiny models with random weights, biases and norms included.
"Relative" errors are the largest absolute difference over the root mean square
of what is expected.

References: `transformers` (VJEPA2Model, VJEPA2ForVideoClassification); the
package `vjepa` (V-JEPA 1's own modules) where it is installed; and
`tests/interop/reference.py`, `reference21.py` and `reference_ac.py`, encoders,
predictors and training loops written in torch from the papers, with the names
and shapes of the published files. No released file of V-JEPA 2.1 was at hand.

"""

_TAIL = """
## Where this code differs on purpose

- **Token counts.** Published: each batch is cut to its shortest sample. Here:
  fixed by the config, near the published means, for one compiled program that
  does not depend on the batch size.
- **Which tokens are kept.** Published: the first in raster order, which are the
  early ones, so that the context covers .66 or .40 of the clip. Here: a random
  subset; `subset='first'` keeps the first.
- **Size of a mask's blocks.** Published: one a batch. Here: one a clip, since
  the counts are fixed anyway.
- **RoPE of V-JEPA 2.** Published: frequencies tiled, pairs interleaved, which
  is no rotation. Here: the same (`rope_tiled`), or exact (`rope_interleaved`)
  for new models. The tables are float32, not bfloat16, which is up to 1.5 % off
  in a frequency.
- **Mask tokens of V-JEPA 2.** Published: ten, of which one is trained, and of
  2.1 eight. Here: one in a new model; all of a checkpoint are kept, and a file
  that is written is filled up with zeros.
- **Predictor of V-JEPA 2.1.** It was trained with positions stretched to those
  of 256 pixels, as the encoder's are; `torch.hub` builds it without. Here: as
  trained, or by `--predictor_positions=rope_interleaved` as on the hub.
- **Levels of distilled V-JEPA 2.1.** The norms of all but the last are as they
  were initialised. Here: kept, and said in a line where they are read.
- **Evaluation of V-JEPA 2.1.** The published evaluation builds the encoder of
  V-JEPA 2, without output norm, modality vectors and rescaled positions, and
  drops what does not fit. Here: the encoder that `torch.hub` loads.
- **Other sizes than in training.** V-JEPA 1 interpolates its sincos tables, and
  transformers takes positions by the configured size; here they are made for
  the grid at hand.
- **Frames at a frame rate.** Published: a step of `ceil(fps) // fps` frames.
  Here: by presentation time, right for any and for varying rates.
- **Schedules** stop at 80 % of their curves (`ipe_scale` 1.25) in both; here it
  is called `schedule_scale`.
- **Non-finite updates.** Published: skipped by the gradient scaler, while EMA
  and schedules go on. Here: the same without a scaler; they are counted, and
  20 in a row stop the run.
- **Gradients over devices.** Published: reduced in float32. Here: in bfloat16
  where compute is bfloat16, since XLA reduces in the dtype that the weights are
  cast to.
"""


def main(source: str, page: str) -> None:
  rows = json.loads(Path(source).read_text())
  lines = ['| model | quantity | error | bound |', '|---|---|---|---|']
  lines += [
    f'| {r["model"]} | {r["quantity"]} | {r["error"]:.1e} | {r["bound"]:.1e} |'
    for r in rows
  ]
  print('\n'.join(lines))
  path = Path(page)
  path.parent.mkdir(exist_ok=True)
  path.write_text(_HEAD + '\n'.join(lines) + '\n' + _TAIL)
  outside = [r for r in rows if not r['error'] <= r['bound']]
  print(f'{len(rows)} rows, {len(outside)} outside their bound')


if __name__ == '__main__':
  main(*sys.argv[1:])
