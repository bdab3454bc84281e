"""What serves a tokenizer's user beside the nine files; each a script, `python -m tools.NAME`."""
