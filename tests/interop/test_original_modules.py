"""V-JEPA 1's own modules, from the package `vjepa`: the same numbers."""

import functools
import math

import numpy as np
import pytest

from vjepa_jax.interop import pytorch

torch = pytest.importorskip('torch', reason='the extra parity has torch')
_REASON = 'pip install --no-deps vjepa==0.1.2 packaging'
vit = pytest.importorskip('vjepa.models.vision_transformer', reason=_REASON)
vit_predictor = pytest.importorskip('vjepa.models.predictor', reason=_REASON)
pooler = pytest.importorskip('vjepa.models.attentive_pooler', reason=_REASON)


def _save(path, **modules):
  """Writes a checkpoint as the official code does."""
  prefixes = {'classifier': 'module.'}
  content = {
    name: {
      prefixes.get(name, 'module.backbone.') + key: value
      for key, value in module.state_dict().items()
    }
    for name, module in modules.items()
  }
  torch.save(content, path)
  return path


@pytest.mark.parametrize('frames,resolution', [(8, 32), (4, 48), (16, 24)])
def test_encoder_and_predictor(
  frames, resolution, tmp_path, randomize, check_parity
):
  options = dict(
    img_size=resolution,
    patch_size=8,
    num_frames=frames,
    tubelet_size=2,
    embed_dim=96,
    num_heads=4,
    uniform_power=True,
    norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
  )
  encoder = randomize(vit.VisionTransformer(depth=3, **options))
  predictor = randomize(
    vit_predictor.VisionTransformerPredictor(
      depth=2, predictor_embed_dim=48, use_mask_tokens=True, **options
    ),
    1,
  )
  path = _save(tmp_path / 'v1.pt', target_encoder=encoder, predictor=predictor)
  weights = pytorch.read_checkpoint(path, num_heads=4)
  assert weights.encoder.positions == 'sincos'
  assert len(weights.unused) == 2

  rng = np.random.default_rng(0)
  shape = 2, frames, resolution, resolution, 3
  video = rng.normal(size=shape).astype(np.float32)
  grid = frames // 2, resolution // 8, resolution // 8
  order = np.stack([rng.permutation(math.prod(grid)) for _ in range(2)])
  context, target = order[:, :15].copy(), order[:, 15:35].copy()
  clip = torch.from_numpy(video.transpose(0, 4, 1, 2, 3).copy())
  ids = torch.from_numpy(context), torch.from_numpy(target)
  with torch.no_grad():
    everything = encoder(clip)
    visible = encoder(clip, masks=[ids[0]])
    predicted = [predictor(visible, None, *ids, mask_index=i) for i in (0, 1)]

  label = f'grid {"x".join(map(str, grid))}'
  params = {'params': weights.encoder_params}
  actual = weights.encoder.apply(params, video)
  check_parity('V-JEPA 1', f'encoder, {label}', actual, everything)
  actual = weights.encoder.apply(params, video, context)
  name = f'encoder of visible tokens, {label}'
  check_parity('V-JEPA 1', name, actual, visible)
  params = {'params': weights.predictor_params}
  for i, expected in enumerate(predicted):
    actual = weights.predictor.apply(
      params, visible.numpy(), context, target, grid, i
    )
    name = f'predictor token {i}, {label}'
    check_parity('V-JEPA 1', name, actual, expected)


def test_attentive_probe(tmp_path, randomize, check_parity):
  probe = randomize(
    pooler.AttentiveClassifier(
      embed_dim=96, num_heads=4, depth=1, num_classes=7
    )
  )
  path = _save(tmp_path / 'probe.pt', classifier=probe)
  ((ours, params),) = pytorch.read_checkpoint(path, num_heads=4).probes
  features = np.random.default_rng(0).normal(size=(3, 20, 96)).astype('f')
  with torch.no_grad():
    expected = probe(torch.from_numpy(features))
  actual = ours.apply({'params': params}, features)
  check_parity('V-JEPA 1', 'attentive probe', actual, expected)
