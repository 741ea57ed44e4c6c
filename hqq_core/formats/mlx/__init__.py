"""Format `mlx`: what MLX reads on Apple machines (mlx-lm, LM Studio); exact, with float offsets.

One width for the whole model, or a mix of two (`mixes.py`). Layout: mlx 0.32, affine mode (`affine.py`).
"""

from __future__ import annotations

from hqq_core.formats.mlx.writer import MlxWriter

__all__ = ["MlxWriter"]
