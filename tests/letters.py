"""A model family without a model."""

from __future__ import annotations

import torch

from rlcore.data.chat import chat
from rlcore.types import Prompt, Row


class LetterFamily:
    """Model family with one token per letter of the first message."""

    def __init__(self):
        self.encoded = 0

    def prompt_length(self, row):
        return len(row.messages[0]["content"])

    def encode(self, row):
        self.encoded += 1
        tokens = [ord(letter) for letter in row.messages[0]["content"]]
        return Prompt(row, tokens, tokens, vision={"pixel_values": torch.zeros(250)})

    def encode_all(self, row):
        return [self.encode(row)]


def letters(count):
    """Rows of 1 to `count` tokens."""
    return [Row(id=f"r:{i}", messages=chat("x" * (i + 1))) for i in range(count)]
