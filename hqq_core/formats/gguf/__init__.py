"""Format `gguf`: one file that llama.cpp and what is built on it read (Ollama, LM Studio), and transformers.

Weights, embedding and output head are quantized to ggml's block types, each with the settings whose result a type holds exactly.
Which tensor gets which type, a file type says (`mixes.py`); the model and its tokenizer are told in keys (`metadata.py`,
`tokenizer.py`). Layout and names: llama.cpp v0.5 and the gguf library 0.19, which is loaded when it is needed.
"""

from __future__ import annotations

from hqq_core.formats.gguf.writer import GgufWriter

__all__ = ["GgufWriter"]
