"""Names of files in a Hugging Face model folder."""

INDEX = "model.safetensors.index.json"  # where weights are in several files: which has each tensor
