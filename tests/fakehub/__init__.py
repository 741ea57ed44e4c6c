"""A Hub of our own on loopback, for the real huggingface_hub client: `python -m tests.fakehub --help`.

It keeps what the Hub keeps that the client can see: history by commit, LFS objects by sha256, pull requests, private, gated,
disabled and renamed repos, tokens and their rights. Faults are made on demand (`faults.py`), and every request is logged.
"""
