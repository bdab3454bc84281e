"""Tests of downstream/, but those of detection: python -m tests.downstream."""
