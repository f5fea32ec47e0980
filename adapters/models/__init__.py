"""Model families, one module each, and sources that make or unpack models offline."""
