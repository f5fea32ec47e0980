"""Names of files in a Hugging Face model folder."""

SINGLE = "model.safetensors"  # all weights in one file
INDEX = "model.safetensors.index.json"  # or, of several, which file holds each tensor
