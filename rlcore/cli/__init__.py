"""The command line. Reads the run file and chooses the backend before anything heavy is imported."""
