"""The pinned stacks as an installed rlcore has them: `rlcore doctor` compares the machine with these files."""
