"""One module a model family, and the sources that make or unpack models offline."""
