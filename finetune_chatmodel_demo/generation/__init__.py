"""Talking with a model: chat sessions, streamed replies, batches of answers. Exercised by inference.py and evaluate.py.

Importing this package imports nothing else, so that `--help` of the entry points stays quick.
"""
