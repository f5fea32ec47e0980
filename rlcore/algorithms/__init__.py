"""One file an algorithm: its advantages and its loss, as pure functions of tensors."""
