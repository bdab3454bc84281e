"""Tests of downstream/detect.py, which needs torchvision: python -m tests.detection, in an environment of its own."""
