"""What the scripts share, and what serves a tokenizer's user: each also a script, `python -m tools.NAME`."""
