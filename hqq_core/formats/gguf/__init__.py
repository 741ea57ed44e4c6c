"""Format `gguf`: ggml's block types, which llama.cpp and what is built on it read."""
