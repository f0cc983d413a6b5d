"""Engines: what turns prompts into greedy tokens. A small Protocol (`base`), one file each, loaded when asked for."""
